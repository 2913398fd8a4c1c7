"""A server under load: arrivals by a Poisson process, requests of mixed lengths.

The load is drawn from a seed, so that two servers get the same requests at the same times. Times
are what a client sees: a token's text has arrived.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from nsagen.core.errors import CapacityError, InvalidInputError, NsagenError
from nsagen.model import ContinuousBatch

if TYPE_CHECKING:
    from openai import AsyncOpenAI

COLUMNS = {
    "over": "",
    "rate": ".3g",
    "requests": "",
    "failed": "",
    "seconds": ".1f",
    "new_tokens_s": ".1f",
    "first_token_ms_p50": ".1f",
    "first_token_ms_p99": ".1f",
    "token_ms_p50": ".2f",
    "token_ms_p99": ".2f",
}

FEWEST = 96
"""Token numbers of prompts are below the smallest vocabulary."""


PAGE = 256
"""Tokens of a block of Transformers' paged cache."""


@dataclass(frozen=True)
class Load:
    """What arrives.

    Attributes:
        requests: how many.
        rate: arrivals a second, on average; the gaps are exponential.
        prompt, new: least and greatest tokens of a prompt and of an answer; prompts' lengths are
            spread evenly over their logarithms, answers' over their range.
        seed: of all of it.
    """

    requests: int
    rate: float
    prompt: tuple[int, int]
    new: tuple[int, int]
    seed: int = 0

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
    """When a request was sent and its tokens came, in seconds from the start."""

    at: float
    tokens: list[float] = field(default_factory=list)
    count: int = 0
    error: str = ""


def planned(load: Load) -> list[Planned]:
    """The requests of a load, in order of time."""
    draw, at, found = random.Random(load.seed), 0.0, []
    low, high = map(math.log, load.prompt)
    for _ in range(load.requests):
        length = min(load.prompt[1], round(math.exp(draw.uniform(low, high))))
        prompt = [draw.randrange(FEWEST) for _ in range(length)]
        found.append(Planned(at, prompt, draw.randint(*load.new)))
        at += draw.expovariate(load.rate)
    return found


def run_http(url: str, requests: Sequence[Planned], done: Callable[[], None]) -> list[Answer]:
    """Send requests to an endpoint with OpenAI's interface that takes token numbers as prompts.

    Raises:
        InvalidInputError: the URL is not a server's, such as `http://127.0.0.1:8000`.
        NsagenError: no such endpoint answers there, or it serves no model.
    """
    return asyncio.run(_run_http(url, requests, done))


