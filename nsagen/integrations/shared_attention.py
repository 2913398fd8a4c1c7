"""Attention of the tokens of one rank among several, for models with nsagen's attention.

A shard of `nsagen.distributed` brings what attends to the tokens of the other ranks.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.integrations.attention_layout import refuse
from nsagen.model.forms import Form, Index
from nsagen.model.packing import SHARD, Packed
from nsagen.model.self_attention import attend_causally

Ranking = Form | Index | None
"""How a layer chooses blocks; None: it attends to everything."""


def check_placed(shard: Any) -> None:
    """Refuse a shard whose positions the model does not have."""
    if not isinstance(shard, Packed) or not getattr(shard, "placed", False):
        rule = "must come through the model that context_parallel was given"
        refuse(SHARD, rule, type(shard).__name__, "call that model with nsa_shard")


def attend_shared(
    ranking: Ranking, q: Tensor, k: Tensor, v: Tensor, shard: Packed, scale: float
) -> Tensor:
    """[N, HQ, D] of this rank's queries to all ranks' tokens.

    Args:
        q: [N, HQ, D]; k, v: [N, HK, D], after rope.
    """
    lengths = shard.lengths or ()
    dense = [ranking is None or (isinstance(ranking, Form) and ranking.dense(n)) for n in lengths]
    if all(dense) or not any(dense):
        return _attend(None if all(dense) else ranking, q, k, v, shard, scale)
    assert shard.remote is not None
    o = torch.zeros_like(q)
    for how, kept in ((None, dense), (ranking, [not one for one in dense])):
        part, rows = shard.remote.only(tuple(kept), shard)
        some_q, some_k, some_v = (x.index_select(0, rows) for x in (q, k, v))
        o = o.index_copy(0, rows, _attend(how, some_q, some_k, some_v, part, scale))
    return o


def _attend(
    ranking: Ranking, q: Tensor, k: Tensor, v: Tensor, shard: Packed, scale: float
) -> Tensor:
    assert shard.remote is not None
    if ranking is not None:
        return shard.remote.blocks(ranking, q, k, v, shard, scale)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, lengths: list[int], key_lengths: list[int]
    ) -> Tensor:
        return attend_causally(q, k, v, lengths, key_lengths, scale)

    return shard.remote.dense(attend, q, k, v, shard)
