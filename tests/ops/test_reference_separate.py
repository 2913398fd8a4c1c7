"""Decoding with keys and values of their own for each branch equals the branches' forward pass."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsagen.cases.compress import compress_weight
from nsagen.ops import SeparateKV, reference
from tests.ops.dense import offsets

LENGTH, SLOTS, HEADS, KV_HEADS, DIM, V_DIM = 40, 3, 4, 2, 8, 6
SIZE, STRIDE, WINDOW = 8, 4, 7
SELECT = {"block_size": 8, "topk": 4, "init_blocks": 1, "local_blocks": 2}
SIZES = {"kernel_size": SIZE, "kernel_stride": STRIDE}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


class Paper:
    """One sequence's queries, gates, and keys and values of each branch; weights and rope."""

    def __init__(self, compress_type: str, v_compress_type: str) -> None:
        torch.manual_seed(0)
        self.types = (compress_type, v_compress_type)
        self.q, self.gate = normal(LENGTH, HEADS, DIM), normal(LENGTH, HEADS, 3)
        self.k_compress, self.k, self.k_window = (normal(LENGTH, KV_HEADS, DIM) for _ in range(3))
        self.v_compress, self.v, self.v_window = (normal(LENGTH, KV_HEADS, V_DIM) for _ in range(3))
        self.w_k, self.w_v = (
            compress_weight(kind, KV_HEADS, SIZE, dim, normal, hidden=5)
            for kind, dim in ((compress_type, DIM), (v_compress_type, V_DIM))
        )
        self.pe, self.pe_v = normal(KV_HEADS, SIZE, DIM), normal(KV_HEADS, SIZE, V_DIM)
        angles = torch.arange(LENGTH)[:, None] * 100.0 ** -torch.linspace(0, 1, DIM // 2)
        self.tables = angles.cos(), angles.sin()

    def forward(self) -> Tensor:
        """The gated sum of the branches, each on what is its own."""
        ends, positions = offsets([LENGTH]), torch.arange(LENGTH)
        q, k, k_window = (
            reference.rope(x, *self.tables, positions) for x in (self.q, self.k, self.k_window)
        )
        ck, ck_ends = reference.compress(
            self.k_compress, self.w_k, self.pe, ends, compress_type=self.types[0], **SIZES
        )
        cv, _ = reference.compress(
            self.v_compress, self.w_v, self.pe_v, ends, compress_type=self.types[1], **SIZES
        )
        ck = reference.rope(ck[: ck_ends[-1]], *self.tables, torch.arange(ck_ends[-1]) * STRIDE)
        o_compressed, topk_idx = reference.compressed_attention(
            q, ck, cv[: len(ck)], **SIZES, **SELECT, cu_seqlens_q=ends, cu_seqlens_k=ck_ends
        )
        o_selected = reference.topk_sparse_attention(q, k, self.v, topk_idx, 8, ends)
        o_sliding = reference.sliding_window_attention(q, k_window, self.v_window, WINDOW, ends)
        return reference.gated_sum(o_compressed, o_selected, o_sliding, self.gate)


@pytest.mark.parametrize(
    "types", [("mlp", "mlp"), ("mlp", "avgpool"), ("avgpool", "sigmoid_mul"), ("linear", "linear")]
)
def test_a_growing_cache_equals_the_forward_pass(types: tuple[str, str]) -> None:
    x = Paper(*types)

    def cache(length: int, dim: int) -> Tensor:
        return torch.full((SLOTS, length, KV_HEADS, dim), float("nan"), dtype=torch.float64)

    k_cache, v_cache, k_window_cache, v_window_cache = (
        cache(LENGTH, dim) for dim in (DIM, V_DIM, DIM, V_DIM)
    )
    ck_cache, cv_cache, k_raw, v_raw = (
        cache(length, dim) for length in (9, SIZE) for dim in (DIM, V_DIM)
    )
    expected = x.forward()
    for t in range(LENGTH):
        one, rows = slice(t, t + 1), (torch.tensor([t]).int(), torch.tensor([1]).int())
        own = (x.k_compress[one], x.v_compress[one], x.k_window[one], x.v_window[one])
        q = reference.cache_append(
            *(x.q[one], x.k[one], x.v[one], *x.tables, x.w_k, x.w_v, x.pe, *rows),
            *(k_cache, v_cache, ck_cache, cv_cache, k_raw),
            compress_type=types[0],
            v_compress_type=types[1],
            **SIZES,
            pe_v=x.pe_v,
            separate=SeparateKV(*own, v_raw, k_window_cache, v_window_cache),
        )
        o_compressed, topk_idx = reference.compressed_attention_decode(
            q, ck_cache, cv_cache, *rows, **SIZES, **SELECT
        )
        o = reference.native_sparse_attention_decode(
            *(q, k_cache, v_cache, topk_idx, *rows, o_compressed, x.gate[one]),
            block_size=8,
            window_size=WINDOW,
            k_window_cache=k_window_cache,
            v_window_cache=v_window_cache,
        )
        torch.testing.assert_close(o[0], expected[t], rtol=1e-11, atol=1e-12)
    for one in (k_cache, v_cache, ck_cache, cv_cache, k_raw, v_raw, k_window_cache):
        assert one[0].isnan().all()  # a slot that no row names stays as it was
