"""A wide local band as dense rows: selected attention that gathers the other blocks alone.

InfLLM-V2 always selects a token's last 33 blocks, a third of all. Neighbouring tokens have them in
common, so that a tile of rows multiplies each of their keys once, as a sliding window does whose
first key is the first of a block; selected attention starts from that result. Gradients are split
in the same way. This is the default for wide bands in 16 bits on Hopper, where it was measured. The
environment variable NSAGEN_LOCAL_BAND=1 turns it on for every target, and 0 turns it off.
"""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from nsagen.core.workload import wide_band
from nsagen.ops import reference
from nsagen.ops._checks import check_packed, check_tensors, check_topk_idx, fail
from nsagen.ops._derive import Gradients, backward_of, called, op_of
from nsagen.ops._launch import (
    attention_outputs,
    attention_sizes,
    has_kernel,
    key_of,
    on_kernels,
    scale_of,
)
from nsagen.ops._op import apply, define_op
from nsagen.ops.forced_blocks import free_blocks_attention
from nsagen.ops.selected_attention import (
    selected_attention_backward,
    selected_attention_forward,
    topk_sparse_attention,
)
from nsagen.runtime import Dispatcher
from nsagen.runtime.device import target_of

ASKED = os.environ.get("NSAGEN_LOCAL_BAND", "")
"""Read once: calls are repeated as recorded."""


def attend_selected(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    block_size: int,
    local_blocks: int,
    cu_seqlens: Tensor,
    softmax_scale: float | None = None,
    *,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """`topk_sparse_attention` to blocks as block selection writes them: ascending, each once, with
    the last `local_blocks` up to a token's own among them.

    These are dense rows on kernels, where `in_rows` says so and sequences are whole.
    """
    whole = cu_seqlens_k is None and q_start is None
    wide = ASKED == "1" or wide_band(local_blocks, topk_idx.shape[-1])
    if not (whole and wide and ASKED != "0" and local_blocks > 0 and on_kernels(q)):
        args = (q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale)
        chunk = {"cu_seqlens_k": cu_seqlens_k, "q_start": q_start}
        return topk_sparse_attention(*args, **chunk, dispatcher=dispatcher)
    sizes, scale = (local_blocks * block_size, block_size), scale_of(softmax_scale, q)
    return banded_attention(q, k, v, topk_idx, cu_seqlens, *sizes, scale, key_of(dispatcher))[0]


def in_rows(
    pass_: str,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: int,
    block_size: int,
    dispatcher: str,
) -> bool:
    """Whether a pass computes the band as such: that was asked for, or was measured on such a GPU,
    and the dispatcher has kernels for it. Passes may differ: the backward one needs o and lse."""
    if ASKED:
        return ASKED == "1"
    if not q.is_cuda or q.dtype == torch.float32 or target_of(q.device) != "cuda:90":
        return False
    sizes = attention_sizes(q, k, v) | {"block_size": block_size}
    wanted = [("sliding_window_attention", sizes | {"window_size": window_size})]
    if pass_ == "forward":
        local = {"init_blocks": 0, "local_blocks": window_size // block_size}
        wanted.append(("selected_attention", sizes | local))
    return all(has_kernel(dispatcher, op, pass_, params, q) for op, params in wanted)


def _check_band(op: str, window_size: int, block_size: int) -> None:
    if block_size < 1 or window_size < 1 or window_size % block_size:
        came = f"{window_size} and {block_size}"
        fail(op, "the window must be one or more whole blocks", came, "pass a multiple of blocks")


def _band(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    window_size: int,
    block_size: int,
    softmax_scale: float,
) -> tuple[Tensor, Tensor]:
    return reference.forced_blocks_attention(
        *(q, k, v, cu_seqlens),
        block_size=block_size,
        init_blocks=0,
        local_blocks=window_size // block_size,
        softmax_scale=softmax_scale,
    )


band_attention_forward = op_of(
    "band_attention_forward",
    _band,
    returns="o lse",
    allocate=attention_outputs,
    check=(check_tensors, check_packed, _check_band),
    kernel="sliding_window_attention forward",
    launch="q k v cu_seqlens o lse softmax_scale",
    gradients=Gradients(
        "q k v",
        "do q k v cu_seqlens o lse dq dk dv softmax_scale delta gate False",
        more="delta gate",
        adds="dq dk dv",
    ),
)
"""(o, lse) of each token's last window_size // block_size blocks, up to itself."""

add_band_gradients = backward_of(band_attention_forward, adds=True)


def free_entries(topk_idx: Tensor, local_blocks: int) -> Tensor:
    """int32 [HK, N, topk - local_blocks], one at least: the blocks before the local ones, then -1.

    A token's own block is the last in its list. Where it has fewer blocks than local ones, none is
    left; elsewhere there are local_blocks of them behind the free ones.
    """
    own = topk_idx.amax(-1, keepdim=True)
    free = topk_idx[..., : max(1, topk_idx.shape[-1] - local_blocks)]
    return torch.where(free <= own - local_blocks, free, -1)


def _gradients(call: Any) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv): of the free blocks, to which the band's are added. Both need the whole lse."""
    if not called(in_rows, call, pass_="backward"):
        return called(selected_attention_backward, call)
    blocks = apply(free_entries, call.topk_idx, call.window_size // call.block_size)
    dq, dk, dv = called(selected_attention_backward, call, topk_idx=blocks)
    called(add_band_gradients, call, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


@define_op(
    returns="o lse",
    allocate=attention_outputs,
    check=(check_tensors, check_packed, _check_band, check_topk_idx),
    gradients=Gradients("q k v", body=_gradients, takes="do o lse"),
)
def banded_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    topk_idx: Tensor,
    cu_seqlens: Tensor,
    window_size: int,
    block_size: int,
    softmax_scale: float,
    dispatcher: str = "",
) -> tuple[Tensor, Tensor]:
    """(o [N, HQ, Dv], lse [N, HQ]) of selected attention; lse is not differentiable.

    Args:
        topk_idx: int32 [HK, N, topk], as block selection writes it: ascending, each block once, the
            local ones among them, then -1.
        window_size: tokens of the local blocks.
    """
    sizes, last = (window_size, block_size), (softmax_scale, dispatcher)
    if not in_rows("forward", q, k, v, *sizes, dispatcher):
        return selected_attention_forward(q, k, v, topk_idx, cu_seqlens, block_size, *last)
    o, lse = band_attention_forward(q, k, v, cu_seqlens, *sizes, *last)
    blocks = (block_size, 0, window_size // block_size)
    return free_blocks_attention(q, k, v, topk_idx, cu_seqlens, o, lse, *blocks, *last)
