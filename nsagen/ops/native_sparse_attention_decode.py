"""Decoding, last step: selected and sliding-window attention, summed with the compressed one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nsagen.core.branches import BRANCHES, branches_on
from nsagen.ops import reference
from nsagen.ops._cache_checks import check_places
from nsagen.ops._checks import check_tensors, check_topk_idx, check_window, fail
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of, scale_of
from nsagen.ops.gated_sum import gate_of
from nsagen.runtime import Dispatcher

_OP = "native_sparse_attention decode"


def native_sparse_attention_decode(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    topk_idx: Tensor,
    positions: Tensor,
    slots: Tensor,
    o_compressed: Tensor,
    gate: Tensor,
    *,
    block_size: int,
    window_size: int,
    softmax_scale: float | None = None,
    block_table: Tensor | None = None,
    branches: Sequence[str] = BRANCHES,
    k_window_cache: Tensor | None = None,
    v_window_cache: Tensor | None = None,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """The gated sum of the three branches for one new token a row.

    Args:
        q: [R, HQ, D], after rope.
        k_cache: [slots, max_length, HK, D], after rope, the new token among them.
        v_cache: [slots, max_length, HK, Dv].
        topk_idx: int32 [HK, R, topk], contiguous, from `compressed_attention_decode` or any other
            set of blocks a row: as in `topk_sparse_attention`, repeats count once, and entries that
            name no block up to the token's own are ignored.
        positions: int32 [R], position of each new token; -1: an idle row.
        slots: int32 [R], each row's place in the caches.
        o_compressed: [R, HQ, Dv], from `compressed_attention_decode`.
        gate: [R, HQ, 3] after the sigmoid: compressed, selected, sliding.
        block_size: tokens of a block.
        window_size: tokens that the sliding window sees, the new one among them; 0 turns that
            branch off.
        softmax_scale: of the scores; 1/sqrt(D) by default.
        block_table: int32 [slots, max_pages], or None. With it the caches are in pages, [pages,
            page_size, HK, dim]: token t of a slot lies in page
            block_table[slot, t // page_size] at row t % page_size.
        branches: those that are on; of the others nothing is read, but of o_compressed that it
            is finite.
        k_window_cache, v_window_cache: like k_cache and v_cache, the sliding branch's own; None
            where it reads those.
        k_scale: float32 [slots, max_length, HK], the scales of k_cache, if that is of
            torch.float8_e4m3fn or torch.int8; v_scale: of v_cache. See `reference.quantize`. The
            sliding branch then has no caches of its own.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [R, HQ, Dv].

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    scale, key = scale_of(softmax_scale, q), key_of(dispatcher)
    if len(branches) < len(BRANCHES) or window_size == 0:
        on = branches_on(_OP, branches, window_size)
        gate = gate_of(gate, on)
        window_size = window_size if "sliding" in on else 1
        if "selected" not in on:
            topk_idx = topk_idx.new_full((*topk_idx.shape[:2], 1), -1)
    inputs = (q, k_cache, v_cache, topk_idx, positions, slots, o_compressed, gate)
    own = (k_window_cache, v_window_cache, k_scale, v_scale)
    return _native_sparse_attention_decode(
        *inputs, block_size, window_size, scale, key, block_table, *own
    )


def _check_own_window(
    op: str,
    k_window_cache: Tensor | None,
    v_window_cache: Tensor | None,
    k_scale: Tensor | None,
) -> None:
    """The sliding branch's caches: none, or both."""
    if k_window_cache is None and v_window_cache is None:
        return
    if k_scale is not None:
        rule = "quantized caches are for branches that share keys and values"
        fail(op, rule, "scales and caches of the window", "leave one out")
    if k_window_cache is None or v_window_cache is None:
        came = "v_window_cache" if k_window_cache is None else "k_window_cache"
        fail(op, "k_window_cache and v_window_cache must come together", came, "pass both")


_native_sparse_attention_decode = op_of(
    "native_sparse_attention_decode",
    reference.native_sparse_attention_decode,
    omit="branches",
    returns="o",
    allocate=lambda o_compressed: o_compressed.new_empty(o_compressed.shape),
    check=(_check_own_window, check_tensors, check_topk_idx, check_window, check_places),
    kernel="native_sparse_attention decode",
    launch="q k_cache v_cache topk_idx positions slots o_compressed gate o softmax_scale"
    " block_table k_window_cache? v_window_cache? k_scale? v_scale?",
)
