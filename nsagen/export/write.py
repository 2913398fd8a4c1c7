"""Writes an exported package, into a folder that is new or nsagen's."""

from __future__ import annotations

import json
import keyword
import re
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from nsagen.codegen.build import choose_variants, write_package
from nsagen.codegen.package import Origin, sha256
from nsagen.codegen.plan import Variant, plan_variants
from nsagen.codegen.record_folders import record_folders, warn_of_dropped
from nsagen.codegen.tuned import Tuned
from nsagen.core.errors import InvalidInputError
from nsagen.core.text import nearest
from nsagen.core.version import __version__
from nsagen.export.files import LAYOUTS, Export, Layout, export_files
from nsagen.spec import Spec

MANIFEST = "export.json"
"""Lists the files that nsagen wrote; a built package has another, so that neither is taken for the
other."""


@dataclass(frozen=True)
class ExportResult:
    """The result of an export.

    Attributes:
        folder: the package's folder.
        package: the name to import.
        kernels: the number of kernels.
        written: changed files, relative to the folder.
        removed: files that no longer belong to the package.
        notes: what a user must know, such as outdated tuning records.
    """

    folder: Path
    package: str
    kernels: int
    written: tuple[str, ...]
    removed: tuple[str, ...]
    notes: tuple[str, ...]


def export(
    spec: Spec,
    out_dir: Path,
    *,
    layout: Layout = "package",
    name: str | None = None,
    release: int = 1,
    repo_id: str = "",
    tuned: Path | None = None,
) -> ExportResult:
    """Write the kernels of `spec`, and what runs them, into `out_dir/<name>`.

    Args:
        layout: "package": a Python package; "kernels": that of Hugging Face's kernels.
        name: to import; nsagen_<the spec's name> by default.
        release: counts the exports of a spec, from 1: the kernel's version, and the end of the
            package's.
        repo_id: "org/name" on the hub, for the layout of kernels.
        tuned: folder of tuning records; by default the spec's own.

    Raises:
        InvalidInputError: an argument breaks the rules above.
        BuildError: the folder has files of the user's, or cannot be written.
    """
    package = name or f"nsagen_{spec.name}"
    _check(layout, package, release, repo_id)
    of_export: dict[str, str] = {"manifest": MANIFEST, "command": "export"}
    folders = record_folders(spec, tuned, out_dir / package, **of_export)
    variants, found = choose_variants(spec, folders)
    warn_of_dropped(out_dir / package, folders, dict(found.hashes), **of_export)
    others = _only_of_devices(variants, found)
    options = ["--layout", layout] if layout != "package" else []
    options += ["--name", name] if name else []
    options += ["--release", str(release)] if release != 1 else []
    options += ["--repo-id", repo_id] if repo_id else []
    origin = Origin(
        spec.name, spec.label, spec.sha256, found.hashes, verb="export", options=tuple(options)
    )
    more = (found.devices, origin, package, layout, release, repo_id)
    files = export_files(Export(spec, variants, others, *more))
    manifest = {
        "nsagen": __version__,
        "command": origin.command,
        "layout": layout,
        "spec": {"name": spec.name, "sha256": spec.sha256},
        "tuned": dict(origin.tuned),
        **({} if folders.place is None else {"records": asdict(folders.place)}),
        "files": {path: sha256(text) for path, text in sorted(files.items())},
        "variants": {v.name: list(v.targets) for v in (*variants, *others)},
    }
    text = json.dumps(manifest, indent=1) + "\n"
    written, removed = write_package(
        out_dir, package, files, lambda: text, manifest_name=MANIFEST, command="export"
    )
    count = len(variants) + len(others)
    return ExportResult(out_dir / package, package, count, written, removed, found.notes)


def _only_of_devices(variants: tuple[Variant, ...], tuned: Tuned) -> tuple[Variant, ...]:
    """The kernels that were fastest on a device, and that its architecture's table lacks."""
    found: dict[str, Variant] = {}
    for choices in tuned.devices.values():
        targets = sorted({choice.target for choice in choices})
        for variant in plan_variants({choice.workload for choice in choices}, targets, choices):
            if any(variant.measured(target) for target in targets):
                found.setdefault(variant.name, variant)
    for variant in variants:
        found.pop(variant.name, None)
    return tuple(found[name] for name in sorted(found))


def _check(layout: str, package: str, release: int, repo_id: str) -> None:
    if layout not in LAYOUTS:
        raise InvalidInputError(
            f"export: --layout must be one of {', '.join(LAYOUTS)}; got {layout!r}; "
            f"{nearest(layout, LAYOUTS)}"
        )
    if not re.fullmatch(r"[a-z][a-z0-9_]*[a-z0-9]", package) or keyword.iskeyword(package):
        raise InvalidInputError(
            "export: --name must be at least two lower-case letters, digits and _, the first a "
            "letter, the last no _, and no keyword of Python; "
            f"got {package!r}; such as nsagen_mine"
        )
    if package in ("nsagen", "torch", "triton", "numpy") or package in sys.stdlib_module_names:
        raise InvalidInputError(
            f"export: --name must be the package's own; got {package!r}, which is another; "
            "such as nsagen_mine"
        )
    if release < 1:
        raise InvalidInputError(
            f"export: --release must be at least 1; got {release}; leave it out for the first"
        )
    if repo_id and layout != "kernels":
        raise InvalidInputError(
            f"export: --repo-id is for --layout kernels; got {repo_id!r}; leave it out"
        )
    if repo_id and not re.fullmatch(r"[\w.-]+/[\w.-]+", repo_id):
        raise InvalidInputError(
            f"export: --repo-id must be organization/name; got {repo_id!r}; such as mine/attention"
        )