async def _run_http(
    url: str, requests: Sequence[Planned], done: Callable[[], None]
) -> list[Answer]:
    async with _client(url) as client:
        model = await _model_of(client, url)
        start = time.perf_counter()

        async def send(one: Planned) -> Answer:
            await asyncio.sleep(start + one.at - time.perf_counter())
            answer = Answer(time.perf_counter() - start)
            try:
                stream = await client.completions.create(
                    model=model,
                    prompt=one.prompt,
                    max_tokens=one.new,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for part in stream:
                    if part.choices:
                        answer.tokens.append(time.perf_counter() - start)
                    if part.usage is not None:
                        answer.count = part.usage.completion_tokens
            except Exception as error:
                answer.error = str(error)
            done()
            return answer

        return list(await asyncio.gather(*map(send, requests)))


def _client(url: str) -> AsyncOpenAI:
    from openai import AsyncOpenAI

    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("no http:// or https:// with a host")
        return AsyncOpenAI(
            base_url=f"{url.rstrip('/')}/v1", api_key="none", max_retries=0, timeout=None
        )
    except Exception as error:  # the client's own libraries have types for what is no URL
        raise InvalidInputError(
            f"bench serve: --url must be a server's address; got {url!r}: {error}; "
            "such as http://127.0.0.1:8000"
        ) from None


async def _model_of(client: AsyncOpenAI, url: str) -> str:
    """The name of the first model that a server lists."""
    from openai import OpenAIError

    try:
        listed = [model.id for model in (await client.models.list()).data or ()]
    except (OpenAIError, AttributeError, ValueError) as error:  # or an answer in another form
        raise NsagenError(
            f"bench serve: a server must answer at {url}/v1/models; it said: "
            f"{_first_line(error)}; start it, or give its address without /v1"
        ) from error
    if not listed:
        raise NsagenError(
            f"bench serve: {url} must serve a model; it lists none; load one, or give another --url"
        )
    return listed[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_batch(model: Any, requests: Sequence[Planned], done: Callable[[], None]) -> list[Answer]:
    """Run requests on a `ContinuousBatch` itself, without a server: what HTTP adds is the rest."""
    batch, waiting = ContinuousBatch(model), list(requests)
    answers: dict[int, Answer] = {}
    start = time.perf_counter()
    while waiting or not batch.idle:
        now = time.perf_counter() - start
        while waiting and waiting[0].at <= now:
            try:
                number = batch.add(waiting[0].prompt, max_new_tokens=waiting[0].new)
            except CapacityError:
                break
            answers[number] = Answer(waiting.pop(0).at)
        if batch.idle and waiting:
            time.sleep(max(0.0, waiting[0].at - now))
            continue
        for new in batch.step():
            answer = answers[new.sequence]
            if new.error is not None:
                answer.error = repr(new.error)
            else:
                answer.count += 1
                answer.tokens.append(time.perf_counter() - start)
            if new.finished:
                done()
    return [answers[number] for number in sorted(answers)]


def run_transformers(
    model: Any, slots: int, chunk: int, requests: Sequence[Planned], done: Callable[[], None]
) -> list[Answer]:
    """Run requests on Transformers' own continuous batching, with its dense attention.

    Args:
        model: a causal language model of Transformers.
        slots: of a cache that the longest requests fill; chunk: most tokens of a pass.
    """
    from transformers.generation.configuration_utils import (
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    length = max(len(one.prompt) + one.new for one in requests)
    limits = ContinuousBatchingConfig(page_size=PAGE, max_batch_tokens=chunk + slots)
    limits.num_blocks = slots * -(-length // PAGE)
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=limits,
    )
    manager.start()
    answers = [Answer(one.at) for one in requests]
    start, sent, left = time.perf_counter(), 0, len(requests)
    try:
        while left:
            now = time.perf_counter() - start
            while sent < len(requests) and requests[sent].at <= now:
                one = requests[sent]
                manager.add_request(
                    one.prompt, str(sent), max_new_tokens=one.new, record_timestamps=True
                )
                answers[sent].at = time.perf_counter() - start
                sent += 1
            if not manager.is_running():
                break
            wait = requests[sent].at - now if sent < len(requests) else 1.0
            result = manager.get_result(timeout=min(1.0, max(1e-3, wait)))
            if result is None:
                continue
            answer = answers[int(result.request_id)]
            answer.tokens = [moment - start for moment in result.timestamps or ()]
            answer.count, answer.error = len(result.generated_tokens), result.error or ""
            left -= 1
            done()
    finally:
        manager.stop(block=True)
    return answers


def row_of(over: str, load: Load, answers: Sequence[Answer]) -> dict[str, Any]:
    """What a load's answers amount to.

    Times are in milliseconds: to the first token from when the request was sent, and between the
    first and the last, a token. Rates are of new tokens from the first arrival to the last token.
    """
    good = [one for one in answers if not one.error and one.tokens]
    first = [(one.tokens[0] - one.at) * 1e3 for one in good]
    later = [
        (one.tokens[-1] - one.tokens[0]) / (one.count - 1) * 1e3 for one in good if one.count > 1
    ]
    seconds = max((one.tokens[-1] for one in good), default=0.0)
    new = sum(one.count for one in good)
    row: dict[str, Any] = {"over": over, **asdict(load), "failed": len(answers) - len(good)}
    row |= {"seconds": seconds, "new_tokens": new}
    row["new_tokens_s"] = new / seconds if seconds else 0.0
    for name, values in (("first_token_ms", first), ("token_ms", later)):
        for percent in (50, 99):
            row[f"{name}_p{percent}"] = float(np.percentile(values, percent)) if values else None
    row["errors"] = sorted({one.error for one in answers if one.error})[:3]
    return row


@contextmanager
def own_server(options: Sequence[str]) -> Iterator[str]:
    """The URL of a `nsagen serve` in a process of its own, which ends with the block.

    Args:
        options: of the command, besides its port.

    Raises:
        NsagenError: it did not start; what it said is on stderr.
    """
    command = [
        sys.executable,
        "-m",
        "nsagen",
        "--quiet",
        "serve",
        "--port",
        "0",
        "--json",
        *options,
    ]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise NsagenError(
                f"bench serve: nsagen serve must start; it ended with {process.wait(60)}; "
                "see its error above"
            )
        yield json.loads(line)["url"]
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
