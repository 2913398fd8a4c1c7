"""`nsagen inspect --html`: a spec's kernels, and what its attention sees."""

from __future__ import annotations

import tempfile
from html import escape
from pathlib import Path

from nsagen.codegen.build import build
from nsagen.core.errors import InvalidInputError
from nsagen.core.packages import read_manifest
from nsagen.core.target import parse_target
from nsagen.core.text import counted
from nsagen.reports import dispatch, patterns
from nsagen.reports.page import page
from nsagen.runtime.package import import_folder
from nsagen.spec import AttentionShape, Spec


def inspection_page(spec: Spec, target: str | None = None) -> str:
    """An HTML document of what a build of the spec would dispatch to now.

    Args:
        target: of the kernels to show; by default this machine's GPU if the spec has it, else
            the spec's last one.

    Raises:
        InvalidInputError: the spec has no such target.
    """
    target = str(parse_target(target)) if target else _usual_target(spec)
    if target not in spec.targets:
        raise InvalidInputError(
            f"inspect: the target must be one of the spec's, {', '.join(spec.targets)}; "
            f"got {target!r}; add it to targets in {spec.label}"
        )
    shape = _widest(spec.shapes)
    with tempfile.TemporaryDirectory() as folder:
        built = build(spec, Path(folder)).folder
        manifest = read_manifest(built)
        assert manifest is not None
        table = dispatch.section(import_folder(built).dispatcher, manifest, target)
    shapes = counted(len(spec.shapes), "attention shape")
    counts = f"{counted(len(spec.workloads()), 'workload')} of {shapes}"
    parameters = ", ".join(f"{name} {value}" for name, value in shape.said().items())
    intro = (
        f"<p>{escape(spec.description or 'An nsagen spec')}: {counts}.</p>"
        f'<p class="quiet">The sequence below has the shape {escape(parameters)}.</p>'
    )
    seen = patterns.section(patterns.example_of(shape), spec.branches)
    return page(f"Spec {spec.name}", intro, seen, table)


def _usual_target(spec: Spec) -> str:
    import torch

    from nsagen.runtime.device import target_of

    if torch.cuda.is_available() and (here := target_of(torch.device("cuda"))) in spec.targets:
        return here
    return spec.targets[-1]


def _widest(shapes: tuple[AttentionShape, ...]) -> AttentionShape:
    """The shape that selects the most blocks; the first of several."""
    return max(shapes, key=lambda shape: shape.topk)
