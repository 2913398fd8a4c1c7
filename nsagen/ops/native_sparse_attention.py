"""The whole block: compression, rope, the three branches and their gated sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES, branches_on
from nsagen.ops import reference
from nsagen.ops._checks import check_forms, check_range, check_tensors, fail
from nsagen.ops._derive import Gradients, called, op_like
from nsagen.ops._launch import fixed_kernel, key_of, on_kernels, scale_of
from nsagen.ops._op import apply, define_op
from nsagen.ops.branch_attention import attend
from nsagen.ops.compress import compress_backward, compress_windows
from nsagen.ops.gated_attention import (
    BRANCH_OUTPUTS,
    TAKEN,
    allocate_branches,
    branch_deltas,
    branches_backward,
    branches_forward,
)
from nsagen.ops.gated_sum import gate_of
from nsagen.ops.lengths import Lengths, lengths_forward, lengths_of
from nsagen.ops.reference.compress import Weight, layers_of, weight_of
from nsagen.ops.rope import check_positions, rope_forward
from nsagen.runtime import Dispatcher

_OP = "native_sparse_attention"


def native_sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    *,
    cu_seqlens: Tensor,
    compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    window_size: int,
    init_blocks: int = 1,
    local_blocks: int = 2,
    w_k: Weight = None,
    w_v: Weight = None,
    pe: Tensor | None = None,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    softmax_scale: float | None = None,
    branches: Sequence[str] = BRANCHES,
    v_compress_type: str | None = None,
    pe_v: Tensor | None = None,
    lengths: Lengths | None = None,
    dispatcher: Dispatcher | None = None,
) -> Tensor:
    """Gated sum of compressed, selected and sliding-window attention.

    Keys and values are compressed before rope; then q and k turn by their token's position and
    compressed key i by position i * kernel_stride. No step waits for the device.

    Args:
        q: [N, HQ, D]; k: [N, HK, D]; v: [N, HK, Dv], all before rope.
        gate: [N, HQ, 3], after the sigmoid: compressed, selected, sliding.
        cu_seqlens: int32 [batch + 1].
        compress_type: one of `nsagen.core.workload.COMPRESS_TYPES`.
        kernel_size: tokens of a window; kernel_stride: tokens between two windows' starts.
        block_size: tokens of a block.
        topk: blocks selected a token, with init_blocks at the start and local_blocks up to
            its own always among them.
        window_size: tokens that the sliding window sees, the query's own among them; 0 turns
            that branch off.
        w_k, w_v: weights that compress keys and values, as in `compress`; None for avgpool.
        pe: [HK, kernel_size, D], added to a window's keys, or None.
        cos, sin: float32 [P, D // 2], or None for no rope.
        softmax_scale: of the scores; 1/sqrt(D) by default.
        branches: those that are on; the gate's columns of the others are ignored.
        v_compress_type: how values are compressed, where it is not compress_type.
        pe_v: [HK, kernel_size, Dv], added to a window's values, or None.
        lengths: prepared ones of this batch, which layers may share; made here by default.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [N, HQ, Dv]. Differentiable in q, k, v, gate, w_k, w_v, pe and pe_v.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    on = branches_on(_OP, branches, window_size)
    if (cos is None) != (sin is None):
        came = "cos" if sin is None else "sin"
        fail(_OP, "cos and sin must come together", came, "pass both")
    if lengths is not None:
        lengths_of(_OP, cu_seqlens, (kernel_size, kernel_stride), lengths, q=q)
    (first_k, second_k), (first_v, second_v) = layers_of(w_k), layers_of(w_v)
    weights = (first_k, first_v, pe, pe_v)
    scale, key = scale_of(softmax_scale, q), key_of(dispatcher)
    statics = (
        *(compress_type, v_compress_type or compress_type, kernel_size, kernel_stride),
        *(block_size, topk, init_blocks, local_blocks, window_size, scale),
    )
    plain = second_k is None and second_v is None and len(on) == len(BRANCHES)
    trains = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, gate, *weights)
    )
    fused = plain and trains and cos is not None and sin is not None and on_kernels(q)
    made: tuple[Any, Any, Any] = (None, None, None) if lengths is None else lengths.tensors
    if lengths is None and fused and q.ndim == 3:  # both passes read them
        made = lengths_forward(cu_seqlens, q.shape[0], kernel_size, kernel_stride)
    inputs = (q, k, v, gate, cu_seqlens, *made, *weights)
    if fused:
        return attention_with_gradients(*inputs, cos, sin, *statics, key)[0]
    tables = (cos, sin, second_k, second_v)
    return attention_without_gradients(*inputs, *tables, *statics, " ".join(on), key)


