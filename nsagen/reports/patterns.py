"""What the tokens of one example sequence attend to, branch by branch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES, branches_on
from nsagen.ops import reference
from nsagen.ops.reference._attend import scores_of
from nsagen.reports.page import legend
from nsagen.spec import AttentionShape

ROWS = 64
"""Queries that a picture shows, evenly spaced."""

MAX_TOKENS = 4096
"""Longest example sequence; the reference computes it in seconds on one core."""


@dataclass(frozen=True)
class Example:
    """One sequence and the reference's results for it, for one key/value head.

    Attributes:
        shape: the attention's parameters.
        tokens: its length, L.
        queries: positions of the queries that are shown.
        probabilities: [queries, M], mean over the group's heads, in compressed attention.
        blocks: int32 [queries, topk], selected blocks, then -1.
    """

    shape: AttentionShape
    tokens: int
    queries: list[int]
    probabilities: Tensor
    blocks: Tensor


def example_of(shape: AttentionShape, seed: int = 0) -> Example:
    """Select the blocks of a made-up sequence, in float32, without a model's weights.

    The sequence changes its subject now and then and returns to earlier ones; queries and
    keys of a subject are alike.
    """
    tokens = min(MAX_TOKENS, max(4 * shape.topk * shape.block_size, 2 * shape.window_size))
    random = torch.Generator().manual_seed(seed)
    subject = _subjects(tokens, shape.block_size, random)
    group = 1 if shape.score_heads == "each" else shape.gqa_ratio
    q, k = _vectors(subject, group, shape.index_head_dim or shape.head_dim, random)
    ends = torch.tensor([0, tokens], dtype=torch.int32)
    size, stride = shape.kernel_size, shape.kernel_stride
    ck, window_ends = reference.avgpool_compress(k, None, ends, size, stride)
    lse = reference.compressed_lse(q, ck, ends, window_ends, kernel_size=size, kernel_stride=stride)
    blocks = reference.block_selection(
        *(q, ck, lse if shape.score_norm == "softmax" else None, ends, window_ends),
        kernel_size=size,
        kernel_stride=stride,
        block_size=shape.block_size,
        topk=shape.topk,
        init_blocks=shape.init_blocks,
        local_blocks=shape.local_blocks,
        score_norm=shape.score_norm,
        score_heads=shape.score_heads,
        score_pool=shape.score_pool,
    )
    queries = [round((i + 1) * tokens / ROWS) - 1 for i in range(ROWS)]
    last = torch.arange(ck.shape[0]) * stride + size - 1
    scores = scores_of(q[queries], ck, q.shape[-1] ** -0.5)[0]  # [G, queries, M]
    probabilities = (scores - lse[queries].T[..., None]).exp()
    hidden = last > torch.tensor(queries)[:, None]
    probabilities = probabilities.masked_fill(hidden, 0.0).mean(0)
    return Example(shape, tokens, queries, probabilities, blocks[0, queries])


def _subjects(tokens: int, block: int, random: torch.Generator) -> Tensor:
    """int64 [tokens]: the subject of each token, one of five, in runs of one to six blocks."""
    runs: list[Tensor] = []
    while sum(len(run) for run in runs) < tokens:
        length = int(torch.randint(block, 6 * block, (), generator=random))
        runs.append(torch.full((length,), int(torch.randint(5, (), generator=random))))
    return torch.cat(runs)[:tokens]


def _vectors(
    subject: Tensor, group: int, dim: int, random: torch.Generator
) -> tuple[Tensor, Tensor]:
    """q [L, G, D] and k [L, 1, D]."""
    tokens = subject.shape[0]
    topics = torch.randn(5, dim, generator=random)
    k = topics[subject] + torch.randn(tokens, dim, generator=random)
    drift = torch.randn(tokens // 16 + 1, dim, generator=random).repeat_interleave(16, 0)[:tokens]
    q = topics[subject][:, None] + drift[:, None]
    q = q + 0.5 * torch.randn(tokens, group, dim, generator=random)
    return 0.7 * q, (k + 0.6 * drift)[:, None]


COLOURS = {
    "compressed": (("var(--compressed)", "compressed"),),
    "selected": (("var(--selected)", "selected by score"), ("var(--forced)", "always selected")),
    "sliding": (("var(--sliding)", "sliding window"),),
}
"""The legend's text for each branch."""


