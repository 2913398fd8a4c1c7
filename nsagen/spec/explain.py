"""Turns pydantic's findings into problems that a person can act on.

The rule in a problem's text comes from the JSON Schema, so the check, the editor's completion
and the message cannot disagree.
"""

from __future__ import annotations

import functools
import keyword
import re
from collections.abc import Iterator, Sequence
from typing import Any

from pydantic import ValidationError

from nsagen.core.text import nearest
from nsagen.spec.document import Document, Location, Problem
from nsagen.spec.schema import json_schema

_ALIASES = {
    "fp16": "float16",
    "half": "float16",
    "f16": "float16",
    "bf16": "bfloat16",
    "fp32": "float32",
    "f32": "float32",
    "float": "float32",
    "mean": "avgpool",
    "weighted": "weightedpool",
}
_TRUTH = {"yes": "true", "on": "true", "y": "true", "no": "false", "off": "false", "n": "false"}


def schema_problems(error: ValidationError, document: Document) -> Iterator[Problem]:
    """One problem for each value that breaks the schema."""
    for item in error.errors(include_url=False, include_context=False):
        location: Location = tuple(item["loc"])
        match item["type"]:
            case "missing":
                yield _missing(location, document)
            case "extra_forbidden":
                yield _unknown(location, document)
            case "value_error":
                yield document.problem(location, item["msg"].removeprefix("Value error, "))
            case "too_short" if item["input"]:
                pass  # it counts the good values of a list whose bad ones have their own problem
            case _:
                yield document.problem(location, _wrong_value(location, item["input"], document))


def _any_of(known: Sequence[str]) -> str:
    return f"choose from {', '.join(known)}"


def shown(location: Location, value: Any, document: Document) -> str:
    """A value as the author wrote it, cut to one line."""
    if isinstance(value, dict):
        return "a mapping"
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}" if value else "an empty list"
    if value is None:
        return "nothing"
    text = document.raw.get(document.known(location), repr(value))
    text = " ".join(text.split()) if text.strip() else repr(text)
    return text if len(text) <= 60 else text[:57] + "..."


def _missing(location: Location, document: Document) -> Problem:
    schema = _schema_at(location)
    meaning = schema.get("description", "")
    text = f"this key is required; got none; add {location[-1]} ({meaning})"
    return document.problem(location, text)


def _unknown(location: Location, document: Document) -> Problem:
    known = list(_schema_at(location[:-1]).get("properties", {}))
    return document.problem(
        location,
        f"only known keys are allowed; got {str(location[-1])[:60]!r}; "
        f"{nearest(str(location[-1]), known, _any_of(known))}",
    )


def _wrong_value(location: Location, value: Any, document: Document) -> str:
    schema = _schema_at(location)
    got = shown(location, value, document)
    if isinstance(value, (list, tuple)) and "anyOf" in schema:
        most = next(part for part in schema["anyOf"] if "items" in part).get("maxItems")
        return f"must be one value or a list of 1 to {most}; got {got}; fix the list"
    one = schema["anyOf"][0] if "anyOf" in schema else schema
    return f"must be {_rule(one)}; got {got}; {_remedy(one, value)}"


def _rule(schema: dict[str, Any]) -> str:
    if "enum" in schema:
        return f"one of {', '.join(map(str, schema['enum']))}"
    match schema.get("type"):
        case "integer" if "minimum" in schema:
            step = schema.get("multipleOf")
            rest = f" that is a multiple of {step}" if step else ""
            return f"a whole number from {schema['minimum']} to {schema['maximum']}{rest}"
        case "integer":
            return "a whole number"
        case "boolean":
            return "true or false"
        case "array":
            return f"a list of at most {schema['maxItems']} mappings"
        case "object":
            return f"a mapping with the keys {', '.join(schema['properties'])}"
    limit = f"text of at most {schema['maxLength']} characters"
    if "pattern" in schema:
        limit += " that begins with a letter a-z and goes on with a-z, 0-9 and _"
    return limit


def _remedy(schema: dict[str, Any], value: Any) -> str:
    if "enum" in schema and isinstance(value, str):
        alias = _ALIASES.get(value.lower())
        if alias in schema["enum"]:
            return f"did you mean {alias!r}?"
        known = [str(one) for one in schema["enum"]]
        return nearest(value, known, _any_of(known))
    if "enum" in schema:
        return "choose one of these"
    if schema.get("type") == "boolean" and str(value).lower() in _TRUTH:
        return f"write {_TRUTH[str(value).lower()]}"
    if schema.get("type") == "integer":
        return _number_remedy(schema, value)
    if "pattern" in schema and isinstance(value, str):
        word = re.sub(r"[^a-z0-9_]+", "_", value.lower()).strip("_")[:40]
        word += "_kernels" if keyword.iskeyword(word) else ""
        return f"write {word!r}" if re.match(schema["pattern"], word) else "choose such a name"
    return "fix it"


def _number_remedy(schema: dict[str, Any], value: Any) -> str:
    if isinstance(value, str) and value.isascii() and value.isdigit() and value[0] != "0":
        return "write it without quotes" if len(value) < 19 else "write a smaller one"
    if isinstance(value, bool) or not isinstance(value, int):
        return "write it in plain digits, such as 16"
    low, high, step = schema["minimum"], schema["maximum"], schema.get("multipleOf", 1)
    if not low <= value <= high:
        return f"the nearest is {min(max(value, low), high)}"
    return f"the nearest are {value // step * step} and {-(-value // step) * step}"


@functools.cache
def _schema() -> dict[str, Any]:
    return json_schema()


def _schema_at(location: Location) -> dict[str, Any]:
    """The JSON Schema of the value at a location; inside a list, of the list's items."""
    node = _schema()
    for part in location:
        node = _resolved(node)
        if isinstance(part, int):
            lists = [node, *node.get("anyOf", ())]
            node = next((part["items"] for part in lists if "items" in part), {})
        else:
            node = node.get("properties", {}).get(part, {})
    return _resolved(node)


def _resolved(node: dict[str, Any]) -> dict[str, Any]:
    name = node.get("$ref", "").rpartition("/")[2]
    return {**_schema()["$defs"][name], **node} if name else node