@define_op(returns="o", allocate=lambda q, v: q.new_empty((*q.shape[:2], v.shape[2])))
def attention_without_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor | None,
    window_cu_seqlens: Tensor | None,
    window_positions: Tensor | None,
    w_k: Tensor | None,
    w_v: Tensor | None,
    pe: Tensor | None,
    pe_v: Tensor | None,
    cos: Tensor | None,
    sin: Tensor | None,
    w_k2: Tensor | None,
    w_v2: Tensor | None,
    compress_type: str,
    v_compress_type: str,
    kernel_size: int,
    kernel_stride: int,
    block_size: int,
    topk: int,
    init_blocks: int,
    local_blocks: int,
    window_size: int,
    softmax_scale: float,
    branches: str,
    dispatcher: str,
) -> Tensor:
    """`native_sparse_attention` on tensors by themselves, without gradients of its own.

    Args:
        positions, window_cu_seqlens, window_positions: see `Lengths`; made here if None.
        w_k2, w_v2: second layers of an mlp.
        branches: names of those that are on, with blanks between.
    """
    check_forms(_OP, {"q": q, "k": k, "v": v})
    on, sizes = branches.split(), (kernel_size, kernel_stride)
    needs_windows = "compressed" in on or "selected" in on  # it ranks their scores
    ends, ck, cv = cu_seqlens, None, None
    if needs_windows or cos is not None:
        if positions is None or window_cu_seqlens is None or window_positions is None:
            lengths = lengths_of(_OP, cu_seqlens, sizes, None, q=q)
            positions, window_cu_seqlens, window_positions = lengths.tensors
        ends = window_cu_seqlens
    if needs_windows:
        if "compressed" not in on:  # nothing reads the values: the cheapest will do
            v_compress_type, w_v, w_v2, pe_v = "avgpool", None, None, None
        more = (*sizes, dispatcher)
        weights = weight_of(w_k, w_k2), weight_of(w_v, w_v2)
        ck = compress_windows(k, weights[0], pe, cu_seqlens, ends, compress_type, *more)
        cv = compress_windows(v, weights[1], pe_v, cu_seqlens, ends, v_compress_type, *more)
    if cos is not None and sin is not None:
        assert positions is not None
        assert window_positions is not None
        q = rope_forward(q, cos, sin, positions, dispatcher)
        k = rope_forward(k, cos, sin, positions, dispatcher)
        ck = None if ck is None else rope_forward(ck, cos, sin, window_positions, dispatcher)
    if len(on) < len(BRANCHES):
        gate = apply(gate_of, gate, on)
    selection = (block_size, topk, init_blocks, local_blocks, window_size, softmax_scale)
    more = (None, None, *sizes, *selection, branches, dispatcher)
    return attend(q, ck, cv, k, v, None, None, gate, cu_seqlens, ends, *more)


def _check_windows(op: str, cos: Tensor, window_positions: Tensor) -> None:
    check_range(op, "window_positions", window_positions, 0, cos.shape[0])


