"""The text of every file of an exported package."""

from __future__ import annotations

import base64
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nsagen.codegen.package import Origin, formatted, package_files
from nsagen.codegen.plan import TunedSchedule, Variant
from nsagen.codegen.template import environment, kernel_name
from nsagen.core.errors import BuildError
from nsagen.core.target import parse_target
from nsagen.core.version import __version__
from nsagen.export.sources import (
    NAMESPACE,
    STAND_INS,
    names_in_all,
    needed_modules,
    relative_path,
    source_of,
    with_relative_imports,
)
from nsagen.spec import AttentionShape, Spec

Layout = Literal["package", "kernels"]
LAYOUTS: tuple[Layout, ...] = ("package", "kernels")

ERRORS = ("InvalidInputError", "NsagenError", "UnsupportedWorkloadError")
ATTENTION = "nsagen.integrations.kernel_attention"


@dataclass(frozen=True)
class Export:
    """What to export, and how it is called.

    Attributes:
        spec: whose kernels.
        variants: the kernels of the table.
        others: those that only a device's own configurations name.
        devices: device's slug -> the schedules that were measured on it.
        origin: for headers.
        package: the name to import.
        layout: "package": a Python package with a pyproject.toml; "kernels": that of Hugging
            Face's kernels.
        release: counts the exports of a spec, from 1.
        repo_id: of the repository on the hub, "" if unknown.
    """

    spec: Spec
    variants: tuple[Variant, ...]
    others: tuple[Variant, ...]
    devices: Mapping[str, tuple[TunedSchedule, ...]]
    origin: Origin
    package: str
    layout: Layout
    release: int = 1
    repo_id: str = ""

    @property
    def distribution(self) -> str:
        """The name to install, or of the kernel."""
        return self.package.replace("_", "-")

    @property
    def backends(self) -> dict[str, list[str]]:
        """Backend of `kernels` -> its architectures, as `kernels` writes them; the CPU has none."""
        found: dict[str, list[str]] = {"cpu": []}
        for target in map(parse_target, self.spec.targets):
            if target.backend == "cuda":
                found.setdefault("cuda", []).append(f"{target.arch[:-1]}.{target.arch[-1]}")
            else:
                found.setdefault("rocm", []).append(target.arch)
        return found


def export_files(export: Export) -> dict[str, str]:
    """Path below the export's folder -> text.

    Raises:
        BuildError: a template or source cannot be read, or ruff fails.
    """
    files = _library(export)
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:8]
    more = {"README.md": _text(export, "README.md"), "LICENSE": _license()}
    if export.layout == "package":
        own = {**files, **_namespace(export, f"{export.package}_{digest}"), "py.typed": ""}
        more["pyproject.toml"] = _text(export, "pyproject.toml")
        return more | {f"{export.package}/{path}": text for path, text in own.items()}
    more["build.toml"] = _text(export, "build.toml")
    source = {**files, **_namespace(export, f"{export.package}_{digest}")}
    more |= {f"torch-ext/{export.package}/{path}": text for path, text in source.items()}
    for backend, archs in export.backends.items():
        name = f"{export.package}_{backend}_{digest}"
        built = {**files, **_namespace(export, name)}
        built["metadata.json"] = _metadata(export, name, backend, archs, built)
        more |= {f"build/torch-{backend}/{path}": text for path, text in built.items()}
    return more


def _library(export: Export) -> dict[str, str]:
    """The files that do not depend on the layout: nsagen's own, the kernels and their table."""
    made = package_files(export.variants, export.origin, export.others)
    files = {path: made[path] for path in made if path.startswith("kernels/")}
    files["dispatcher.py"] = with_relative_imports(made["dispatcher.py"], "nsagen.dispatcher")
    roots = ["nsagen.ops", "nsagen.core.errors", "nsagen.runtime.configs"]
    forms = forms_of(export.spec)
    modules = needed_modules([*roots, ATTENTION] if forms else roots)
    python: dict[str, str] = {}
    for module in modules:
        if module == NAMESPACE:
            continue
        if module in STAND_INS:
            text = _text(export, f"{STAND_INS[module]}.py")
            python[relative_path(module)] = with_relative_imports(text, module)
        else:
            mark = f"# From nsagen/{relative_path(module)} of nsagen {__version__}."
            python[relative_path(module)] = f"{export.origin.header}\n{mark}\n{source_of(module)}"
    for folder in {path.rpartition("/")[0] for path in python}:
        python.setdefault(f"{folder}/__init__.py", f"{export.origin.header}\n")
    python["__init__.py"] = with_relative_imports(_text(export, "init.py"), "nsagen.top")
    files |= formatted(python)
    return files | _configs(export)


