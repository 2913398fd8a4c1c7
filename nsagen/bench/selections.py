"""Which blocks a benchmark's selected attention reads: random ones, or those that a model learned.

Neighbouring tokens of a model select mostly the same blocks; on random tensors they have little
more than the forced ones in common. What reads common blocks once is measured on both.
"""

from __future__ import annotations

import functools
import lzma
from pathlib import Path

import torch
from torch import Tensor

from nsagen.bench.member import Member
from nsagen.bench.shape import Shape
from nsagen.core.errors import InvalidInputError
from nsagen.core.text import nearest
from nsagen.ops import reference

SELECTIONS = ("random", "learned")

_FILE = Path(__file__).parent / "learned_selection.xz"
_HEADS, _BLOCKS, _TOKENS = 2, 256, 16384
_NEEDS = {"block_size": 64, "topk": 16, "init_blocks": 1, "local_blocks": 2}
"""Of the model that made the file; what it selected says nothing about other sizes."""


def check_selection(selection: str, shape: Shape | Member) -> None:
    """Refuse a name that is none of `SELECTIONS`, and shapes that the file is not for.

    Raises:
        InvalidInputError: either.
    """
    if selection not in SELECTIONS:
        raise InvalidInputError(
            f"bench: --selection must be one of {', '.join(SELECTIONS)}; got {selection!r}; "
            f"{nearest(selection, SELECTIONS)}"
        )
    if selection == "learned" and isinstance(shape, Member):
        raise InvalidInputError(
            "bench: --selection learned is of an NSA model; got another member of the family; "
            "use --selection random"
        )
    wrong = [n for n, value in _NEEDS.items() if getattr(shape, n) != value]
    if selection == "learned" and wrong:
        needs = ", ".join(f"{name} {value}" for name, value in _NEEDS.items())
        got = ", ".join(f"{name} {getattr(shape, name)}" for name in wrong)
        raise InvalidInputError(
            f"bench: --selection learned needs {needs}, as the model had that made it; "
            f"got {got}; use --selection random"
        )


@functools.cache
def _free_blocks() -> Tensor:
    """bool [heads, tokens, blocks]: which free blocks each token of the file selected."""
    packed = bytearray(lzma.decompress(_FILE.read_bytes()))
    # Of each head and block, a bit for each token: neighbours' bits lie together.
    by_block = torch.frombuffer(packed, dtype=torch.uint8).view(_HEADS, _BLOCKS, _TOKENS // 8)
    bits = by_block[..., None] >> torch.arange(7, -1, -1, dtype=torch.uint8) & 1
    return bits.flatten(-2).transpose(1, 2).bool()


def learned_selection(kv_heads: int, tokens: int, device: torch.device | str) -> Tensor:
    """topk_idx int32 [HK, N, 16], ascending, then -1, of one sequence.

    Up to 16384 tokens it is what two key/value heads of a model selected in as many tokens of text;
    further heads repeat them. Longer sequences repeat the second half, its blocks spread over all
    that a token has by then, so that neighbours have as many blocks in common as there.
    """
    free, half = _free_blocks(), _TOKENS // 2
    lists = []
    for start in range(0, tokens, half):
        token = torch.arange(start, min(start + half, tokens))
        source = token if start < _TOKENS else token % half + half
        own, had = (x[:, None] // 64 for x in (token, source))
        block = torch.arange(_BLOCKS)[None, :]
        # Distinct blocks stay distinct: there are as many or more, and the free ones lie between.
        spread = 1 + (block - 1) * (own - 2).clamp(min=1) // (had - 2).clamp(min=1)
        spread = torch.where(own == had, block, spread)
        some = torch.where(free[:, source], spread, 1 << 30)
        forced = reference.forced_blocks(token, block_size=64, init_blocks=1, local_blocks=2)
        forced = forced.masked_fill(forced < 0, 1 << 30)
        chosen = torch.cat([some, forced.expand(_HEADS, -1, -1)], -1).sort(-1).values[..., :16]
        lists.append(torch.where(chosen == 1 << 30, -1, chosen))
    found = torch.cat(lists, 1).to(torch.int32)
    return found[torch.arange(kv_heads) % _HEADS].contiguous().to(device)
