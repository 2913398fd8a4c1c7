"""What a call's tensors say of its workload: a name means the same in every op."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from nsagen.core.workload import Param
from nsagen.ops.reference._pages import capacity_of


def cache_dtype_of(cache: Tensor, scale: Tensor | None) -> str:
    """The static parameter `cache_dtype`: "" for a cache of the workload's dtype."""
    return "" if scale is None else str(cache.dtype).removeprefix("torch.")


_READ: dict[str, tuple[Callable[..., Param], tuple[str, ...]]] = {
    "head_dim": (lambda x: x.shape[-1], ("q x k_cache",)),
    "v_head_dim": (lambda v: v.shape[-1], ("v v_cache cv_cache o_compressed",)),
    "index_head_dim": (lambda index_q: index_q.shape[-1], ("index_q",)),
    "gqa_ratio": (lambda q, k: q.shape[1] // k.shape[-2], ("q", "k k_cache ck_cache")),
    "topk": (lambda topk_idx: topk_idx.shape[-1], ("topk_idx",)),
    "with_pe": (lambda pe: pe is not None, ("pe",)),
    "v_with_pe": (lambda pe_v: pe_v is not None, ("pe_v",)),
    "cache_dtype": (cache_dtype_of, ("k_cache ck_cache", "k_scale ck_scale")),
}
"""How a static parameter follows from others, each by the names that it has in some op."""


def reader(param: str, names: Sequence[str]) -> Callable[[tuple[Any, ...]], Param] | None:
    """What reads a static parameter off the values of an op's parameters, which have these names;
    None if they do not tell it."""
    if param in names:
        return operator.itemgetter(names.index(param))
    if param not in _READ:
        return None
    read, wanted = _READ[param]
    told = [[name for name in some.split() if name in names] for some in wanted]
    if not all(told):
        return None
    places = [names.index(some[0]) for some in told]
    return lambda values: read(*[values[place] for place in places])


def tokens_of(k_cache: Tensor, block_table: Tensor | None = None) -> int:
    """The most tokens that a slot of a cache of keys holds."""
    return capacity_of(k_cache, block_table)


def tokens_of_windows(
    kernel_size: int,
    kernel_stride: int,
    block_table: Tensor | None,
    ck_cache: Tensor | None = None,
    k_cache: Tensor | None = None,
) -> int:
    """The same of a cache of compressed keys. Pages hold the windows that start in them."""
    cache = k_cache if ck_cache is None else ck_cache
    assert cache is not None
    tokens = capacity_of(cache, block_table) * kernel_stride
    return tokens + (kernel_size - kernel_stride if block_table is None else 0)