def section(example: Example, branches: Sequence[str] = BRANCHES) -> str:
    """The patterns of the branches that are on side by side, as HTML."""
    shape, tokens = example.shape, example.tokens
    on = branches_on("inspect", branches, shape.window_size)
    chosen = int((example.blocks[-1] >= 0).sum())
    read = example.probabilities.shape[1] if "compressed" in on or "selected" in on else 0
    read += min(tokens, chosen * shape.block_size) if "selected" in on else 0
    read += min(tokens, shape.window_size) if "sliding" in on else 0
    panels = _panels(example)
    known = [colour for name in on for colour in COLOURS[name]]
    known.append(("var(--causal)", "visible to dense attention alone"))
    return (
        f"<h2>What one sequence attends to</h2>\n<p>{tokens} tokens of a made-up sequence that "
        "returns to earlier subjects; the selection is the reference's own. A row is a query, from "
        f"the first at the top to the last; a column is a key. The last token reads "
        f"{read:,} keys where dense attention reads {tokens:,}.</p>\n{legend(known)}"
        f'<div class="panels">{"".join(panels[name] for name in on)}</div>'
    )


def _panels(example: Example) -> dict[str, str]:
    """A panel for each branch."""
    shape, windows = example.shape, example.probabilities.shape[1]
    return {
        "compressed": _panel(
            "Compressed attention",
            _compressed(example),
            f"{windows} windows of {shape.kernel_size} tokens, one every {shape.kernel_stride}; "
            "stronger colour: more attention.",
        ),
        "selected": _panel(
            "Selected attention",
            _selected(example),
            f"{shape.topk} blocks of {shape.block_size} tokens: the first {shape.init_blocks} and "
            f"last {shape.local_blocks} always, the rest by {_ranking(shape)}.",
        ),
        "sliding": _panel(
            "Sliding-window attention",
            _sliding(example),
            f"the last {shape.window_size} tokens, the query's own among them.",
        ),
    }


def _ranking(shape: AttentionShape) -> str:
    """What ranks blocks, in words."""
    if shape.scorer == "index":
        return "a learned index"
    if shape.score_norm == "none":
        return "their compressed keys"
    return "the compressed attention's " + ("maximum" if shape.score_pool == "max" else "mass")


def _panel(title: str, shapes: str, caption: str) -> str:
    triangle = f'<path class="causal" d="{_staircase()}"/>'
    return (
        f'<figure><strong>{title}</strong><svg viewBox="0 0 {ROWS} {ROWS}" role="img" '
        f'aria-label="{title}: rows are queries, columns are keys" shape-rendering="crispEdges">'
        f"{triangle}{shapes}</svg><figcaption>{caption}</figcaption></figure>"
    )


def _staircase() -> str:
    """What a causal query sees: row i up to column i."""
    return "M0 0" + "".join(f"H{i + 1}V{i + 1}" for i in range(ROWS)) + "H0Z"


def _path(kind: str, boxes: Iterable[tuple[int, float, float]], opacity: float = 1.0) -> str:
    """Boxes (row, from, to) in one path."""
    drawn = "".join(f"M{a:.4g} {row}H{b:.4g}v1H{a:.4g}z" for row, a, b in boxes if b > a)
    faded = f' fill-opacity="{opacity:.2g}"' if opacity < 1 else ""
    return f'<path class="{kind}"{faded} d="{drawn}"/>' if drawn else ""


def _compressed(example: Example) -> str:
    """Each window at its stride, in five strengths relative to the row's strongest."""
    shape, scale = example.shape, ROWS / example.tokens
    strength = example.probabilities / example.probabilities.amax(1, keepdim=True).clamp(min=1e-30)
    levels = (strength.sqrt() * 5).ceil().to(torch.int64).tolist()
    boxes: dict[int, list[tuple[int, float, float]]] = {level: [] for level in range(1, 6)}
    for row, values in enumerate(levels):
        start = 0
        for end in range(1, len(values) + 1):
            if end < len(values) and values[end] == values[start]:
                continue
            if values[start]:
                places = (start * shape.kernel_stride, end * shape.kernel_stride)
                boxes[values[start]].append((row, places[0] * scale, places[1] * scale))
            start = end
    return "".join(_path("compressed", found, level / 5) for level, found in boxes.items())


def _selected(example: Example) -> str:
    shape, scale = example.shape, ROWS / example.tokens
    boxes: dict[str, list[tuple[int, float, float]]] = {"selected": [], "forced": []}
    for row, (query, chosen) in enumerate(
        zip(example.queries, example.blocks.tolist(), strict=True)
    ):
        own = query // shape.block_size
        for block in chosen:
            if block < 0:
                continue
            always = block < shape.init_blocks or block > own - shape.local_blocks
            end = min((block + 1) * shape.block_size, query + 1)
            box = (row, block * shape.block_size * scale, end * scale)
            boxes["forced" if always else "selected"].append(box)
    return "".join(_path(kind, found) for kind, found in boxes.items())


def _sliding(example: Example) -> str:
    scale = ROWS / example.tokens
    width = example.shape.window_size
    return _path(
        "sliding",
        (
            (row, max(0, query + 1 - width) * scale, (query + 1) * scale)
            for row, query in enumerate(example.queries)
        ),
    )
