"""Continuous batching: sequences enter and leave a batch while it runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from nsagen.core.errors import CapacityError
from nsagen.model.checks import require
from nsagen.model.prefill import Piece, PrefillRows
from nsagen.model.requests import check_inference, check_length, check_tokens
from nsagen.model.sampling import SamplingConfig, SamplingRows
from nsagen.model.sequences import DROPPED, Finished, NewToken, Readout, RunningSequence
from nsagen.model.step import DecodeStep, Row


@dataclass
class ContinuousBatch:
    """Runs sequences together that start and end at different times.

    A step runs at most one pass over waiting prompts (`InferenceConfig.prefill_chunk_size` bounds
    how long it holds up the others) and one token of every running sequence. A slot that a
    sequence leaves is used again without clearing the others. Tokens reach the host a step late,
    so that the device never waits for it: a sequence may compute one token past its stop token,
    which nobody sees.

        batch = ContinuousBatch(model)
        first = batch.add(prompt, stop_tokens=[2])
        for new in batch.run():
            print(new.sequence, new.token, new.finished)

    Args:
        model: a `ToyNSALlama` or `ToyLlama` with an InferenceConfig.
        cuda_graph: replay captured steps; `InferenceConfig.cuda_graph` unless given.
    """

    model: Any
    cuda_graph: bool | None = None
    _count: int = field(default=0, init=False)
    _waiting: list[RunningSequence] = field(default_factory=list, init=False)
    _running: list[RunningSequence] = field(default_factory=list, init=False)
    _rows: list[RunningSequence] = field(default_factory=list, init=False)
    _readouts: deque[Readout] = field(default_factory=deque, init=False)

    def __post_init__(self) -> None:
        self.limits = check_inference("ContinuousBatch", self.model)
        if self.cuda_graph is None:
            self.cuda_graph = self.limits.cuda_graph
        self.cache = self.model.new_cache()
        self._step = DecodeStep(self.model, self.cache)
        self._free_slots = list(range(self.limits.max_batch_size))[::-1]

    @property
    def waiting(self) -> int:
        """Sequences whose prompts are not computed yet."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that get a token at every step."""
        return len(self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do."""
        return not (self._waiting or self._running or self._readouts)

    def add(
        self,
        prompt: Tensor | Sequence[int],
        *,
        max_new_tokens: int = -1,
        stop_tokens: Iterable[int] = (),
        sampling: SamplingConfig | None = None,
    ) -> int:
        """Let a sequence into the batch; its first token comes from a later step.

        Args:
            prompt: int64 [L], not empty.
            max_new_tokens: tokens to make; -1 for `InferenceConfig.max_new_tokens`.
            stop_tokens: tokens that end the sequence; the one that does is its last.
            sampling: how tokens are chosen; the most likely ones by default.

        Returns:
            the sequence's number: 0, 1, 2, ... in the order of calls.

        Raises:
            InvalidInputError: a prompt or limit that the cache can never take.
            CapacityError: no slot or too few pages are free now; the batch is as it was.
        """
        where = f"ContinuousBatch: sequence {self._count}"
        device = self.cache.device
        if not isinstance(prompt, Tensor):
            prompt = torch.tensor(prompt) if len(prompt) else torch.empty(0, dtype=torch.int64)
        tokens = prompt.to(device)
        require(
            tokens.dim() == 1 and not (tokens.is_floating_point() or tokens.dtype is torch.bool),
            where,
            "a prompt must be integers with shape [L]",
            f"{tokens.dtype} with shape {list(tokens.shape)}",
            "pass token numbers",
        )
        limit = check_length(where, self.limits, tokens.shape[0], max_new_tokens)
        require(limit > 0, where, "max_new_tokens must be positive", "0", "leave it out instead")
        check_tokens(where, tokens, self.model.lm_head.weight, self.model.config.vocab_size)
        return self.admit(where, tokens.to(torch.int64), limit, stop_tokens, sampling)

    def admit(
        self,
        where: str,
        prompt: Tensor,
        limit: int,
        stop_tokens: Iterable[int],
        sampling: SamplingConfig | None,
    ) -> int:
        """`add` what is checked already."""
        if not self._free_slots:
            raise CapacityError(
                f"{where}: a sequence needs a free slot, got none of "
                f"InferenceConfig.max_batch_size={self.limits.max_batch_size}; "
                "wait until other sequences end, or raise max_batch_size"
            )
        slot = self._free_slots[-1]
        self.cache.reserve(slot, prompt.shape[0] + limit, where)
        self._free_slots.pop()
        stops = frozenset(int(token) for token in stop_tokens)
        sampling = sampling or SamplingConfig()
        self._waiting.append(RunningSequence(self._count, slot, prompt, limit, stops, sampling))
        self._count += 1
        return self._count - 1

    def cancel(self, sequence: int) -> None:
        """Take a sequence out of the batch, if it is still in it."""
        for one in (*self._waiting, *self._running):
            if one.number == sequence:
                one.received = DROPPED
                self._end(one)

    def clear(self) -> None:
        """Take all sequences out of the batch, and number the next one 0."""
        for one in (*self._waiting, *self._running):
            self._end(one)
        self._readouts.clear()
        self._count = 0

    @torch.no_grad()
    def step(self) -> list[NewToken]:
        """Run a pass over waiting prompts and a step of running sequences; the tokens so far."""
        if self._waiting:
            self._prefill()
        if self._running:
            self._decode()
        return self._receive(in_flight=bool(self._running))

    def run(self, prompts_first: bool = False) -> Iterator[NewToken]:
        """Step until nothing is left to do; sequences may be added meanwhile.

        Args:
            prompts_first: compute all waiting prompts before the next step.
        """
        while not self.idle:
            while prompts_first and self._waiting:
                self.prefill()
            yield from self.step()

    @torch.no_grad()
    def prefill(self) -> None:
        """Run one pass over waiting prompts; running sequences wait."""
        self._prefill()

    def _prefill(self) -> None:
        budget = self.limits.prefill_chunk_size or sum(one.length for one in self._waiting)
        chosen, pieces = [], []
        for one in self._waiting:
            length = min(one.length - one.computed, budget)
            if length == 0:
                break
            chosen.append(one)
            pieces.append(Piece(one.slot, one.computed, length))
            budget -= length
        tokens = [one.prompt[p.start : p.end] for one, p in zip(chosen, pieces, strict=True)]
        rows = PrefillRows.of(pieces, self.cache)
        hidden = self.model.model.prefill(torch.cat(tokens), rows, self.cache)
        for one, piece in zip(chosen, pieces, strict=True):
            one.computed = piece.end
        done = [i for i, one in enumerate(chosen) if one.computed == one.length]
        if not done:
            return
        device = self.cache.device
        logits = self.model.head(hidden[rows.cu_seqlens[1:][done] - 1])
        ready = [chosen[i] for i in done]
        first = self._choose_first(ready, logits)
        slots = torch.tensor([one.slot for one in ready]).to(device)
        self._step.newest[slots] = first
        self._waiting = [one for one in self._waiting if one not in ready]
        self._running += ready
        self._requested(ready, first)

    def _choose_first(self, ready: list[RunningSequence], logits: Tensor) -> Tensor:
        if all(one.sampling.temperature == 0 for one in ready):
            return logits.argmax(-1)
        positions = torch.tensor([one.length for one in ready]).to(logits.device)
        configs = [one.sampling for one in ready]
        return SamplingRows.of(configs, logits.device).sample(logits, positions)

    def _decode(self) -> None:
        if self._rows != self._running:
            rows = [
                Row(one.slot, one.length + one.chosen - 1, one.sampling) for one in self._running
            ]
            kept = [i for i, one in enumerate(self._rows) if one in self._running]
            self._step.fill(rows, kept)
            self._rows = list(self._running)
        # A few sizes, not all: each is captured once. Rows past the last sequence are idle.
        count = min(1 << (len(self._rows) - 1).bit_length(), self.limits.max_batch_size)
        tokens = self._step.run(count, cuda_graph=bool(self.cuda_graph))
        self._requested(self._rows, tokens[: len(self._rows)])

    def _requested(self, sequences: list[RunningSequence], tokens: Tensor) -> None:
        """Send new tokens on their way to the host, and end sequences that need no more."""
        arrived = None
        if tokens.is_cuda:
            host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            host.copy_(tokens, non_blocking=True)
            arrived = torch.cuda.Event()
            arrived.record()
        else:
            host = tokens.clone()
        self._readouts.append(Readout(tuple(sequences), host, arrived))
        for one in sequences:
            one.chosen += 1
            if one.chosen == one.limit:
                self._end(one)

    def _receive(self, in_flight: bool) -> list[NewToken]:
        """The tokens that have arrived; the newest ones may stay in flight."""
        received = []
        while len(self._readouts) > int(in_flight):
            readout = self._readouts.popleft()
            if readout.arrived is not None:
                readout.arrived.synchronize()
            for one, token in zip(readout.sequences, readout.tokens.tolist(), strict=True):
                if one.received == DROPPED:
                    continue
                one.received += 1
                finished: Finished = "length" if one.received == one.limit else ""
                if token in one.stop_tokens:
                    finished, one.received = "stop", DROPPED
                    self._end(one)
                received.append(NewToken(one.number, token, finished))
        return received

    def _end(self, one: RunningSequence) -> None:
        """Free a sequence's slot. Work in flight comes before that of its next sequence."""
        if one.ended:
            return
        one.ended = True
        self._waiting = [other for other in self._waiting if other is not one]
        self._running = [other for other in self._running if other is not one]
        self.cache.release(one.slot)
        self._free_slots.append(one.slot)