def _namespace(export: Export, name: str) -> dict[str, str]:
    return {relative_path(NAMESPACE): _text(export, "namespace.py", namespace=name)}


def _text(export: Export, template: str, **more: Any) -> str:
    forms = forms_of(export.spec)
    ops = names_in_all("nsagen.ops")
    names = [*ERRORS, *ops, "dispatcher", "reference", *forms]
    names += ["register"] if forms else []
    names += ["flash_attn_forward", "supports_flash_attn"] if "attention" in forms else []
    try:
        return (
            environment()
            .get_template(f"export/{template}.j2")
            .render(
                header=export.origin.header,
                command=export.origin.command,
                version=__version__,
                spec_name=export.spec.name,
                targets=export.spec.targets,
                package=export.package,
                package_version=f"{__version__}.{export.release}",
                distribution=export.distribution,
                layout=export.layout,
                release=export.release,
                repo_id=export.repo_id,
                backends=sorted(export.backends),
                devices=sorted(export.devices),
                errors=ERRORS,
                ops=ops,
                forms=forms,
                names=sorted(names),
                **more,
            )
        )
    except Exception as error:
        if type(error).__module__.partition(".")[0] != "jinja2":
            raise
        raise BuildError(f"templates/export/{template}.j2: must render; {error}") from error


def _configs(export: Export) -> dict[str, str]:
    """A JSON file for each device on which schedules were measured."""
    files = {}
    for device, choices in export.devices.items():
        entries = [
            {
                "op": choice.workload.op,
                "pass": choice.workload.pass_,
                "dtype": choice.workload.dtype,
                "params": dict(choice.workload.params),
                "tokens": choice.bucket.tokens,
                "context": choice.bucket.context,
                "kernel": kernel_name(choice.workload, choice.schedule),
                "schedule": {"algorithm": choice.schedule.algorithm, **dict(choice.schedule.knobs)},
                "evidence": choice.provenance,
            }
            for choice in sorted(choices, key=lambda one: (one.workload, one.bucket.order))
        ]
        content = {"device": device, "entries": entries}
        files[f"configs/{device}.json"] = json.dumps(content, indent=1) + "\n"
    return files


def _metadata(
    export: Export, name: str, backend: str, archs: list[str], files: Mapping[str, str]
) -> str:
    """A build's metadata.json, as `kernels` reads it."""
    hashes = {
        path: base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        for path, text in sorted(files.items())
    }
    content: dict[str, Any] = {
        "id": name,
        "name": export.distribution,
        "version": export.release,
        "license": "Apache-2.0",
        "python-depends": [],
        "backend": {"type": backend, **({"archs": archs} if archs else {})},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    return json.dumps(content, indent=1) + "\n"


def forms_of(spec: Spec) -> dict[str, dict[str, Any]]:
    """Name of an attention function -> settings of `nsagen.model.forms.Form`, for each form of the
    spec that Transformers' attention interface can compute: one that has no parameters."""
    found: list[dict[str, Any]] = []
    for shape in spec.shapes:
        settings = _form_of(shape)
        if settings is not None and spec.branches == ("selected",) and settings not in found:
            found.append(settings)
    if len(found) == 1:
        return {"attention": found[0]}
    return {f"attention_b{one['block_size']}_k{one['topk']}": one for one in found}


def _form_of(shape: AttentionShape) -> dict[str, Any] | None:
    kinds = {("softmax", "sum"): "infllm_v2", ("none", "each"): "moba"}
    form = kinds.get((shape.score_norm, shape.score_heads))
    rest = (shape.scorer, shape.score_pool, shape.pool_rope, shape.lse_windows)
    if form is None or rest != ("compressed", "max", "after", 1):
        return None
    names = ("kernel_size", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks")
    sizes = {name: getattr(shape, name) for name in (*names, "dense_len")}
    return {"form": form, **sizes, "dense_decode": form == "moba"}


def _license() -> str:
    """The text of nsagen's license, of a checkout or of what is installed."""
    path = Path(__file__).resolve().parents[2] / "LICENSE"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    for file in importlib.metadata.files("nsagen") or ():
        if file.name == "LICENSE":
            return file.read_text(encoding="utf-8")
    raise BuildError("export: needs nsagen's LICENSE; found none; install nsagen again")
