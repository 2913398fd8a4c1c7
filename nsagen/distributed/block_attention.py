"""Attention of one rank's tokens to the blocks that they select of all ranks' tokens.

These are the members of the family with one softmax and no compressed values: blocks are ranked by
means of roped keys (InfLLM-V2, MoBA) or by a learned index's keys (MSA). What ranks them is
gathered first, and blocks are chosen while keys and values move. The choice has no gradient; the
backward pass gathers keys and values again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsagen.distributed.gathering import Gathering, Places, RemoteTokens
from nsagen.distributed.shard import Shard
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
    (read,) = RemoteTokens.apply(layout.halo, shard.tokens.group, k)
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

    @property
    def where(self) -> tuple[Tensor, Tensor]:
        """The offsets of the tokens that each piece sees, and its first one's position."""
        return self.shard.tokens.starts, self.shard.pieces.q_start

    def choose(self, q: Tensor, ranked: Tensor) -> Tensor:
        """The queries' blocks, int32 [heads, N, topk], by what is gathered."""
        ends, (_, q_start) = (self.shard.pieces.cu_seqlens, self.places.starts), self.where
        if isinstance(self.ranking, Form):
            return select(self.ranking, q, ranked, *ends, q_start, self.scale)
        more = {**self.ranking.rule, "dispatcher": self.ranking.dispatcher}
        return block_selection(
            self.ranking.q.detach(), ranked, None, *ends, q_start=q_start, **more
        )

    def gathered(self, repeats: int) -> Sequence[Tensor]:
        """Keys and values of tokens, once for each head that selects for itself."""
        found = self.of_tokens.wait()
        return found if repeats == 1 else [x.repeat_interleave(repeats, 1) for x in found]


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, call: _Call, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        of_ranked, joined = Gathering(call.places), call.of_tokens.join(k, v)
        of_ranked.start(of_ranked.join(call.places.padded(call.ranked)))
        call.of_tokens.start(joined)
        blocks = call.choose(q, *of_ranked.wait())
        repeats = blocks.shape[0] // k.shape[1]
        every, ends = call.gathered(repeats), call.shard.pieces.cu_seqlens
        o, lse = selected_attention_forward(q, *every, blocks, ends, *call.last, *call.where)
        ctx.call, ctx.repeats = call, repeats
        ctx.save_for_backward(q, joined, blocks, o, lse)
        return o

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        q, joined, blocks, o, lse = ctx.saved_tensors
        call.of_tokens.start(joined)
        every, ends = call.gathered(ctx.repeats), call.shard.pieces.cu_seqlens
        dq, *found = selected_attention_backward(
            gradients[0], q, *every, blocks, ends, o, lse, *call.last, *call.where
        )
        if ctx.repeats > 1:
            found = [x.unflatten(1, (-1, ctx.repeats)).sum(2) for x in found]
        return None, dq, *call.of_tokens.sum_gradients(found, ctx.needs_input_grad[2:])
