"""Checks of the ops' tensors. Values on a GPU are read only on request.

`FORMS` says what a tensor looks like, by its name, which means the same in every op. Each size in
it has one value in a call, so one function checks the tensors of all ops. What else an op demands
of its arguments is in functions that take them by name.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import CACHE_DTYPES
from nsagen.ops.reference._checks import check_windows
from nsagen.ops.reference.compress import Weight, check_weights, tensors_of

MOST_HEADS = 65535
"""The most heads of keys and values: a GPU's limit for the second axis of a grid."""


class Size(NamedTuple):
    """A dimension of `name / factor + added`; a name that is a number stands for itself."""

    name: str
    added: int = 0
    factor: int = 1


class Form(NamedTuple):
    """What a tensor looks like.

    Attributes:
        kind: "" for the one float dtype of a call, the last dimension contiguous; "dense" for the
            same, all contiguous; "gate" for that dtype or float32; "cache" for that dtype, or a
            narrow one beside a scale; "lse" for the dtype of softmax statistics, contiguous;
            "int32" and "float32", contiguous; "scale" for float32 with any strides.
        text: the sizes as they are written.
    """

    kind: str
    sizes: tuple[Size, ...]
    text: str


def _form(text: str) -> Form:
    """The form that is written e.g. "int32 [batch + 1]"."""
    kind, _, inner = text.removesuffix("]").partition("[")
    sizes = []
    for size in inner.split(", "):
        name, _, more = size.partition(" ")
        operator, _, number = more.partition(" ")
        sizes.append(Size(name, **{_OPERATORS[operator]: int(number)} if more else {}))
    return Form(kind.strip(), tuple(sizes), f"[{inner}]")


_OPERATORS = {"+": "added", "/": "factor"}

FORMS = {
    name: _form(form)
    for form, names in {
        "[N, HQ, D]": "q",
        "[N, H, D]": "x",
        "[T, HK, D]": "k",
        "[T, HK, Dv]": "v",
        "[N, HK, D]": "k_compress k_window",
        "[N, HK, Dv]": "v_compress v_window",
        "[windows, HK, D]": "ck",
        "[N, HK, Di]": "index_q",
        "[T, 1, Di]": "index_k",
        "[N, HQ, Dv]": "o_compressed o_selected o_sliding o_forced",
        "gate [N, HQ, 3]": "gate",
        "lse [N, HQ]": "lse lse_forced",
        "float32 [positions, D / 2]": "cos sin",
        "int32 [batch + 1]": "cu_seqlens cu_seqlens_q cu_seqlens_k y_cu_seqlens",
        "int32 [batch]": "q_start",
        "int32 [HK, N, topk]": "topk_idx",
        "int32 [N]": "positions slots",
        "int32 [windows]": "window_positions",
        "int32 [slots, max_pages]": "block_table",
        "cache [places, length, H, D]": "cache",
        "cache [places, length, HK, D]": "k_cache k_window_cache",
        "cache [places, length, HK, Dv]": "v_cache v_window_cache",
        "cache [places, windows, HK, D]": "ck_cache",
        "cache [places, windows, HK, Dv]": "cv_cache",
        "[slots, kernel_size, HK, D]": "k_raw",
        "[slots, kernel_size, HK, Dv]": "v_raw",
        "scale [places, length, H]": "scale",
        "scale [places, length, HK]": "k_scale v_scale",
        "scale [places, windows, HK]": "ck_scale cv_scale",
    }.items()
    for name in names.split()
}
"""N: rows of a call; T: rows of its keys; HQ, HK: heads of queries and of keys and values; places:
slots, or pages."""


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


def check_tensors(call: Any) -> None:
    """All tensors of a call have their `FORMS`."""
    check_forms(call.op, vars(call))


def tensors(**forms: str) -> Callable[[Any], None]:
    """`check_tensors` of an op in which some tensors have forms of its own."""
    own = FORMS | {name: _form(form) for name, form in forms.items()}
    return lambda call: check_forms(call.op, vars(call), own)


