"""Sequences in a running batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from nsagen.model.requests import Request

Finished = Literal["", "stop", "length", "error"]

NO_TOKEN = -1
"""Means no token: after a sequence's end, and beside an error."""

DROPPED = -1
"""Replaces a count of received tokens: any later tokens are dropped."""


@dataclass(frozen=True)
class NewToken:
    """A token that a sequence got, or the error that ended it.

    Attributes:
        sequence: which one, as `add` numbered it.
        token: the token; -1 beside an error.
        finished: "" while the sequence runs; "stop" after one of its stop tokens, "length" after
            its last allowed one, "error" if its part of a step failed.
        error: what failed; None except for "error".
    """

    sequence: int
    token: int
    finished: Finished
    error: Exception | None = None


@dataclass(eq=False)
class Readout:
    """New tokens on their way to the host.

    Attributes:
        read: how many of them have been processed.
    """

    sequences: tuple[RunningSequence, ...]
    tokens: Tensor
    arrived: torch.cuda.Event | None
    read: int = 0

    def on_host(self) -> list[int]:
        """The tokens, as soon as they have arrived."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tokens.tolist()


@dataclass(eq=False)
class RunningSequence:
    """A sequence in the batch.

    Attributes:
        computed: tokens of the prompt that the cache holds.
        alone: whether its prompt runs in separate passes, because one with others failed.
        chosen: new tokens requested from the device.
        received: new tokens that the host has seen.
        newest: the readout of its newest token and its place there.
        ended: whether it has left the batch.
    """

    number: int
    slot: int
    request: Request
    computed: int = 0
    alone: bool = False
    chosen: int = 0
    received: int = 0
    newest: tuple[Readout, int] | None = None
    ended: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.request.prompt.shape[0]

    @property
    def left(self) -> int:
        """Tokens of the prompt that the cache does not hold yet."""
        return self.length - self.computed
