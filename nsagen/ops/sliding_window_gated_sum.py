"""Sliding-window attention that ends in the gated sum of the branches, where nothing is trained.

The kernel of the last branch adds the other two to what it has in registers: its own output is
neither written nor read again. A backward pass would need that output, and takes the separate ops.
"""

from __future__ import annotations

from torch import Tensor

from nsagen.ops._checks import (
    check_attention,
    check_like,
    check_packed,
    check_rows,
    check_window,
)
from nsagen.ops._launch import attention_outputs
from nsagen.ops._op import define_op
from nsagen.ops.gated_sum import check_gate, gated_sum_forward
from nsagen.ops.sliding_window_attention import sliding_window_attention_forward


def _check(op: str, q: Tensor, v: Tensor, o_compressed: Tensor, o_selected: Tensor) -> None:
    check_rows(op, v=v, o_compressed=o_compressed, o_selected=o_selected)
    o, _ = attention_outputs(q.to("meta"), v.to("meta"))
    check_like(op, ("o", o), o_compressed=o_compressed, o_selected=o_selected)


@define_op(
    returns="o",
    allocate=lambda q, v: attention_outputs(q, v)[0],
    scratch={"lse": lambda q, v: attention_outputs(q, v)[1]},
    check=(check_attention, check_packed, check_window, _check, check_gate),
    kernel="sliding_window_attention forward",
    launch="q k v cu_seqlens o lse softmax_scale cu_seqlens_k q_start o_compressed o_selected gate",
    prepare={
        "o_compressed": lambda o_compressed: o_compressed.contiguous(),
        "o_selected": lambda o_selected: o_selected.contiguous(),
        "gate": lambda gate: gate.contiguous(),
    },
)
def sliding_window_gated_sum(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    o_compressed: Tensor,
    o_selected: Tensor,
    gate: Tensor,
    window_size: int,
    softmax_scale: float,
    dispatcher: str = "",
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> Tensor:
    """o [N, HQ, Dv]: `gated_sum` with what `sliding_window_attention` gives; no gradient.

    Args:
        o_compressed, o_selected: [N, HQ, Dv], the other branches.
        gate: [N, HQ, 3], after the sigmoid: compressed, selected, sliding.
        others: as in `sliding_window_attention`.
    """
    statics = (window_size, softmax_scale, dispatcher, cu_seqlens_k, q_start)
    o_sliding, _ = sliding_window_attention_forward(q, k, v, cu_seqlens, *statics)
    return gated_sum_forward(o_compressed, o_selected, o_sliding, gate, dispatcher)
