"""Servers under a load: over HTTP, a `ContinuousBatch` without it, and Transformers' own.

Times are what a client sees: a token's text has arrived.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from nsagen.bench.load import Answer, Planned, Run
from nsagen.core.errors import CapacityError, InvalidInputError, NsagenError
from nsagen.model import ContinuousBatch

if TYPE_CHECKING:
    from openai import AsyncOpenAI

PAGE = 256
"""Tokens of a block of Transformers' paged cache."""

SETTLING_S = 0.5
"""Seconds that a server has to let go of requests that were cut off."""


def run_http(
    url: str, requests: Sequence[Planned], limit: float | None, done: Callable[[], None]
) -> list[Answer]:
    """Send requests to an endpoint with OpenAI's interface that takes token numbers as prompts.

    Raises:
        InvalidInputError: the URL is not a server's, such as `http://127.0.0.1:8000`.
        NsagenError: no such endpoint answers there, or it serves no model.
    """
    return asyncio.run(_run_http(url, requests, limit, done))


async def _run_http(
    url: str, requests: Sequence[Planned], limit: float | None, done: Callable[[], None]
) -> list[Answer]:
    answers = [Answer(one.at) for one in requests]
    async with _client(url) as client:
        model = await _model_of(client, url)
        start = time.perf_counter()

        async def send(one: Planned, answer: Answer) -> None:
            await asyncio.sleep(start + one.at - time.perf_counter())
            answer.at = time.perf_counter() - start
            try:
                stream = await client.completions.create(
                    model=model,
                    prompt="",
                    extra_body={"prompt": one.prompt},  # the client walks over `prompt`
                    max_tokens=one.new,
                    temperature=0,
                    stream=True,
                    stream_options={"include_usage": True},
                )
                async for part in stream:
                    if part.choices:
                        answer.tokens.append(time.perf_counter() - start)
                        answer.count += 1
                    if part.usage is not None:
                        answer.count = part.usage.completion_tokens
                answer.ended = True
            except Exception as error:
                answer.error = str(error)
            done()

        sent = [asyncio.ensure_future(send(*pair)) for pair in zip(requests, answers, strict=True)]
        if sent:
            _, cut = await asyncio.wait(sent, timeout=limit)
            for one in cut:
                one.cancel()
            await asyncio.gather(*sent, return_exceptions=True)
            await asyncio.sleep(SETTLING_S if cut else 0)
    return answers


def _client(url: str) -> AsyncOpenAI:
    from openai import AsyncOpenAI

    try:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ValueError("no http:// or https:// with a host")
        return AsyncOpenAI(
            base_url=f"{url.rstrip('/').removesuffix('/v1')}/v1",
            api_key="none",
            max_retries=0,
            timeout=None,
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
            f"bench serve: a server must answer at {client.base_url}models; it said: "
            f"{_first_line(error)}; start it, or correct its address"
        ) from error
    if not listed:
        raise NsagenError(
            f"bench serve: {url} must serve a model; it lists none; load one, or give another --url"
        )
    return listed[0]


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def run_batch(
    batch: ContinuousBatch,
    requests: Sequence[Planned],
    limit: float | None,
    done: Callable[[], None],
) -> list[Answer]:
    """Run requests on a `ContinuousBatch` itself, without a server: what HTTP adds is the rest."""
    answers = [Answer(one.at) for one in requests]
    waiting = deque(zip(requests, answers, strict=True))
    running: dict[int, Answer] = {}
    start = time.perf_counter()
    while waiting or not batch.idle:
        now = time.perf_counter() - start
        if limit is not None and now >= limit:
            break
        while waiting and waiting[0][0].at <= now:
            one, answer = waiting[0]
            try:
                running[batch.add(one.prompt, max_new_tokens=one.new)] = answer
            except CapacityError:
                break
            waiting.popleft()
        if batch.idle and waiting:
            until = waiting[0][0].at if limit is None else min(waiting[0][0].at, limit)
            time.sleep(max(0.0, until - now))
            continue
        for new in batch.step():
            answer = running[new.sequence]
            if new.error is not None:
                answer.error = repr(new.error)
            else:
                answer.count += 1
                answer.tokens.append(time.perf_counter() - start)
            if new.finished:
                answer.ended = True
                done()
    batch.clear()
    return answers


@contextmanager
def transformers_manager(model: Any, slots: int, chunk: int, length: int) -> Iterator[Run]:
    """Transformers' own continuous batching, with its dense attention.

    Args:
        model: a causal language model of Transformers.
        slots: of a cache that the longest requests fill.
        chunk: most tokens of a pass.
        length: tokens of the longest request.
    """
    from transformers.generation.configuration_utils import (
        ContinuousBatchingConfig,
        GenerationConfig,
    )

    names = {one.name for one in dataclasses.fields(ContinuousBatchingConfig)}
    page: dict[str, Any] = {"page_size" if "page_size" in names else "block_size": PAGE}
    limits = ContinuousBatchingConfig(max_batch_tokens=chunk + slots, **page)
    limits.num_blocks = slots * -(-length // PAGE)
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)  # a line a cut request
    manager = model.init_continuous_batching(
        generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0),
        continuous_batching_config=limits,
    )
    manager.start()
    runs: list[None] = []

    def run(
        requests: Sequence[Planned], limit: float | None, done: Callable[[], None]
    ) -> list[Answer]:
        runs.append(None)  # requests that were cut off may still answer during the next run
        return _run_manager(manager, f"{len(runs)}-", requests, limit, done)

    try:
        yield run
    finally:
        manager.stop(block=True, timeout=10, hard_stop=True)


def _run_manager(
    manager: Any,
    prefix: str,
    requests: Sequence[Planned],
    limit: float | None,
    done: Callable[[], None],
) -> list[Answer]:
    answers = [Answer(one.at) for one in requests]
    names = {f"{prefix}{place}": answer for place, answer in enumerate(answers)}
    waiting = deque(zip(requests, names, strict=True))
    start = time.perf_counter()
    while not all(one.ended for one in answers):
        now = time.perf_counter() - start
        if limit is not None and now >= limit:
            break
        while waiting and waiting[0][0].at <= now:
            one, name = waiting.popleft()
            names[name].at = time.perf_counter() - start
            more = {"streaming": True, "record_timestamps": True}
            manager.add_request(one.prompt, name, max_new_tokens=one.new, **more)
        if not manager.is_running():
            for answer in answers:
                answer.error = answer.error or ("" if answer.ended else "its thread has ended")
            break
        wait = waiting[0][0].at - now if waiting else 1.0
        wait = wait if limit is None else min(wait, limit - now)
        result = manager.get_result(timeout=min(1.0, max(1e-3, wait)))
        answer = None if result is None else names.get(result.request_id)
        if result is None or answer is None:
            continue
        answer.tokens = [moment - start for moment in result.timestamps or ()]
        answer.count, answer.error = len(result.generated_tokens), result.error or ""
        if result.is_finished() or answer.error:
            answer.ended = True
            done()
    for name, answer in names.items():
        if not answer.ended:
            manager.cancel_request(name)
    return answers


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
