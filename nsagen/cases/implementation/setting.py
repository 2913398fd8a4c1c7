"""What a foreign implementation is called with: the sizes of a run, and an op's signature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.core.text import nearest
from nsagen.core.workload import DTYPES
from nsagen.ops import reference

OPS = ("topk_sparse_attention", "sliding_window_attention", "compressed_attention")


@dataclass(frozen=True)
class Setting:
    """The sizes shared by all cases of a run.

    Attributes:
        gqa_ratio: query heads per key/value head; kv_heads: key/value heads.
        window_size: tokens that the sliding window sees, the query's own included.
        topk: blocks per token, with init_blocks at the start and local_blocks up to its own.
    """

    dtype: str = "bfloat16"
    head_dim: int = 128
    gqa_ratio: int = 16
    kv_heads: int = 2
    block_size: int = 64
    topk: int = 16
    kernel_size: int = 32
    kernel_stride: int = 16
    window_size: int = 512
    init_blocks: int = 1
    local_blocks: int = 2
    seed: int = 0

    @property
    def long(self) -> int:
        """A length with more blocks than topk, past the window, that ends within a block."""
        return max(self.block_size * (self.topk + 2), self.window_size + self.block_size) + 5


@dataclass(frozen=True)
class Call:
    """Tensors of one call: q [N, HQ, D], k and v [T, HK, D], offsets, and blocks if needed."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    key_cu_seqlens: Tensor
    topk_idx: Tensor
    scale: float


@dataclass(frozen=True)
class Contract:
    """How an op is called and what it should give.

    Attributes:
        apply: (function, call) -> o, or (o, topk_idx).
        expect: call -> o, differentiable.
    """

    apply: Callable[[Callable[..., Any], Call], Any]
    expect: Callable[[Call], Tensor]


def setting_of(texts: Sequence[str], seed: int) -> Setting:
    """The usual sizes with some changed, `NAME=VALUE` each.

    Raises:
        InvalidInputError: an unknown size, or an invalid value.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Setting)}
    changed: dict[str, Any] = {"seed": seed}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds or (kinds[name] is int and not value.isdigit()):
            raise InvalidInputError(
                f"verify: --size must be NAME=VALUE of {', '.join(kinds)}; got {text!r}; "
                "values are whole numbers, and a dtype's name"
            )
        changed[name] = kinds[name](value)
    if changed.get("dtype", "float16") not in DTYPES:
        raise InvalidInputError(
            f"verify: dtype must be one of {', '.join(DTYPES)}; got {changed['dtype']!r}; "
            f"{nearest(changed['dtype'], DTYPES)}"
        )
    return Setting(**changed)


def contract_of(op: str, s: Setting) -> Contract:
    """The call and the reference of one of `OPS`."""
    windows = (s.kernel_size, s.kernel_stride)
    if op == "sliding_window_attention":
        return Contract(
            lambda f, c: f(c.q, c.k, c.v, s.window_size, c.cu_seqlens, c.scale),
            lambda c: reference.sliding_window_attention(
                c.q, c.k, c.v, s.window_size, c.cu_seqlens, c.scale
            ),
        )
    if op == "topk_sparse_attention":
        return Contract(
            lambda f, c: f(c.q, c.k, c.v, c.topk_idx, s.block_size, c.cu_seqlens, c.scale),
            lambda c: reference.topk_sparse_attention(
                c.q, c.k, c.v, c.topk_idx, s.block_size, c.cu_seqlens, c.scale
            ),
        )
    longest = (s.long, s.long // s.kernel_stride)
    return Contract(
        lambda f, c: f(
            *(c.q, c.k, c.v, *windows, s.block_size, s.topk, c.cu_seqlens, c.key_cu_seqlens),
            *(*longest, c.scale, s.init_blocks, s.local_blocks),
        ),
        lambda c: reference.compressed_attention_forward(
            *(c.q, c.k, c.v, c.cu_seqlens, c.key_cu_seqlens),
            kernel_size=s.kernel_size,
            kernel_stride=s.kernel_stride,
            softmax_scale=c.scale,
        )[0],
    )
