"""Reads a YAML file into plain values that remember their lines.

YAML is read as a small subset: mappings, lists, text, whole numbers, true and false.
Anchors, tags, several documents and deep nesting are refused, so no file can cost more than its
size, and a number is never read in a base that its author didn't mean.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.resolver import Resolver

from nsagen.core.errors import SpecError
from nsagen.core.text import printable

MAX_BYTES = 64 * 1024
MAX_DEPTH = 8
MAX_PROBLEMS = 20

Location = tuple[str | int, ...]
"""Where a value is: keys and list indices from the top, e.g. ("attention", "topk", 1)."""

_DECIMAL = re.compile(r"-?(0|[1-9][0-9]{0,17})")
_TAG = "tag:yaml.org,2002:"
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}


@dataclass(frozen=True, order=True)
class Problem:
    """One problem in a spec: the line (from 1), the key, and the rule, value and remedy."""

    line: int
    key: str
    text: str


def spec_error(name: str, problems: Iterable[Problem]) -> SpecError:
    """A file's problems as one error, one `file:line: key: text` a line, in file order."""
    lines = list(
        dict.fromkeys(
            f"{name}:{p.line}: {p.key}: {p.text}" if p.key else f"{name}:{p.line}: {p.text}"
            for p in sorted(problems)
        )
    )
    if len(lines) > MAX_PROBLEMS:
        rest = len(lines) - MAX_PROBLEMS
        lines[MAX_PROBLEMS:] = [f"{name}: and {rest} more problems; fix these first"]
    return SpecError("\n".join(map(printable, lines)))


def key_text(path: Location) -> str:
    """`attention.topk[1]` for ("attention", "topk", 1)."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
    return text.removeprefix(".")


@dataclass
class Document:
    """A YAML file's values, the line of each, and the problems in its form."""

    values: Any = None
    lines: dict[Location, int] = field(default_factory=dict)
    raw: dict[Location, str] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def known(self, path: Location) -> Location:
        """The location itself or, for the only value of a key without a list, the key's."""
        return path[:-1] if path and path[-1] == 0 and path not in self.lines else path

    def problem(self, path: Location, text: str) -> Problem:
        """A problem with a value, on its line; for a missing value, on the line of its parent."""
        path = near = self.known(path)
        while near and near not in self.lines:
            near = near[:-1]
        return Problem(self.lines.get(near, 1), key_text(path), text)


