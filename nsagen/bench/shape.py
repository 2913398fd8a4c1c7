"""The attention that benchmarks run, and its calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor

from nsagen import ops
from nsagen.bench.member import Member
from nsagen.core.branches import BRANCHES
from nsagen.core.errors import InvalidInputError
from nsagen.core.text import nearest
from nsagen.core.workload import STATIC_PARAMS, Workload
from nsagen.ops import forced_blocks
from nsagen.ops._launch import key_of
from nsagen.ops.block_selection import block_selection_forward
from nsagen.ops.branch_attention import attend_branches
from nsagen.ops.compressed_attention import compressed_attention_forward
from nsagen.ops.layout import compressed_cu_seqlens
from nsagen.ops.selected_attention import selected_attention_forward
from nsagen.ops.sliding_window_gated_sum import sliding_window_gated_sum
from nsagen.runtime import Dispatcher


@dataclass(frozen=True)
class Shape:
    """One attention. The defaults are those on which public NSA implementations are measured.

    Attributes:
        kv_heads: key/value heads HK; the others are the static parameters of workloads.
    """

    kv_heads: int = 4
    gqa_ratio: int = 16
    head_dim: int = 128
    v_head_dim: int = 128
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512
    index_head_dim: int = 128
    compress_type: str = "avgpool"
    with_pe: bool = False
    dtype: str = "bfloat16"

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.gqa_ratio

    def heads_of(self, op: str) -> int:
        """The heads that an op's cases count."""
        return self.query_heads if op in ("gated_sum", "rope") else self.kv_heads

    def workload(self, op: str, pass_: str) -> Workload:
        """The workload of an op of this attention."""
        values = asdict(self)
        names = STATIC_PARAMS[op, pass_]
        return Workload.of(op, pass_, dtype=self.dtype, **{name: values[name] for name in names})


@dataclass(frozen=True)
class Inputs:
    """Random tensors of one sequence: what the three branches read.

    Attributes:
        q: [N, HQ, D], k: [N, HK, D], v: [N, HK, Dv]; ck, cv: the same of the windows.
        gate: [N, HQ, 3].
    """

    shape: Shape
    tokens: int
    q: Tensor
    k: Tensor
    v: Tensor
    ck: Tensor
    cv: Tensor
    gate: Tensor
    cu_seqlens: Tensor
    window_cu_seqlens: Tensor
    dispatcher: Dispatcher | None = field(default=None, compare=False)

    @classmethod
    def random(
        cls,
        shape: Shape,
        tokens: int,
        dispatcher: Dispatcher | None = None,
        *,
        device: str = "cuda",
        requires_grad: bool = False,
    ) -> Inputs:
        """Standard normal tensors, and gates between 0 and 1."""
        dtype = getattr(torch, shape.dtype)
        generator = torch.Generator(device).manual_seed(0)

        def normal(rows: int, heads: int, dim: int) -> Tensor:
            x = torch.randn(rows, heads, dim, device=device, dtype=dtype, generator=generator)
            return x.requires_grad_(requires_grad)

        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        windows = tokens // shape.kernel_stride
        gate = torch.rand(tokens, shape.query_heads, 3, device=device, generator=generator)
        return cls(
            shape=shape,
            tokens=tokens,
            q=normal(tokens, shape.query_heads, shape.head_dim),
            k=normal(tokens, shape.kv_heads, shape.head_dim),
            v=normal(tokens, shape.kv_heads, shape.v_head_dim),
            ck=normal(windows, shape.kv_heads, shape.head_dim),
            cv=normal(windows, shape.kv_heads, shape.v_head_dim),
            gate=gate.to(dtype).requires_grad_(requires_grad),
            cu_seqlens=cu_seqlens,
            window_cu_seqlens=compressed_cu_seqlens(
                cu_seqlens, shape.kernel_size, shape.kernel_stride
            ),
            dispatcher=dispatcher,
        )

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """The tensors that have a gradient."""
        return self.q, self.k, self.v, self.ck, self.cv, self.gate

    def compressed(self) -> tuple[Tensor, Tensor]:
        """(o, topk_idx) of compressed attention and block selection."""
        s = self.shape
        return ops.compressed_attention(
            *(self.q, self.ck, self.cv, s.kernel_size, s.kernel_stride, s.block_size, s.topk),
            *(self.cu_seqlens, self.window_cu_seqlens),
            init_blocks=s.init_blocks,
            local_blocks=s.local_blocks,
            dispatcher=self.dispatcher,
        )

    def attention(self) -> Tensor:
        """The three branches and their gated sum: o [N, HQ, Dv]."""
        s, tokens = self.shape, (self.k, self.v)
        return attend_branches(
            *(self.q, (self.ck, self.cv), tokens, tokens, self.gate),
            cu_seqlens=self.cu_seqlens,
            window_cu_seqlens=self.window_cu_seqlens,
            kernel_size=s.kernel_size,
            kernel_stride=s.kernel_stride,
            block_size=s.block_size,
            topk=s.topk,
            init_blocks=s.init_blocks,
            local_blocks=s.local_blocks,
            window_size=s.window_size,
            branches=BRANCHES,
            softmax_scale=s.head_dim**-0.5,
            dispatcher=self.dispatcher,
        )

    def attention_over(self, topk_idx: Tensor) -> Tensor:
        """`attention` by the same kernels, without gradients, but the selected branch reads given
        blocks, not those that block selection chooses beside."""
        s, key = self.shape, key_of(self.dispatcher)
        windows = (self.cu_seqlens, self.window_cu_seqlens, s.kernel_size, s.kernel_stride)
        qkv, last = (self.q, self.k, self.v), (s.head_dim**-0.5, key)
        forced = (s.block_size, s.init_blocks, s.local_blocks)
        o, lse = compressed_attention_forward(self.q, self.ck, self.cv, *windows, *last)
        blocks = (s.block_size, s.topk, s.init_blocks, s.local_blocks)
        block_selection_forward(self.q, self.ck, lse, *windows, *blocks, *last)
        if forced_blocks.applies(*qkv, s.window_size, *forced, key):
            o_window, _, o_forced, lse_forced = forced_blocks.window_and_forced_blocks(
                *qkv, self.cu_seqlens, s.window_size, *forced, *last
            )
            others = (o_forced, lse_forced, o, o_window, self.gate)
            return forced_blocks.free_blocks_gated_sum(
                *qkv, topk_idx, self.cu_seqlens, *others, *forced, *last
            )
        selected, _ = selected_attention_forward(
            *qkv, topk_idx, self.cu_seqlens, s.block_size, *last
        )
        others = (o, selected, self.gate)
        return sliding_window_gated_sum(*qkv, self.cu_seqlens, *others, s.window_size, *last)