@define_op(
    returns="q_turned k_turned ck_turned",
    allocate=lambda q, k, ck: (q.new_empty(q.shape), k.new_empty(k.shape), ck.new_empty(ck.shape)),
    check=(check_tensors, check_positions, _check_windows),
    kernel=lambda q: fixed_kernel("launch_turn", q),
    launch="q k ck cos sin positions window_positions q_turned k_turned ck_turned",
)
def turn(
    q: Tensor,
    k: Tensor,
    ck: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    window_positions: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """`rope` of q, k and compressed keys in one launch."""
    q, k = (reference.rope(x, cos, sin, positions) for x in (q, k))
    return q, k, reference.rope(ck, cos, sin, window_positions)


@define_op(
    returns="",
    allocate=lambda: None,
    kernel=lambda x: fixed_kernel("launch_turn_back", x),
    launch="x cos sin positions",
    mutates="x",
)
def turn_back(x: Tensor, cos: Tensor, sin: Tensor, positions: Tensor) -> None:
    """The gradient of `rope`, in place: x [N, H, D], contiguous, rotated back."""
    x.copy_(reference.rope(x, cos, -sin, positions))


@define_op(
    returns="",
    allocate=lambda: None,
    kernel=lambda dq: fixed_kernel("launch_finish", dq),
    launch="dq dk of_k dv of_v cos sin positions",
    mutates="dq dk dv",
)
def finish_gradients(
    dq: Tensor,
    dk: Tensor,
    of_k: Tensor,
    dv: Tensor,
    of_v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
) -> None:
    """Rotate dq and dk back, then dk += of_k and dv += of_v; all contiguous."""
    for x in (dq, dk):
        x.copy_(reference.rope(x, cos, -sin, positions))
    dk += of_k
    dv += of_v


def _of_keys(call: Any) -> dict[str, Any]:
    """What compression takes of keys under other names than the call's."""
    return {"x": call.k, "w": call.w_k, "y_cu_seqlens": call.window_cu_seqlens}


def _of_values(call: Any) -> dict[str, Any]:
    """The same of values."""
    how = {"pe": call.pe_v, "compress_type": call.v_compress_type}
    return {"x": call.v, "w": call.w_v, "y_cu_seqlens": call.window_cu_seqlens, **how}


def _gradients(call: Any) -> tuple[Tensor, ...]:
    """Gradients from that of the gated sum; only by kernels."""
    turned = {"q": call.q_turned, "k": call.k_turned}
    dq, dk, dv, dck, dcv, dgate = called(branches_backward, call, **turned)
    turn_back(dck, call.cos, call.sin, call.window_positions)
    of_k, dw_k, dpe = called(compress_backward, call, dy=dck, **_of_keys(call))
    of_v, dw_v, dpe_v = called(compress_backward, call, dy=dcv, **_of_values(call))
    called(finish_gradients, call, dq=dq, dk=dk, of_k=of_k, dv=dv, of_v=of_v)
    return dq, dk, dv, dgate, dw_k, dw_v, dpe, dpe_v


def _allocate(q: Tensor, k: Tensor, v: Tensor, topk: int, kernel_stride: int) -> tuple[Tensor, ...]:
    windows = [x.new_empty((x.shape[0] // kernel_stride, *x.shape[1:])) for x in (k, v)]
    turned = (x.new_empty(x.shape) for x in (q, k))
    return *allocate_branches(q, k, v, topk), *turned, *windows


def _attend(call: Any) -> tuple[Tensor, ...]:
    """The outputs of `branches_forward`, and what its gradients need in addition."""
    check_forms(_OP, {"q": call.q, "k": call.k, "v": call.v})
    ck = called(compress_windows, call, **_of_keys(call))
    cv = called(compress_windows, call, **_of_values(call))
    q, k, ck = called(turn, call, ck=ck)
    return *called(branches_forward, call, q=q, k=k, ck=ck, cv=cv), q, k, ck, cv


attention_with_gradients = op_like(
    "attention_with_gradients",
    attention_without_gradients,
    _attend,
    omit="w_k2 w_v2 branches",
    returns=f"{BRANCH_OUTPUTS} q_turned k_turned ck cv",
    allocate=_allocate,
    gradients=Gradients(
        "q k v gate w_k w_v pe pe_v",
        body=_gradients,
        takes=f"{TAKEN} q_turned k_turned ck cv",
        first=branch_deltas,
        omit="q",
        like={"q": "q_turned"},
    ),
)
