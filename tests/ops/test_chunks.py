"""Gradients of a batch cut into chunks: the sum over its chunks is what the whole has."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsagen import ops
from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.core.branches import BRANCHES
from nsagen.ops.branch_attention import attend_branches

from .chunks import Chunk, check_gradients, cuts
from .dense import HEADS, PROPERTY, offsets, windows_and_blocks

DIMS = st.sampled_from([(8, 8), (8, 6), (5, 12)])


def close(came: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(came, expected, rtol=1e-12, atol=1e-12)


class Batch:
    """Random tensors of a batch, and its attention, whole or of a chunk."""

    def __init__(
        self,
        cuts: list[list[int]],
        heads: tuple[int, int],
        dims: tuple[int, int],
        shape: tuple[int, int, int] = (8, 4, 8),
        dtype: torch.dtype = torch.float64,
    ) -> None:
        self.kernel_size, self.kernel_stride, self.block_size = shape
        self.windows = {"kernel_size": shape[0], "kernel_stride": shape[1]}
        self.ends = offsets([sequence[-1] for sequence in cuts])
        self.window_ends = ops.reference.compressed_cu_seqlens(self.ends, *shape[:2])
        (query_heads, kv_heads), (dim, v_dim) = heads, dims
        random = torch.Generator().manual_seed(0)

        def normal(rows: Tensor, heads: int, size: int) -> Tensor:
            return torch.randn(int(rows), heads, size, generator=random).to(dtype)

        tokens, windows = self.ends[-1], self.window_ends[-1]
        self.q = normal(tokens, query_heads, dim)
        self.k, self.v = normal(tokens, kv_heads, dim), normal(tokens, kv_heads, v_dim)
        self.ck, self.cv = normal(windows, kv_heads, dim), normal(windows, kv_heads, v_dim)
        self.gate = normal(tokens, query_heads, 3)
        blocks = torch.randint(-1, 4, (kv_heads, int(tokens), 3), generator=random)
        self.topk_idx = blocks.to(torch.int32)

    def of(self, chunk: Chunk | None) -> tuple[Tensor, dict[str, Tensor]]:
        """cu_seqlens of the queries and the further arguments of attention to tokens."""
        if chunk is None:
            return self.ends, {}
        return chunk.cu_seqlens, {"cu_seqlens_k": self.ends, "q_start": chunk.q_start}

    def sliding(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk | None) -> Tensor:
        ends, more = self.of(chunk)
        return ops.sliding_window_attention(q, k, v, 5, ends, **more)

    def selected(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk | None) -> Tensor:
        ends, more = self.of(chunk)
        topk_idx = self.topk_idx if chunk is None else self.topk_idx[:, chunk.rows].contiguous()
        return ops.topk_sparse_attention(q, k, v, topk_idx, self.block_size, ends, **more)

    def compressed(self, q: Tensor, k: Tensor, v: Tensor, chunk: Chunk | None) -> Tensor:
        ends, more = self.of(chunk)
        more.pop("cu_seqlens_k", None)
        blocks, sizes = (self.block_size, 4), (self.kernel_size, self.kernel_stride)
        return ops.compressed_attention(q, k, v, *sizes, *blocks, ends, self.window_ends, **more)[0]

    def branches(
        self, q: Tensor, ck: Tensor, cv: Tensor, k: Tensor, v: Tensor, chunk: Chunk | None
    ) -> Tensor:
        ends, more = self.of(chunk)
        return attend_branches(
            *(q, (ck, cv), (k, v), (k, v)),
            self.gate if chunk is None else self.gate[chunk.rows],
            cu_seqlens=ends,
            window_cu_seqlens=self.window_ends,
            block_size=self.block_size,
            **self.windows,
            **{"topk": 4, "init_blocks": 1, "local_blocks": 1, "window_size": 5},
            branches=BRANCHES,
            softmax_scale=0.3,
            **more,
        )


@PROPERTY
@given(cuts(), HEADS, DIMS, windows_and_blocks())
def test_each_op(
    cuts: list[list[int]],
    heads: tuple[int, int],
    dims: tuple[int, int],
    shape: tuple[int, int, int],
) -> None:
    x = Batch(cuts, heads, dims, shape)
    check_gradients(x.sliding, x.q, [x.k, x.v], cuts, close)
    check_gradients(x.selected, x.q, [x.k, x.v], cuts, close)
    check_gradients(x.compressed, x.q, [x.ck, x.cv], cuts, close)


@PROPERTY
@given(cuts(), HEADS, DIMS, windows_and_blocks())
def test_all_branches(
    cuts: list[list[int]],
    heads: tuple[int, int],
    dims: tuple[int, int],
    shape: tuple[int, int, int],
) -> None:
    """The blocks that a chunk's queries select are those that they select in the whole."""
    x = Batch(cuts, heads, dims, shape)
    check_gradients(x.branches, x.q, [x.ck, x.cv, x.k, x.v], cuts, close)


@pytest.mark.interpreter
@pytest.mark.usefixtures("cache")
def test_all_branches_by_kernels() -> None:
    """An empty sequence, an empty chunk, and sequences shorter and longer than a window."""
    cuts = [[0, 0, 0], [0, 11, 20], [0, 0, 5]]
    x = Batch(cuts, (6, 2), (16, 24), dtype=torch.float32)

    def compare(came: Tensor, expected: Tensor) -> None:
        assert relative_error(came, expected) <= THRESHOLDS[torch.float32]

    check_gradients(x.branches, x.q, [x.ck, x.cv, x.k, x.v], cuts, compare)
