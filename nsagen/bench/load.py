"""What a server is put under: arrivals by a Poisson process, requests of mixed lengths.

All of it is drawn from a seed, so that two servers get the same requests at the same times.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np

from nsagen.core.errors import InvalidInputError

COLUMNS = {
    "over": "",
    "rate": ".3g",
    "requests": "",
    "failed": "",
    "unfinished": "",
    "seconds": ".1f",
    "new_tokens_s": ".1f",
    "first_token_ms_p50": ".1f",
    "first_token_ms_p99": ".1f",
    "token_ms_p50": ".2f",
    "token_ms_p99": ".2f",
}

FEWEST = 96
"""Token numbers of prompts are below the smallest vocabulary."""

ARRIVING = 0.6
"""The part of a load's seconds in which requests arrive; the rest is for their answers."""


@dataclass(frozen=True)
class Load:
    """What arrives.

    Attributes:
        requests: how many, at most.
        rate: arrivals a second, on average; the gaps are exponential.
        prompt, new: least and greatest tokens of a prompt and of an answer; prompts' lengths are
            spread evenly over their logarithms, answers' over their range.
        seed: of all of it.
        limit: seconds after which unfinished requests are cut off, and what of them has come
            counts; requests arrive in the first `ARRIVING` of it. None: all are finished.
    """

    requests: int
    rate: float
    prompt: tuple[int, int]
    new: tuple[int, int]
    seed: int = 0
    limit: float | None = None

    def __post_init__(self) -> None:
        for name in ("prompt", "new"):
            least, greatest = getattr(self, name)
            if not 1 <= least <= greatest:
                raise InvalidInputError(
                    f"bench serve: --{name} must be least and greatest, such as 16,512; "
                    f"got {least},{greatest}"
                )
        if not (self.rate > 0 and math.isfinite(self.rate)):
            raise InvalidInputError(
                f"bench serve: --rates must be above 0; got {self.rate}; such as 1,4"
            )

    @property
    def length(self) -> int:
        """Tokens of the longest request."""
        return self.prompt[1] + self.new[1]


@dataclass(frozen=True)
class Planned:
    """A request: when it is sent, in seconds from the start, and of what."""

    at: float
    prompt: list[int]
    new: int


@dataclass
class Answer:
    """When a request was sent and its tokens came, in seconds from the start.

    Attributes:
        count: tokens; several may come at one time.
        ended: whether they are all.
        error: why it failed, if it did.
    """

    at: float
    tokens: list[float] = field(default_factory=list)
    count: int = 0
    ended: bool = False
    error: str = ""


Run = Callable[[Sequence[Planned], float | None, Callable[[], None]], list[Answer]]
"""Sends requests at their times, cuts off at a limit, and calls a function as each one ends."""


def planned(load: Load) -> list[Planned]:
    """The requests of a load, in order of time."""
    draw, at, found = random.Random(load.seed), 0.0, []
    low, high = map(math.log, load.prompt)
    last = math.inf if load.limit is None else ARRIVING * load.limit
    while len(found) < load.requests and at <= last:
        length = min(load.prompt[1], round(math.exp(draw.uniform(low, high))))
        prompt = [draw.randrange(FEWEST) for _ in range(length)]
        found.append(Planned(at, prompt, draw.randint(*load.new)))
        at += draw.expovariate(load.rate)
    return found


class Clock:
    """Seconds that several servers share: each has its part of what those before it left.

    That is what the rows of those after it leave, or its equal share if that is more. The first
    server may compile kernels for all.

    Args:
        total: seconds from now on; None: any.
        servers: how many there are.
        rows: seconds of a server's rows, at most; None: any.
    """

    def __init__(self, total: float | None, servers: int, rows: float | None) -> None:
        self._servers, self._rows, self._last = servers, rows, time.monotonic()
        self._end = math.inf if total is None else self._last + total
        self._until = self._end

    def begin(self) -> None:
        """Begin the next server's part."""
        now = self._last = time.monotonic()
        self._until = now + max(0.0, self._end - now) / max(1, self._servers)
        self._servers -= 1
        if self._rows is not None:
            self._until = max(self._until, self._end - self._servers * self._rows)

    def lap(self) -> float:
        """Seconds since the last call, or since the part began."""
        before, self._last = self._last, time.monotonic()
        return self._last - before

    def rows_begin(self) -> float:
        """When to begin the rows, so that they fit; they have no more than half of what is left."""
        now = time.monotonic()
        return max(self._until - (self._rows or 0.0), now + (self._until - now) / 2)

    def until(self, moment: float) -> float | None:
        """Seconds until then, 0 for less than one; None: any number."""
        left = moment - time.monotonic()
        return None if left == math.inf else left * (left >= 1)

    @property
    def left(self) -> float | None:
        """Seconds that are left of the part, as `until` has them."""
        return self.until(self._until)


def warm_up(load: Load, sent: Sequence[Planned], slots: int) -> Iterator[list[Planned]]:
    """Requests to run before a load, and after those more, each by itself.

    The first use all slots, down to one, the longest prompt and a few such as the load's; the
    others are prompts that will be `sent`, one for each power of two that lengths lie between. What
    is loaded, compiled or captured at its first use is there afterwards, for prompts that share a
    pass and for those that have their own.
    """
    shortest, longest = load.prompt
    news = [min(2 + 2 * slot, load.length - shortest) for slot in range(slots)]
    requests = [Planned(0.0, [1] * shortest, new) for new in news]
    others = planned(replace(load, requests=4, seed=load.seed + 1, limit=None))
    prompts = [[1] * longest, *(one.prompt for one in others)]
    few = min(2, load.new[1])
    yield [*requests, *(Planned(0.0, prompt, few) for prompt in prompts)]
    for prompt in {len(one.prompt).bit_length(): one.prompt for one in sent}.values():
        yield [Planned(0.0, prompt, few)]


def row_of(over: str, load: Load, answers: Sequence[Answer]) -> dict[str, Any]:
    """What a load's answers amount to.

    Times are in milliseconds: to the first token from when the request was sent, and between the
    first and the last, a token. Rates are of new tokens from the first arrival to the last token,
    or to the limit. Requests that were cut off count with the tokens that came, and with the time
    that they had waited for the first.
    """
    good = [one for one in answers if not one.error]
    cut = [one for one in good if not one.ended]
    ends = [one.tokens[-1] for one in good if one.tokens]
    seconds = load.limit if cut and load.limit is not None else max(ends, default=0.0)
    first = [((one.tokens[0] if one.tokens else seconds) - one.at) * 1e3 for one in good]
    later = [
        (one.tokens[-1] - one.tokens[0]) / (one.count - 1) * 1e3 for one in good if one.count > 1
    ]
    new = sum(one.count for one in good)
    row: dict[str, Any] = {"over": over, **asdict(load), "requests": len(answers)}
    row |= {"failed": len(answers) - len(good), "unfinished": len(cut)}
    row |= {"seconds": seconds, "new_tokens": new}
    row["new_tokens_s"] = new / seconds if seconds else 0.0
    for name, values in (("first_token_ms", first), ("token_ms", later)):
        for percent in (50, 99):
            row[f"{name}_p{percent}"] = float(np.percentile(values, percent)) if values else None
    row["errors"] = sorted({one.error for one in answers if one.error})[:3]
    return row
