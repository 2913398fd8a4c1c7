"""Sliding-window attention that ends in the gated sum of the branches, where nothing is trained.

The kernel of the last branch adds the other two to what it has in registers: its own output is
neither written nor read again. A backward pass would need that output, and takes the separate ops.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsagen.ops._checks import check_packed, check_tensors, check_window
from nsagen.ops._derive import called, dense, op_like
from nsagen.ops._launch import attention_outputs
from nsagen.ops.gated_sum import gated_sum_forward
from nsagen.ops.sliding_window_attention import sliding_window_attention_forward


def _sliding_window_gated_sum(call: Any) -> Tensor:
    o_sliding, _ = called(sliding_window_attention_forward, call)
    branches = (call.o_compressed, call.o_selected, o_sliding)
    return gated_sum_forward(*branches, call.gate, call.dispatcher)


sliding_window_gated_sum = op_like(
    "sliding_window_gated_sum",
    (sliding_window_attention_forward, gated_sum_forward),
    _sliding_window_gated_sum,
    "q k v cu_seqlens o_compressed o_selected gate window_size softmax_scale dispatcher"
    " cu_seqlens_k q_start",
    returns="o",
    allocate=lambda q, v: attention_outputs(q, v)[0],
    scratch={"lse": lambda q, v: attention_outputs(q, v)[1]},
    check=(check_tensors, check_packed, check_window),
    kernel="sliding_window_attention forward",
    launch="q k v cu_seqlens o lse softmax_scale cu_seqlens_k q_start o_compressed o_selected gate",
    prepare=dense("o_compressed o_selected gate"),
)
"""o [N, HQ, Dv]: `gated_sum` with what `sliding_window_attention` gives; no gradient."""
