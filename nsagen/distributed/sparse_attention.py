"""Native Sparse Attention of one rank's tokens to those of all ranks, with gradients.

In order: the windows that start in this rank's pieces; gathers of all windows, then of all keys and
values; meanwhile compressed attention and block selection, which need windows alone; then the other
branches. The backward pass gathers both again and computes the gradients of windows while keys and
values move.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.distributed.chunk_attention import (
    Call,
    attend_tokens,
    attend_windows,
    only,
    pairs_of,
    total_of,
)
from nsagen.distributed.gated_chunks import attend_gated, takes_gated_branches
from nsagen.distributed.gathering import Gathering, RemoteTokens
from nsagen.distributed.shard import Chunk, Shard, Windows
from nsagen.model.heads import KV, Heads
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.rope import Tables
from nsagen.ops.compressed_attention import compressed_attention_backward
from nsagen.ops.gated_sum import gated_sum_backward, gated_sum_forward
from nsagen.ops.selected_attention import selected_attention_backward
from nsagen.ops.sliding_window_attention import sliding_window_attention_backward


def attend_sparsely(
    module: NSAOps, heads: Heads, gate: Tensor, shard: Shard, tables: Tables
) -> Tensor:
    """What the module's branches give for this rank's tokens.

    Args:
        module: with the parameters; heads, gate: of this rank's tokens.
        shard: where they are, and where the others.
        tables: of rope.

    Returns:
        [N, HQ * Dv].
    """
    s = module.sparsity
    q, selected, sliding = module.turned(heads, shard.positions, tables)
    own_window = () if sliding is selected else sliding
    of_tokens = Gathering(shard.tokens)
    tokens = of_tokens.enter(*selected, *own_window)
    of_windows, windows = None, ()
    if s.needs_windows:
        layout = shard.windows_for(**s.window_sizes)
        of_windows = Gathering(layout.places)
        windows = _new_windows(module, heads.compressed, shard, layout, tables)
        if "compressed" not in s.on:
            windows = KV(*(x.detach() for x in windows))
        windows = of_windows.enter(*windows)
    call = Call(module, shard, of_tokens, of_windows)
    if takes_gated_branches(call, q, gate, *tokens, *windows):
        return attend_gated(call, q, gate, KV(*tokens), KV(*windows)).flatten(1)
    return _Attention.apply(call, q, gate, *tokens, *windows).flatten(1)


def _new_windows(module: NSAOps, tokens: KV, shard: Shard, layout: Windows, tables: Tables) -> KV:
    """The windows that start in this rank's pieces, keys after rope."""
    both = RemoteTokens.apply(torch.cat(tokens, -1), layout.halo, shard.tokens.group)
    dims = [x.shape[-1] for x in tokens]
    read = KV(*(x.contiguous() for x in both.split(dims, -1)))
    ck, cv = module.compress(read, layout.lengths.cu_seqlens, layout.lengths)
    made = layout.places.count
    return KV(module.rope(ck[:made], layout.positions, tables), cv[:made])


