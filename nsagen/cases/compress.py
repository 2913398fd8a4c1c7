"""Example calls of compression's forward kernels."""

from __future__ import annotations

from collections.abc import Callable

import torch

from nsagen.cases.base import Case, Cost, Sizes, cu_seqlens_of, poisoned
from nsagen.core.workload import Workload
from nsagen.ops import reference
from nsagen.ops.reference.compress import Weight, tensors_of


def make_case(workload: Workload, sizes: Sizes, device: torch.device | str, seed: int = 0) -> Case:
    """Random x [N, HK, D], w and pe; y, N // kernel_stride rows, poisoned."""
    dtype, kind = getattr(torch, workload.dtype), str(workload.compress_type)
    dim, size, stride = (
        int(n) for n in (workload.head_dim, workload.kernel_size, workload.kernel_stride)
    )
    heads = sizes.kv_heads
    meta = torch.device(device).type == "meta"
    random = None if meta else torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=dtype, device=device, generator=random)

    x = normal(sizes.tokens, heads, dim)
    hidden = int(workload.mlp_hidden)
    weights = tensors_of(compress_weight(kind, heads, size, dim, normal, hidden))
    w = weights[0] if weights else None  # of an mlp the first layer, which is what kernels compute
    pe = normal(heads, size, dim) if workload.with_pe else None
    counts = tuple(max(0, (length - size) // stride + 1) for length in sizes.seqlens)
    cu_seqlens, y_cu_seqlens = (cu_seqlens_of(n, device) for n in (sizes.seqlens, counts))
    columns = hidden or dim
    y = poisoned((sizes.tokens // stride, heads, columns), dtype, device)

    def expected() -> dict[str, torch.Tensor]:
        exact_w, exact_pe = (None if t is None else t.double() for t in (w, pe))
        return {"y": window_results(workload, x.double(), exact_w, exact_pe, cu_seqlens)}

    products = {"linear": dim * columns, "mlp": dim * columns, "sigmoid_mul": dim}
    product = 2 * sum(counts) * heads * size * products.get(kind, 0)
    return Case(
        args=(x, w, pe, cu_seqlens, y_cu_seqlens, y),
        outputs={"y": y},
        expected=expected,
        cost=Cost(
            flops=product,
            bytes=sum(tensor.nbytes for tensor in (x, w, pe, y) if tensor is not None),
        ),
    )


def window_results(
    workload: Workload,
    x: torch.Tensor,
    w: torch.Tensor | None,
    pe: torch.Tensor | None,
    cu_seqlens: torch.Tensor,
) -> torch.Tensor:
    """What kernels compute, by the reference; for an mlp, the first layer."""
    sizes = {
        "kernel_size": int(workload.kernel_size),
        "kernel_stride": int(workload.kernel_stride),
    }
    if workload.compress_type == "mlp":
        assert w is not None
        return reference.mlp_first_layer(x, w, pe, cu_seqlens, **sizes)
    kind = str(workload.compress_type)
    return reference.compress(x, w, pe, cu_seqlens, compress_type=kind, **sizes)[0]


def compress_weight(
    kind: str,
    heads: int,
    size: int,
    dim: int,
    normal: Callable[..., torch.Tensor],
    hidden: int = 0,
) -> Weight:
    """The weight of a compress_type, scaled so that windows keep their tokens' magnitude.

    Args:
        normal: makes a tensor of a shape.
        hidden: the hidden size of an mlp.
    """
    if kind == "avgpool":
        return None
    if kind == "weightedpool":
        return normal(heads, size) / size**0.5
    if kind == "sigmoid_mul":
        return normal(heads, size, dim) / dim**0.5
    columns = hidden if kind == "mlp" else dim
    flat = normal(heads, size * dim, columns) / (size * dim) ** 0.5
    return (flat, normal(heads, hidden, dim) / hidden**0.5) if kind == "mlp" else flat
