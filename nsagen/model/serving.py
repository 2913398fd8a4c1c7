"""Continuous batching: sequences enter and leave a batch while it runs."""

from __future__ import annotations

import operator
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.model.checks import is_integer, require
from nsagen.model.drafts import Drafter, check_drafter
from nsagen.model.driver import Driver
from nsagen.model.memory import home_of
from nsagen.model.requests import (
    Request,
    check_cuda_graph,
    check_hooks,
    check_inference,
    check_keep,
    check_length,
    check_prompt,
    check_sampling,
    check_stop_tokens,
    check_tokens,
    vocabulary,
)
from nsagen.model.results import Results
from nsagen.model.roster import Roster
from nsagen.model.runner import BatchRunner
from nsagen.model.sampling import SamplingConfig
from nsagen.model.sequences import NewToken, RunningSequence


@dataclass(eq=False)
class ContinuousBatch:
    """Runs sequences together that start and end at different times.

    A step runs at most one pass over waiting prompts (`InferenceConfig.prefill_chunk_size` bounds
    how long it delays the others) and one token of every running sequence. A slot that a sequence
    leaves is reused without clearing the others. Tokens reach the host one step late, so the
    device never waits for it: a sequence may compute one token past its stop token, which is
    dropped.

        batch = ContinuousBatch(model)
        first = batch.add(prompt, stop_tokens=[2])
        for new in batch.run():
            print(new.sequence, new.token, new.finished)

    Results wait for their reader: leaving the loop loses none, and the next `run` or `step`
    continues with them. If a pass or a step fails, its sequences run again separately. Those that
    fail alone end with a `NewToken` that has the error, and the others continue. If several run and
    each fails, the step raises, and all of them stay as they were.

    Threads may share a batch: each method waits until the one before it is done. All state of a
    call is in the batch; several batches of one model are independent.

    Args:
        model: a `ToyNSALlama` or `ToyLlama` with an InferenceConfig.
        cuda_graph: replay captured steps; `InferenceConfig.cuda_graph` unless given.

    Attributes:
        retries: whether the sequences of a failed pass or step run again. If not, the whole batch
            ends with its error, which may be meant for the caller, such as a time limit.
        weights_change: whether a program may write to weights through `.data` while sequences run,
            which PyTorch does not report. If so, the copies of weights that fused products read
            are renewed for each new sequence, and otherwise only for the first in an empty batch.
        drafted, accepted: tokens that drafters guessed, and those of them that were right.
    """

    model: Any
    cuda_graph: bool | None = None
    weights_change: bool = field(default=True, init=False, repr=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)
    _at_work: bool = field(default=False, init=False, repr=False)

    def __post_init__(self) -> None:
        self.limits = check_inference("ContinuousBatch", self.model)
        check_cuda_graph("ContinuousBatch", self.cuda_graph)
        if self.cuda_graph is None:
            self.cuda_graph = self.limits.cuda_graph
        self._runner = BatchRunner(self.model)
        self.cache = self._runner.cache
        self._roster = Roster(self.cache)
        self._results = Results(self._roster)
        self._driver = Driver(self._runner, self._roster, self._results)

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse copies and pickles: they would share or lose the running sequences' cache."""
        raise InvalidInputError(
            "ContinuousBatch: a batch cannot be copied or saved, got copy, deepcopy or pickle of "
            "one; make another with ContinuousBatch(model) and add the prompts to it"
        )

    @property
    def retries(self) -> bool:
        return self._driver.retries

    @retries.setter
    def retries(self, retries: bool) -> None:
        self._driver.retries = retries

    @property
    def drafted(self) -> int:
        return self._driver.drafted

    @property
    def accepted(self) -> int:
        return self._driver.accepted

    @property
    def waiting(self) -> int:
        """Sequences whose prompts are not computed yet."""
        return len(self._roster.waiting)

    @property
    def running(self) -> int:
        """Sequences that get a token at every step."""
        return len(self._roster.running)

    @property
    def free_slots(self) -> int:
        """Sequences that can be added now, if there are pages for them."""
        return self._roster.free_slots

    @property
    def idle(self) -> bool:
        """Whether nothing is left to do or to read."""
        return not (self._roster.waiting or self._roster.running) and self._results.empty

    def add(
        self,
        prompt: Tensor | Sequence[int],
        *,
        max_new_tokens: int = -1,
        stop_tokens: Iterable[int] = (),
        sampling: SamplingConfig | None = None,
        keep: bool = False,
        drafter: Callable[[], Drafter] | None = None,
    ) -> int:
        """Add a sequence to the batch; its first token comes from a later step.

        Everything is checked before anything is taken, so a refused request costs nothing.

        Args:
            prompt: int64 or int32 [L], not empty, on any device; copied.
            max_new_tokens: tokens to make; -1 for `InferenceConfig.max_new_tokens`.
            stop_tokens: tokens that end the sequence; the stop token is its last.
            sampling: how tokens are chosen; the most likely ones by default.
            keep: keep its slot and pages after its end, for `resume`, until `cancel`.
            drafter: makes what guesses the sequence's next tokens, such as `PromptLookup`: called
                once, without arguments. A step then takes all guesses that are right. The tokens
                are the same as without.

        Returns:
            the sequence's number: 0, 1, 2, ... in the order of calls; never reused.

        Raises:
            InvalidInputError: a prompt or limit that the cache can never take.
            CapacityError: no slot or too few pages are free now; the batch is unchanged.
        """
        with self._lock:
            where = f"ContinuousBatch: sequence {self._roster.next_number}"
            request = self.checked(
                where,
                prompt,
                stop_tokens,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                keep=keep,
                drafter=drafter,
            )
            return self.admit(where, request)

    def resume(
        self,
        sequence: int,
        tokens: Tensor | Sequence[int],
        *,
        max_new_tokens: int = -1,
        stop_tokens: Iterable[int] = (),
        sampling: SamplingConfig | None = None,
        keep: bool = True,
        drafter: Callable[[], Drafter] | None = None,
    ) -> None:
        """Go on with a sequence that was kept after its end: a chat's next turn.

        The new tokens follow its prompt and its own tokens, and run in passes like a prompt, but
        for what the cache holds. Its next tokens come under its old number.

        Args:
            sequence: its number.
            tokens: int64 or int32 [L], not empty.
            others: as in `add`.

        Raises:
            InvalidInputError: not a kept sequence whose tokens have all been read; what `add`
                refuses.
            CapacityError: too few pages are free now; the sequence stays as it was.
        """
        with self._lock:
            where = f"ContinuousBatch: resume of sequence {sequence}"
            one = None if sequence in self._roster.unread else self._roster.kept.get(sequence)
            require(
                one is not None,
                where,
                "the sequence must have been added with keep=True, and have ended",
                "one that still runs" if sequence in self._roster.unread else "an unknown number",
                "read its tokens to the end first",
            )
            assert one is not None
            new = check_prompt(where, tokens)
            require(new.shape[0] > 0, where, "a turn must have a token", "none", "pass some")
            request = self.checked(
                where,
                torch.cat((_text_of(one), new.cpu())),
                stop_tokens,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                keep=keep,
                drafter=drafter,
            )
            self._check_model(where)
            self._expect_new_weights()
            self._roster.resume(one, request, where)

    def fork(
        self,
        sequence: int,
        *,
        max_new_tokens: int = -1,
        stop_tokens: Iterable[int] = (),
        sampling: SamplingConfig | None = None,
        keep: bool = False,
        drafter: Callable[[], Drafter] | None = None,
    ) -> int:
        """Add a sequence that begins with another's prompt and all its tokens so far.

        What the cache holds of these is shared in pages, the last page copied; without pages, all
        of it is copied.

        Args:
            sequence: the other's number: one that waits or runs, or was kept.
            others: as in `add`.

        Returns:
            the new sequence's number.

        Raises:
            InvalidInputError: an unknown or ended sequence; what `add` refuses.
            CapacityError: as for `add`.
        """
        with self._lock:
            where = f"ContinuousBatch: fork of sequence {sequence}"
            kept = self._roster.kept.get(sequence)
            one = self._roster.unread.get(sequence) or kept
            if one is None or (one.ended and kept is None):
                raise InvalidInputError(
                    f"{where}: the sequence must wait, run or have been kept, got another number; "
                    "add its tokens as a prompt"
                )
            request = self.checked(
                where,
                _text_of(one),
                stop_tokens,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                keep=keep,
                drafter=drafter,
            )
            return self.admit(where, request, of=one)

    def checked(
        self,
        where: str,
        prompt: Tensor | Sequence[int],
        stop_tokens: Iterable[int] = (),
        *,
        max_new_tokens: int = -1,
        sampling: SamplingConfig | None = None,
        keep: bool = False,
        drafter: Callable[[], Drafter] | None = None,
    ) -> Request:
        """What `admit` takes, from what `add` takes; the batch is unchanged, and not waited for.

        Raises:
            InvalidInputError: a prompt or limit that the cache can never take; it names `where`.
        """
        if isinstance(
            prompt, list | tuple
        ):  # one that is far too long is refused before it is read
            check_length(where, self.limits, len(prompt), max_new_tokens)
        tokens = check_prompt(where, prompt)
        limit = check_length(where, self.limits, tokens.shape[0], max_new_tokens)
        require(limit > 0, where, "max_new_tokens must be positive", "0", "leave it out")
        check_tokens(where, tokens, vocabulary(self.model))
        stops = check_stop_tokens(where, stop_tokens)
        sampling = check_sampling(where, sampling)
        check_keep(where, keep)
        check_drafter(where, drafter)
        copied = tokens.to(self.cache.device, torch.int64, copy=True)
        needed = keep or drafter is not None or self.limits.share_prefixes
        text = tuple(tokens.tolist()) if needed and not tokens.is_cuda else None
        return Request(copied, limit, stops, sampling, keep, drafter, text)

    def admit(self, where: str, request: Request, *, of: RunningSequence | None = None) -> int:
        """`add` for a request that is already checked.

        Args:
            of: a sequence in the batch whose tokens the prompt begins with.
        """
        with self._lock:
            self._check_model(where)
            self._expect_new_weights()
            self._roster.sharing.follow(self.model)
            return self._roster.admit(where, request, of)

    def cancel(self, sequence: int) -> None:
        """Take a sequence out of the batch, if it is still in it; returns no more of its tokens.

        Tokens that were computed but not read are dropped.
        """
        with self._lock:
            require(
                is_integer(sequence),
                "ContinuousBatch: cancel",
                "sequence must be an integer",
                repr(sequence),
                "pass the number that add returned",
            )
            sequence = operator.index(sequence)
            self._results.drop(sequence)
            self._roster.drop(sequence)

    def forget_prefixes(self) -> None:
        """Forget which tokens earlier sequences left in pages; running sequences continue.

        The batch does so by itself after a change of weights, modules or hooks that PyTorch can
        report. A write through `.data` and a switch in a module's own Python are no such changes.
        """
        with self._lock:
            self._roster.sharing.forget()

    def clear(self) -> None:
        """Take all sequences out of the batch, drop their unread tokens, forget prefixes."""
        with self._lock:
            self._results.clear()
            self._runner.clear()
            self._roster.clear()

    def serve(self, model: Any) -> None:
        """Give an empty batch its model, or none while it is idle: a model that holds its batch
        would otherwise be freed only by the garbage collector."""
        self.model = self._runner.model = model

    def step(self) -> list[NewToken]:
        """Run a pass over waiting prompts and a step of running sequences; returns tokens so far.

        Raises:
            InvalidInputError: called while a step of this batch runs, as from a hook.
        """
        nothing: deque[NewToken] = deque()
        results: list[NewToken] = []
        try:
            with self._working():
                self._driver.advance(cuda_graph=bool(self.cuda_graph))
                results += self._results.ready
                self._results.ready = nothing
            return results
        except BaseException:  # such as Ctrl-C before the caller has them
            self._results.ready.extendleft(reversed(results))
            raise

    def run(self, prompts_first: bool = False) -> Iterator[NewToken]:
        """Step until no work is left; sequences may be added in the meantime.

        Args:
            prompts_first: compute all waiting prompts before the next step.
        """
        require(
            isinstance(prompts_first, bool),
            "ContinuousBatch.run",
            "prompts_first must be True or False",
            repr(prompts_first),
            "pass one of these",
        )
        while not self.idle:
            if not self._results.ready:
                with self._working():
                    while prompts_first and self._roster.waiting:
                        self._driver.prefill()
                    self._driver.advance(cuda_graph=bool(self.cuda_graph))
            new = None
            try:
                with self._lock:
                    if self._results.ready:
                        new = self._results.ready[0]
                        del self._results.ready[0]
            except BaseException:  # Ctrl-C before the caller has it
                if new is not None:
                    self._results.ready.appendleft(new)
                raise
            if new is not None:
                yield new

    def prefill(self) -> None:
        """Run one pass over waiting prompts, if there are any; running sequences wait."""
        with self._working():
            self._driver.prefill()

    @contextmanager
    def _working(self) -> Iterator[None]:
        """One step at a time, whichever thread or hook asks; without gradients."""
        with self._lock:
            if self._at_work:
                raise InvalidInputError(
                    "ContinuousBatch: one step runs at a time, got a call from within a step; "
                    "call it after the step, or use a batch of its own"
                )
            self._check_model("ContinuousBatch")
            try:
                self._at_work = True
                with torch.no_grad(), self._on_its_device():
                    yield
            finally:
                self._at_work = False

    def _on_its_device(self) -> AbstractContextManager[Any]:
        """Graphs, streams and events belong to the current device: make the cache's current."""
        device = self.cache.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _check_model(self, where: str) -> None:
        device, dtype = home_of(self.model)
        require(
            (device, dtype) == (self.cache.device, self.cache.dtype),
            where,
            "a model must stay as it was when its batch was made",
            f"weights of {dtype} on {device} and a cache of {self.cache.dtype} on "
            f"{self.cache.device}",
            "move the model back, or make a new batch of it",
        )
        check_hooks(where, self.model)

    def _expect_new_weights(self) -> None:
        """Before a sequence enters: weights may have changed since the last one did."""
        if self.weights_change or not self._roster.unread:
            self._runner.stale = True


def _text_of(one: RunningSequence) -> Tensor:
    """Its prompt and its tokens so far, int64 [L] on the host."""
    return torch.tensor(one.text, dtype=torch.int64, device="cpu")
