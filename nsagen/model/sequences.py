"""Sequences in a running batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from nsagen.model.drafts import Drafter
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
        reused: those of them that it held before the sequence began to compute.
        alone: whether its prompt runs in separate passes, because one with others failed.
        chosen: new tokens requested from the device.
        received: new tokens that the host has seen.
        output: these tokens, without any that were dropped.
        newest: the readout of its newest token and its place there.
        ended: whether it has left the batch.
        names: of its pages; see `nsagen.model.prefixes`.
        recorded: pages whose names the index has had.
        epoch: of the weights that all of it was computed with; see `Sharing`.
    """

    number: int
    slot: int
    request: Request
    computed: int = 0
    reused: int = 0
    alone: bool = False
    chosen: int = 0
    received: int = 0
    output: list[int] = field(default_factory=list)
    newest: tuple[Readout, int] | None = None
    ended: bool = False
    names: list[bytes] = field(default_factory=list)
    recorded: int = 0
    epoch: int = 0

    @property
    def length(self) -> int:
        """Tokens of the prompt."""
        return self.request.prompt.shape[0]

    @property
    def left(self) -> int:
        """Tokens of the prompt that the cache does not hold yet."""
        return self.length - self.computed

    @property
    def cached(self) -> int:
        """Tokens that the cache is known to hold: the newest one has not been computed with."""
        return self.length + len(self.output) - 1 if self.output else self.computed

    @cached_property
    def prompt(self) -> tuple[int, ...]:
        """The prompt on the host."""
        text = self.request.text
        return tuple(self.request.prompt.tolist()) if text is None else text

    @property
    def text(self) -> list[int]:
        """Prompt and new tokens: one list, which grows with these."""
        return self._grown(self._text)

    @cached_property
    def _text(self) -> list[int]:
        return list(self.prompt)

    def _grown(self, tokens: list[int]) -> list[int]:
        """A list that begins with the prompt, with the output that it lacks at its end."""
        tokens += self.output[max(0, len(tokens) - self.length) :]
        return tokens

    @cached_property
    def drafter(self) -> Drafter | None:
        """What guesses its next tokens; None without one."""
        return None if self.request.drafter is None else self.request.drafter()

    def guess(self, most: int) -> Sequence[int]:
        """At most that many tokens that may come next; needs a drafter.

        The drafter has a list of its own: `text` names pages that others may share.
        """
        assert self.drafter is not None
        return self.drafter(self._grown(self._shown), most)

    @cached_property
    def _shown(self) -> list[int]:
        return list(self.prompt)

    def resumed(self, request: Request, start: int) -> RunningSequence:
        """The sequence with a longer prompt, of which the cache holds `start` tokens."""
        held = {"names": self.names, "recorded": self.recorded, "epoch": self.epoch}
        return RunningSequence(self.number, self.slot, request, start, start, **held)

    def restart(self) -> None:
        """Compute the prompt again, but for what the cache held before."""
        self.computed = self.reused
