"""Small kernels that are the same for every workload. They have nothing to tune, so they are not
generated: the lengths of a batch, what the backward pass does between its large ones, and rows of
narrow caches."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from nsagen.core.workload import CACHE_DTYPES

TILE = 512  # tokens a program
CHUNK = 1024  # sequences that a program looks at in one go
STORED_ROWS = 8  # heads of tokens a program


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


@triton.jit
def branch_columns(gate, delta, at, columns, dgate, branch, row, rows):
    """One branch's gates and deltas as columns, and the deltas as its gates' gradients."""
    inside, size = row < rows, rows.to(tl.int64)
    weight = tl.load(gate + branch, mask=inside).to(tl.float32)
    value = tl.load(delta + at, mask=inside).to(tl.float32)
    tl.store(columns + branch * size + row, weight, mask=inside)
    tl.store(columns + (branch + 3) * size + row, value, mask=inside)
    at_gate = row.to(tl.int64) * 3 + branch
    tl.store(dgate + at_gate, value.to(dgate.dtype.element_ty), mask=inside)


# Columns of one tensor [N, HQ, 3] lie 4 bytes apart.
@triton.jit(
    do_not_specialize=["rows"],
    do_not_specialize_on_alignment=["compressed", "selected", "sliding"],
)
def columns_kernel(
    gate,
    compressed,
    selected,
    sliding,
    columns,
    dgate,
    rows,
    heads,
    stride_g,
    stride_gh,
    stride_c,
    stride_ch,
    stride_s,
    stride_sh,
    stride_w,
    stride_wh,
    TILE: tl.constexpr,
):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)
    token, head = (row // heads).to(tl.int64), (row % heads).to(tl.int64)
    gate += token * stride_g + head * stride_gh
    at_c, at_s = token * stride_c + head * stride_ch, token * stride_s + head * stride_sh
    at_w = token * stride_w + head * stride_wh
    branch_columns(gate, compressed, at_c, columns, dgate, 0, row, rows)
    branch_columns(gate, selected, at_s, columns, dgate, 1, row, rows)
    branch_columns(gate, sliding, at_w, columns, dgate, 2, row, rows)


def launch_columns(
    gate: Tensor,
    compressed: Tensor,
    selected: Tensor,
    sliding: Tensor,
    columns: Tensor,
    dgate: Tensor,
) -> None:
    """Write gates and deltas as columns, and the gates' gradient.

    Args:
        gate: [N, HQ, 3], the last dimension contiguous; compressed, selected, sliding: [N, HQ],
            any strides.
        columns: float32 [6, N, HQ], contiguous: the gates' columns, then the other three.
        dgate: [N, HQ, 3], contiguous: the other three in any dtype.
    """
    rows, heads = columns.shape[1] * columns.shape[2], columns.shape[2]
    columns_kernel[(triton.cdiv(rows, TILE),)](
        *(gate, compressed, selected, sliding, columns, dgate, rows, heads),
        *(*gate.stride()[:2], *compressed.stride(), *selected.stride(), *sliding.stride()),
        TILE=TILE,
        num_warps=4,  # pyright: ignore
    )


@triton.jit
def add_tile(x, more, at, size):
    total = tl.load(x + at, mask=at < size).to(tl.float32)
    total += tl.load(more + at, mask=at < size).to(tl.float32)
    tl.store(x + at, total.to(x.dtype.element_ty), mask=at < size)


@triton.jit
def add_kernel(x, more_x, y, more_y, size_x, size_y, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)
    if tl.program_id(1) == 0:
        add_tile(x, more_x, at, size_x)
    else:
        add_tile(y, more_y, at, size_y)


def launch_add(x: Tensor, more_x: Tensor, y: Tensor, more_y: Tensor) -> None:
    """x += more_x and y += more_y, of a shape each, contiguous, rounded once from float32."""
    sizes = (x.numel(), y.numel())
    add_kernel[(triton.cdiv(max(sizes), 4 * TILE), 2)](
        x,
        more_x,
        y,
        more_y,
        *sizes,
        TILE=4 * TILE,
        num_warps=4,  # pyright: ignore
    )


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
    index = index.to(tl.int64)

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


def launch_store_rows(
    x: Tensor,
    cache: Tensor,
    scale: Tensor,
    positions: Tensor,
    slots: Tensor,
    block_table: Tensor | None = None,
) -> None:
    """Write the rows of `store_rows`: any strides, but a last one of 1 in x and cache."""
    rows, heads, head_dim = x.shape
    limit = CACHE_DTYPES[str(cache.dtype).removeprefix("torch.")]
    store_rows_kernel[(triton.cdiv(rows * heads, STORED_ROWS),)](
        *(x, cache, scale, positions, slots, block_table, rows, heads),
        1 if block_table is None else block_table.shape[1],
        *(*x.stride()[:2], *cache.stride()[:3], *scale.stride()),
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        LIMIT=limit,
        INTEGERS=not cache.dtype.is_floating_point,
        PAGE_SIZE=cache.shape[1],
        TILE=STORED_ROWS,
        num_warps=4,  # pyright: ignore
    )
