"""Checks of the ops' tensors. Values on a GPU are read only on request."""

from __future__ import annotations

import itertools
import os
from typing import NoReturn

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.ops.reference._checks import check_windows
from nsagen.ops.reference.compress import Weight, check_weights, tensors_of

MOST_HEADS = 65535
"""The most heads of keys and values: a GPU's limit for the second axis of a grid."""


def values_are_read(x: Tensor) -> bool:
    """Whether a call checks the values of offsets, positions and slots before it uses them.

    On a CPU always. A GPU would have to be waited for, each time: there only where the variable
    NSAGEN_CHECK_VALUES is 1, and never while a CUDA graph is captured.
    """
    if x.device.type == "cpu":
        return True
    if x.device.type != "cuda" or os.environ.get("NSAGEN_CHECK_VALUES") != "1":
        return False
    return not torch.cuda.is_current_stream_capturing()


def fail(op: str, rule: str, came: object, remedy: str) -> NoReturn:
    """Raise the error of a broken contract, on one line."""
    raise InvalidInputError(f"{op}: {rule}; got {came}; {remedy}")


def check_rows(op: str, dims: int = 3, **tensors: Tensor | None) -> None:
    """The tensors are [rows, heads, ..., dim] of one float dtype on one device, dim contiguous."""
    first: Tensor | None = None
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        first = tensor if first is None else first
        if tensor.ndim != dims:
            fail(op, f"{name} must have {dims} dimensions", shapes(tensors), "reshape it")
        if tensor.shape[-1] == 0:
            fail(
                op, f"{name} must not be empty in its last dimension", shapes(tensors), "slice less"
            )
        if not tensor.dtype.is_floating_point or tensor.dtype != first.dtype:
            came = ", ".join(f"{n} {t.dtype}" for n, t in tensors.items() if t is not None)
            fail(op, f"{', '.join(tensors)} must share one float dtype", came, "convert them")
        if tensor.device != first.device:
            came = f"{first.device} and {tensor.device}"
            fail(op, f"{', '.join(tensors)} must be on one device", came, f"move {name}")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1 and tensor.numel() > 0:
            came = f"strides {tuple(tensor.stride())}"
            fail(op, f"{name}'s last dimension must be contiguous", came, "call .contiguous()")


def check_attention(op: str, q: Tensor, k: Tensor, v: Tensor) -> None:
    """q [N, HQ, D], k [T, HK, D], v [T, HK, Dv], HQ a multiple of HK, beside `check_rows`."""
    check_rows(op, q=q, k=k, v=v)
    check_keys(op, q, k)
    if k.shape[:2] != v.shape[:2]:
        came = shapes({"k": k, "v": v})
        fail(op, "k and v must agree in tokens and heads", came, "pass k [T, HK, D], v [T, HK, Dv]")


def check_scores(op: str, q: Tensor, k: Tensor) -> None:
    """q [N, HQ, D] and k [T, HK, D] of one call, HQ a multiple of HK."""
    check_rows(op, q=q, k=k)
    check_keys(op, q, k)


def check_keys(op: str, q: Tensor, k: Tensor) -> None:
    """The last two dimensions of q and k: HQ, D and HK, D with HQ a multiple of HK.

    Key/value heads are the second axis of most grids, which has MOST_HEADS places.
    """
    if k.shape[-2] > MOST_HEADS:
        rule = f"there must be at most {MOST_HEADS} key/value heads"
        fail(op, rule, k.shape[-2], "call it with some of the heads at a time")
    if q.shape[-1] != k.shape[-1]:
        came = shapes({"q": q, "k": k})
        fail(op, "q and k must agree in head_dim, their last size", came, "slice or project one")
    if k.shape[-2] == 0 or q.shape[-2] % k.shape[-2]:
        rule = "query heads must be a multiple of key/value heads"
        fail(op, rule, f"{q.shape[-2]} and {k.shape[-2]}", "repeat or drop heads")


def check_like(op: str, like: tuple[str, Tensor], **tensors: Tensor) -> None:
    """The tensors have the shape of `like`."""
    for name, tensor in tensors.items():
        if tensor.shape != like[1].shape:
            came = shapes({like[0]: like[1], name: tensor})
            fail(op, f"{name} must have {like[0]}'s shape", came, "pass branches of one call")


