"""The whole block: compression, rope, the three branches and their gated sum."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from nsagen.core.branches import BRANCHES, branches_on
from nsagen.ops._checks import check_attention, fail
from nsagen.ops._launch import scale_of
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.compress import compress
from nsagen.ops.gated_sum import gate_of
from nsagen.ops.layout import positions_in_sequence
from nsagen.ops.reference.compress import Weight
from nsagen.ops.rope import rope
from nsagen.runtime import Dispatcher


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
        dispatcher: the generated kernels to use; by default they are built when missing.

    Returns:
        o [N, HQ, Dv]. Differentiable in q, k, v, gate, w_k, w_v, pe and pe_v.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    on = branches_on("native_sparse_attention", branches, window_size)
    check_attention("native_sparse_attention", q, k, v)
    sizes = {"kernel_size": kernel_size, "kernel_stride": kernel_stride, "dispatcher": dispatcher}
    ck, cv, ck_cu_seqlens = k, v, cu_seqlens
    needs_windows = "compressed" in on or "selected" in on  # selection ranks their scores
    if needs_windows:
        ck, ck_cu_seqlens = compress(k, w_k, pe, cu_seqlens, compress_type=compress_type, **sizes)
        v_type = v_compress_type or compress_type
        if "compressed" not in on:  # nothing reads the values: the cheapest will do
            v_type, w_v, pe_v = "avgpool", None, None
        cv, _ = compress(v, w_v, pe_v, cu_seqlens, compress_type=v_type, **sizes)
    if (cos is None) != (sin is None):
        came = "cos" if sin is None else "sin"
        fail("native_sparse_attention", "cos and sin must come together", came, "pass both")
    if cos is not None and sin is not None:
        positions = positions_in_sequence(cu_seqlens, q.shape[0])
        q = rope(q, cos, sin, positions, dispatcher=dispatcher)
        k = rope(k, cos, sin, positions, dispatcher=dispatcher)
        if needs_windows:
            starts = positions_in_sequence(ck_cu_seqlens, ck.shape[0]) * kernel_stride
            ck = rope(ck, cos, sin, starts, dispatcher=dispatcher)
    return attend_branches(
        *(q, (ck, cv) if needs_windows else None, (k, v), (k, v)),
        gate if len(on) == len(BRANCHES) else gate_of(gate, on),
        cu_seqlens=cu_seqlens,
        window_cu_seqlens=ck_cu_seqlens,
        kernel_size=kernel_size,
        kernel_stride=kernel_stride,
        block_size=block_size,
        topk=topk,
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        window_size=window_size,
        branches=on,
        softmax_scale=scale_of(softmax_scale, q),
        dispatcher=dispatcher,
    )
