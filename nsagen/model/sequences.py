"""Sequences on their way through a running batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nsagen.model.sampling import SamplingConfig

Finished = Literal["", "stop", "length"]

DROPPED = -1
"""In place of a count of received tokens: what else arrives is not for anyone to see."""


@dataclass(frozen=True)
class NewToken:
    """A token that a sequence got.

    Attributes:
        sequence: which one, as `add` numbered it.
        token: the token.
        finished: "" while the sequence goes on; "stop" after one of its stop tokens, "length"
            after its last allowed one.
    """

    sequence: int
    token: int
    finished: Finished


@dataclass(eq=False)
class RunningSequence:
    """A sequence in the batch.

    Attributes:
        computed: tokens of the prompt that the cache holds.
        chosen: new tokens that the device has been asked for.
        received: new tokens that the host has seen.
        ended: whether it has left the batch.
    """

    number: int
    slot: int
    prompt: Tensor
    limit: int
    stop_tokens: frozenset[int]
    sampling: SamplingConfig
    computed: int = 0
    chosen: int = 0
    received: int = 0
    ended: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.prompt.shape[0]


@dataclass(frozen=True)
class Readout:
    """New tokens on their way to the host."""

    sequences: tuple[RunningSequence, ...]
    tokens: Tensor
    arrived: torch.cuda.Event | None
