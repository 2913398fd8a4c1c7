"""Attention of one rank's tokens to the blocks that they select of all ranks' tokens.

These are the members of the family with one softmax and no compressed values: blocks are ranked by
means of roped keys (InfLLM-V2, MoBA) or by a learned index's keys (MSA). What ranks them is
gathered first, and blocks are chosen while keys and values move. The choice has no gradient; the
backward pass gathers keys and values again.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsagen.distributed.chunk_attention import only, total_of
from nsagen.distributed.gathering import Gathering, Places, RemoteTokens
from nsagen.distributed.shard import Chunk, Shard
from nsagen.model.forms import Form, Index, select
from nsagen.ops import block_selection
from nsagen.ops._launch import key_of
from nsagen.ops.compress import compress
from nsagen.ops.selected_attention import selected_attention_backward, selected_attention_forward


def attend_blocks(
    ranking: Form | Index, q: Tensor, k: Tensor, v: Tensor, shard: Shard, scale: float
) -> Tensor:
    """[N, HQ, D] of this rank's queries.

    Args:
        q: [N, HQ, D]; k, v: [N, HK, D], of this rank's tokens, after rope.
    """
    of_tokens = Gathering(shard.tokens)
    tokens = of_tokens.enter(k, v)
    ranked, places = (
        _means(ranking, k, shard) if isinstance(ranking, Form) else (ranking.k, shard.tokens)
    )
    call = _Call(ranking, shard, of_tokens, ranked.detach(), places, scale)
    return _Attention.apply(call, q, *tokens)


@torch.no_grad()
def _means(form: Form, k: Tensor, shard: Shard) -> tuple[Tensor, Places]:
    """The means of the windows that start in this rank's pieces."""
    layout = shard.windows_for(**form.window_sizes)
    read = RemoteTokens.apply(k, layout.halo, shard.tokens.group)
    made, _ = compress(
        *(read, None, None, layout.lengths.cu_seqlens),
        lengths=layout.lengths,
        compress_type="avgpool",
        dispatcher=form.dispatcher,
        **form.window_sizes,
    )
    return made[: layout.places.count], layout.places


@dataclass(frozen=True)
class _Call:
    """What a call needs beside its tensors."""

    ranking: Form | Index
    shard: Shard
    of_tokens: Gathering
    ranked: Tensor
    places: Places
    scale: float

    @property
    def last(self) -> tuple[int, float, str]:
        return self.ranking.block_size, self.scale, key_of(self.ranking.dispatcher)

    def choose(self, chunk: Chunk, q: Tensor, ranked: Tensor) -> Tensor:
        """The blocks of a chunk's queries, int32 [heads, N, topk], by what is gathered."""
        ends = (chunk.cu_seqlens, self.places.starts)
        if isinstance(self.ranking, Form):
            return select(self.ranking, q, ranked, *ends, chunk.q_start, self.scale)
        index_q = self.ranking.q[chunk.rows].detach()
        more = {**self.ranking.rule, "dispatcher": self.ranking.dispatcher}
        return block_selection(index_q, ranked, None, *ends, q_start=chunk.q_start, **more)

    def gathered(self, repeats: int) -> list[Tensor]:
        """Keys and values of all tokens, once for each head that selects for itself."""
        found = self.of_tokens.wait()
        return found if repeats == 1 else [x.repeat_interleave(repeats, 1) for x in found]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_ranked, chunks = Gathering(call.places), call.shard.chunks
        of_ranked.start(call.ranked)
        call.of_tokens.start(k, v)
        (ranked,) = of_ranked.wait()
        blocks = [call.choose(chunk, q[chunk.rows], ranked) for chunk in chunks]
        del ranked
        repeats = blocks[0].shape[0] // k.shape[1]
        every = call.gathered(repeats)
        kept = []
        size, *last = call.last
        for chunk, chosen in zip(chunks, blocks, strict=True):
            where = (chosen, chunk.cu_seqlens, size, *last, call.shard.tokens.starts, chunk.q_start)
            kept += [chosen, *selected_attention_forward(q[chunk.rows], *every, *where)]
        ctx.call, ctx.repeats = call, repeats
        ctx.save_for_backward(q, k, v, *kept)
        return torch.cat(kept[1::3])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        q, k, v, *kept = ctx.saved_tensors
        call.of_tokens.start(k, v)
        every, repeats = call.gathered(ctx.repeats), ctx.repeats
        size, *last = call.last
        of_queries: list[Tensor] = []

        def parts() -> Iterator[list[Tensor]]:
            for i, chunk in enumerate(call.shard.chunks):
                blocks, o, lse = kept[3 * i : 3 * i + 3]
                dq, *found = selected_attention_backward(
                    *(gradients[0][chunk.rows], q[chunk.rows], *every),
                    *(blocks, chunk.cu_seqlens, o, lse, size, *last),
                    cu_seqlens_k=call.shard.tokens.starts,
                    q_start=chunk.q_start,
                )
                of_queries.append(dq)
                yield found

        found = total_of(parts())
        if repeats > 1:
            found = [x.unflatten(1, (-1, repeats)).sum(2) for x in found]
        of_tokens = call.of_tokens.sum_gradients(*only(found, ctx.needs_input_grad[2:]))
        return None, torch.cat(of_queries), *of_tokens
