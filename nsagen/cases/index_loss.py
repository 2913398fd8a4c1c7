"""Example calls of the index loss's forward kernels, over lists of blocks or over all tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nsagen.cases.base import Case, Cost, Sizes, cu_seqlens_of, poisoned
from nsagen.cases.selected_attention import in_any_order, pairs_of, random_blocks
from nsagen.core.workload import Workload
from nsagen.ops.reference.index_loss import dense_index_loss_forward, index_loss_forward


@dataclass(frozen=True)
class Inputs:
    """q [N, HQ, D], k [N, HK, D], index_q [N, HK, Di], index_k [N, 1, Di], and the selection.

    Without one (topk_idx None) the loss is over all earlier tokens.
    """

    q: Tensor
    k: Tensor
    index_q: Tensor
    index_k: Tensor
    topk_idx: Tensor | None
    cu_seqlens: Tensor
    block_size: int
    scales: tuple[float, float]
    pairs: int

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        listed = () if self.topk_idx is None else (self.topk_idx,)
        return self.q, self.k, self.index_q, self.index_k, *listed, self.cu_seqlens

    def outputs(self) -> dict[str, Tensor]:
        """Poisoned outputs of the forward pass."""
        (tokens, heads), device = self.k.shape[:2], self.q.device
        lse, f32 = tuple(self.q.shape[:2]), torch.float32
        shapes = {"loss": (heads, tokens), "lse": lse, "lse_index": (tokens, heads)}
        made = {name: poisoned(shape, f32, device) for name, shape in shapes.items()}
        if self.topk_idx is None:
            x = self.index_q
            made["slope"] = poisoned(tuple(x.shape), x.dtype, device)
        return made

    def loss(self, index_q: Tensor, index_k: Tensor) -> tuple[Tensor, ...]:
        """The reference's outputs in float64."""
        tensors = (self.q.double(), self.k.double(), index_q, index_k)
        scales = {"softmax_scale": self.scales[0], "index_scale": self.scales[1]}
        if self.topk_idx is None:
            return dense_index_loss_forward(*tensors, self.cu_seqlens, **scales)
        blocks = (self.topk_idx, self.cu_seqlens)
        return index_loss_forward(*tensors, *blocks, block_size=self.block_size, **scales)


def make_inputs(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int) -> Inputs:
    """Standard normal tensors, and forced and random blocks where the workload has lists."""
    dtype = getattr(torch, workload.dtype)
    dim, index_dim = int(workload.head_dim), int(workload.index_head_dim)
    heads, listed = sizes.kv_heads, workload.op == "index_loss"
    block_size = int(workload.block_size) if listed else 1
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(heads: int, size: int) -> Tensor:
        shape = (sizes.tokens, heads, size)
        return torch.randn(shape, dtype=dtype, device=device, generator=random)

    topk_idx = random_blocks(sizes, block_size, device, random) if listed else None
    if topk_idx is not None and sizes.any_order:
        topk_idx = in_any_order(topk_idx, seed)
    return Inputs(
        normal(heads * int(workload.gqa_ratio), dim),
        normal(heads, dim),
        normal(heads, index_dim),
        normal(1, index_dim),
        topk_idx,
        cu_seqlens_of(sizes.seqlens, device),
        block_size,
        (dim**-0.5, index_dim**-0.5),
        pairs_of(sizes, block_size) if listed else sizes.over_queries(lambda n: n * (n + 1) // 2),
    )


def cost_of(x: Inputs, outputs: tuple[Tensor, ...]) -> Cost:
    """Two products a (query, key) pair and head: of the attention and of the index."""
    flops = 2 * x.pairs * (x.q.shape[1] * x.q.shape[2] + x.index_q.shape[1] * x.index_q.shape[2])
    return Cost(flops, float(sum(tensor.nbytes for tensor in (*x.tensors, *outputs))))


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """A call on random inputs."""
    x = make_inputs(workload, sizes, device, seed)
    outputs = x.outputs()

    def expected() -> dict[str, Tensor]:
        found = x.loss(x.index_q.double(), x.index_k.double())
        return dict(zip(outputs, found, strict=True))

    made = tuple(outputs.values())
    return Case((*x.tensors, *made, *x.scales), outputs, expected, cost_of(x, made))
