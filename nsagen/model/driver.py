"""Passes and steps of a batch's sequences, and what ends where one fails."""

from __future__ import annotations

import logging
import traceback
from collections.abc import Mapping, Sequence
from types import MappingProxyType

from nsagen.model.drafts import check_draft
from nsagen.model.requests import vocabulary
from nsagen.model.results import Results
from nsagen.model.roster import Roster
from nsagen.model.runner import BatchRunner
from nsagen.model.sequences import RunningSequence

_log = logging.getLogger("nsagen.serving")


class Driver:
    """Runs a roster's sequences, and finds the one that is at fault for a failure.

    Attributes:
        retries: see `ContinuousBatch`.
        drafted, accepted: tokens that drafters guessed, and those of them that were right.
    """

    def __init__(self, runner: BatchRunner, roster: Roster, results: Results) -> None:
        self._runner, self._roster, self._results = runner, roster, results
        self.retries, self.drafted, self.accepted = True, 0, 0

    def advance(self, *, cuda_graph: bool) -> None:
        """A pass over waiting prompts, a step of running sequences, and their results.

        In each, `Roster` says what runs, `BatchRunner` runs it, and `Results` counts its tokens.
        """
        roster = self._roster
        roster.end_complete(list(roster.running))  # those of a step that was interrupted
        self.prefill()
        drafts = self._drafts()
        if roster.running:
            self._decode(drafts, cuda_graph)
        self._results.receive(in_flight=bool(roster.running) and not drafts)

    def prefill(self) -> None:
        """A pass over waiting prompts, if there are any."""
        roster = self._roster
        if roster.waiting:
            roster.sharing.follow(self._runner.model)
        chosen = roster.next_pass()
        if not chosen:
            return
        sequences = [one for one, _ in chosen]
        try:
            readout = self._runner.run_pass(chosen)
            for one, piece in chosen:
                one.computed = piece.end
            if readout is not None:
                self._results.expect(readout, begun=readout.sequences)
        except BaseException as error:
            # The cache may hold a part of the pass: these prompts restart, each by itself.
            for one in sequences:
                one.restart()
                one.alone = True
            if not isinstance(error, Exception):
                raise
            self._blame(sequences, error, "pass over %d prompts")
            return
        for one in sequences:
            roster.record(one)
        roster.end_complete(() if readout is None else readout.sequences)

    def _drafts(self) -> dict[RunningSequence, list[int]]:
        """Guesses of what follows the running sequences. The host must know all their tokens, so
        it waits for those in flight, if any sequence has a drafter."""
        running = self._roster.running
        if not any(one.request.drafter for one in running):
            return {}
        self._results.receive(in_flight=False)
        drafts = {}
        for one in list(self._roster.running):
            most = min(self._runner.most_drafted, one.request.limit - one.chosen - 1)
            try:
                if one.drafter is not None and most > 0:
                    draft = check_draft(one.guess(most), most, vocabulary(self._runner.model))
                    if draft:
                        drafts[one] = draft
            except Exception as error:
                _free_frames(error)
                self._results.fail(one, error)
        return drafts

    def _decode(self, drafts: Mapping[RunningSequence, list[int]], cuda_graph: bool) -> None:
        """A step of the running sequences."""
        together = list(self._roster.running)
        try:
            self.run_step(together, drafts, cuda_graph=cuda_graph)
        except Exception as error:
            if self._blame(together, error, "step of %d sequences"):
                return
            together = [one for one in together if not one.ended]  # a hook may cancel, then fail
            failed = self._run_apart(together, cuda_graph)
            if together and len(failed) == len(together):
                raise  # not one sequence's fault, as far as this can tell
            for one, own in failed.items():
                self._results.fail(one, own)

    def run_step(
        self,
        sequences: list[RunningSequence],
        drafts: Mapping[RunningSequence, list[int]] = MappingProxyType({}),
        *,
        cuda_graph: bool,
    ) -> None:
        """Run a step of these sequences; if it fails, they stay as they were."""
        running = self._roster.running
        try:
            readout = self._runner.run_step(sequences, running, drafts, cuda_graph=cuda_graph)
            self._results.expect(readout)
        except BaseException:
            self._runner.take_back()
            raise
        self.drafted += sum(map(len, drafts.values()))
        self.accepted += len(readout.sequences) - len(sequences)
        self._roster.end_complete(sequences)

    def _run_apart(
        self, sequences: Sequence[RunningSequence], cuda_graph: bool
    ) -> dict[RunningSequence, Exception]:
        """Run a step of each sequence separately; returns those that fail, and how."""
        failed = {}
        for one in sequences:
            try:
                self.run_step([one], cuda_graph=cuda_graph)
            except Exception as error:
                _free_frames(error)
                failed[one] = error
        return failed

    def _blame(self, sequences: list[RunningSequence], error: Exception, what: str) -> bool:
        """End what a failure ends: the only sequence that ran or, without retries, all that there
        are. Returns False if sequences are to run again, each alone."""
        _free_frames(error)
        if not self.retries:
            for one in (*self._roster.waiting, *self._roster.running):
                self._results.fail(one, error)
        elif len(sequences) == 1:
            self._results.fail(sequences[0], error)
        else:
            _log.warning(f"a {what} failed (%r): each runs alone", len(sequences), error)
            return False
        return True


def _free_frames(error: Exception) -> None:
    """Release the tensors of a failed pass, which the error's traceback holds."""
    traceback.clear_frames(error.__traceback__)
