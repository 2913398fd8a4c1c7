"""Rope, the gated sum and the whole block against dense formulations."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsagen.cases.compress import compress_weight
from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.ops import reference
from nsagen.ops.reference.compress import Weight, tensors_of
from tests.ops import dense
from tests.ops.dense import HEADS, PROPERTY, SEQLENS, Packed, offsets, windows_and_blocks

DIM, VALUE_DIM = 8, 6


def tables(positions: int = 64, dim: int = DIM) -> tuple[Tensor, Tensor]:
    angles = torch.arange(positions)[:, None] * 100.0 ** -torch.linspace(0, 1, dim // 2)
    return angles.cos(), angles.sin()


def weights(compress_type: str, heads: int, size: int, dim: int) -> Weight:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return compress_weight(compress_type, heads, size, dim, normal, hidden=6)


def test_rope_is_a_rotation_by_position() -> None:
    x = torch.randn(7, 3, DIM, dtype=torch.float64)
    cos, sin = tables()
    positions = [0, 3, 1, 9, 9, 40, 63]
    came = reference.rope(x, cos, sin, torch.tensor(positions, dtype=torch.int32))
    torch.testing.assert_close(came, dense.rope(x, cos, sin, positions), rtol=1e-13, atol=1e-13)
    assert torch.equal(came[0], x[0])
    assert reference.rope(x.half(), cos, sin, torch.zeros(7).int()).dtype == torch.float16


def test_rope_and_gated_sum_gradients() -> None:
    cos, sin = tables(dim=4)
    x = torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True)
    positions = torch.tensor([0, 5, 2], dtype=torch.int32)
    assert torch.autograd.gradcheck(lambda x: reference.rope(x, cos.double(), sin, positions), x)
    parts = [torch.randn(3, 2, 4, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    gate = torch.rand(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(reference.gated_sum, (*parts, gate))


def test_gates_are_compressed_selected_sliding() -> None:
    parts = [torch.full((2, 2, 4), value) for value in (1.0, 10.0, 100.0)]
    gate = torch.tensor([[[1.0, 2, 3], [0, 0, 1]], [[0, 1, 0], [1, 0, 0]]])
    expected = torch.tensor([[321.0, 100], [10, 1]])
    assert torch.equal(reference.gated_sum(*parts, gate), expected[..., None].expand(2, 2, 4))
    half = [part.half() for part in parts]
    assert reference.gated_sum(*half, gate).dtype == torch.float16


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
@PROPERTY
@given(SEQLENS, HEADS, windows_and_blocks(), st.integers(3, 6), st.integers(1, 20), st.booleans())
def test_the_whole_block(
    compress_type: str,
    seqlens: list[int],
    heads: tuple[int, int],
    shape: tuple[int, int, int],
    topk: int,
    window: int,
    with_rope: bool,
) -> None:
    size, stride, block_size = shape
    query_heads, kv_heads = heads
    tokens, scale = sum(seqlens), DIM**-0.5
    torch.manual_seed(0)
    q, k, v, gate = (
        torch.randn(tokens, *rest, dtype=torch.float64)
        for rest in ((query_heads, DIM), (kv_heads, DIM), (kv_heads, VALUE_DIM), (query_heads, 3))
    )
    w_k = weights(compress_type, kv_heads, size, DIM)
    w_v = weights(compress_type, kv_heads, size, VALUE_DIM)
    pe = torch.randn(kv_heads, size, DIM, dtype=torch.float64)
    cos, sin = tables()
    came = reference.native_sparse_attention(
        q,
        k,
        v,
        gate,
        cu_seqlens=offsets(seqlens),
        compress_type=compress_type,
        kernel_size=size,
        kernel_stride=stride,
        block_size=block_size,
        topk=topk,
        window_size=window,
        w_k=w_k,
        w_v=w_v,
        pe=pe,
        cos=cos if with_rope else None,
        sin=sin if with_rope else None,
    )

    ck = dense.compress(k, w_k, pe, seqlens, size, stride)
    cv = dense.compress(v, w_v, None, seqlens, size, stride)
    if with_rope:
        counts = [dense.window_count(length, size, stride) for length in seqlens]
        positions = Packed.of(seqlens).position.tolist()
        q, k = dense.rope(q, cos, sin, positions), dense.rope(k, cos, sin, positions)
        starts = [i * stride for i in Packed.of(counts).position.tolist()]
        ck = dense.rope(ck, cos, sin, starts)
    visible = dense.window_mask(seqlens, size, stride)
    o_compressed, _, probabilities = dense.attention(q, ck, cv, visible, scale)
    topk_idx = dense.blocks(
        probabilities,
        seqlens,
        kv_heads,
        size,
        stride,
        block_size,
        topk=topk,
        init_blocks=1,
        local_blocks=2,
    )
    chosen = dense.selected_mask(topk_idx, seqlens, block_size, query_heads // kv_heads)
    o_selected, _, _ = dense.attention(q, k, v, chosen, scale)
    recent = dense.token_mask(seqlens, lambda t, u: u > t - window)
    o_sliding, _, _ = dense.attention(q, k, v, recent, scale)
    branches = torch.stack((o_compressed, o_selected, o_sliding), -1)
    expected = (branches * gate[:, :, None]).sum(-1)
    torch.testing.assert_close(came, expected, rtol=1e-10, atol=1e-11)


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_gradients_reach_every_input(compress_type: str) -> None:
    """The choice of blocks is a constant to the gradient; here topk covers every block."""
    torch.manual_seed(0)
    size, kv_heads, dim = 4, 1, 2
    shapes = ((7, 2, dim), (7, kv_heads, dim), (7, kv_heads, dim), (7, 2, 3), (kv_heads, size, dim))
    wrt = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    for _ in range(2):
        own = tensors_of(weights(compress_type, kv_heads, size, dim))
        wrt += [w.requires_grad_() for w in own]
    cos, sin = tables(dim=dim)

    def whole(q: Tensor, k: Tensor, v: Tensor, gate: Tensor, pe: Tensor, *w: Tensor) -> Tensor:
        half = len(w) // 2
        w_k, w_v = (w[:half], w[half:]) if compress_type == "mlp" else w or (None, None)
        return reference.native_sparse_attention(
            q,
            k,
            v,
            gate,
            cu_seqlens=offsets([5, 0, 2]),
            compress_type=compress_type,
            kernel_size=size,
            kernel_stride=1,
            block_size=2,
            topk=4,
            window_size=2,
            w_k=w_k,
            w_v=w_v,
            pe=pe,
            cos=cos,
            sin=sin,
        )

    assert torch.autograd.gradcheck(whole, wrt)
    for gradient in torch.autograd.grad(whole(*wrt).square().sum(), wrt):
        assert gradient.any()


def test_half_a_rope_table_is_refused() -> None:
    x = torch.ones(8, 1, DIM)
    cos, _ = tables()
    with pytest.raises(InvalidInputError, match="got no sin"):
        reference.native_sparse_attention(
            x,
            x,
            x,
            torch.ones(8, 1, 3),
            cu_seqlens=offsets([8]),
            compress_type="avgpool",
            kernel_size=4,
            kernel_stride=2,
            block_size=4,
            topk=3,
            window_size=4,
            cos=cos,
        )
