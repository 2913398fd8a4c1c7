"""What benchmarks run of the family's members besides NSA: a selection by scores, and attention."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.workload import Workload
from nsagen.ops.compress import compress
from nsagen.ops.local_band import attend_selected
from nsagen.ops.reference import quantize
from nsagen.runtime import Dispatcher

if TYPE_CHECKING:  # measuring needs no pydantic
    from nsagen.spec import AttentionShape


@dataclass(frozen=True)
class Member:
    """Attention of a shape whose spec names another member of the family.

    Attributes:
        kv_heads: key/value heads HK.
    """

    shape: AttentionShape
    kv_heads: int

    @classmethod
    def of(cls, shape: AttentionShape, kv_heads: int | None = None) -> Member:
        """With as many heads as an index has, or as 32 query heads need."""
        return cls(shape, kv_heads or shape.index_heads or max(1, 32 // shape.gqa_ratio))

    @property
    def query_heads(self) -> int:
        return self.kv_heads * self.shape.gqa_ratio

    @property
    def head_dim(self) -> int:
        return self.shape.head_dim

    @property
    def v_head_dim(self) -> int:
        return self.shape.v_head_dim

    @property
    def dtype(self) -> str:
        return self.shape.dtype

    @property
    def topk(self) -> int:
        return self.shape.topk

    @property
    def indexed(self) -> bool:
        """Whether a learned index ranks blocks."""
        return self.shape.scorer == "index"

    @property
    def windows(self) -> dict[str, Any]:
        return {"kernel_size": self.shape.kernel_size, "kernel_stride": self.shape.kernel_stride}

    @property
    def rule(self) -> dict[str, Any]:
        """What `block_selection` takes."""
        names = ("block_size", "topk", "init_blocks", "local_blocks")
        names += ("score_norm", "score_heads", "score_pool")
        return {**self.windows, **{name: getattr(self.shape, name) for name in names}}

    def workload(self, op: str, pass_: str) -> Workload:
        """The workload of an op of this attention."""
        every = self.shape.workloads(("forward", "backward", "decode"))
        return next(w for w in every if (w.op, w.pass_) == (op, pass_))

    def heads_of(self, op: str) -> int:
        """Key heads of an op: those of an index share one."""
        return 1 if self.indexed and op == "block_selection" else self.kv_heads


@dataclass(frozen=True)
class MemberInputs:
    """Random tensors of one sequence.

    Attributes:
        q: [N, HQ, D], k: [N, HK, D], v: [N, HK, Dv].
        index_q: [N, HK, Di], index_k: [N, 1, Di], of a learned index; else empty.
    """

    member: Member
    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor
    cu_seqlens: Tensor
    dispatcher: Dispatcher | None = field(default=None, compare=False)

    @classmethod
    def random(
        cls,
        member: Member,
        tokens: int,
        dispatcher: Dispatcher | None = None,
        *,
        device: str = "cuda",
        requires_grad: bool = False,
    ) -> MemberInputs:
        """Standard normal tensors."""
        s, dtype = member.shape, getattr(torch, member.shape.dtype)
        generator = torch.Generator(device).manual_seed(0)
        heads = (member.query_heads, member.kv_heads, member.kv_heads)
        sizes = [*zip(heads, (s.head_dim, s.head_dim, s.v_head_dim), strict=True)]
        sizes += [(member.kv_heads, s.index_head_dim), (1, s.index_head_dim)]
        tensors = [
            torch.randn(tokens, *size, device=device, dtype=dtype, generator=generator)
            for size in sizes
        ]
        cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=device)
        q, k, v, index_q, index_k = (x.requires_grad_(requires_grad) for x in tensors)
        return cls(member, q, k, v, index_q, index_k, cu_seqlens, dispatcher)

    @property
    def leaves(self) -> tuple[Tensor, ...]:
        """What attention has a gradient of."""
        return self.q, self.k, self.v

    @torch.no_grad()
    def select(self) -> Tensor:
        """topk_idx, from index heads or from means of keys."""
        *_, (_, last) = self.selection_calls()
        return last()

    def selection_calls(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """The ops of a selection, each on what the earlier ones make."""
        s, ends, windows = self.member.shape, self.cu_seqlens, self.member.windows
        more: dict[str, Any] = {"dispatcher": self.dispatcher}
        q, keys, key_ends, lse = self.index_q, self.index_k, ends, None
        if not self.member.indexed:
            pool = partial(compress, self.k.detach(), None, None, ends, compress_type="avgpool")
            call = partial(pool, **windows, **more)
            yield "compress", call
            q, (keys, key_ends) = self.q, call()
        if s.score_norm == "softmax":
            wide = {name: s.lse_windows * size for name, size in windows.items()}
            of, of_ends = (keys, key_ends) if s.lse_windows == 1 else pool(**wide, **more)
            call = partial(ops.compressed_lse, q, of, ends, of_ends, **wide, **more)
            yield "compressed_lse", call
            lse = call()
        args = (q, keys, lse, ends, key_ends)
        yield "block_selection", partial(ops.block_selection, *args, **self.member.rule, **more)

    def attend(self, topk_idx: Tensor) -> Tensor:
        """Attention to given blocks, as a model calls it: o [N, HQ, Dv]."""
        s = self.member.shape
        blocks = (topk_idx, s.block_size, s.local_blocks, self.cu_seqlens)
        return attend_selected(self.q, self.k, self.v, *blocks, dispatcher=self.dispatcher)

    def attention(self) -> Tensor:
        """The selection and attention to what it selects: o [N, HQ, Dv]."""
        return self.attend(self.select())

    def forward_calls(self) -> Iterator[tuple[str, Callable[[], Any]]]:
        """Each op of the forward pass, on what the earlier ones make."""
        yield from self.selection_calls()
        yield "selected_attention", partial(self.attend, self.select())

    def training_calls(self) -> dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]]:
        """Each differentiable op, and the tensors whose gradients it gives."""
        topk_idx = self.select()
        calls = {"selected_attention": (partial(self.attend, topk_idx), self.leaves)}
        if self.member.indexed:
            index = (self.index_q, self.index_k)
            args = (self.q.detach(), self.k.detach(), *index, topk_idx, self.cu_seqlens)
            more: dict[str, Any] = {"dispatcher": self.dispatcher}
            more["block_size"] = self.member.shape.block_size
            calls["index_loss"] = (partial(ops.index_loss, *args, **more), index)
            args = (*args[:4], None, self.cu_seqlens)
            calls["dense_index_loss"] = (partial(ops.index_loss, *args, **more), index)
        return calls


class MemberCaches:
    """A random cache of one layer of a member, full, and a token of each sequence.

    Args:
        batch: sequences.
        context: tokens of each, including the new one.
    """

    def __init__(self, member: Member, batch: int, context: int, device: torch.device) -> None:
        self.member, s, dtype = member, member.shape, getattr(torch, member.shape.dtype)

        def normal(*shape: int) -> Tensor:
            return torch.randn(batch, *shape, device=device, dtype=dtype)

        self.q = normal(member.query_heads, s.head_dim)
        self.k = normal(context, member.kv_heads, s.head_dim)
        self.v = normal(context, member.kv_heads, s.v_head_dim)
        self.scored_q, self.scored = self.q, normal(context, 1, max(1, s.index_head_dim))
        if member.indexed:
            self.scored_q = normal(member.kv_heads, s.index_head_dim)
        else:
            windows = max(1, (context - s.kernel_size) // s.kernel_stride + 1)
            self.scored = normal(windows, member.kv_heads, s.head_dim)
        self.k_scale = self.v_scale = self.scored_scale = None
        if s.cache_dtype:
            narrow = getattr(torch, s.cache_dtype)
            self.k, self.k_scale = _narrow(self.k, narrow)
            self.v, self.v_scale = _narrow(self.v, narrow)
            self.scored, self.scored_scale = _narrow(self.scored, narrow)
        self.positions = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
        self.slots = torch.arange(batch, dtype=torch.int32, device=device)
        self.topk_idx = self.select()

    def append(self) -> None:
        """The means of the windows that the new tokens complete."""
        args = (self.k, self.scored, self.positions, self.slots)
        scales: dict[str, Any] = {"k_scale": self.k_scale, "ck_scale": self.scored_scale}
        ops.pool_append(*args, **self.member.windows, **scales)

    def select(self) -> Tensor:
        """The new tokens' blocks."""
        args = (self.scored_q, self.scored, self.positions, self.slots)
        return ops.block_selection_decode(*args, **self.member.rule, k_scale=self.scored_scale)

    def attend(self, topk_idx: Tensor | None = None) -> Tensor:
        """Attention to given blocks, or those selected before."""
        blocks = self.topk_idx if topk_idx is None else topk_idx
        args = (self.q, self.k, self.v, blocks, self.positions, self.slots)
        scales: dict[str, Any] = {"k_scale": self.k_scale, "v_scale": self.v_scale}
        return ops.selected_attention_decode(
            *args, block_size=self.member.shape.block_size, **scales
        )

    def sparse(self) -> Tensor:
        """A step: complete windows, select blocks and attend to them."""
        if not self.member.indexed:
            self.append()
        return self.attend(self.select())

    def calls(self) -> dict[str, tuple[Callable[[], object], int]]:
        """A step and its ops, each with the bytes that it must read."""
        selected = self.topk_idx.shape[-1] * self.member.shape.block_size
        tokens = (self.k, self.k_scale, self.v, self.v_scale)
        entry = sum(x[:, 0].nbytes for x in tokens if x is not None)
        read = min(selected, self.k.shape[1]) * entry
        ranks = sum(x.nbytes for x in (self.scored, self.scored_scale) if x is not None)
        found: dict[str, tuple[Callable[[], object], int]] = {
            "block_selection": (self.select, ranks),
            "selected_attention": (self.attend, read),
            "attention": (self.sparse, ranks + read),
        }
        if not self.member.indexed:
            found["pool_append"] = (self.append, 0)
        return found


def _narrow(cache: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A cache's rows in a narrow dtype and their scales, one sequence at a time: they are wide
    before they are narrow."""
    rows, scales = zip(*(quantize(one, dtype) for one in cache), strict=True)
    return torch.stack(rows), torch.stack(scales)
