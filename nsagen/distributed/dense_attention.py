"""Dense attention of one rank's tokens to those of all ranks, for the models that NSA replaces.

The backward pass gathers keys and values again and computes attention again, one chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from nsagen.distributed.gathering import Gathering
from nsagen.distributed.shard import Chunk, Shard

Attend = Callable[[Tensor, Tensor, Tensor, list[int], list[int]], Tensor]
"""(q, k, v, queries of each sequence, keys of each) -> o; queries are the last of their tokens."""


def attend_densely(attend: Attend, q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> Tensor:
    """What `attend` gives for this rank's queries [N, HQ, D]; k and v are of its tokens, after
    rope."""
    gathering = Gathering(shard.tokens)
    return _Attention.apply(attend, shard, gathering, q, *gathering.enter(k, v))


def _attend(attend: Attend, shard: Shard, chunk: Chunk, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """A chunk's queries, each with its sequence's keys up to the chunk's last."""
    starts = shard.cut.starts.tolist()
    ends = [last for _, last in chunk.bounds]
    keys, values = (
        torch.cat([x[:0], *(x[at : at + n] for at, n in zip(starts, ends, strict=False))])
        for x in (k, v)
    )
    return attend(q, keys, values, [b - a for a, b in chunk.bounds], ends)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attend: Attend, shard: Shard, gathering: Gathering, q: Tensor, *local: Tensor
    ) -> Tensor:
        ctx.attend, ctx.shard, ctx.gathering = attend, shard, gathering
        ctx.save_for_backward(q, *local)
        gathering.start(*local)
        k, v = gathering.wait()
        return torch.cat([_attend(attend, shard, c, q[c.rows], k, v) for c in shard.chunks])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, *local = ctx.saved_tensors
        shard: Shard = ctx.shard
        ctx.gathering.start(*local)
        k, v = (x.requires_grad_() for x in ctx.gathering.wait())
        of_queries, of_tokens = [], [torch.zeros_like(k), torch.zeros_like(v)]
        for chunk in shard.chunks:
            with torch.enable_grad():
                some = q[chunk.rows].detach().requires_grad_()
                o = _attend(ctx.attend, shard, chunk, some, k, v)
            found = torch.autograd.grad(
                o, (some, k, v), gradients[0][chunk.rows], materialize_grads=True
            )
            of_queries.append(found[0])
            for total, part in zip(of_tokens, found[1:], strict=True):
                total += part
        sums = ctx.gathering.sum_gradients(*of_tokens)
        return None, None, None, torch.cat(of_queries), *sums
