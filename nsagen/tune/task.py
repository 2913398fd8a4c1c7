"""Tasks: a workload and a bucket of run-time sizes, with the sizes that represent the bucket."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from nsagen.cases.sizes import TOPK, Sizes, takes_lists
from nsagen.codegen.template import kernel_fingerprint
from nsagen.core.bucket import Bucket, Range
from nsagen.core.errors import NsagenError
from nsagen.core.workload import Schedule, Workload

SEQLENS = (2048, 16384)
"""Query tokens that represent short and long calls of the forward and backward passes."""

CONTEXTS = (16384,)
"""Context tokens of a decoding step."""

BATCHES = (1, 32)
"""Rows that represent small and large decoding steps."""

_QUERY_HEADS = 32
_KV_HEADS = 8


@dataclass(frozen=True)
class Task:
    """The subject of one search.

    Attributes:
        bucket: the calls that the winner will serve.
        timed: the sizes that are timed to represent it.
        checked: smaller sizes that compile alike, at which outputs are compared with the reference.
    """

    workload: Workload
    bucket: Bucket
    timed: Sizes
    checked: Sizes

    def __str__(self) -> str:
        return f"{self.workload}, {self.bucket}"

    @property
    def sizes_text(self) -> str:
        """The timed sizes as records and reports show them, e.g. `1 x 16384 tokens, 8 kv heads`."""
        rows, first = len(self.timed.seqlens), self.timed.seqlens[0]
        if self.workload.pass_ == "decode":
            return f"{rows} x context {first + 1}, {self.timed.kv_heads} kv heads"
        listed = f", {self.timed.topk} blocks" if self.timed.topk != TOPK else ""
        return f"{rows} x {first} tokens, {self.timed.kv_heads} kv heads{listed}"


def tasks_of(
    workloads: Iterable[Workload],
    seqlens: Sequence[int] = (),
    batches: Sequence[int] = (),
    kv_heads: int | None = None,
    topk: Mapping[Workload, int] | None = None,
) -> tuple[Task, ...]:
    """The tasks of workloads: one per workload and bucket.

    The buckets' limits lie at the geometric mean of neighbouring sizes. The outer buckets are
    open, so together they cover every call.

    Args:
        seqlens: query tokens or, for decoding, tokens of context; the defaults if empty.
        batches: sequences, or rows of a decoding step; the defaults if empty.
        kv_heads: by default as many as 32 query heads have. The heads of a learned index share one
            key head, whatever this says.
        topk: blocks of a list, for workloads whose calls decide it; `TOPK` for others.
    """
    tasks = []
    for workload in workloads:
        params = dict(workload.params)
        group = int(params.get("gqa_ratio", _QUERY_HEADS // _KV_HEADS))
        shared = group > 1 and params.get("score_heads") == "each"
        heads = 1 if shared else kv_heads or max(1, _QUERY_HEADS // group)
        decode = workload.pass_ == "decode"
        lengths = tuple(sorted(set(seqlens))) or (CONTEXTS if decode else SEQLENS)
        rows = tuple(sorted(set(batches))) or (BATCHES if decode else (1,))
        if decode:
            tasks += _decode_tasks(workload, lengths, rows, heads)
            continue
        listed = (topk or {}).get(workload, TOPK) if takes_lists(workload) else TOPK
        tasks += _forward_tasks(workload, lengths, rows, heads, listed)
    return tuple(tasks)


def _forward_tasks(
    workload: Workload, lengths: tuple[int, ...], rows: tuple[int, ...], heads: int, topk: int
) -> list[Task]:
    calls = sorted((batch * length, batch, length) for batch in rows for length in lengths)
    calls = [next(group) for _, group in itertools.groupby(calls, key=lambda call: call[0])]
    ranges = ranges_between([tokens for tokens, _, _ in calls])
    few = (_few_tokens(workload, topk),)
    return [
        Task(
            workload,
            Bucket(tokens=limits),
            Sizes((length,) * batch, heads, topk=topk),
            Sizes(few * batch, heads, topk=topk),
        )
        for limits, (_, batch, length) in zip(ranges, calls, strict=True)
    ]


def _decode_tasks(
    workload: Workload, contexts: tuple[int, ...], rows: tuple[int, ...], heads: int
) -> list[Task]:
    few = _few_tokens(workload)
    return [
        Task(
            workload,
            Bucket(tokens=tokens, context=context),
            Sizes((length - 1,) * batch, heads, capacity=length),
            Sizes(tuple(few - 1 - 37 * row % few for row in range(batch)), heads, capacity=few),
        )
        for context, length in zip(ranges_between(contexts), contexts, strict=True)
        for tokens, batch in zip(ranges_between(rows), rows, strict=True)
    ]


def ranges_between(sizes: Sequence[int]) -> list[Range]:
    """Ranges around ascending sizes that meet at geometric means and leave no gap."""
    ends = [math.isqrt(low * high) for low, high in itertools.pairwise(sizes)]
    return list(zip([None, *(end + 1 for end in ends)], [*ends, None], strict=True))


def _few_tokens(workload: Workload, topk: int = TOPK) -> int:
    """Tokens that reach past topk blocks and the window; divisible as the timed sizes are."""
    params = dict(workload.params)

    def number(name: str, default: int) -> int:
        return int(params.get(name, default))

    block, window, kernel = number("block_size", 16), number("window_size", 16), 4
    least = max(
        block * (number("topk", topk) + 2), window + block, kernel * number("kernel_size", 8)
    )
    unit = 16 * number("kernel_stride", 1)
    return -(-least // unit) * unit


def fingerprint_or_none(task: Task, schedule: Schedule) -> str | None:
    """The fingerprint of a schedule's kernel; None if it cannot be rendered."""
    try:
        return kernel_fingerprint(task.workload, schedule)
    except NsagenError:
        return None