def check_forms(op: str, values: Mapping[str, Any], forms: Mapping[str, Form] = FORMS) -> None:
    """Tensors among the values have the forms of their names, and are on one device.

    A size that is named like a parameter, as kernel_size, has its value.
    """
    given = {n: x for n, x in values.items() if n in forms and isinstance(x, Tensor)}
    scales = {n: values.get(n.replace("cache", "scale")) for n in given if forms[n].kind == "cache"}
    rows = [n for n in given if forms[n].kind in ("", "dense", "cache") and scales.get(n) is None]
    dtype, device = given[rows[0]].dtype if rows else None, next(iter(given.values())).device
    known = {name: (size, name) for name, size in values.items() if isinstance(size, int)}
    for name, x in given.items():
        form = forms[name]
        if name in rows and (x.dtype != dtype or not x.dtype.is_floating_point):
            came = ", ".join(f"{n} {given[n].dtype}" for n in rows)
            fail(op, f"{', '.join(rows)} must share one float dtype", came, "convert them")
        wanted = _dtypes(form.kind, dtype)
        if wanted and x.dtype not in wanted:
            rule = f"{name} must be {' or '.join(str(d).removeprefix('torch.') for d in wanted)}"
            fail(op, rule, x.dtype, f"pass {name}.to({wanted[0]})")
        if x.device != device:
            came = f"{device} and {x.device}"
            fail(op, f"{', '.join(given)} must be on one device", came, f"move {name}")
        _check_sizes(op, name, x, form, known)
        _check_strides(op, name, x, form.kind)
    if any(scale is not None for scale in scales.values()):
        _check_scales(op, {n: given[n] for n in scales}, scales, dtype)
    if "HQ" in known and "HK" in known:
        _check_heads(op, known["HQ"][0], known["HK"][0])


def _dtypes(kind: str, dtype: torch.dtype | None) -> tuple[torch.dtype, ...]:
    """Those that a kind of form allows beside rows of this dtype; none where it says nothing."""
    if kind == "int32":
        return (torch.int32,)
    if kind in ("float32", "scale"):
        return (torch.float32,)
    if kind == "gate" and dtype is not None:
        return (dtype, torch.float32)
    if kind == "lse" and dtype is not None:
        return (torch.promote_types(dtype, torch.float32),)
    return ()


