"""Dense causal attention by PyTorch and by FlashAttention-4: what sparse attention must beat."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsagen.bench.member import Member
from nsagen.bench.shape import Shape
from nsagen.bench.tables import FLASH_4
from nsagen.cases.base import Cost

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}


@functools.cache
def flash_attention_4() -> Callable[..., Any] | None:
    """The package flash-attn-4's function of [batch, N, heads, D], if it is installed."""
    try:
        from flash_attn.cute import flash_attn_func  # type: ignore[import-not-found]
    except ImportError:
        return None
    return flash_attn_func


def backends() -> tuple[str, ...]:
    """The dense attentions that benchmarks measure here."""
    return ("cuDNN", FLASH_4) if flash_attention_4() else ("cuDNN",)


class DenseAttention:
    """Causal attention of one sequence on the heads of a shape.

    Args:
        backend: a key of `BACKENDS`, or `FLASH_4` where it is installed.
    """

    def __init__(
        self,
        shape: Shape | Member,
        tokens: int,
        backend: str = "cuDNN",
        *,
        requires_grad: bool = False,
    ) -> None:
        self.backend = backend
        self.shape, self.tokens = shape, tokens
        dtype = getattr(torch, shape.dtype)

        def normal(heads: int, dim: int) -> Tensor:
            size = (tokens, heads) if backend == FLASH_4 else (heads, tokens)
            x = torch.randn(1, *size, dim, device="cuda", dtype=dtype)
            return x.requires_grad_(requires_grad)

        self.q = normal(shape.query_heads, shape.head_dim)
        self.k = normal(shape.kv_heads, shape.head_dim)
        self.v = normal(shape.kv_heads, shape.v_head_dim)

    def forward(self) -> Tensor:
        """o [1, HQ, N, Dv]; of FlashAttention-4, in its own layout, [1, N, HQ, Dv]."""
        call = flash_attention_4() if self.backend == FLASH_4 else None
        if call:
            return call(self.q, self.k, self.v, causal=True)[0]
        with sdpa_kernel(BACKENDS[self.backend]):
            return scaled_dot_product_attention(
                self.q, self.k, self.v, is_causal=True, enable_gqa=True
            )

    @property
    def cost(self) -> Cost:
        """The least work of the forward pass."""
        dims = self.shape.head_dim + self.shape.v_head_dim
        tensors = (self.q, self.k, self.v)
        o_elements = self.tokens * self.shape.query_heads * self.shape.v_head_dim
        return Cost(
            flops=self.tokens**2 * self.shape.query_heads * dims,
            bytes=sum(x.nbytes for x in tensors) + o_elements * self.q.element_size(),
        )


def dense(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """A token of each sequence, q [R, HQ, D], on all of its cache [R, tokens, HK, D]."""
    k, v = (cache.transpose(1, 2) for cache in (k_cache, v_cache))
    return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)


def dense_grouped(q: Tensor, k_cache: Tensor, v_cache: Tensor) -> Tensor:
    """The same with a group's heads as rows of one matrix, which some kernels prefer."""
    k, v = (cache.transpose(1, 2) for cache in (k_cache, v_cache))
    return scaled_dot_product_attention(q.unflatten(1, (k.shape[1], -1)), k, v)