class _Attention(torch.autograd.Function):
    """The branches and their gated sum: [N, HQ, Dv].

    `tensors` are this rank's keys and values of the selected branch, those of the sliding one if
    it has its own, and windows if a branch needs them.
    """

    @staticmethod
    def forward(ctx: Any, call: Call, q: Tensor, gate: Tensor, *tensors: Tensor) -> Tensor:
        tokens, windows = _parted(call, tensors)
        call.start(tokens, windows)
        chunks = call.shard.chunks
        kept: list[dict[str, Tensor]] = [{} for _ in chunks]
        if call.of_windows is not None:
            ck, cv = call.of_windows.wait()
            for chunk, made in zip(chunks, kept, strict=True):
                attend_windows(call, chunk, q[chunk.rows], ck, cv, made)
            del ck, cv
        all_tokens = call.of_tokens.wait()
        outputs = []
        for chunk, made in zip(chunks, kept, strict=True):
            attend_tokens(call, chunk, q[chunk.rows], all_tokens, made)
            three = _outputs(made)
            outputs.append(gated_sum_forward(*three, gate[chunk.rows], call.last[1]))
        ctx.call, ctx.names = call, [list(made) for made in kept]
        made = [x for one in kept for x in one.values()]
        ctx.save_for_backward(q, gate, *tensors, *made)
        ctx.count = len(tensors)
        return torch.cat(outputs)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        q, gate, *rest = ctx.saved_tensors
        tensors, made = rest[: ctx.count], iter(rest[ctx.count :])
        kept = [{name: next(made) for name in names} for names in ctx.names]
        tokens, windows = _parted(call, tensors)
        call.start(tokens, windows)
        chunks = call.shard.chunks
        parts = [
            _Part(call, chunk, q[chunk.rows], gate[chunk.rows], one, gradients[0][chunk.rows])
            for chunk, one in zip(chunks, kept, strict=True)
        ]
        needed = ctx.needs_input_grad[3:]
        of_windows: tuple[Tensor | None, ...] = (None,) * len(windows)
        if call.of_windows is not None:
            all_windows = call.of_windows.wait()
            if "compressed" in call.on:
                found = total_of(part.windows_backward(*all_windows) for part in parts)
                wanted = only(found, needed[len(tokens) :])
                of_windows = call.of_windows.sum_gradients(*wanted)
            del all_windows
        all_tokens = call.of_tokens.wait()
        found = total_of(part.tokens_backward(all_tokens) for part in parts)
        del all_tokens
        of_tokens = call.of_tokens.sum_gradients(*only(found, needed))
        dq = torch.cat([part.dq for part in parts])
        dgate = torch.cat([part.dgate for part in parts])
        return None, dq, dgate, *of_tokens, *of_windows


def _parted(call: Call, tensors: Sequence[Tensor]) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """Those of tokens, and those of windows."""
    count = len(tensors) - (0 if call.of_windows is None else 2)
    return tensors[:count], tensors[count:]


def _outputs(made: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """What each branch gave; in place of one that is off, another, whose gate is 0."""
    some = next(x for name, x in made.items() if name.startswith("o_"))
    first, second, third = (made.get(f"o_{name}", some) for name in BRANCHES)
    return first, second, third


class _Part:
    """The backward pass of one chunk."""

    def __init__(
        self,
        call: Call,
        chunk: Chunk,
        q: Tensor,
        gate: Tensor,
        made: dict[str, Tensor],
        gradient: Tensor,
    ) -> None:
        self.call, self.chunk, self.q, self.made = call, chunk, q, made
        three = _outputs(made)
        *of_branches, self.dgate = gated_sum_backward(gradient, *three, gate, call.last[1])
        self.do = dict(zip(BRANCHES, of_branches, strict=True))
        self.dq = torch.zeros_like(q)

    def _of(self, branch: str) -> tuple[Tensor, Tensor]:
        return self.made[f"o_{branch}"], self.made[f"lse_{branch}"]

    def windows_backward(self, ck: Tensor, cv: Tensor) -> list[Tensor]:
        """Gradients of all windows' keys and values."""
        cu_seqlens, ends, size, stride = self.call.windows_of(self.chunk)
        dq, dck, dcv = compressed_attention_backward(
            *(self.do["compressed"], self.q, ck, cv, cu_seqlens, ends),
            *self._of("compressed"),
            *(size, stride),
            *(*self.call.last, self.chunk.q_start),
        )
        self.dq += dq
        return [dck, dcv]

    def tokens_backward(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of all tokens' keys and values, in their order."""
        s, cu_seqlens = self.call.module.sparsity, self.chunk.cu_seqlens
        ends, q_start = self.call.shard.tokens.starts, self.chunk.q_start
        selected, sliding = pairs_of(tokens)
        found: list[Tensor] = []
        if "selected" in self.call.on:
            dq, *found = selected_attention_backward(
                *(self.do["selected"], self.q, selected.k, selected.v),
                *(self.made["topk_idx"], cu_seqlens),
                *self._of("selected"),
                *(s.block_size, *self.call.last),
                cu_seqlens_k=ends,
                q_start=q_start,
            )
            self.dq += dq
        if "sliding" in self.call.on:
            dq, *near = sliding_window_attention_backward(
                *(self.do["sliding"], self.q, sliding.k, sliding.v, cu_seqlens),
                *self._of("sliding"),
                *(s.window_size, *self.call.last, ends, q_start),
            )
            self.dq += dq
            if len(tokens) > 2:
                found = [*(found or map(torch.zeros_like, tokens[:2])), *near]
            else:
                found = [a.add_(b) for a, b in zip(found, near, strict=True)] if found else near
        return found or [torch.zeros_like(x) for x in tokens]