def _check_sizes(
    op: str, name: str, x: Tensor, form: Form, known: dict[str, tuple[int, str]]
) -> None:
    """The sizes agree with those that other tensors told; what this one tells is added to them."""
    if x.ndim != len(form.sizes):
        fail(op, f"{name} must have shape {form.text}", tuple(x.shape), "reshape it")
    for found, (letter, added, factor) in zip(x.shape, form.sizes, strict=True):
        if letter.isdigit():
            known[letter] = (int(letter), letter)
        size = (found - added) * factor
        wanted, origin = known.setdefault(letter, (size, name))
        if size != wanted or size < 0:
            here = [str(known[n][0] // f + a) if n in known else n for n, a, f in form.sizes]
            rule = f"{name} must have shape {form.text} = [{', '.join(here)}]"
            why = "" if origin == letter else f": {letter} is {origin}'s"
            fail(op, rule, tuple(x.shape), f"reshape it{why}")
    if x.shape[-1] == 0 and form.kind in ("", "dense", "gate", "cache"):
        came = tuple(x.shape)
        fail(op, f"{name} must not be empty in its last dimension", came, "slice less")


def _check_strides(op: str, name: str, x: Tensor, kind: str) -> None:
    if kind in ("dense", "lse", "int32", "float32"):
        if not x.is_contiguous():
            came = f"strides {tuple(x.stride())}"
            fail(op, f"{name} must be contiguous", came, "call .contiguous()")
    elif kind != "scale" and x.stride(-1) != 1 and x.shape[-1] > 1 and x.numel() > 0:
        came = f"strides {tuple(x.stride())}"
        fail(op, f"{name}'s last dimension must be contiguous", came, "call .contiguous()")


def _check_scales(
    op: str,
    caches: dict[str, Tensor],
    scales: dict[str, Tensor | None],
    dtype: torch.dtype | None,
) -> None:
    """Caches of a narrow dtype, all with a scale, beside rows of this dtype, if any."""
    given = {name: scale for name, scale in scales.items() if scale is not None}
    if len(given) < len(caches):
        rule = f"{', '.join(caches)} must all have scales, or none of them"
        fail(op, rule, f"scales of {', '.join(given)}", "pass the rest, or none")
    if dtype == torch.float16:
        rule = "quantized caches need bfloat16 or float32 beside them, which hold their values"
        fail(op, rule, dtype, "use bfloat16, or caches of float16")
    first = next(iter(caches.values()))
    for name, cache in caches.items():
        if str(cache.dtype).removeprefix("torch.") not in CACHE_DTYPES:
            rule = f"{name} with a scale must be {' or '.join(CACHE_DTYPES)}"
            fail(op, rule, cache.dtype, "allocate it so, or pass no scales")
        if cache.dtype != first.dtype:
            fail(op, f"{', '.join(caches)} must share one dtype", cache.dtype, "convert them")
    for one, other in (("k_cache", "v_cache"), ("ck_cache", "cv_cache")):
        if one in given and other in given and given[one].stride() != given[other].stride():
            came = f"strides {given[one].stride()} and {given[other].stride()}"
            names = f"{one} and {other}".replace("cache", "scale")
            fail(op, f"{names} must have one layout", came, "make both new")


def _check_heads(op: str, query_heads: int, kv_heads: int) -> None:
    """Key/value heads are the second axis of most grids, which has MOST_HEADS places."""
    if kv_heads > MOST_HEADS:
        rule = f"there must be at most {MOST_HEADS} key/value heads"
        fail(op, rule, kv_heads, "call it with some of the heads at a time")
    if kv_heads == 0 or query_heads % kv_heads:
        rule = "query heads must be a multiple of key/value heads"
        fail(op, rule, f"{query_heads} and {kv_heads}", "repeat or drop heads")


def check_cu_seqlens(
    op: str, name: str, cu_seqlens: Tensor, x: Tensor, *, spare: bool = False
) -> None:
    """If values are read: from 0, never falling, to x's rows.

    Args:
        spare: x may have rows past the last sequence.
    """
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
    """The values of offsets of queries and of the windows that they see."""
    check_cu_seqlens(op, "cu_seqlens_q", cu_seqlens_q, q)
    check_cu_seqlens(op, "cu_seqlens_k", cu_seqlens_k, k, spare=True)
    check_q_start(op, q_start)
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
    check_chunk(op, cu_seqlens, cu_seqlens_k, q_start)


def check_topk_idx(op: str, topk_idx: Tensor, block_size: int) -> None:
    """The entries of topk_idx may be any."""
    if topk_idx.shape[-1] < 1:
        rule, remedy = "topk_idx must have an entry for each row", "pass -1 for nothing selected"
        fail(op, rule, tuple(topk_idx.shape), remedy)
    if block_size < 1:
        fail(op, "block_size must be positive", block_size, "64 or 128 are usual")


def check_window(op: str, window_size: int) -> None:
    if window_size < 1:
        fail(op, "window_size must be positive", window_size, "1 is the token itself")


def check_q_start(op: str, q_start: Tensor | None) -> None:
    """If values are read: not negative."""
    if q_start is not None and values_are_read(q_start) and bool((q_start < 0).any()):
        fail(op, "q_start must not be negative", q_start.tolist(), "pass positions")


def check_chunk(
    op: str, cu_seqlens: Tensor, cu_seqlens_k: Tensor | None, q_start: Tensor | None
) -> None:
    """If values are read: each query's own token is among its sequence's keys."""
    check_q_start(op, q_start)
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
