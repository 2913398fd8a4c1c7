"""`load_spec`: finds a spec, checks all of it, and enumerates its shapes and workloads."""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from nsagen.core.branches import BRANCHES
from nsagen.core.errors import SpecError
from nsagen.core.files import is_file
from nsagen.core.packages import GENERATED, build_command, from_here
from nsagen.core.paths import project_roots, specs_dir, visible, working_folder
from nsagen.core.text import nearest
from nsagen.core.workload import Workload
from nsagen.spec.combine import combine
from nsagen.spec.document import parse, read_text, spec_error
from nsagen.spec.explain import schema_problems
from nsagen.spec.schema import SpecFile
from nsagen.spec.shape import AttentionShape

_log = logging.getLogger("nsagen.spec")


@dataclass(frozen=True)
class Spec:
    """A checked spec. Make it with `load_spec`.

    Attributes:
        name: of the generated package.
        description: free text; may be empty.
        passes: the passes to make kernels for, sorted.
        targets: the GPU architectures to make kernels for, as in `nsagen.core.target`, sorted.
        branches: the branches to make kernels for, in the order of a gate's columns.
        shapes: the attention shapes, sorted.
        label: what to give `nsagen build` to read this spec again: the name of a shipped spec,
            or a path from the project's root; never a path of the machine.
        sha256: hex digest of the file's text.
        tuned_folder: where this machine keeps the spec's tuning records, one file a device: beside
            the spec or, for an installed nsagen's own, in the project around the working folder.
        source: its file on this machine.
        shipped_tuned: the records that an installed nsagen ships for its own spec, if it is one.
    """

    name: str
    description: str
    passes: tuple[str, ...]
    targets: tuple[str, ...]
    branches: tuple[str, ...]
    shapes: tuple[AttentionShape, ...]
    label: str
    sha256: str
    tuned_folder: Path = field(default=Path(), compare=False)
    source: Path = field(default=Path(), compare=False)
    shipped_tuned: Path | None = field(default=None, compare=False)

    def attention_shapes(self) -> tuple[AttentionShape, ...]:
        """Every combination of the attention's values except the excluded ones, sorted."""
        return self.shapes

    def build_command(self, out: Path = GENERATED, tuned: Path | None = None) -> str:
        """What to type into a shell in the working folder to build this spec below `out`."""
        return build_command(self._from_here(), out, tuned)

    def _from_here(self) -> str:
        if "/" not in self.label and not self.label.endswith(".yaml"):
            found, _ = _find(self.label)
            if found.absolute() == self.source:
                return self.label
        return from_here(self.source)

    def workloads(self) -> tuple[Workload, ...]:
        """The workloads of all shapes and passes, each once, sorted."""
        found = {w for shape in self.shapes for w in shape.workloads(self.passes, self.branches)}
        return tuple(sorted(found))

    def topk_of(self, workload: Workload) -> int:
        """The most blocks that a shape selects whose calls need a workload; 0 if none does."""
        kinds = self.passes, self.branches
        having = (
            shape.topk
            for shape in self.shapes
            if workload in (*shape.workloads(*kinds), *shape.forced_once(*kinds))
        )
        return max(having, default=0)

    def forced_once(self) -> tuple[tuple[Workload, ...], ...]:
        """Workloads that are built together, for targets that cover all of them; see
        `AttentionShape.forced_once`."""
        found = {shape.forced_once(self.passes, self.branches) for shape in self.shapes}
        return tuple(sorted(filter(None, found)))


def load_spec(path_or_name: str | Path) -> Spec:
    """Load a spec by path, or by name: `tiny` is ./specs/tiny.yaml or else the shipped one.

    Raises:
        SpecError: no such spec, or it is invalid; one `file:line: key: rule; got; do` per problem.
    """
    path, shown = _find(path_or_name)
    text = read_text(path, shown)
    document = parse(text, shown)
    try:
        checked = SpecFile.model_validate(document.values)
    except ValidationError as error:
        reported = {p.key for p in document.problems}
        found = [p for p in schema_problems(error, document) if p.key not in reported]
        raise spec_error(shown, document.problems + found) from None
    if document.problems:
        raise spec_error(shown, document.problems)
    shapes, problems = combine(checked, document)
    if problems:
        raise spec_error(shown, problems)
    return Spec(
        name=checked.name,
        description=checked.description,
        passes=tuple(sorted(checked.passes)),
        targets=tuple(sorted(checked.targets)),
        branches=tuple(name for name in BRANCHES if name in checked.branches),
        shapes=shapes,
        label=_label(path),
        sha256=hashlib.sha256(text.encode()).hexdigest(),
        tuned_folder=_tuned_folder(path, checked.name),
        shipped_tuned=path.parent / "tuned" / checked.name if _is_packaged(path) else None,
        source=path.absolute(),
    )


