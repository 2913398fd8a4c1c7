"""`nsagen build`: renders a spec's package, writes it safely, and tells whether one is stale."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nsagen.codegen.owned import (
    NOTES,
    check_free,
    edited_files,
    intact_files,
    note_files,
    own_files,
    python_files,
    replaceable,
    unlisted_kernels,
)
from nsagen.codegen.package import (
    VARIANT_KEYS,
    Origin,
    manifest_text,
    package_files,
    variant_header,
)
from nsagen.codegen.plan import DEFAULT_PROVENANCE, Use, Variant, plan_variants
from nsagen.codegen.record_folders import RecordFolders, record_folders, warn_of_dropped
from nsagen.codegen.template import default_schedule, is_offered, kernel_name, render
from nsagen.codegen.tuned import Tuned, tuned_schedules
from nsagen.core.bucket import Bucket
from nsagen.core.compiler import compiler_name
from nsagen.core.errors import BuildError
from nsagen.core.files import TEMPORARY, lock_path, locked, replace_file, sealed
from nsagen.core.packages import MANIFEST, read_manifest, recorded_path
from nsagen.core.releases import installed_release
from nsagen.core.target import Target, parse_target
from nsagen.core.text import shown_keys
from nsagen.core.version import __version__
from nsagen.core.workload import Workload
from nsagen.spec import Spec

ResourceRows = dict[str, list[dict[str, Any]]]
"""Variant name -> one dict per kernel and target: what the kernel uses there."""

_log = logging.getLogger("nsagen.build")

_KEYS = frozenset({"command", "files", "layout", "nsagen", "records", "spec", "tuned", "variants"})
"""Of the manifests that this version writes, of builds and of exports."""

_NAMED = 4
"""Most files that a text names."""

Compile = Callable[[Path, tuple[Variant, ...]], ResourceRows]
"""Compiles the variants whose files are in a folder."""


@dataclass(frozen=True)
class BuildResult:
    """The result of a build.

    Attributes:
        folder: the package's folder.
        variants: the kernels, sorted by name.
        written: changed files, relative to the folder.
        removed: files that no longer belong to the package.
        resources: of the kernels; empty if they were not compiled.
        notes: what a user must know, such as tuning records that a template change outdated.
    """

    folder: Path
    variants: tuple[Variant, ...]
    written: tuple[str, ...]
    removed: tuple[str, ...]
    resources: ResourceRows
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Stale:
    """A file of a generated package that differs from what a build would write.

    Attributes:
        path: relative to the package's folder.
        state: "missing", "edited" by hand, "outdated" or "orphaned".
        why: what changed since the build, such as "the spec"; empty for a file edited by hand.
        in_the_way: whether a build refuses to replace it, as nothing says that nsagen wrote it.
    """

    path: str
    state: str
    why: str = ""
    in_the_way: bool = False


def build(
    spec: Spec,
    out_dir: Path,
    *,
    tuned: Path | None = None,
    compile_all: Compile | None = None,
) -> BuildResult:
    """Render `spec` into `out_dir/<name>`; with `compile_all`, compile every variant too.

    Files whose text is unchanged are not touched. Each file is replaced in one step, kernels
    before the table that names them, so a reader never imports half a package.

    Args:
        tuned: folder of tuning records; by default those of the package's last build, or else
            the spec's own.
        compile_all: compiles the variants, such as `nsagen.aot.variants.compile_variants`; by
            default nothing is compiled, and what an earlier build measured is kept.

    Raises:
        InvalidInputError: `tuned` is not a folder of records.
        BuildError: the last build's records are gone, a template fails, a compiled variant must
            not ship, or a file cannot be written; the text names which.
    """
    folder = out_dir / spec.name
    plan = _render(spec, tuned, folder)
    variants, files = plan.variants, plan.files
    resources: ResourceRows = {}

    def manifest() -> str:
        kept, tritons = _kept_resources(folder, variants)
        resources.update(kept)
        if compile_all:
            compiled = compile_all(folder / "kernels", variants)
            resources.update(compiled)
            tritons |= dict.fromkeys(compiled, compiler_name())
        return manifest_text(variants, plan.origin, files, resources, tritons)

    written, removed = write_package(out_dir, spec.name, files, manifest)
    notes = (*plan.notes, *_left_alone(folder, files))
    return BuildResult(folder, variants, written, removed, resources, notes)


def write_package(
    out_dir: Path,
    name: str,
    files: dict[str, str],
    manifest: Callable[[], str],
    *,
    manifest_name: str = MANIFEST,
    command: str = "build",
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Write a package's files into `out_dir/<name>`, kernels first and the manifest last.

    Files whose text is unchanged are not touched; those that an earlier manifest lists and this
    package lacks are removed unless they were edited; others are left alone.

    Args:
        manifest: makes the manifest's text once the files are there.
        command: that writes, for errors.

    Returns:
        the paths that were written, and those that were removed, relative to the folder.

    Raises:
        BuildError: the folder has files of the user's, or cannot be written.
    """
    folder, lock = out_dir / name, lock_path(out_dir, name)
    more = (manifest_name, command)
    with _writing(folder, command):
        try:
            check_free(folder, files, *more)  # before writing a lock file
        except BuildError:
            if not lock.exists():  # otherwise another build is at it
                check_free(folder, files, *more)  # it may have been, a moment ago
    with _writing(folder, command), locked(out_dir, name):
        check_free(folder, files, *more)
        _say_unread(folder, manifest_name)
        for path in edited_files(folder, files, manifest_name):
            _log.warning("%s: %s was edited; it is written again", command, folder / path)
        removed = _orphans(folder, files, manifest_name)
        if removed or any(_differs(folder / path, files[path]) for path in files):
            note_files(folder, files, manifest_name)
        written = [path for path in _write_order(files) if replace_file(folder / path, files[path])]
        if replace_file(folder / manifest_name, manifest()):
            written.append(manifest_name)
        removed += _left_by_a_kill(folder)
        for path in (*removed, NOTES):
            (folder / path).unlink(missing_ok=True)
        _prune(folder, removed)
    return tuple(written), tuple(removed)


