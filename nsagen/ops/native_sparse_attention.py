"""The whole block: compression, rope, the three branches and their gated sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES, branches_on
from nsagen.ops._checks import check_attention, fail
from nsagen.ops._launch import key_of, on_kernels, scale_of
from nsagen.ops._op import apply, define_op
from nsagen.ops.branch_attention import attend
from nsagen.ops.compress import compress_backward, compress_windows
from nsagen.ops.gated_attention import branches_backward, branches_forward, sum_branches
from nsagen.ops.gated_sum import gate_of
from nsagen.ops.lengths import Lengths, lengths_of
from nsagen.ops.reference.compress import Weight, tensors_of, weight_of
from nsagen.ops.rope import rope_forward
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
    first_k, second_k, *_ = (*tensors_of(w_k), None, None)
    first_v, second_v, *_ = (*tensors_of(w_v), None, None)
    scale, key = scale_of(softmax_scale, q), key_of(dispatcher)
    sizes = _Sizes(
        *(compress_type, v_compress_type or compress_type, kernel_size, kernel_stride),
        *(block_size, topk, init_blocks, local_blocks, window_size, scale, key),
    )
    weights = (first_k, first_v, pe, pe_v)
    plain = second_k is None and second_v is None and len(on) == len(BRANCHES)
    trains = torch.is_grad_enabled() and any(
        x is not None and x.requires_grad for x in (q, k, v, gate, *weights)
    )
    if plain and trains and cos is not None and sin is not None and on_kernels(q):
        if lengths is None:
            lengths = lengths_of(_OP, cu_seqlens, (kernel_size, kernel_stride), None, q=q)
        outputs: Any = attention_with_gradients(
            *(q, k, v, gate, cu_seqlens, *lengths.tensors, *weights, cos, sin, sizes)
        )
        o_compressed, lse_compressed, o_selected, lse_selected, o_sliding, lse_sliding, *_ = outputs
        compressed, selected = (o_compressed, lse_compressed), (o_selected, lse_selected)
        return sum_branches(*compressed, *selected, o_sliding, lse_sliding, gate, key)
    made = (None, None, None) if lengths is None else lengths.tensors
    tables = (cos, sin, second_k, second_v)
    return attention_of(q, k, v, gate, cu_seqlens, *made, *weights, *tables, sizes, on)


class _Sizes(NamedTuple):
    """The static parameters of a call, its scale and its dispatcher."""

    compress_type: str
    v_compress_type: str
    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    window_size: int
    softmax_scale: float
    dispatcher: str

    @property
    def windows(self) -> tuple[int, int]:
        return self.kernel_size, self.kernel_stride

    @property
    def selection(self) -> tuple[int, int, int, int]:
        return self.block_size, self.topk, self.init_blocks, self.local_blocks


@define_op(returns="o")
def attention_of(
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
    sizes: _Sizes,
    branches: tuple[str, ...],
) -> Tensor:
    """`native_sparse_attention` on tensors by themselves, without gradients of its own."""
    check_attention(_OP, q, k, v)
    needs_windows = "compressed" in branches or "selected" in branches  # it ranks their scores
    if window_cu_seqlens is None and (needs_windows or cos is not None):
        lengths = lengths_of(_OP, cu_seqlens, sizes.windows, None, q=q)
        positions, window_cu_seqlens, window_positions = lengths.tensors
    ck = cv = None
    ends, dispatcher = cu_seqlens, sizes.dispatcher
    if needs_windows:
        assert window_cu_seqlens is not None
        v_type, ends = sizes.v_compress_type, window_cu_seqlens
        if "compressed" not in branches:  # nothing reads the values: the cheapest will do
            v_type, w_v, w_v2, pe_v = "avgpool", None, None, None
        windows = (*sizes.windows, dispatcher)
        weights = weight_of(w_k, w_k2), weight_of(w_v, w_v2)
        ck = compress_windows(k, weights[0], pe, cu_seqlens, ends, sizes.compress_type, *windows)
        cv = compress_windows(v, weights[1], pe_v, cu_seqlens, ends, v_type, *windows)
    if cos is not None and sin is not None:
        assert positions is not None
        assert window_positions is not None
        q = rope_forward(q, cos, sin, positions, dispatcher)
        k = rope_forward(k, cos, sin, positions, dispatcher)
        ck = None if ck is None else rope_forward(ck, cos, sin, window_positions, dispatcher)
    if len(branches) < len(BRANCHES):
        gate = apply(gate_of, gate, branches)
    statics = (*sizes.windows, *sizes.selection, sizes.window_size, sizes.softmax_scale)
    return attend(
        *(q, ck, cv, k, v, k, v, gate, cu_seqlens, ends, None, None),
        *(*statics, branches, dispatcher),
    )


def _gradients(call: Any) -> dict[str, Tensor]:
    """From what `sum_branches` hands on; see `gated_attention`."""
    sizes: _Sizes = call.sizes
    dq, dk, dv, dck, dcv = branches_backward(
        *(call.do_compressed, call.dlse_compressed, call.dlse_selected, call.dlse_sliding),
        *(call.q_turned, call.k_turned, call.v, call.ck, call.cv, call.gate),
        *(call.cu_seqlens, call.window_cu_seqlens),
        *(call.lse_compressed, call.lse_selected, call.lse_sliding, call.topk_idx),
        *(*sizes.windows, sizes.block_size, sizes.window_size, sizes.softmax_scale),
        sizes.dispatcher,
    )
    # The transpose of a rotation is the rotation back.
    tables, positions = (call.cos, apply(torch.neg, call.sin)), call.positions
    dq = rope_forward(dq, *tables, positions, sizes.dispatcher)
    dk = rope_forward(dk, *tables, positions, sizes.dispatcher)
    dck = rope_forward(dck, *tables, call.window_positions, sizes.dispatcher)
    ends, more = (call.cu_seqlens, call.window_cu_seqlens), (*sizes.windows, sizes.dispatcher)
    of_k = compress_backward(dck, call.k, call.w_k, call.pe, *ends, sizes.compress_type, *more)
    of_v = compress_backward(dcv, call.v, call.w_v, call.pe_v, *ends, sizes.v_compress_type, *more)
    found = {"q": dq, "k": apply(torch.add, dk, of_k[0]), "v": apply(torch.add, dv, of_v[0])}
    weights = {"w_k": of_k[1], "pe": of_k[2], "w_v": of_v[1], "pe_v": of_v[2]}
    return found | {name: dw for name, dw in weights.items() if getattr(call, name) is not None}


@define_op(
    returns="o_compressed lse_compressed o_selected lse_selected o_sliding lse_sliding topk_idx"
    " q_turned k_turned ck cv",
    gradients=_gradients,
    saves="do_compressed dlse_compressed dlse_selected dlse_sliding k v gate cu_seqlens positions"
    " window_cu_seqlens window_positions w_k w_v pe pe_v cos sin sizes lse_compressed lse_selected"
    " lse_sliding topk_idx q_turned k_turned ck cv",
)
def attention_with_gradients(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    gate: Tensor,
    cu_seqlens: Tensor,
    positions: Tensor,
    window_cu_seqlens: Tensor,
    window_positions: Tensor,
    w_k: Tensor | None,
    w_v: Tensor | None,
    pe: Tensor | None,
    pe_v: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    sizes: _Sizes,
) -> Any:
    """What `branches_forward` gives, and what its gradients need besides."""
    check_attention(_OP, q, k, v)
    ends, more = (cu_seqlens, window_cu_seqlens), (*sizes.windows, sizes.dispatcher)
    ck = compress_windows(k, w_k, pe, *ends, sizes.compress_type, *more)
    cv = compress_windows(v, w_v, pe_v, *ends, sizes.v_compress_type, *more)
    q = rope_forward(q, cos, sin, positions, sizes.dispatcher)
    k = rope_forward(k, cos, sin, positions, sizes.dispatcher)
    ck = rope_forward(ck, cos, sin, window_positions, sizes.dispatcher)
    statics = (*sizes.selection, sizes.window_size, sizes.softmax_scale, sizes.dispatcher)
    outputs = branches_forward(q, k, v, ck, cv, gate, *ends, *sizes.windows, *statics)
    return *outputs, q, k, ck, cv
