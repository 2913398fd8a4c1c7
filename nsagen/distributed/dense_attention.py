"""Dense attention of one rank's tokens to those of all ranks, for the models that NSA replaces.

The backward pass gathers keys and values again, and computes attention again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from nsagen.distributed.gathering import Gathering
from nsagen.distributed.shard import Shard

Attend = Callable[[Tensor, Tensor, Tensor, Sequence[int], Sequence[int]], Tensor]
"""(q, k, v, queries of each sequence, keys of each) -> o; queries are the last of their tokens."""


def attend_densely(attend: Attend, q: Tensor, k: Tensor, v: Tensor, shard: Shard) -> Tensor:
    """What `attend` gives for this rank's queries [N, HQ, D]; k and v are of its tokens, after
    rope."""
    gathering = Gathering(shard.tokens)
    return _Attention.apply(attend, shard, gathering, q, *gathering.enter(k, v))


def _attend(attend: Attend, shard: Shard, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each piece's queries, with its sequence's keys up to the piece's last."""
    return attend(q, k, v, shard.pieces.lengths, shard.pieces.ends)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, attend: Attend, shard: Shard, gathering: Gathering, q: Tensor, *local: Tensor
    ) -> Tensor:
        ctx.attend, ctx.shard, ctx.gathering = attend, shard, gathering
        joined = gathering.join(*local)
        ctx.save_for_backward(q, joined)
        gathering.start(joined)
        return _attend(attend, shard, q, *gathering.wait())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, joined = ctx.saved_tensors
        ctx.gathering.start(joined)
        leaves = [x.detach().requires_grad_() for x in (q, *ctx.gathering.wait())]
        with torch.enable_grad():
            o = _attend(ctx.attend, ctx.shard, *leaves)
        dq, *found = torch.autograd.grad(o, leaves, gradients, materialize_grads=True)
        return None, None, None, dq, *ctx.gathering.sum_gradients(found, ctx.needs_input_grad[4:])