def check_indices(op: str, x: Tensor, shape: tuple[int, ...], **tensors: Tensor) -> None:
    """int32, contiguous, of this shape, on x's device."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.int32:
            fail(op, f"{name} must be int32", tensor.dtype, f"pass {name}.to(torch.int32)")
        if tuple(tensor.shape) != tuple(shape) or not tensor.is_contiguous():
            came = f"{tuple(tensor.shape)}, strides {tuple(tensor.stride())}"
            fail(op, f"{name} must be contiguous with shape {tuple(shape)}", came, "reshape it")
        if tensor.device != x.device:
            came = f"{tensor.device} and {x.device}"
            fail(op, f"{name} must be on the device of the other tensors", came, f"move {name}")


def check_cu_seqlens(
    op: str, name: str, cu_seqlens: Tensor, x: Tensor, *, spare: bool = False
) -> None:
    """int32 [batch + 1] on x's device. If values are read: from 0, never falling, to x's rows.

    Args:
        spare: x may have rows past the last sequence.
    """
    check_offsets(op, name, cu_seqlens)
    check_indices(op, x, (cu_seqlens.shape[0],), **{name: cu_seqlens})
    if not values_are_read(cu_seqlens):
        return
    ends, rows = cu_seqlens.tolist(), x.shape[0]
    right = ends[0] == 0 and (ends[-1] <= rows if spare else ends[-1] == rows)
    if not right or any(a > b for a, b in itertools.pairwise(ends)):
        rule = f"{name} must start at 0, never fall and end at {rows}, the number of rows"
        came = f"{ends[:8]}{'...' if len(ends) > 8 else ''}"
        fail(op, rule, came, "pass the running sum of the sequence lengths, 0 first")


def check_windowed(
    op: str,
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_start: Tensor | None,
    kernel_size: int,
    kernel_stride: int,
) -> None:
    """The offsets of queries and of the windows that they see, and where chunks start."""
    check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, k, spare=True)
    check_like(op, ("cu_seqlens_q", cu_seqlens_q), cu_seqlens_k=cu_seqlens_k)
    check_q_start(op, cu_seqlens_q, q_start)
    check_windows(op, kernel_size, kernel_stride)


def check_packed(
    op: str,
    q: Tensor,
    k: Tensor,
    cu_seqlens: Tensor,
    cu_seqlens_k: Tensor | None = None,
    q_start: Tensor | None = None,
) -> None:
    """The offsets of queries and of their keys, and where chunks start."""
    if cu_seqlens_k is None and q.shape[0] != k.shape[0]:
        came = f"{q.shape[0]} and {k.shape[0]}"
        fail(op, "q and k must have the same tokens", came, "pack one, or pass cu_seqlens_k")
    check_cu_seqlens(op, "cu_seqlens", cu_seqlens, q)
    if cu_seqlens_k is not None:
        check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, k)
        check_like(op, ("cu_seqlens", cu_seqlens), cu_seqlens_k=cu_seqlens_k)
    check_chunk(op, cu_seqlens, cu_seqlens_k, q_start)


def check_offsets(op: str, name: str, cu_seqlens: Tensor) -> None:
    """int32 [batch + 1]: what can be checked without the packed tensor or any value."""
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] == 0:
        rule = f"{name} must have shape [batch + 1]"
        fail(op, rule, tuple(cu_seqlens.shape), "start with 0 and append the running sum")
    if cu_seqlens.dtype != torch.int32:
        fail(op, f"{name} must be int32", cu_seqlens.dtype, f"pass {name}.to(torch.int32)")


def check_topk_idx(
    op: str,
    q: Tensor,
    topk_idx: Tensor,
    block_size: int,
    k: Tensor | None = None,
    k_cache: Tensor | None = None,
) -> None:
    """int32 [key heads, rows of q, topk], contiguous; its values may be any. And block_size."""
    keys, topk = k if k_cache is None else k_cache, topk_idx.shape[-1] if topk_idx.ndim else 0
    assert keys is not None
    check_indices(op, q, (keys.shape[-2], q.shape[0], topk), topk_idx=topk_idx)
    if topk < 1:
        rule, remedy = "topk_idx must have an entry for each row", "pass -1 for nothing selected"
        fail(op, rule, tuple(topk_idx.shape), remedy)
    if block_size < 1:
        fail(op, "block_size must be positive", block_size, "64 or 128 are usual")


def check_window(op: str, window_size: int) -> None:
    if window_size < 1:
        fail(op, "window_size must be positive", window_size, "1 is the token itself")


def check_q_start(op: str, cu_seqlens: Tensor, q_start: Tensor | None) -> None:
    """None, or int32 [batch] on the device of cu_seqlens. If values are read: not negative."""
    if q_start is None:
        return
    check_indices(op, cu_seqlens, (cu_seqlens.shape[0] - 1,), q_start=q_start)
    if values_are_read(q_start) and bool((q_start < 0).any()):
        fail(op, "q_start must not be negative", q_start.tolist(), "pass positions")


def check_chunk(
    op: str, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q_start: Tensor | None
) -> None:
    """q_start, and if values are read: each query's own token is among its sequence's keys."""
    check_q_start(op, cu_seqlens, q_start)
    if (cu_seqlens_k is None and q_start is None) or not values_are_read(cu_seqlens):
        return
    queries, keys = cu_seqlens.diff(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).diff()
    ends = queries if q_start is None else queries + q_start
    if bool(((ends > keys) & (queries > 0)).any()):
        rule = "each query's own token must be among its sequence's keys"
        came = f"queries that end at {ends.tolist()} of {keys.tolist()} keys"
        fail(op, rule, came, "pass all keys up to the last query, and q_start")


def check_range(op: str, name: str, values: Tensor, least: int, end: int) -> None:
    """If values are read: least <= value < end. Otherwise kernels rely on the caller."""
    if not values_are_read(values) or values.numel() == 0:
        return
    low, high = int(values.min()), int(values.max())
    if low < least or high >= end:
        rule = f"{name} must be from {least} to {end - 1}"
        fail(op, rule, f"{low} to {high}", "make the table or cache longer, or fix the numbers")


def check_compress_weights(
    op: str, x: Tensor, w: Weight, pe: Tensor | None, compress_type: str, size: int
) -> None:
    """w and pe have compress_type's shapes for windows of x [N, HK, D], and x's dtype."""
    check_weights(op, torch.Size((size, *x.shape[1:])), w, pe, compress_type)
    weights = [("the weight", tensor) for tensor in tensors_of(w)]
    for name, tensor in (*weights, ("pe", pe)):
        if tensor is None:
            continue
        if (tensor.dtype, tensor.device) != (x.dtype, x.device):
            rule = f"{name} must be {x.dtype} on {x.device}, as the tokens are"
            fail(op, rule, f"{tensor.dtype} on {tensor.device}", "convert it")
        if not tensor.is_contiguous():
            fail(op, f"{name} must be contiguous", f"strides {tensor.stride()}", "make it so")


def shapes(tensors: dict[str, Tensor | None]) -> str:
    """`q (5, 4, 64), k (5, 2, 64)`."""
    return ", ".join(f"{n} {tuple(t.shape)}" for n, t in tensors.items() if t is not None)
