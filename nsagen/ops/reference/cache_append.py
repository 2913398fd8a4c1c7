"""Appending one token a row to the caches, and the window that it completes."""

from __future__ import annotations

import torch
from torch import Tensor

from nsagen.ops.reference._checks import check_windows
from nsagen.ops.reference._pages import first_entries, place_of
from nsagen.ops.reference.compress import Weight, pool_windows
from nsagen.ops.reference.quantize import store
from nsagen.ops.reference.rope import rope_if_given
from nsagen.ops.scales import CacheScales
from nsagen.ops.separate import SeparateKV


@torch.no_grad()
def cache_append(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor | None,
    sin: Tensor | None,
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
) -> Tensor:
    """Turn q and k by their position, append k and v, and compress a window once it is full.

    The token at position t completes window i = (t + 1 - l) // s when t + 1 >= l and
    (t + 1 - l) % s == 0. Its keys before rope come from `k_raw`, its values from `v_cache`; where
    branches have their own keys and values or caches are quantized, these come from `v_raw`.

    Args:
        q: [R, HQ, D], before rope.
        k: [R, HK, D], before rope.
        v: [R, HK, Dv].
        cos: float32 [P, D // 2], or None for no rope; `sin` alike.
        w_k: weight that compresses the keys, see `pool_windows`; `w_v` for the values.
        pe: [HK, l, D], added to the keys before compression, or None.
        positions: int32 [R], position of the new token; -1: an idle row, which is skipped.
        slots: int32 [R], each row's place in the caches.
        k_cache: [slots, max_length, HK, D], keys after rope. Changed, as are all caches.
        v_cache: [slots, max_length, HK, Dv].
        ck_cache: [slots, max_windows, HK, D], compressed keys after rope at position i * s.
        cv_cache: [slots, max_windows, HK, Dv], compressed values.
        k_raw: [slots, kernel_size, HK, D], keys before rope, token t at index t % kernel_size.
        block_table: int32 [slots, max_pages], pages of each slot, or None. With it k_cache and
            v_cache are [pages, page_size, HK, dim], and the compressed caches [pages,
            page_size // kernel_stride, HK, dim]; see `place_of`.
        v_compress_type: of the values, where it is not compress_type.
        pe_v: [HK, l, Dv], added to the values before compression, or None.
        separate: the compressed and the sliding branch's own rows and caches, or None: both
            read the selected branch's.
        scales: of the first four caches, if they are of a narrow dtype.

    Returns:
        q after rope, [R, HQ, D]; 0 for idle rows.
    """
    check_windows("cache_append", kernel_size, kernel_stride)
    q_out = q.new_zeros(q.shape)
    for row, (position, slot) in enumerate(zip(positions.tolist(), slots.tolist(), strict=True)):
        if position < 0:
            continue
        one, time = slice(row, row + 1), positions[row : row + 1]
        q_out[one] = rope_if_given(q[one], cos, sin, time)
        here = place_of(k_cache, block_table, slot, position)
        store(k_cache, scales and scales.k_scale, here, rope_if_given(k[one], cos, sin, time)[0])
        store(v_cache, scales and scales.v_scale, here, v[row])
        k_raw[slot, position % kernel_size] = (separate.k_compress if separate else k)[row]
        if scales:
            scales.v_raw[slot, position % kernel_size] = v[row]
        if separate:
            separate.v_raw[slot, position % kernel_size] = separate.v_compress[row]
            separate.k_window_cache[here] = rope_if_given(separate.k_window[one], cos, sin, time)[0]
            separate.v_window_cache[here] = separate.v_window[row]
        window, rest = divmod(position + 1 - kernel_size, kernel_stride)
        if window < 0 or rest:
            continue
        first = window * kernel_stride
        tokens = torch.arange(first, first + kernel_size, device=k.device)
        key = pool_windows(k_raw[slot, tokens % kernel_size][None], w_k, pe, compress_type)
        there = place_of(ck_cache, block_table, slot, window)
        key = rope_if_given(key, cos, sin, torch.full_like(time, first))[0]
        store(ck_cache, scales and scales.ck_scale, there, key)
        if ring := separate or scales:
            values = ring.v_raw[slot, tokens % kernel_size]
        else:
            values = first_entries(v_cache, block_table, slot, position + 1)[first:]
        v_type = v_compress_type or compress_type
        value = pool_windows(values[None], w_v, pe_v, v_type)[0]
        store(cv_cache, scales and scales.cv_scale, there, value)
    return q_out
