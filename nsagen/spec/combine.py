"""Turns a spec's lists of values into attention shapes: the cross product without exclusions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import Any

from nsagen.spec.document import Document, Problem
from nsagen.spec.schema import SpecFile
from nsagen.spec.shape import PARAMETERS, AttentionShape, violations

MAX_SHAPES = 4096
"""Most attention shapes of one spec, before `exclude`."""


def combine(
    checked: SpecFile, document: Document
) -> tuple[tuple[AttentionShape, ...], list[Problem]]:
    """The attention shapes from the lists minus those excluded, sorted, and the problems found."""
    attention = checked.attention
    values = {name: getattr(attention, name) or (0,) for name in PARAMETERS}  # 0: left out
    total = math.prod(len(listed) for listed in values.values())
    if total > MAX_SHAPES:
        rule = f"the lists may give at most {MAX_SHAPES} combinations"
        text = f"{rule}; got {total}; shorten them, or split the spec in two"
        return (), [document.problem(("attention",), text)]
    shapes = []
    for combination in itertools.product(*values.values()):
        assignment: dict[str, Any] = dict(zip(PARAMETERS, combination, strict=True))
        assignment["v_head_dim"] = assignment["v_head_dim"] or assignment["head_dim"]
        for name in ("v_compress_type", "cache_dtype"):
            assignment[name] = assignment[name] or ""
        shapes.append(AttentionShape(**assignment))
    shapes = list(dict.fromkeys(shapes))  # without an mlp, its sizes make no difference
    kept, unused = _without_excluded(shapes, checked)
    problems = [
        document.problem(
            ("exclude", i),
            "must match a combination; got one that no list makes; remove or fix it",
        )
        for i in unused
    ]
    if not kept:
        text = f"must leave at least one combination; got all {total} excluded; exclude fewer"
        problems.append(document.problem(("exclude",), text))
    if checked.branches == ("sliding",) and any(not shape.window_size for shape in kept):
        text = "one branch must be on; got sliding alone, and window_size 0; name another, too"
        problems.append(document.problem(("branches",), text))
    members = [name for shape in kept for name in shape.family_keys]
    if members and checked.branches != ("selected",):
        text = (
            "must be selected alone with the keys that make attention another member of the "
            f"family than NSA; got {', '.join(checked.branches)}, and {members[0]}; "
            "write branches: selected, or leave those keys out"
        )
        problems.append(document.problem(("branches",), text))
    problems += _broken_rules(kept, document, many=total > 1)
    return tuple(sorted(kept)), problems


def _without_excluded(
    shapes: list[AttentionShape], checked: SpecFile
) -> tuple[list[AttentionShape], list[int]]:
    """The shapes that no entry of `exclude` matches, and the entries that match none."""
    entries = [entry.model_dump(exclude_unset=True) for entry in checked.exclude]
    unused = set(range(len(entries)))
    kept = []
    for shape in shapes:
        matching = [
            i
            for i, entry in enumerate(entries)
            if all(getattr(shape, name) in allowed for name, allowed in entry.items())
        ]
        unused.difference_update(matching)
        if not matching:
            kept.append(shape)
    return kept, sorted(unused)


def _broken_rules(
    shapes: list[AttentionShape], document: Document, *, many: bool
) -> Iterator[Problem]:
    """Each combination of parameters that breaks a rule, once, in however many shapes it occurs."""
    seen = set()
    for shape in shapes:
        for broken in violations(shape):
            assignment = ", ".join(f"{name}: {getattr(shape, name)}" for name in broken.names)
            if (broken.rule, assignment) in seen:
                continue
            seen.add((broken.rule, assignment))
            exclude = f", or leave it out with `exclude: [{{{assignment}}}]`" if many else ""
            text = f"{broken.rule}; got {assignment}; {broken.remedy}{exclude}"
            yield document.problem(("attention", broken.key), text)
