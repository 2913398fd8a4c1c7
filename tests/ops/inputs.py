"""Inputs of small calls, shared by the tests of the ops."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nsagen.cases.compress import compress_weight
from nsagen.ops.reference.compress import Weight, tensors_of
from nsagen.ops.separate import SeparateKV

STATICS: dict[str, Any] = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 8,
    "topk": 4,
    "init_blocks": 1,
    "local_blocks": 2,
}


@dataclass
class Packed:
    """q, k, v, gate and offsets of a ragged batch: empty, short, and two longer sequences."""

    dtype: torch.dtype = torch.float32
    seqlens: tuple[int, ...] = (0, 5, 30, 25)
    query_heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    v_head_dim: int = 24
    requires_grad: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        tokens, heads = sum(self.seqlens), self.kv_heads
        self.q = self.randn(tokens, self.query_heads, self.head_dim)
        self.k = self.randn(tokens, heads, self.head_dim)
        self.v = self.randn(tokens, heads, self.v_head_dim)
        self.gate = self.randn(tokens, self.query_heads, 3)
        self.pe = self.randn(heads, 8, self.head_dim)
        self.cu_seqlens = torch.tensor((0, *self.seqlens)).cumsum(0).to(torch.int32)
        angles = torch.rand(64, self.head_dim // 2) * torch.arange(64.0)[:, None]
        self.cos, self.sin = angles.cos(), angles.sin()

    def randn(self, *shape: int) -> Tensor:
        tensor = torch.randn(shape, dtype=torch.float32).to(self.dtype)
        return tensor.requires_grad_(self.requires_grad)

    def weights(self, compress_type: str) -> tuple[Weight, Weight]:
        """(w_k, w_v) of a compress_type."""
        return self.weight(compress_type, self.head_dim), self.weight(
            compress_type, self.v_head_dim
        )

    def weight(self, compress_type: str, dim: int) -> Weight:
        """Of a compress_type, for windows of 8 tokens and heads of size dim."""
        w = compress_weight(compress_type, self.kv_heads, 8, dim, torch.randn, hidden=20)
        leaves = [t.to(self.dtype).requires_grad_(self.requires_grad) for t in tensors_of(w)]
        return tuple(leaves) if compress_type == "mlp" else (*leaves, None)[0]

    def block(self, compress_type: str = "linear") -> tuple[list[Tensor], dict[str, Any]]:
        """Arguments of `native_sparse_attention`."""
        w_k, w_v = self.weights(compress_type)
        keywords = {
            "cu_seqlens": self.cu_seqlens,
            "compress_type": compress_type,
            **STATICS,
            "window_size": 9,
            "w_k": w_k,
            "w_v": w_v,
            "pe": self.pe,
            "cos": self.cos,
            "sin": self.sin,
        }
        return [self.q, self.k, self.v, self.gate], keywords


@dataclass
class Cached:
    """New tokens of three rows, one of them idle, and caches of random content."""

    dtype: torch.dtype = torch.float32
    positions: tuple[int, ...] = (23, -1, 6)
    slots: tuple[int, ...] = (1, 0, 3)

    def __post_init__(self) -> None:
        torch.manual_seed(1)
        rows, heads, dim, v_dim, length, windows = len(self.positions), 2, 16, 24, 32, 7
        self.q, self.k = self.randn(rows, 6, dim), self.randn(rows, heads, dim)
        self.v, self.gate = self.randn(rows, heads, v_dim), self.randn(rows, 6, 3)
        self.o_compressed = self.randn(rows, 6, v_dim)
        self.k_cache, self.v_cache = (self.randn(4, length, heads, d) for d in (dim, v_dim))
        self.ck_cache, self.cv_cache = (self.randn(4, windows, heads, d) for d in (dim, v_dim))
        self.k_raw = self.randn(4, 8, heads, dim)
        self.w_k, self.w_v = self.randn(heads, 8 * dim, dim), self.randn(heads, 8 * v_dim, v_dim)
        self.pe = self.randn(heads, 8, dim)
        self.rows = tuple(torch.tensor(x, dtype=torch.int32) for x in (self.positions, self.slots))
        self.topk_idx = torch.tensor([[[0, 1, 2, -1]] * rows] * heads, dtype=torch.int32)
        angles = torch.rand(64, dim // 2) * torch.arange(64.0)[:, None]
        self.cos, self.sin = angles.cos(), angles.sin()

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float32).to(self.dtype)

    def caches(self) -> tuple[Tensor, ...]:
        """Fresh copies of the five caches."""
        caches = (self.k_cache, self.v_cache, self.ck_cache, self.cv_cache, self.k_raw)
        return tuple(cache.clone() for cache in caches)

    def separate(self) -> SeparateKV:
        """The branches' own rows, and caches of random content."""
        rows, caches = (self.k, self.v) * 2, (self.k_cache, self.v_cache)
        v_raw = self.randn(4, 8, 2, 24)
        return SeparateKV(*(self.randn(*x.shape) for x in (*rows, v_raw, *caches)))

    def paged_caches(self, page_size: int) -> tuple[tuple[Tensor, ...], Tensor]:
        """The caches with the first four in pages of any order, and the block table."""
        slots, length = self.k_cache.shape[:2]
        pages = length // page_size
        table = torch.randperm(slots * pages).to(torch.int32).view(slots, pages)

        def paged(cache: Tensor, rows: int) -> Tensor:
            cache = functional.pad(cache, (0, 0, 0, 0, 0, pages * rows - cache.shape[1]))
            out = torch.empty_like(cache).view(slots * pages, rows, *cache.shape[2:])
            out[table.flatten().long()] = cache.reshape(out.shape)
            return out

        windows = page_size // STATICS["kernel_stride"]
        full = paged(self.k_cache, page_size), paged(self.v_cache, page_size)
        compressed = paged(self.ck_cache, windows), paged(self.cv_cache, windows)
        return (*full, *compressed, self.k_raw.clone()), table

    def append_inputs(self) -> tuple[Tensor, ...]:
        """The arguments of `cache_append` before the caches."""
        return (
            *(self.q, self.k, self.v, self.cos, self.sin),
            *(self.w_k, self.w_v, self.pe, *self.rows),
        )