def shipped_specs() -> tuple[str, ...]:
    """The names of the specs that come with nsagen, sorted."""
    return tuple(path.stem for path in visible(specs_dir().glob("*.yaml")))


def _find(path_or_name: str | Path) -> tuple[Path, str]:
    text = str(path_or_name)
    path = Path(path_or_name)
    is_name = isinstance(path_or_name, str) and path.name == text and not path.suffix
    _check_printable(text)
    if not is_name or is_file(path):
        return (path if is_file(path) else _below_a_root(path) or path), text
    shipped, own = specs_dir() / f"{text}.yaml", Path("specs", f"{text}.yaml")
    found = own if is_file(own) else _below_a_root(own) or shipped
    if is_file(found):
        if found is not shipped and is_file(shipped) and not found.samefile(shipped):
            _log.info("spec %s: %s, not the shipped one", text, found)
        if found is shipped:
            _note_passed_over(text, shipped)
        return found, f"specs/{found.name}"
    remedy = nearest(text, shipped_specs(), "give a name of these or a path to a .yaml")
    raise SpecError(
        f"spec: must be a file, or one of {', '.join(shipped_specs())}, or in ./specs; "
        f"got {text[:60]!r}; {remedy}"
    )


def _note_passed_over(name: str, shipped: Path) -> None:
    """Say that a spec of a folder above goes unused, as nothing marks that folder as a project."""
    here = working_folder()
    for folder in here.parents:
        other = folder / "specs" / f"{name}.yaml"
        if is_file(other) and not other.samefile(shipped):
            _log.info(
                "spec %s: the shipped one, not %s, as %s is no project's root (it has no .git and "
                "no pyproject.toml); to use that one, give its path",
                name,
                other,
                folder,
            )
            return


def _is_packaged(path: Path) -> bool:
    """Whether a spec lies in an installed package, which must not hold a user's records."""
    return specs_dir().name == "_specs" and path.resolve().parent == specs_dir().resolve()


def _tuned_folder(path: Path, name: str) -> Path:
    if not _is_packaged(path):
        return path.parent / "tuned" / name
    here = working_folder()
    own, root = here / "specs" / "tuned" / name, next(project_roots(here / path.name), here)
    if own.is_dir():
        return own
    return project_records(name, here / path.name) or root / "specs" / "tuned" / name


def project_records(name: str, path: Path) -> Path | None:
    """The folder of a spec's tuning records in a project around a path, if it is there."""
    places = (root / "specs" / "tuned" / name for root in project_roots(path))
    return next((place for place in places if place.is_dir()), None)


def _label(given: Path) -> str:
    path = given.resolve()
    if path.parent == specs_dir().resolve():
        return path.stem
    root = next(project_roots(path), None)
    if root is not None:
        label = path.relative_to(root).as_posix()
    elif path.parent.name == "specs":  # of a project without any other mark
        label = f"specs/{path.name}"
    else:
        label = path.name if given.is_absolute() else given.as_posix()
    _check_printable(label)
    return label


def _below_a_root(path: Path) -> Path | None:
    """The file that a path means from the root of a project around the working folder."""
    if path.is_absolute():
        return None
    roots = project_roots(working_folder() / path.name)
    return next((root / path for root in roots if is_file(root / path)), None)


def _check_printable(path: str) -> None:
    """A path is shown in comments of generated files: a line break in it could end one."""
    if not path.isprintable():
        raise SpecError(f"spec: a path must be printable text; got {path[:60]!a}; rename it")
