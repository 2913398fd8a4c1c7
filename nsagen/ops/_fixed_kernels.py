"""Small kernels that are the same for every workload. They have nothing to tune, so they are not
generated: the lengths of a batch, what the backward pass does between its large ones, and rows of
narrow caches."""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl
from torch import Tensor

from nsagen.core.workload import CACHE_DTYPES

TILE = 512  # tokens a program
CHUNK = 1024  # sequences that a program reads at a time
STORED_ROWS = 8  # heads of tokens a program
LOADED_ROWS = 8  # the same; 54 registers a thread on sm_90, with 16 of them 156, with 32 250
TURNED = 16  # heads of tokens a program


@triton.jit
def lengths_kernel(
    cu_seqlens,
    positions,
    window_cu_seqlens,
    window_positions,
    batch,
    tokens,
    rows,
    kernel_size,
    kernel_stride,
    STEPS: tl.constexpr,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    first = tl.program_id(0) * TILE
    token = first + tl.arange(0, TILE)

    # The last sequence that begins at or before a token; empty ones are stepped over.
    low = tl.zeros((TILE,), tl.int32)
    high = low + (batch - 1)
    for _ in tl.static_range(STEPS):  # pyright: ignore
        middle = (low + high + 1) // 2
        begun = tl.load(cu_seqlens + middle) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle - 1)
    sequence = tl.maximum(low, 0)
    start = tl.load(cu_seqlens + sequence)
    length = tl.load(cu_seqlens + sequence + 1, mask=sequence < batch, other=0) - start
    place = token - start
    real = (token < tl.load(cu_seqlens + batch)) & (token < tokens)
    tl.store(positions + token, tl.where(real, place, 0), mask=token < tokens)

    before = tl.zeros((), tl.int32)  # windows that start before this tile
    total = tl.zeros((), tl.int32)
    for chunk in range(0, batch, CHUNK):
        which = chunk + tl.arange(0, CHUNK)
        begin = tl.load(cu_seqlens + which, mask=which < batch, other=0)
        end = tl.load(cu_seqlens + which + 1, mask=which < batch, other=0)
        windows = tl.maximum(end - begin - kernel_size + kernel_stride, 0) // kernel_stride
        past = (tl.maximum(first - begin, 0) + kernel_stride - 1) // kernel_stride
        before += tl.sum(tl.minimum(past, windows))
        if first == 0:
            ends = total + tl.cumsum(windows)
            tl.store(window_cu_seqlens + which + 1, ends, mask=which < batch)
        total += tl.sum(windows)
    if first == 0:
        tl.store(window_cu_seqlens, 0)

    starts = real & (place % kernel_stride == 0) & (place + kernel_size <= length)
    row = before + tl.cumsum(starts.to(tl.int32)) - 1
    tl.store(window_positions + row, place, mask=starts & (row < rows))
    tl.store(window_positions + token, 0, mask=(token >= total) & (token < rows))


def runs_on(x: Tensor) -> bool:
    """Whether the kernel runs on x's device: a GPU, or a CPU with Triton's interpreter."""
    return x.is_cuda or not isinstance(tl.cdiv, triton.JITFunction)


def launch_lengths(
    cu_seqlens: Tensor,
    positions: Tensor,
    window_cu_seqlens: Tensor,
    window_positions: Tensor,
    tokens: int,
    kernel_size: int,
    kernel_stride: int,
) -> None:
    """Write the three tensors of `Lengths`.

    Args:
        cu_seqlens: int32 [batch + 1], contiguous, as all others are.
        positions: int32 [N]; window_cu_seqlens: int32 [batch + 1].
        window_positions: int32 [N // kernel_stride].
    """
    batch = cu_seqlens.shape[0] - 1
    lengths_kernel[(max(1, triton.cdiv(tokens, TILE)),)](
        cu_seqlens,
        positions,
        window_cu_seqlens,
        window_positions,
        batch,
        tokens,
        tokens // kernel_stride,
        kernel_size,
        kernel_stride,
        STEPS=max(0, batch - 1).bit_length(),
        TILE=TILE,
        CHUNK=min(CHUNK, triton.next_power_of_2(max(1, batch))),
        num_warps=4,  # pyright: ignore
    )


