"""From the tokens of a call to the texts of its answers."""

from __future__ import annotations

import asyncio
import itertools
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from nsagen.model import SamplingConfig
from nsagen.model.requests import Request
from nsagen.model.sequences import NewToken
from nsagen.serve.engine import Arrival, Engine, Failed, Job, Stopped
from nsagen.serve.protocol import SamplingFields
from nsagen.serve.text import Tokenizer


@dataclass(frozen=True)
class Piece:
    """A part of an answer: of which prompt, its text, and "stop" or "length" at its end."""

    place: int
    text: str
    finish: str = ""


class StopTexts:
    """Cuts a text before the first of some texts, and keeps back what may begin one."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops, self._kept = stops, ""
        self.found = False

    def add(self, text: str, last: bool = False) -> str:
        """The text that is sure; "" once a stop was found."""
        if self.found:
            return ""
        text = self._kept + text
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            self.found, self._kept = True, ""
            return text[: min(places)]
        held = 0 if last else max((_overlap(text, stop) for stop in self._stops), default=0)
        self._kept = text[len(text) - held :]
        return text[: len(text) - held]


def _overlap(text: str, stop: str) -> int:
    """Characters at a text's end that begin a stop."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


class _Answer:
    def __init__(self, job: Job, tokenizer: Tokenizer, stops: Sequence[str]) -> None:
        self.job, self.tokens = job, 0
        self._stop_tokens = tokenizer.stop
        self._stream, self._cut = tokenizer.stream(), StopTexts(stops)

    def add(self, new: NewToken) -> Piece:
        self.tokens += 1
        text = "" if new.token in self._stop_tokens else self._stream.add(new.token)
        if new.finished:
            text += self._stream.end()
        text = self._cut.add(text, last=bool(new.finished))
        finish = "stop" if self._cut.found else str(new.finished)
        return Piece(self.job.place, text, finish)


class Call:
    """The answers to one HTTP request; made when its requests are checked, before they run.

    Args:
        requests: one for each prompt.
        stops: texts that end an answer.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        requests: Sequence[Request],
        stops: Sequence[str],
    ) -> None:
        self._engine = engine
        self._arrivals: asyncio.Queue[Arrival] = asyncio.Queue()
        jobs = [Job(place, one, self._arrivals) for place, one in enumerate(requests)]
        self._answers = [_Answer(job, tokenizer, stops) for job in jobs]
        self.prompt_tokens = sum(one.prompt.shape[0] for one in requests)
        engine.submit(jobs)

    @property
    def completion_tokens(self) -> int:
        """New tokens so far, of all answers."""
        return sum(answer.tokens for answer in self._answers)

    async def pieces(self) -> AsyncIterator[Piece]:
        """The parts of all answers as they come; leaving the loop frees their slots.

        Raises:
            Stopped: the server ends.
            Failed: one of them failed; its cause is the error.
        """
        open_ = set(range(len(self._answers)))
        try:
            while open_:
                place, new = await self._arrivals.get()
                if isinstance(new, Stopped):
                    raise new
                error = new if isinstance(new, Exception) else new.error
                if error is not None:
                    raise Failed(repr(error)) from error
                assert isinstance(new, NewToken)
                if place not in open_:
                    continue
                piece = self._answers[place].add(new)
                if piece.finish:
                    open_.remove(place)
                    self._engine.cancel(self._answers[place].job)
                if piece.text or piece.finish:
                    yield piece
        finally:
            self.close()

    def close(self) -> None:
        """Free the slots of answers that are still on their way."""
        for answer in self._answers:
            self._engine.cancel(answer.job)


_SEEDS = itertools.count(secrets.randbits(60))


def sampling_of(body: SamplingFields) -> SamplingConfig:
    """How a request's tokens are chosen; without a seed, each request has another."""
    return SamplingConfig(
        temperature=1.0 if body.temperature is None else body.temperature,
        top_k=body.top_k or 0,
        top_p=1.0 if body.top_p is None else body.top_p,
        seed=next(_SEEDS) if body.seed is None else body.seed,
    )
