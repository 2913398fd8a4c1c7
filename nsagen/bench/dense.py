"""Dense causal attention through PyTorch: what sparse attention must beat."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from nsagen.bench.member import Member
from nsagen.bench.shape import Shape
from nsagen.cases.base import Cost

BACKENDS = {"cuDNN": SDPBackend.CUDNN_ATTENTION, "FlashAttention-2": SDPBackend.FLASH_ATTENTION}


class DenseAttention:
    """Causal attention of one sequence on the heads of a shape.

    Args:
        backend: a key of `BACKENDS`.
    """

    def __init__(
        self,
        shape: Shape | Member,
        tokens: int,
        backend: str = "cuDNN",
        *,
        requires_grad: bool = False,
    ) -> None:
        self.backend = BACKENDS[backend]
        self.shape, self.tokens = shape, tokens
        dtype = getattr(torch, shape.dtype)

        def normal(heads: int, dim: int) -> Tensor:
            x = torch.randn(1, heads, tokens, dim, device="cuda", dtype=dtype)
            return x.requires_grad_(requires_grad)

        self.q = normal(shape.query_heads, shape.head_dim)
        self.k = normal(shape.kv_heads, shape.head_dim)
        self.v = normal(shape.kv_heads, shape.v_head_dim)

    def forward(self) -> Tensor:
        """o [1, HQ, N, Dv]."""
        with sdpa_kernel(self.backend):
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
