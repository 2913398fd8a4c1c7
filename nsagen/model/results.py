"""New tokens on their way: from the device to the host, and there to whoever reads them."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from nsagen.model.roster import Roster
from nsagen.model.sequences import (
    DROPPED,
    NO_TOKEN,
    Finished,
    NewToken,
    Readout,
    RunningSequence,
)


class Results:
    """Counts the tokens of a roster's sequences as they are chosen, arrive and are read.

    Whatever fails or interrupts it, no token is lost and none comes twice.

    Attributes:
        ready: tokens that have arrived and wait for their reader.
    """

    def __init__(self, roster: Roster) -> None:
        self.ready: deque[NewToken] = deque()
        self._roster = roster
        self._readouts: deque[Readout] = deque()

    @property
    def empty(self) -> bool:
        """Whether nothing is on its way or ready."""
        return not (self._readouts or self.ready)

    def expect(self, readout: Readout, begun: Sequence[RunningSequence] = ()) -> None:
        """Count tokens that are on their way; if it fails, nothing has changed.

        Args:
            begun: sequences whose first tokens these are: they run from now on.
        """
        roster = self._roster
        waiting = [one for one in roster.waiting if one not in begun]
        running = roster.running + [one for one in begun if not one.ended]  # a hook may cancel
        before = [(one, one.chosen, one.newest) for one in readout.sequences]
        try:
            for place, one in enumerate(readout.sequences):
                one.chosen += 1
                one.newest = (readout, place)
            self._readouts += (readout,)
            roster.waiting, roster.running = waiting, running
        except BaseException:
            for one, chosen, newest in before:
                one.chosen, one.newest = chosen, newest
            raise

    def receive(self, in_flight: bool) -> None:
        """Make results of the tokens that have arrived.

        Args:
            in_flight: whether the newest ones may stay on their way; otherwise wait for them.
        """
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

    def fail(self, one: RunningSequence, error: Exception) -> None:
        """End a sequence with an error, which comes after its tokens."""
        self.receive(in_flight=False)
        if one.number not in self._roster.unread:
            return
        self.ready.append(NewToken(one.number, NO_TOKEN, "error", error))
        one.received = DROPPED
        del self._roster.unread[one.number]
        self._roster.end(one)

    def drop(self, number: int) -> None:
        """Forget a sequence's tokens that are ready."""
        self.ready = deque([new for new in self.ready if new.sequence != number])

    def clear(self) -> None:
        """Forget all tokens."""
        self.ready, self._readouts = deque(), deque()

    def _received(self, one: RunningSequence, token: int, readout: Readout) -> None:
        """Process a token. What can fail comes first, so that a failure loses no token."""
        count = one.received + 1
        finished: Finished = "length" if count == one.request.limit else ""
        if token in one.request.stop_tokens:
            finished = "stop"
        if finished:
            self._roster.end(one)
        new = NewToken(one.number, token, finished)
        # Ctrl-C interrupts Python at calls and loops only, so not between these lines.
        self.ready += (new,)
        one.output += (token,)
        one.received = DROPPED if finished else count
        readout.read += 1
        if finished:
            del self._roster.unread[one.number]
        self._roster.record(one)
