"""Queries, keys and values between the projections and the branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


class KV(NamedTuple):
    """Keys and values of a branch."""

    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class Heads:
    """The projections' results for tokens, before rope.

    Attributes:
        q: [N, HQ, D].
        compressed, selected, sliding: [N, HK, D] and [N, HK, Dv]; branches that share their keys
            and values have the same object.
    """

    q: Tensor
    compressed: KV
    selected: KV
    sliding: KV


@dataclass(frozen=True)
class Branches:
    """What the branches read; queries and keys are after rope.

    Attributes:
        windows: compressed keys and values; None if nothing reads them.
        q_start, cu_seqlens_k: set if sequences have more keys than queries.
    """

    q: Tensor
    windows: KV | None
    selected: KV
    sliding: KV
    cu_seqlens: Tensor
    window_cu_seqlens: Tensor
    q_start: Tensor | None = None
    cu_seqlens_k: Tensor | None = None


PROJECTIONS = {
    "selected": ("k_proj", "v_proj"),
    "compressed": ("k_proj_compressed", "v_proj_compressed"),
    "sliding": ("k_proj_sliding", "v_proj_sliding"),
}
"""The key and value projections of the branches that have their own; see `Sparsity.kv_branches`."""
