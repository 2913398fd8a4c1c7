"""Which folders of tuning records a package is built with: given, remembered, or the spec's own."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from nsagen.codegen.package import RecordsPlace
from nsagen.core.errors import BuildError, InvalidInputError
from nsagen.core.packages import MANIFEST, read_manifest
from nsagen.core.paths import visible
from nsagen.spec import Spec
from nsagen.spec.load import project_records

_log = logging.getLogger("nsagen.build")


@dataclass(frozen=True)
class RecordFolders:
    """The folders of tuning records of a build.

    Attributes:
        folders: in the order of reading; one of the spec's own may be missing.
        place: what the manifest must say of them; None where the spec alone tells.
        notes: what a user must know of the choice.
    """

    folders: tuple[Path, ...]
    place: RecordsPlace | None = None
    notes: tuple[str, ...] = ()


def record_folders(
    spec: Spec,
    given: Path | None,
    package: Path,
    *,
    manifest: str = MANIFEST,
    command: str = "build",
) -> RecordFolders:
    """The folders to build with: the given one, else those of the last build, else the spec's own.

    Args:
        given: a folder of records, or the one that `nsagen tune --out` was given.
        package: the package's folder, whose manifest tells those of the last build.
        manifest: the manifest's name.
        command: that builds, for errors.

    Raises:
        InvalidInputError: `given` is not a folder of records.
        BuildError: the folder of the last build's records is gone.
    """
    shipped = () if spec.shipped_tuned is None else (spec.shipped_tuned,)
    if given is not None:
        folder = _given(given, spec.name, command)
        note = f"{folder} has no tuning records, so every kernel has its default schedule"
        notes = () if visible(folder.glob("*.yaml")) else (note,)
        if not shipped and _is_same(folder, spec.tuned_folder):
            return RecordFolders((folder,), None, notes)
        return RecordFolders((folder,), RecordsPlace(_relative(folder, package), False), notes)
    remembered = _remembered(package, manifest)
    if remembered is not None:
        folder = Path(os.path.normpath(os.path.join(os.path.realpath(package), remembered.path)))
        if not os.path.isdir(folder):
            raise BuildError(
                f"{command}: {package}: its tuning records must be where its last build found "
                f"them, {folder}; that folder is not there; bring it back, or name another with "
                "--tuned (an empty one builds without records)"
            )
        note = f"{spec.name}: with the tuning records in {folder}, as in its last build"
        notes = () if _is_same(folder, spec.tuned_folder) else (note,)
        folders = (*shipped, folder) if remembered.with_shipped else (folder,)
        return RecordFolders(folders, remembered, notes)
    if not shipped:
        return RecordFolders((spec.tuned_folder,))
    # A shipped spec's own are in a project: around the working folder or around the package.
    own = spec.tuned_folder
    if not own.is_dir():
        own = project_records(spec.name, Path(os.path.realpath(package))) or own
    place = RecordsPlace(_relative(own, package), True) if own.is_dir() else None
    return RecordFolders((*shipped, own), place)


def warn_of_dropped(
    package: Path,
    found: RecordFolders,
    used: Mapping[str, str],
    *,
    manifest: str = MANIFEST,
    command: str = "build",
) -> None:
    """Log which files of records the last build used and this one does not find."""
    was = (read_manifest(package, manifest) or {}).get("tuned")
    gone = sorted(was.keys() - used.keys()) if isinstance(was, dict) else []
    if gone:
        _log.warning(
            "%s: %s was built with the tuning records %s, which are not in %s; they do not count "
            "any more; to keep them, name their folder with --tuned",
            command,
            package,
            ", ".join(gone),
            " or ".join(map(str, found.folders)),
        )


def _given(folder: Path, name: str, command: str) -> Path:
    if not folder.is_dir():
        raise InvalidInputError(
            f"{command}: --tuned must be a folder of tuning records; got {folder}, which is "
            f"{'a file' if folder.exists() else 'not there'}; leave it out for the spec's own"
        )
    below = folder / name  # as `nsagen tune --out` writes them
    if not (below.is_dir() and visible(below.glob("*.yaml"))):
        return folder
    if visible(folder.glob("*.yaml")):
        raise InvalidInputError(
            f"{command}: --tuned must be one folder of tuning records; got {folder}, which has "
            f"some, and so has {below}; give {below}, or move the others away"
        )
    return below


def _remembered(package: Path, manifest: str) -> RecordsPlace | None:
    place = (read_manifest(package, manifest) or {}).get("records")
    if not (isinstance(place, dict) and isinstance(place.get("path"), str)):
        return None
    return RecordsPlace(place["path"], place.get("with_shipped") is True)


def _relative(folder: Path, package: Path) -> str:
    return Path(os.path.relpath(os.path.realpath(folder), os.path.realpath(package))).as_posix()


def _is_same(one: Path, other: Path) -> bool:
    return os.path.realpath(one) == os.path.realpath(other)