def shape_of(spec: str | None = None, changes: Sequence[str] = ()) -> Shape | Member:
    """The attention to measure.

    Args:
        spec: a spec's path or name: its first shape that agrees with `changes`; None: `Shape`'s
            defaults with the changes made.
        changes: such as "topk=8" and "dtype=float16".

    Raises:
        SpecError: no such spec, or it is invalid.
        InvalidInputError: a change is not NAME=VALUE of `Shape`, or the spec has no such shape.
    """
    values = _parse(changes)
    if spec is None:
        return Shape(**values)
    from nsagen.spec import load_spec  # what measuring does not need

    heads = {"kv_heads": values.pop("kv_heads")} if "kv_heads" in values else {}
    found = load_spec(spec)
    names = {f.name for f in fields(Shape)}
    for shape in found.shapes:
        own = {name: value for name, value in asdict(shape).items() if name in names}
        if values.items() <= own.items():
            if shape.family_keys:
                return Member.of(shape, heads.get("kv_heads"))
            own["index_head_dim"] = own["index_head_dim"] or shape.head_dim
            return replace(Shape(**own), **heads)
    raise InvalidInputError(
        f"bench: {found.name} must have a shape with {', '.join(changes)}; it has none; "
        f"see nsagen inspect {found.name}, or leave the spec out to measure any shape"
    )


def _parse(changes: Sequence[str]) -> dict[str, Any]:
    """`["topk=8", "dtype=float16"]` as keyword arguments of `Shape`."""
    types = {f.name: type(f.default) for f in fields(Shape)}
    found: dict[str, Any] = {}
    for change in changes:
        name, sign, value = change.partition("=")
        kind = types.get(name)
        good = {int: value.isdecimal(), bool: value in ("true", "false"), str: bool(value)}
        if not sign or kind is None or not good[kind]:
            raise InvalidInputError(
                f"bench: --set must be PARAM=VALUE with one of {', '.join(types)}; "
                f"got {change!r}; "
                + (nearest(name, types) if kind is None else "give a value of its kind")
            )
        found[name] = value == "true" if kind is bool else kind(value)
    return found