def check(spec: Spec, out_dir: Path, *, tuned: Path | None = None) -> list[Stale]:
    """Each file of `out_dir/<name>` that differs from what `build` would write now."""
    folder = out_dir / spec.name
    plan = _render(spec, tuned, folder)
    files = plan.files
    kept, tritons = _kept_resources(folder, plan.variants)
    manifest = manifest_text(plan.variants, plan.origin, files, kept, tritons)
    known = read_manifest(folder) or {"files": {}}
    listed, why = known["files"], _changed_inputs(known, plan.origin)
    intact = intact_files(folder, listed)

    def cause(path: str, was_listed: bool) -> str:
        return (why or "a template") if (path in listed) is was_listed else ""

    _say_unread(folder)
    stale = []
    is_known = not (folder / MANIFEST).is_file() or bool(listed)
    free = replaceable(folder, files)
    for path, text in sorted({**files, MANIFEST: manifest}.items()):
        if not (folder / path).is_file():
            stale.append(Stale(path, "missing", cause(path, False) if listed else ""))
        elif not _differs(folder / path, text):
            continue
        elif (
            path in intact
            or not isinstance(listed.get(path, ""), str)  # a later version's way to list a file
            or (path == MANIFEST and is_known and (why or stale))
        ):
            stale.append(Stale(path, "outdated", why or "a template"))
        else:
            stale.append(Stale(path, "edited", in_the_way=path not in free))
    orphans = _orphans(folder, files)
    return stale + [Stale(path, "orphaned", cause(path, True)) for path in orphans]


def way_to_fresh(stale: Sequence[Stale], folder: Path, command: str) -> str:
    """What brings a stale package up to date: the command, and first what it would refuse."""
    names = [str(folder / one.path) for one in stale if one.in_the_way]
    if not names:
        return f"run: {command}"
    moved = ", ".join(names) if len(names) <= _NAMED else str(folder)
    return f"move {moved} away, as nothing says that nsagen wrote it; then run: {command}"


def _say_unread(folder: Path, manifest: str = MANIFEST) -> None:
    """Log what a later version's manifest says in a way that is unknown here."""
    known = read_manifest(folder, manifest) or {"files": {}}
    of_variants = (entry for entry in known.get("variants", {}).values() if isinstance(entry, dict))
    unknown = known.keys() - _KEYS
    if unknown := unknown | {key for entry in of_variants for key in entry.keys() - VARIANT_KEYS}:
        _log.warning(
            "%s: nsagen %s wrote %s, which is not understood here; a build leaves it out",
            folder / manifest,
            known["nsagen"],
            shown_keys(unknown),
        )
    if unread := sum(not isinstance(was, str) for was in known["files"].values()):
        _log.warning(
            "%s: nsagen %s lists %d files in a way that cannot be read here; "
            "a build keeps those that it does not write",
            folder / manifest,
            known["nsagen"],
            unread,
        )


def _changed_inputs(manifest: Mapping[str, Any], origin: Origin) -> str:
    """Which of a package's recorded inputs are others now; a template is recorded by no hash."""
    spec = manifest.get("spec")
    was = {
        "the spec": spec.get("sha256") if isinstance(spec, dict) else None,
        "a tuning record": manifest.get("tuned"),
        "nsagen's version": manifest.get("nsagen"),
    }
    now = {
        "the spec": origin.spec_sha256,
        "a tuning record": dict(origin.tuned),
        "nsagen's version": __version__,
    }
    return " and ".join(name for name in now if was[name] not in (None, now[name]))