def read_text(path: Path, name: str) -> str:
    """The text of a spec file.

    Raises:
        SpecError: the file is missing, not a file, too large, or not UTF-8.
    """
    try:
        if not path.exists():
            raise SpecError(f"{name}: a spec must be a readable file; got none; fix the path")
        if not path.is_file():
            raise SpecError(f"{name}: a spec must be a regular file; got another; name a file")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except OSError as error:
        came = error.strerror or "an error"
        shown = name if len(name) <= 200 else f"{name[:60]}..."
        raise SpecError(
            f"{shown}: a spec must be a readable file; got {came}; fix the path"
        ) from None
    if len(data) > MAX_BYTES:
        raise SpecError(
            f"{name}: a spec must be at most {MAX_BYTES} bytes; got more; split it into several"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise SpecError(
            f"{name}:{line}: a spec must be UTF-8 text; got byte 0x{data[error.start]:02x} "
            f"at offset {error.start}; save the file as UTF-8"
        ) from None


def parse(text: str, name: str) -> Document:
    """Parse a spec's YAML; `problems` holds what is wrong with single values.

    Raises:
        SpecError: the text is not YAML, or not the subset that specs use.
    """
    try:
        node = _Tree(checked_events(text, name)).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        said = " ".join(filter(None, (error.context, error.problem)))
        raise SpecError(f"{name}:{line}: must be valid YAML; the parser says: {said}") from None
    except yaml.YAMLError as error:
        line = text.count("\n", 0, getattr(error, "position", 0)) + 1
        reason = getattr(error, "reason", str(error))
        raise SpecError(f"{name}:{line}: must be valid YAML; {reason}; remove it") from None
    document = Document()
    if node is None:
        raise SpecError(
            f"{name}:1: must be a mapping with name and attention; got an empty file; "
            "start from specs/tiny.yaml"
        )
    document.values = _value(node, (), document)
    return document


class _Tree(Composer, Resolver):
    """Composes nodes of events that come from elsewhere: a text is parsed once."""

    def __init__(self, events: Iterator[yaml.Event]) -> None:
        Composer.__init__(self)
        Resolver.__init__(self)
        self._events, self._next = events, next(events, None)

    def peek_event(self) -> yaml.Event | None:
        return self._next

    def check_event(self, *kinds: type[yaml.Event]) -> bool:
        return isinstance(self._next, kinds)

    def get_event(self) -> yaml.Event | None:
        event, self._next = self._next, next(self._events, None)
        return event


def checked_events(text: str, name: str, loader: Any = yaml.SafeLoader) -> Iterator[yaml.Event]:
    """The events of a text, without features that no file of the project needs.

    Raises:
        SpecError: anchors, tags, a second document or deep nesting; the text names the line.
        yaml.YAMLError: the text is not YAML.
    """
    depth = documents = 0
    for event in yaml.parse(text, Loader=loader):
        where = f"{name}:{event.start_mark.line + 1}"
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise SpecError(
                f"{where}: anchors and aliases are not allowed; "
                f"got {getattr(event, 'anchor', '')!r}; write the value out"
            )
        if getattr(event, "tag", None):
            raise SpecError(
                f"{where}: tags are not allowed; got {event.tag!r}; write the value alone"
            )
        if isinstance(event, yaml.DocumentStartEvent):
            documents += 1
            if documents > 1:
                raise SpecError(f"{where}: one document a file; got a second; split the file")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise SpecError(
                    f"{where}: at most {MAX_DEPTH} levels of nesting; got more; flatten it"
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        yield event


def _value(node: yaml.Node, path: Location, document: Document) -> Any:
    document.lines.setdefault(path, node.start_mark.line + 1)
    if isinstance(node, yaml.MappingNode):
        return _mapping(node, path, document)
    if isinstance(node, yaml.SequenceNode):
        return [_value(child, (*path, i), document) for i, child in enumerate(node.value)]
    quoted = isinstance(node, yaml.ScalarNode) and node.style in ("'", '"')
    document.raw[path] = f'"{node.value}"' if quoted else str(node.value)
    return _scalar(node)


def _mapping(node: yaml.MappingNode, path: Location, document: Document) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for key_node, value_node in node.value:
        line = key_node.start_mark.line + 1
        key = str(key_node.value)[:60] if isinstance(key_node, yaml.ScalarNode) else ""
        child = (*path, key)
        if not key:
            text = "a key must be a word; got something else; write `key: value`"
            document.problems.append(Problem(line, key_text(path), text))
        elif key in result:
            text = f"a key may occur once; it is also on line {document.lines[child]}; keep one"
            document.problems.append(Problem(line, key_text(child), text))
        else:
            document.lines[child] = line
            result[key] = _value(value_node, child, document)
            if result[key] is None:
                text = "a key needs a value; got none; write one, or remove the key"
                document.problems.append(Problem(line, key_text(child), text))
    return result


def _scalar(node: yaml.Node) -> Any:
    """Whole decimal numbers, true, false and nothing; every other scalar stays text.

    So `1e3`, `0x10`, `.nan`, `12:30`, `yes` and `2024-01-01` are text, and a rule that asks for
    a number or truth value refuses them as they were written.
    """
    text, kind = str(node.value), node.tag.removeprefix(_TAG)
    if kind == "int" and _DECIMAL.fullmatch(text):
        return int(text)
    if kind == "bool" and text in _BOOLS:
        return _BOOLS[text]
    return None if kind == "null" else text
