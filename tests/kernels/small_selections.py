"""Small block selections, shared by the tests of its kernels."""

from __future__ import annotations

from typing import Any

from nsagen.core.workload import Schedule, Workload

RAGGED = (3, 4, 0, 160, 5, 1, 7)
"""Shorter than a window, exactly one, empty, one long sequence and many short ones."""


def workload_of(
    dtype: str = "float32",
    *,
    form: tuple[str, str, str] | None = None,
    pass_: str = "forward",
    **params: Any,
) -> Workload:
    """A workload; `form` is (score_norm, score_heads, score_pool), NSA's by default."""
    shape = {
        "head_dim": 16,
        "gqa_ratio": 2,
        "kernel_size": 4,
        "kernel_stride": 2,
        "block_size": 4,
        "topk": 6,
        "init_blocks": 1,
        "local_blocks": 2,
    }
    if form is not None:
        shape |= dict(zip(("score_norm", "score_heads", "score_pool"), form, strict=True))
    return Workload.of("block_selection", pass_, dtype=dtype, **(shape | params))


def small(**knobs: Any) -> Schedule:
    """Few programs, short steps and segments: each program takes several of all of them."""
    knobs = {"tokens": 32, "columns": 64, "windows": 16, "segment": 32} | knobs
    return Schedule.of("resident_scores", {"programs": 4, "num_warps": 4, "num_stages": 2} | knobs)