def is_offered_here(workload: Workload, target: Target) -> bool:
    """Whether an algorithm is preferred for a workload on a target, with the installed Triton."""
    return is_offered(workload, target, installed_release())


def build_variant(workload: Workload, target: str, out_dir: Path) -> Path:
    """Render one workload with its target's default schedule to `out_dir/<name>.py`.

    It is for this machine: the default is chosen among algorithms that the installed Triton runs.

    Safe under concurrent calls: the file appears whole or not at all.
    """
    schedule = default_schedule(workload, parse_target(target), installed_release())
    use = Use(target, Bucket(), DEFAULT_PROVENANCE)
    variant = Variant(kernel_name(workload, schedule), workload, schedule, (use,))
    path = out_dir / f"{variant.name}.py"
    origin = Origin("user cache", "(built when a call needed it)", "")
    replace_file(path, sealed(render(workload, schedule, variant_header(variant, origin))))
    return path


@dataclass(frozen=True)
class _Plan:
    """What a build would write: its variants and the text of each file but the manifest."""

    variants: tuple[Variant, ...]
    origin: Origin
    files: dict[str, str]
    notes: tuple[str, ...]


def choose_variants(spec: Spec, folders: RecordFolders) -> tuple[tuple[Variant, ...], Tuned]:
    """The kernels of a spec's package, and the tuning records that chose them."""
    workloads, together = spec.workloads(), spec.forced_once()
    every = (*workloads, *itertools.chain(*together))
    tuned = tuned_schedules(folders.folders, every, spec.targets)
    tuned = replace(tuned, notes=(*folders.notes, *tuned.notes))
    return plan_variants(workloads, spec.targets, tuned.choices, together), tuned


def _render(spec: Spec, records: Path | None, folder: Path) -> _Plan:
    folders = record_folders(spec, records, folder)
    variants, tuned = choose_variants(spec, folders)
    warn_of_dropped(folder, folders, dict(tuned.hashes))
    place = recorded_path(folder, spec.label, spec.source)
    origin = Origin(spec.name, spec.label, spec.sha256, tuned.hashes, place, folders.place)
    return _Plan(variants, origin, package_files(variants, origin), tuned.notes)


def _kept_resources(
    folder: Path, variants: tuple[Variant, ...]
) -> tuple[ResourceRows, dict[str, str]]:
    """What an earlier build measured for unchanged variants, and their Triton versions."""
    manifest = read_manifest(folder)
    known = {} if manifest is None else manifest["variants"]
    kept: ResourceRows = {}
    tritons: dict[str, str] = {}
    for variant in variants:
        entry = known.get(variant.name)
        if isinstance(entry, dict) and _are_resources(entry.get("resources"), variant):
            kept[variant.name] = entry["resources"]
            if isinstance(entry.get("triton"), str):
                tritons[variant.name] = entry["triton"]
    return kept, tritons


def _are_resources(rows: Any, variant: Variant) -> bool:
    """Whether a manifest's rows look like the output of `compile_variants` for the variant."""
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and isinstance(row.get("kernel"), str)
        and row.get("target") in variant.targets
        and {type(value) for value in row.values()} <= {str, int}
        for row in rows
    )


def _write_order(files: dict[str, str]) -> list[str]:
    return sorted(files, key=lambda path: ("kernels" not in path.split("/"), path))


def _orphans(folder: Path, files: dict[str, str], manifest: str = MANIFEST) -> list[str]:
    """Files that an earlier build wrote and this one does not."""
    own = own_files(folder, manifest)
    if manifest == MANIFEST:
        own |= unlisted_kernels(folder)
    return sorted(own - files.keys())


def _differs(path: Path, text: str) -> bool:
    return not path.is_file() or path.read_bytes() != text.encode()


def _left_by_a_kill(folder: Path) -> list[str]:
    """Temporary files of killed builds; nothing else writes while the lock is held."""
    return sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob(TEMPORARY)
        if path.is_file() and not path.is_symlink()
    )


def _prune(folder: Path, removed: Iterable[str]) -> None:
    """Remove the folders that have become empty."""
    for path in removed:
        for parent in Path(path).parents[:-1]:
            with contextlib.suppress(OSError):  # not empty
                (folder / parent).rmdir()


def _left_alone(folder: Path, files: dict[str, str]) -> list[str]:
    """A note on Python files in the package's folder that belong to the user."""
    others = sorted(set(python_files(folder)) - files.keys())
    shown = f"{folder}: left {', '.join(others)} alone, which nsagen did not write or was edited"
    return [shown] if others else []


@contextmanager
def _writing(folder: Path, command: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        place = error.filename2 or error.filename or folder
        raise BuildError(
            f"{command}: must be able to write {folder}; got {error.strerror or error}: {place}; "
            f"fix that or choose another --out, then {command} again: what is there stays usable "
            f"or refuses to import, and the next {command} completes it"
        ) from error