@triton.jit(do_not_specialize=["rows"])
def columns_kernel(
    gate, deltas, columns, dgate, rows, heads, stride_g, stride_gh, TILE: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    inside, size = row < rows, rows.to(tl.int64)
    gate += row // heads * stride_g + row % heads * stride_gh
    for branch in tl.static_range(3):  # pyright: ignore
        weight = tl.load(gate + branch, mask=inside).to(tl.float32)
        delta = tl.load(deltas + row * 3 + branch, mask=inside)
        tl.store(columns + branch * size + row, weight, mask=inside)
        tl.store(columns + (branch + 3) * size + row, delta, mask=inside)
        tl.store(dgate + row * 3 + branch, delta.to(dgate.dtype.element_ty), mask=inside)


def launch_columns(gate: Tensor, deltas: Tensor, columns: Tensor, dgate: Tensor) -> None:
    """Write gates and deltas as columns, and the gates' gradient.

    Args:
        gate: [N, HQ, 3], the last dimension contiguous.
        deltas: float32 [N, HQ, 3], contiguous.
        columns: float32 [6, N, HQ], contiguous: the gates' columns, then those of deltas.
        dgate: [N, HQ, 3], contiguous: deltas in any dtype.
    """
    rows, heads = columns.shape[1] * columns.shape[2], columns.shape[2]
    columns_kernel[(triton.cdiv(rows, TILE),)](
        *(gate, deltas, columns, dgate, rows, heads, *gate.stride()[:2]),
        TILE=TILE,
        num_warps=4,  # pyright: ignore
    )


@triton.jit
def turn_rows(x, y, more, cos, sin, positions, layout, sizes):
    """Rotate rows of x, or rotate them back, and add those of `more`, if any; y may be x.

    layout: a tile of x, and x's rows, heads and strides. sizes: whether back, and of a head.
    """
    tile, rows, heads, stride_x, stride_xh = layout
    BACK: tl.constexpr = sizes[0]
    HALF: tl.constexpr = sizes[1]
    BLOCK_HALF: tl.constexpr = sizes[2]
    ROWS: tl.constexpr = sizes[3]
    row = tile * ROWS + tl.arange(0, ROWS)
    dim = tl.arange(0, BLOCK_HALF)
    inside = (row < rows)[:, None] & (dim < HALF)[None, :]
    token, head = row // heads, row % heads
    first = (token.to(tl.int64) * stride_x + head.to(tl.int64) * stride_xh)[:, None] + dim[None, :]
    a = tl.load(x + first, mask=inside).to(tl.float32)
    b = tl.load(x + first + HALF, mask=inside).to(tl.float32)
    place = tl.load(positions + token, mask=row < rows, other=0).to(tl.int64)
    angle = (place * HALF)[:, None] + dim[None, :]
    cosine = tl.load(cos + angle, mask=inside)
    sine = tl.load(sin + angle, mask=inside)
    if BACK:  # the transpose of a rotation is the rotation back
        sine = -sine
    left = (a * cosine - b * sine).to(y.dtype.element_ty)
    right = (b * cosine + a * sine).to(y.dtype.element_ty)
    at = row.to(tl.int64)[:, None] * (2 * HALF) + dim[None, :]
    if more is not None:
        left = left.to(tl.float32) + tl.load(more + at, mask=inside).to(tl.float32)
        right = right.to(tl.float32) + tl.load(more + at + HALF, mask=inside).to(tl.float32)
    tl.store(y + at, left.to(y.dtype.element_ty), mask=inside)
    tl.store(y + at + HALF, right.to(y.dtype.element_ty), mask=inside)


def _tiles(*tensors: Tensor) -> int:
    """Programs that turn these tensors [N, H, D]."""
    return sum(triton.cdiv(x.shape[0] * x.shape[1], TURNED) for x in tensors)


def _half(x: Tensor) -> dict[str, Any]:
    """The sizes that the kernels take of the heads of x [N, H, D]."""
    half = x.shape[2] // 2
    sizes: dict[str, Any] = {"HALF": half, "BLOCK_HALF": triton.next_power_of_2(half)}
    return sizes | {"ROWS": TURNED, "num_warps": 4}


@triton.jit
def turn_kernel(
    q,
    k,
    ck,
    q_turned,
    k_turned,
    ck_turned,
    cos,
    sin,
    positions,
    window_positions,
    rows_q,
    rows_k,
    rows_ck,
    heads_q,
    heads_k,
    stride_q,
    stride_qh,
    stride_k,
    stride_kh,
    stride_ck,
    stride_ckh,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_q, tiles_k = tl.cdiv(rows_q, ROWS), tl.cdiv(rows_k, ROWS)
    if tile < tiles_q:
        of_q = (tile, rows_q, heads_q, stride_q, stride_qh)
        turn_rows(q, q_turned, None, cos, sin, positions, of_q, (False, HALF, BLOCK_HALF, ROWS))
    elif tile < tiles_q + tiles_k:
        of_k = (tile - tiles_q, rows_k, heads_k, stride_k, stride_kh)
        turn_rows(k, k_turned, None, cos, sin, positions, of_k, (False, HALF, BLOCK_HALF, ROWS))
    else:
        of_ck = (tile - tiles_q - tiles_k, rows_ck, heads_k, stride_ck, stride_ckh)
        turn_rows(
            ck, ck_turned, None, cos, sin, window_positions, of_ck, (False, HALF, BLOCK_HALF, ROWS)
        )


def launch_turn(
    q: Tensor,
    k: Tensor,
    ck: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    window_positions: Tensor,
    q_turned: Tensor,
    k_turned: Tensor,
    ck_turned: Tensor,
) -> None:
    """Rotate q [N, HQ, D], k [N, HK, D] and ck [M, HK, D] by float32 tables [P, D // 2].

    Of what is read any token and head strides; what is written is contiguous.
    """
    turn_kernel[(_tiles(q, k, ck),)](  # pyright: ignore
        *(q, k, ck, q_turned, k_turned, ck_turned, cos, sin, positions, window_positions),
        *(q.shape[0] * q.shape[1], k.shape[0] * k.shape[1], ck.shape[0] * ck.shape[1]),
        *(q.shape[1], k.shape[1], *q.stride()[:2], *k.stride()[:2], *ck.stride()[:2]),
        **_half(q),
    )


@triton.jit
def turn_back_kernel(
    x,
    cos,
    sin,
    positions,
    rows,
    heads,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    layout = (tl.program_id(0), rows, heads, heads * 2 * HALF, 2 * HALF)
    turn_rows(x, x, None, cos, sin, positions, layout, (True, HALF, BLOCK_HALF, ROWS))


def launch_turn_back(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """x [N, H, D], contiguous, rotated back in place by float32 tables [P, D // 2]."""
    rows, heads = x.shape[0] * x.shape[1], x.shape[1]
    turn_back_kernel[(_tiles(x),)](x, cos, sin, positions, rows, heads, **_half(x))


@triton.jit
def finish_kernel(
    dq,
    dk,
    of_k,
    dv,
    of_v,
    cos,
    sin,
    positions,
    rows_q,
    rows_k,
    size_v,
    heads_q,
    heads_k,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
):
    tile = tl.program_id(0)
    tiles_q, tiles_k = tl.cdiv(rows_q, ROWS), tl.cdiv(rows_k, ROWS)
    if tile < tiles_q:
        layout_q = (tile, rows_q, heads_q, heads_q * 2 * HALF, 2 * HALF)
        turn_rows(dq, dq, None, cos, sin, positions, layout_q, (True, HALF, BLOCK_HALF, ROWS))
    elif tile < tiles_q + tiles_k:
        layout_k = (tile - tiles_q, rows_k, heads_k, heads_k * 2 * HALF, 2 * HALF)
        turn_rows(dk, dk, of_k, cos, sin, positions, layout_k, (True, HALF, BLOCK_HALF, ROWS))
    else:
        at = (tile - tiles_q - tiles_k).to(tl.int64) * TILE + tl.arange(0, TILE)
        total = tl.load(dv + at, mask=at < size_v).to(tl.float32)
        total += tl.load(of_v + at, mask=at < size_v).to(tl.float32)
        tl.store(dv + at, total.to(dv.dtype.element_ty), mask=at < size_v)


def launch_finish(
    dq: Tensor,
    dk: Tensor,
    of_k: Tensor,
    dv: Tensor,
    of_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
) -> None:
    """Rotate dq and dk back, then add of_k to dk and of_v to dv, all contiguous and in place.

    Sums are rounded once from float32, as rotations are.
    """
    finish_kernel[(_tiles(dq, dk) + triton.cdiv(dv.numel(), 4 * TILE),)](
        *(dq, dk, of_k, dv, of_v, cos, sin, positions),
        *(dq.shape[0] * dq.shape[1], dk.shape[0] * dk.shape[1], dv.numel()),
        *(dq.shape[1], dk.shape[1]),
        **_half(dq),
        TILE=4 * TILE,  # pyright: ignore
    )


@triton.jit
def places_of_rows(
    positions,
    slots,
    block_table,
    rows,
    heads,
    max_pages,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    """A program's heads of tokens: row and head, which are there, and their places in a cache."""
    number = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    row, head = number // heads, number % heads
    position = tl.load(positions + row, mask=row < rows, other=-1)
    live = position >= 0
    place = tl.load(slots + row, mask=live, other=0).to(tl.int64)
    index = tl.maximum(position, 0)
    if block_table is not None:
        page = place * max_pages + index // PAGE_SIZE
        place = tl.load(block_table + page, mask=live, other=0).to(tl.int64)
        index = index % PAGE_SIZE
    return row, head, live, place, index.to(tl.int64)


@triton.jit(do_not_specialize=["rows", "max_pages"])
def store_rows_kernel(
    x,
    cache,
    scale,
    positions,
    slots,
    block_table,
    rows,
    heads,
    max_pages,
    stride_x_row,
    stride_x_head,
    stride_c_slot,
    stride_c_token,
    stride_c_head,
    stride_s_slot,
    stride_s_token,
    stride_s_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LIMIT: tl.constexpr,  # the largest number of the cache's dtype
    INTEGERS: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    # As templates/shared/quantize.py.j2 has it for caches that other kernels write.
    row, head, live, place, index = places_of_rows(
        positions, slots, block_table, rows, heads, max_pages, PAGE_SIZE, TILE
    )
    dim = tl.arange(0, BLOCK_D)
    there = live[:, None] & (dim < HEAD_DIM)[None, :]
    x_ptrs = x + (row * stride_x_row + head * stride_x_head)[:, None] + dim[None, :]
    values = tl.load(x_ptrs, mask=there, other=0.0).to(tl.float32)
    # A maximum would overlook NaN.
    largest = tl.max(tl.where(values == values, tl.abs(values), float("inf")), 1)
    bits = (largest * (1.0 / LIMIT)).to(tl.int32, bitcast=True)  # pyright: ignore
    bits = tl.maximum((bits + 0x7FFFFF) & 0x7F800000, 0x00800000)  # the next power of two
    factor = bits.to(tl.float32, bitcast=True)
    factor = tl.where(largest < float("inf"), factor, float("nan"))  # pyright: ignore
    values *= (0x7F000000 - bits).to(tl.float32, bitcast=True)[:, None]
    if INTEGERS:
        values = (values + 12582912.0) - 12582912.0  # 1.5 * 2^23: to the nearest, ties to even
    c_at = place * stride_c_slot + index * stride_c_token + head * stride_c_head
    tl.store(cache + c_at[:, None] + dim[None, :], values.to(cache.dtype.element_ty), mask=there)
    s_at = place * stride_s_slot + index * stride_s_token + head * stride_s_head
    tl.store(scale + s_at, factor, mask=live)


def _rows_in_cache(
    x: Tensor,
    cache: Tensor,
    scale: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None,
) -> tuple[Any, ...]:
    """The arguments of both kernels of rows of narrow caches."""
    max_pages = 1 if block_table is None else block_table.shape[1]
    return (
        *(x, cache, scale, positions, slots, block_table, *x.shape[:2], max_pages),
        *(*x.stride()[:2], *cache.stride()[:3], *scale.stride()),
    )


def _sizes_of_rows(cache: Tensor, block_table: Tensor | None, tile: int) -> dict[str, Any]:
    """What both are specialized for: not the length of a slot, which may grow."""
    head_dim = cache.shape[3]
    sizes: dict[str, Any] = {"HEAD_DIM": head_dim, "BLOCK_D": triton.next_power_of_2(head_dim)}
    sizes["PAGE_SIZE"] = 1 if block_table is None else cache.shape[1]
    return sizes | {"TILE": tile, "num_warps": 4}


def launch_store_rows(
    x: Tensor,
    cache: Tensor,
    scale: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Write the rows of `store_rows`: any strides, but a last one of 1 in x and cache."""
    narrow: dict[str, Any] = {"INTEGERS": not cache.dtype.is_floating_point}
    narrow["LIMIT"] = CACHE_DTYPES[str(cache.dtype).removeprefix("torch.")]
    store_rows_kernel[(triton.cdiv(x.shape[0] * x.shape[1], STORED_ROWS),)](
        *_rows_in_cache(x, cache, scale, positions, slots, block_table),
        **_sizes_of_rows(cache, block_table, STORED_ROWS),
        **narrow,
    )


@triton.jit(do_not_specialize=["rows", "max_pages"])
def load_rows_kernel(
    x,
    cache,
    scale,
    positions,
    slots,
    block_table,
    rows,
    heads,
    max_pages,
    stride_x_row,
    stride_x_head,
    stride_c_slot,
    stride_c_token,
    stride_c_head,
    stride_s_slot,
    stride_s_token,
    stride_s_head,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    TILE: tl.constexpr,
):
    row, head, live, place, index = places_of_rows(
        positions, slots, block_table, rows, heads, max_pages, PAGE_SIZE, TILE
    )
    dim = tl.arange(0, BLOCK_D)
    inside = (row < rows)[:, None] & (dim < HEAD_DIM)[None, :]
    there = live[:, None] & inside
    c_at = place * stride_c_slot + index * stride_c_token + head * stride_c_head
    numbers = tl.load(cache + c_at[:, None] + dim[None, :], mask=there, other=0.0)
    s_at = place * stride_s_slot + index * stride_s_token + head * stride_s_head
    factor = tl.load(scale + s_at, mask=live, other=0.0)
    values = (numbers.to(tl.float32) * factor[:, None]).to(x.dtype.element_ty)
    x_at = row * stride_x_row + head * stride_x_head
    tl.store(x + x_at[:, None] + dim[None, :], values, mask=inside)


def launch_load_rows(
    x: Tensor,
    cache: Tensor,
    scale: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Write x, as `load_rows` returns it: any strides of the cache, but a last one of 1."""
    load_rows_kernel[(triton.cdiv(x.shape[0] * x.shape[1], LOADED_ROWS),)](
        *_rows_in_cache(x, cache, scale, positions, slots, block_table),
        **_sizes_of_rows(cache, block_table, LOADED_ROWS),
    )
