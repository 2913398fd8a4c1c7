"""Decoding, first step: rope, append the new keys and values, compress a window that they fill."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from nsagen.core.workload import BRANCH_KV
from nsagen.ops import reference
from nsagen.ops._cache_checks import check_pages_of_windows, check_rows_in
from nsagen.ops._calls import all_none
from nsagen.ops._checks import check_compress_weights, fail, tensors
from nsagen.ops._derive import called, op_like
from nsagen.ops._launch import key_of
from nsagen.ops.compress import compress_forward
from nsagen.ops.reference._checks import check_windows
from nsagen.ops.reference._pages import capacity_of
from nsagen.ops.reference.compress import Weight, layers_of, weight_of
from nsagen.ops.rope import rope_forward
from nsagen.ops.scales import CacheScales
from nsagen.ops.separate import SeparateKV
from nsagen.runtime import Dispatcher

_OP = "cache_append"


def cache_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    w_k: Weight,
    w_v: Weight,
    pe: Tensor | None,
    positions: Tensor,
    slots: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    ck_cache: Tensor,
    cv_cache: Tensor,
    k_raw: Tensor,
    *,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    v_compress_type: str | None = None,
    pe_v: Tensor | None = None,
    block_table: Tensor | None = None,
    separate: SeparateKV | None = None,
    scales: CacheScales | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Append one token of each row to the caches, which change in place.

    Args:
        q: [R, HQ, D]; k: [R, HK, D]; v: [R, HK, Dv], all before rope.
        cos, sin: float32 [P, D // 2].
        w_k, w_v: weights that compress keys and values, as in `compress`; None for avgpool.
        pe: [HK, kernel_size, D], added to a window's keys, or None.
        positions: int32 [R], position of each new token; -1: an idle row, which is skipped.
        slots: int32 [R], each row's place in the caches.
        k_cache: [slots, max_length, HK, D], keys after rope; v_cache: the same for values.
        ck_cache: [slots, max_windows, HK, D], compressed keys after rope at position
            i * kernel_stride; cv_cache: the same for values.
        k_raw: [slots, kernel_size, HK, D], keys before rope, token t at t % kernel_size.
        block_table: int32 [slots, max_pages], or None. With it the first four caches are in
            pages: k_cache and v_cache [pages, page_size, HK, dim], ck_cache and cv_cache
            [pages, page_size // kernel_stride, HK, dim]. Token t of a slot lies in page
            block_table[slot, t // page_size], and so does the window that starts at token t.
            Entries of pages that no row reaches may hold anything.
        v_compress_type: how values are compressed, where it is not compress_type.
        pe_v: [HK, kernel_size, Dv], added to a window's values, or None.
        separate: the compressed and the sliding branch's own keys, values and caches. Without it
            all branches have the same, and compressed values are made of v_cache.
        scales: beside k_cache, v_cache, ck_cache and cv_cache of torch.float8_e4m3fn or
            torch.int8, the scale of each of their rows; see `reference.quantize`. Then all branches
            have the same keys and values, and compressed ones are made of what is in the rings.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        q after rope, [R, HQ, D].

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    (first_k, w_k2), (first_v, w_v2) = layers_of(w_k), layers_of(w_v)
    key = key_of(dispatcher)
    usual = (
        *(q, k, v, cos, sin, first_k, first_v, pe, positions, slots),
        *(k_cache, v_cache, ck_cache, cv_cache, k_raw),
        *(compress_type, kernel_size, kernel_stride, key, block_table),
    )
    own_type = v_compress_type if v_compress_type not in (None, compress_type) else ""
    more = (separate, scales, pe_v, w_k2, w_v2)
    if not own_type and all_none(more):
        return _cache_append_decode(*usual)
    if separate is not None and scales is not None:
        rule = "quantized caches are for branches that share keys and values"
        fail(_OP, rule, "separate and scales", "leave one out")
    own = {**({} if separate is None else vars(separate)), **(vars(scales) if scales else {})}
    return _cache_append_decode(*usual, own_type, w_k2=w_k2, w_v2=w_v2, pe_v=pe_v, **own)


def _hidden_size(w_k: Weight, w_v: Weight) -> int:
    """The hidden size of the mlps among two weights; 0 if neither is one."""
    sizes = [w[0].shape[-1] for w in (w_k, w_v) if isinstance(w, tuple)]
    if len(set(sizes)) > 1:
        rule = "the mlps of keys and values must have one hidden size"
        fail(_OP, rule, f"{sizes[0]} and {sizes[1]}", "make both as wide")
    return sizes[0] if sizes else 0


_OF_SLOTS = {"k": "[N, HK, D]", "v": "[N, HK, Dv]"}
_check_pages = tensors(**_OF_SLOTS)
_RINGS = {"k_raw": "[places, kernel_size, HK, D]", "v_raw": "[places, kernel_size, HK, Dv]"}
_check_slots = tensors(**_OF_SLOTS, **_RINGS)


def _check_tensors(call: Any) -> None:
    (_check_slots if call.block_table is None else _check_pages)(call)
    if call.k_scale is not None:
        if call.v_raw is None:
            rule, remedy = "quantized caches need v_raw", "allocate an NSACache of that cache_dtype"
            fail(call.op, rule, None, remedy)
        return
    own = [name for name in SeparateKV.__annotations__ if getattr(call, name) is not None]
    if own and len(own) < len(SeparateKV.__annotations__):
        rule = "the branches' own rows and caches must come together"
        fail(call.op, rule, ", ".join(own), "pass a SeparateKV")


def _check(call: Any) -> None:
    """Weights and places."""
    op, size, table = call.op, call.kernel_size, call.block_table
    w_k, w_v = weight_of(call.w_k, call.w_k2), weight_of(call.w_v, call.w_v2)
    check_compress_weights(op, call.k, w_k, call.pe, call.compress_type, size)
    v_type = call.v_compress_type or call.compress_type
    check_compress_weights(op, call.v, w_v, call.pe_v, v_type, size)
    _hidden_size(w_k, w_v)
    tokens = min(capacity_of(call.k_cache, table), call.cos.shape[0])
    check_rows_in(op, call.positions, call.slots, tokens, call.k_cache, table)


def _sizes(call: Any) -> dict[str, Any]:
    return {
        "v_compress_type": call.v_compress_type or call.compress_type,
        "mlp_hidden": _hidden_size(weight_of(call.w_k, call.w_k2), weight_of(call.w_v, call.w_v2)),
        "branch_kv": BRANCH_KV[call.k_window is not None],
    }


def _append(call: Any) -> Tensor:
    call.w_k, call.w_v = weight_of(call.w_k, call.w_k2), weight_of(call.w_v, call.w_v2)
    call.separate = call.scales = None
    if call.k_scale is not None:
        call.scales = called(CacheScales, call)
    elif call.k_window is not None:
        call.separate = called(SeparateKV, call)
    return called(reference.cache_append, call)


_cache_append_decode = op_like(
    "cache_append_decode",
    (compress_forward, rope_forward),
    _append,
    "q k v cos sin w_k? w_v? pe? positions slots k_cache v_cache ck_cache cv_cache k_raw"
    " compress_type kernel_size kernel_stride dispatcher block_table? v_compress_type w_k2? w_v2?"
    " pe_v? k_compress? v_compress? k_window? v_window? v_raw? k_window_cache? v_window_cache?"
    " k_scale? v_scale? ck_scale? cv_scale?",
    texts="v_compress_type",
    returns="q_turned",
    allocate=lambda q: q.new_empty(q.shape),
    check=(_check_tensors, check_windows, check_pages_of_windows, _check),
    kernel="cache_append decode",
    sizes=_sizes,
    launch="q k v cos sin w_k w_v pe positions slots k_cache v_cache ck_cache cv_cache k_raw"
    " q_turned block_table w_k2? w_v2? pe_v? k_compress? v_compress? k_window? v_window? v_raw?"
    " k_window_cache? v_window_cache? k_scale? v_scale? ck_scale? cv_scale?",
    mutates="k_cache v_cache ck_cache cv_cache k_raw v_raw k_window_cache v_window_cache"
    " k_scale v_scale ck_scale cv_scale",
)
"""q after rope, [R, HQ, D]; see `cache_append`. w_k2, w_v2: second layers of an mlp."""
