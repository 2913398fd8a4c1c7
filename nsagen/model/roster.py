"""The sequences of a batch, their slots, and which of their prompt tokens are computed next."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from nsagen.core.errors import CapacityError
from nsagen.model.prefill import Piece
from nsagen.model.requests import Request
from nsagen.model.sequences import DROPPED, RunningSequence
from nsagen.model.sharing import Sharing

PromptPass = list[tuple[RunningSequence, Piece]]
"""Which tokens of which prompts a pass computes."""


class Roster:
    """The sequences of a batch, from `admit` to `end`. It computes nothing.

    Args:
        cache: the batch's; sequences get its slots and pages.

    Attributes:
        waiting: sequences whose prompts are not computed yet, in the order of passes.
        running: sequences that get a token at every step.
        unread: those whose last token is not among the results yet, by number.
        kept: ended sequences that keep their slots for another turn, by number.
        sharing: which pages they share.
        next_number: of the next sequence; never used again.
    """

    def __init__(self, cache: Any) -> None:
        self.cache, self.sharing = cache, Sharing(cache)
        self.waiting: list[RunningSequence] = []
        self.running: list[RunningSequence] = []
        self.unread: dict[int, RunningSequence] = {}
        self.kept: dict[int, RunningSequence] = {}
        self.next_number = 0
        self._free = self._all_slots()

    @property
    def free_slots(self) -> int:
        """Slots that no sequence has."""
        return len(self._free)

    def admit(self, where: str, request: Request, of: RunningSequence | None = None) -> int:
        """Give a sequence a slot and pages, and let it wait; returns its number.

        Args:
            of: a sequence whose tokens the prompt begins with.

        Raises:
            CapacityError: no slot or too few pages are free; nothing has changed.
        """
        if not self._free:
            limit = self.cache.limits.max_batch_size
            raise CapacityError(
                f"{where}: a sequence needs a free slot, got none of "
                f"InferenceConfig.max_batch_size={limit}; "
                "wait until other sequences end, or raise max_batch_size"
            )
        one = RunningSequence(self.next_number, self._free[-1], request)
        self.sharing.place(one, where, of)
        self._free.pop()
        self._enter(one)
        self.next_number += 1
        return one.number

    def resume(self, one: RunningSequence, request: Request, where: str) -> None:
        """Let a kept sequence wait for the passes of a longer prompt.

        Raises:
            CapacityError: too few pages are free; nothing has changed.
        """
        self.cache.reserve(one.slot, request.tokens, where)
        self._enter(one.resumed(request, self.cache.settled(one.cached)))
        del self.kept[one.number]

    def next_pass(self) -> PromptPass:
        """What the next pass computes of the prompts that wait; empty if there are none."""
        limit = self.cache.limits.prefill_chunk_size
        budget = limit or sum(one.left for one in self.waiting)
        chosen: PromptPass = []
        coming: set[bytes] = set()
        for one in self.waiting:
            if self.sharing.waits(one, coming):
                continue
            length = min(one.left, budget)
            if length == 0 or (chosen and (one.alone or chosen[0][0].alone)):
                break
            chosen.append((one, Piece(one.slot, one.computed, length, one.reused)))
            budget -= length
        return chosen

    def record(self, one: RunningSequence) -> None:
        """Let other sequences find the pages that one has filled, while they are its own."""
        if not one.ended or one.number in self.kept:
            self.sharing.record(one)

    def end_complete(self, sequences: Sequence[RunningSequence]) -> None:
        """End sequences that need no more tokens from the device."""
        for one in sequences:
            if one.chosen == one.request.limit:
                self.end(one)

    def end(self, one: RunningSequence) -> None:
        """Take a sequence out of the steps, and free its slot unless it is kept."""
        if one.ended:
            return
        self.waiting = [other for other in self.waiting if other is not one]
        self.running = [other for other in self.running if other is not one]
        if one.request.keep and one.received != DROPPED:
            self.kept[one.number] = one
            one.ended = True
        else:
            self._release(one)

    def drop(self, number: int) -> None:
        """Take a sequence out whose tokens are not read any more; any number is fine."""
        one = self.unread.get(number)
        if one is not None:
            one.received = DROPPED
            self.end(one)
            del self.unread[number]
        if number in self.kept:
            self._release(self.kept[number])
            del self.kept[number]

    def clear(self) -> None:
        """Take all sequences out, and forget what is in their pages."""
        for one in self.unread.values():
            one.received, one.ended = DROPPED, True
        self.unread, self.kept, self.waiting, self.running = {}, {}, [], []
        for slot in self._all_slots():
            self.cache.release(slot)
        self._free = self._all_slots()
        self.sharing.forget()

    def _enter(self, one: RunningSequence) -> None:
        self.waiting.append(one)
        self.unread[one.number] = one

    def _release(self, one: RunningSequence) -> None:
        """Free a sequence's slot. Work in flight runs before that of the slot's next sequence."""
        try:
            self.cache.release(one.slot)
        finally:
            self._free += (one.slot,)
            one.ended = True

    def _all_slots(self) -> list[int]:
        return list(range(self.cache.limits.max_batch_size))[::-1]
