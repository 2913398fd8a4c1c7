"""Continuous batching: sequences enter and leave a batch while it runs."""

from __future__ import annotations

import logging
import operator
import threading
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, NoReturn

import torch
from torch import Tensor

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.model.checks import is_integer, require
from nsagen.model.drafts import Drafter, check_draft, check_drafter
from nsagen.model.fused import renew_joined
from nsagen.model.memory import home_of
from nsagen.model.packing import to_device
from nsagen.model.prefill import Piece, PrefillRows
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
from nsagen.model.sampling import SamplingConfig, SamplingRows
from nsagen.model.sequences import (
    DROPPED,
    NO_TOKEN,
    Finished,
    NewToken,
    Readout,
    RunningSequence,
)
from nsagen.model.sharing import Sharing
from nsagen.model.step import DecodeStep, Row

_log = logging.getLogger("nsagen.serving")


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
    retries: bool = field(default=True, init=False, repr=False)
    weights_change: bool = field(default=True, init=False, repr=False)
    drafted: int = field(default=0, init=False)
    accepted: int = field(default=0, init=False)
    _count: int = field(default=0, init=False)
    _waiting: list[RunningSequence] = field(default_factory=list, init=False)
    _running: list[RunningSequence] = field(default_factory=list, init=False)
    _rows: list[RunningSequence] | None = field(default_factory=list, init=False)
    _readouts: deque[Readout] = field(default_factory=deque, init=False)
    _results: deque[NewToken] = field(default_factory=deque, init=False)
    _unread: dict[int, RunningSequence] = field(default_factory=dict, init=False)
    _kept: dict[int, RunningSequence] = field(default_factory=dict, init=False)
    _lock: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)
    _at_work: bool = field(default=False, init=False)
    _begins: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.limits = check_inference("ContinuousBatch", self.model)
        check_cuda_graph("ContinuousBatch", self.cuda_graph)
        if self.cuda_graph is None:
            self.cuda_graph = self.limits.cuda_graph
        # Tensors made in inference mode could not be written outside it later.
        with torch.inference_mode(False):
            self.cache = self.model.new_cache()
            self._step = DecodeStep(self.model, self.cache)
        self._sharing = Sharing(self.cache)
        self._free_slots = self._all_slots()

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuse copies and pickles: they would share or lose the running sequences' cache."""
        raise InvalidInputError(
            "ContinuousBatch: a batch cannot be copied or saved, got copy, deepcopy or pickle of "
            "one; make another with ContinuousBatch(model) and add the prompts to it"
        )

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
        """Whether nothing is left to do or to read."""
        return not (self._waiting or self._running or self._readouts or self._results)

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
            where = f"ContinuousBatch: sequence {self._count}"
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
            options |= {"keep": keep, "drafter": drafter}
            return self.admit(where, self.checked(where, prompt, stop_tokens, **options))

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
            one = None if sequence in self._unread else self._kept.get(sequence)
            require(
                one is not None,
                where,
                "the sequence must have been added with keep=True, and have ended",
                "one that still runs" if sequence in self._unread else "an unknown number",
                "read its tokens to the end first",
            )
            assert one is not None
            new = check_prompt(where, tokens)
            require(new.shape[0] > 0, where, "a turn must have a token", "none", "pass some")
            text = torch.tensor(one.text, dtype=torch.int64, device="cpu")
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
            options |= {"keep": keep, "drafter": drafter}
            request = self.checked(where, torch.cat((text, new.cpu())), stop_tokens, **options)
            self._check_model(where)
            self.cache.reserve(one.slot, request.tokens, where)
            self._enter(one.resumed(request, self.cache.settled(one.cached)))
            del self._kept[sequence]

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
            one = self._unread.get(sequence) or self._kept.get(sequence)
            if one is None or (one.ended and sequence not in self._kept):
                raise InvalidInputError(
                    f"{where}: the sequence must wait, run or have been kept, got another number; "
                    "add its tokens as a prompt"
                )
            options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "sampling": sampling}
            text = torch.tensor(one.text, dtype=torch.int64, device="cpu")
            options |= {"keep": keep, "drafter": drafter}
            request = self.checked(where, text, stop_tokens, **options)
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
            if not self._free_slots:
                raise CapacityError(
                    f"{where}: a sequence needs a free slot, got none of "
                    f"InferenceConfig.max_batch_size={self.limits.max_batch_size}; "
                    "wait until other sequences end, or raise max_batch_size"
                )
            one = RunningSequence(self._count, self._free_slots[-1], request)
            self._sharing.follow(self.model)
            self._sharing.place(one, where, of)
            self._free_slots.pop()
            self._enter(one)
            self._count += 1
            return one.number

    def _enter(self, one: RunningSequence) -> None:
        """Let a sequence wait for its prompt's passes."""
        self._begins = self._begins or self.weights_change or not self._unread
        self._waiting.append(one)
        self._unread[one.number] = one

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
            unread = [new for new in self._results if new.sequence != sequence]
            self._results = deque(unread)
            one = self._unread.get(sequence)
            if one is not None:
                one.received = DROPPED
                self._end(one)
                del self._unread[sequence]
            if sequence in self._kept:
                self._free(self._kept[sequence])
                del self._kept[sequence]

    def forget_prefixes(self) -> None:
        """Forget which tokens earlier sequences left in pages; those in the batch go on.

        The batch does so by itself after a change of weights, modules or hooks that PyTorch can
        report. A write through `.data` and a switch in a module's own Python are no such changes.
        """
        with self._lock:
            self._sharing.forget()

    def clear(self) -> None:
        """Take all sequences out of the batch, drop their unread tokens, forget prefixes."""
        with self._lock:
            for one in self._unread.values():
                one.received, one.ended = DROPPED, True
            self._unread, self._results, self._readouts = {}, deque(), deque()
            self._waiting, self._running, self._rows, self._kept = [], [], [], {}
            for slot in self._all_slots():
                self.cache.release(slot)
            self._free_slots = self._all_slots()
            self.forget_prefixes()

    def serve(self, model: Any) -> None:
        """Give an empty batch its model, or none while it is idle: a model that holds its batch
        would otherwise be freed only by the garbage collector."""
        self.model = self._step.model = model

    def step(self) -> list[NewToken]:
        """Run a pass over waiting prompts and a step of running sequences; returns tokens so far.

        Raises:
            InvalidInputError: called while a step of this batch runs, as from a hook.
        """
        nothing: deque[NewToken] = deque()
        results: list[NewToken] = []
        try:
            with self._working():
                self._advance()
                results += self._results
                self._results = nothing
            return results
        except BaseException:  # such as Ctrl-C before the caller has them
            self._results.extendleft(reversed(results))
            raise

    def run(self, prompts_first: bool = False) -> Iterator[NewToken]:
        """Step until nothing is left to do; sequences may be added meanwhile.

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
            if not self._results:
                with self._working():
                    while prompts_first and self._waiting:
                        self._prefill()
                    self._advance()
            new = None
            try:
                with self._lock:
                    if self._results:
                        new = self._results[0]
                        del self._results[0]
            except BaseException:  # Ctrl-C before the caller has it
                if new is not None:
                    self._results.appendleft(new)
                raise
            if new is not None:
                yield new

    def prefill(self) -> None:
        """Run one pass over waiting prompts, if there are any; running sequences wait."""
        with self._working():
            self._prefill()

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

    def _advance(self) -> None:
        self._end_complete(list(self._running))  # those of a step that was interrupted
        self._prefill()
        drafts = self._drafts()
        if self._running:
            self._decode(drafts)
        self._receive(in_flight=bool(self._running) and not drafts)

    def _prefill(self) -> None:
        chosen = self._next_pieces()
        if not chosen:
            return
        try:
            ready = self._run_pieces(chosen)
            for one, piece in chosen:
                one.computed = piece.end
            done = [] if ready is None else ready[0]
            waiting = [one for one in self._waiting if one not in done]
            running = self._running + [one for one in done if not one.ended]  # a hook may cancel
            if ready is not None:
                self._requested(*ready, waiting, running)
        except BaseException as error:
            # The cache may hold a part of the pass: these prompts restart, each by itself.
            for one, _ in chosen:
                one.restart()
                one.alone = True
            if not isinstance(error, Exception):
                raise
            _free_frames(error)
            if not self.retries:
                self._fail_all(error)
            elif len(chosen) == 1:
                self._fail(chosen[0][0], error)
            else:
                _log.warning(
                    "a pass over %d prompts failed (%r): each runs alone", len(chosen), error
                )
            return
        for one, _ in chosen:
            self._record(one)
        self._end_complete(done)

    def _next_pieces(self) -> list[tuple[RunningSequence, Piece]]:
        """What the next pass computes of which waiting prompts."""
        chosen: list[tuple[RunningSequence, Piece]] = []
        coming: set[bytes] = set()
        if self._waiting:
            self._sharing.follow(self.model)
        budget = self.limits.prefill_chunk_size or sum(one.left for one in self._waiting)
        for one in self._waiting:
            if self._sharing.waits(one, coming):
                continue
            length = min(one.left, budget)
            if length == 0 or (chosen and (one.alone or chosen[0][0].alone)):
                break
            chosen.append((one, Piece(one.slot, one.computed, length, one.reused)))
            budget -= length
        return chosen

    def _run_pieces(
        self, chosen: Sequence[tuple[RunningSequence, Piece]]
    ) -> tuple[list[RunningSequence], Tensor, Tensor] | None:
        """Run a pass; returns the sequences whose prompts are done, their first tokens, and where
        these go on the host. None if no prompt is done."""
        pieces = [piece for _, piece in chosen]
        parts = [one.request.prompt[piece.start : piece.end] for one, piece in chosen]
        tokens = torch.cat(parts)
        rows = PrefillRows.of(pieces, self.cache, self.model.may_fuse())
        self._renew(rows.fused)
        done = [i for i, (one, piece) in enumerate(chosen) if piece.end == one.length]
        if not done:
            self.model.hidden(tokens, rows, self.cache)
            return None
        ready = [chosen[i][0] for i in done]
        host = self._host_memory(len(ready))
        last = rows.cu_seqlens[1:][done] - 1
        logits = self.model.pass_logits(tokens, rows, self.cache, last)
        first = self._choose_first(ready, logits)
        slots = self._to_device([one.slot for one in ready])
        self._step.newest[slots] = first
        return ready, first, host

    def _renew(self, fused: bool) -> None:
        """Copy joined weights again for new sequences, before the first work that reads them."""
        if fused and self._begins:
            renew_joined(self.model)
            self._begins = False

    def _choose_first(self, ready: list[RunningSequence], logits: Tensor) -> Tensor:
        configs = [one.request.sampling for one in ready]
        if all(config.temperature == 0 for config in configs):
            return logits.argmax(-1)
        positions = self._to_device([one.length for one in ready])
        return SamplingRows.of(configs, logits.device).sample(logits, positions)

    def _drafts(self) -> dict[RunningSequence, list[int]]:
        """Guesses of what follows the running sequences. The host must know all their tokens, so
        it waits for those in flight, if any sequence has a drafter."""
        if not any(one.request.drafter for one in self._running):
            return {}
        self._receive(in_flight=False)
        drafts = {}
        for one in list(self._running):
            most = min(self._step.most_drafted, one.request.limit - one.chosen - 1)
            try:
                if one.drafter is not None and most > 0:
                    draft = check_draft(one.drafter(one.text, most), most, vocabulary(self.model))
                    if draft:
                        drafts[one] = draft
            except Exception as error:
                _free_frames(error)
                self._fail(one, error)
        return drafts

    def _decode(self, drafts: Mapping[RunningSequence, list[int]]) -> None:
        together = list(self._running)
        try:
            self._run_rows(together, drafts)
        except Exception as error:
            _free_frames(error)
            if not self.retries:
                self._fail_all(error)
                return
            if len(together) == 1:
                self._fail(together[0], error)
                return
            together = [one for one in together if not one.ended]  # a hook may cancel, then fail
            _log.warning(
                "a step of %d sequences failed (%r): each runs alone", len(together), error
            )
            failed = self._run_apart(together)
            if together and len(failed) == len(together):
                raise  # not one sequence's fault, as far as this can tell
            for one, own in failed.items():
                self._fail(one, own)

    def _run_apart(self, sequences: Sequence[RunningSequence]) -> dict[RunningSequence, Exception]:
        """Run a step of each sequence separately; returns those that fail, and how."""
        failed = {}
        for one in sequences:
            try:
                self._run_rows([one])
            except Exception as error:
                _free_frames(error)
                failed[one] = error
        return failed

    def _run_rows(
        self,
        sequences: list[RunningSequence],
        drafts: Mapping[RunningSequence, list[int]] = MappingProxyType({}),
    ) -> None:
        """Run a step of these sequences; if it fails, they stay as they were."""
        if self._begins:  # prompts ran with a hook, which is gone
            self._renew(self.model.may_fuse())
        try:
            self._seat(sequences)
            host = self._host_memory(len(sequences))
            # A few sizes, not all: each is captured once. Rows past the last sequence are idle.
            count = min(1 << (len(sequences) - 1).bit_length(), self.limits.max_batch_size)
            if drafts:
                self._verify(sequences, drafts, count)
            else:
                tokens = self._step.run(count, cuda_graph=bool(self.cuda_graph))
                self._requested(sequences, tokens[: len(sequences)], host)
        except BaseException:
            self._rows = None  # what the device holds of them is unknown
            raise
        self._end_complete(sequences)

    def _verify(
        self,
        sequences: list[RunningSequence],
        drafts: Mapping[RunningSequence, list[int]],
        count: int,
    ) -> None:
        """A step that may get several tokens of each sequence. The host waits for it, because it
        must know how many before it can do anything else."""
        try:
            guesses = [drafts.get(one, []) for one in sequences]
            cuda_graph = bool(self.cuda_graph)
            accepted, *chosen = self._step.verify(guesses, count, cuda_graph=cuda_graph).tolist()
            rows = zip(sequences, accepted, *chosen, strict=False)  # idle rows are behind
            new = [(one, token) for one, right, *tokens in rows for token in tokens[: 1 + right]]
            owners, tokens = zip(*new, strict=True)
            self._read_out(Readout(owners, torch.tensor(tokens, device="cpu"), None))
        except BaseException:
            self._step.take_back()
            raise
        self.drafted += sum(map(len, guesses))
        self.accepted += len(owners) - len(sequences)

    def _seat(self, sequences: list[RunningSequence]) -> None:
        """Give the step's rows to these sequences."""
        if self._rows == sequences:
            return
        if self._rows is None:
            self._restore_newest()
        old = self._rows or []
        rows = [
            Row(one.slot, one.length + one.chosen - 1, one.request.sampling) for one in sequences
        ]
        self._step.fill(rows, [i for i, one in enumerate(old) if one in self._running])
        self._rows = list(sequences)

    def _restore_newest(self) -> None:
        """After a failure, restore the newest tokens from the host's copy."""
        known = [(one.slot, *one.newest) for one in self._running if one.newest is not None]
        slots = self._to_device([slot for slot, *_ in known])
        self._step.newest[slots] = self._to_device([r.on_host()[place] for _, r, place in known])

    def _host_memory(self, count: int) -> Tensor:
        """Host memory for new tokens. Allocated before a step, so the step cannot fail on it."""
        pinned = self.cache.device.type == "cuda"
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=pinned)

    def _requested(
        self,
        sequences: list[RunningSequence],
        tokens: Tensor,
        host: Tensor,
        waiting: list[RunningSequence] | None = None,
        running: list[RunningSequence] | None = None,
    ) -> None:
        """Start copying new tokens to the host; if it fails, nothing has changed.

        Args:
            waiting, running: the sequences in these states from now on; as they are by default.
        """
        host.copy_(tokens, non_blocking=True)
        arrived = None
        if tokens.is_cuda:
            arrived = torch.cuda.Event()
            arrived.record()
        self._read_out(Readout(tuple(sequences), host, arrived), waiting, running)

    def _read_out(
        self,
        readout: Readout,
        waiting: list[RunningSequence] | None = None,
        running: list[RunningSequence] | None = None,
    ) -> None:
        """Count tokens that are on their way to the host, or there; the rest as in `_requested`."""
        waiting = self._waiting if waiting is None else waiting
        running = self._running if running is None else running
        before = [(one, one.chosen, one.newest) for one in readout.sequences]
        try:
            for place, one in enumerate(readout.sequences):
                one.chosen += 1
                one.newest = (readout, place)
            self._readouts += (readout,)
            self._waiting, self._running = waiting, running
        except BaseException:
            for one, chosen, newest in before:
                one.chosen, one.newest = chosen, newest
            raise

    def _end_complete(self, sequences: Sequence[RunningSequence]) -> None:
        """End sequences that need no more tokens from the device."""
        for one in sequences:
            if one.chosen == one.request.limit:
                self._end(one)

    def _receive(self, in_flight: bool) -> None:
        """Process the tokens that have arrived; the newest ones may stay in flight."""
        while len(self._readouts) > int(in_flight):
            readout = self._readouts[0]
            tokens = readout.on_host()
            while readout.read < len(tokens):
                one, token = readout.sequences[readout.read], tokens[readout.read]
                if one.received == DROPPED:
                    readout.read += 1
                else:
                    self._received(one, token, readout)
            self._readouts.popleft()

    def _received(self, one: RunningSequence, token: int, readout: Readout) -> None:
        """Process a token. What can fail comes first, so that a failure loses no token."""
        count = one.received + 1
        finished: Finished = "length" if count == one.request.limit else ""
        if token in one.request.stop_tokens:
            finished = "stop"
        if finished:
            self._end(one)
        new = NewToken(one.number, token, finished)
        # Ctrl-C interrupts Python at calls and loops only, so not between these lines.
        self._results += (new,)
        one.output += (token,)
        one.received = DROPPED if finished else count
        readout.read += 1
        if finished:
            del self._unread[one.number]
        self._record(one)

    def _fail(self, one: RunningSequence, error: Exception) -> None:
        """End a sequence with an error, which comes after its tokens."""
        self._receive(in_flight=False)
        if one.number not in self._unread:
            return
        self._results.append(NewToken(one.number, NO_TOKEN, "error", error))
        one.received = DROPPED
        del self._unread[one.number]
        self._end(one)

    def _fail_all(self, error: Exception) -> None:
        for one in (*self._waiting, *self._running):
            self._fail(one, error)

    def _record(self, one: RunningSequence) -> None:
        """Let other sequences find the pages that one has filled, while they are its own."""
        if not one.ended or one.number in self._kept:
            self._sharing.record(one)

    def _end(self, one: RunningSequence) -> None:
        """Take a sequence out of the steps, and free its slot unless it is kept."""
        if one.ended:
            return
        self._waiting = [other for other in self._waiting if other is not one]
        self._running = [other for other in self._running if other is not one]
        if one.request.keep and one.received != DROPPED:
            self._kept[one.number] = one
            one.ended = True
        else:
            self._free(one)

    def _free(self, one: RunningSequence) -> None:
        """Free a sequence's slot. Work in flight runs before that of the slot's next sequence."""
        try:
            self.cache.release(one.slot)
        finally:
            self._free_slots += (one.slot,)
            one.ended = True

    def _to_device(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self.cache.device)

    def _all_slots(self) -> list[int]:
        return list(range(self.limits.max_batch_size))[::-1]


def _free_frames(error: Exception) -> None:
    """Release the tensors of a failed pass, which the error's traceback holds."""
    traceback.clear_frames(error.__traceback__)
