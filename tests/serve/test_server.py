"""`nsagen serve` over loopback, as OpenAI's own client sees it."""

from __future__ import annotations

import asyncio
import errno
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

openai = pytest.importorskip("openai")
pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from nsagen.cli.models import random_model  # noqa: E402
from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.model import ContinuousBatch, InferenceConfig, PromptLookup  # noqa: E402
from nsagen.serve import app as app_module  # noqa: E402
from nsagen.serve.app import make_app  # noqa: E402
from nsagen.serve.engine import Engine  # noqa: E402
from nsagen.serve.server import Server, bound, serve  # noqa: E402
from nsagen.serve.text import characters  # noqa: E402

LENGTH = 160
GREEDY: dict[str, Any] = {"model": "tiny", "temperature": 0}
LONG: dict[str, Any] = {"model": "tiny", "prompt": "go on", "max_tokens": 150}


class Running:
    """A server in a thread of this process, and a client of it."""

    def __init__(
        self,
        slots: int = 2,
        queue: int = 64,
        drafter: Any = None,
        tokenizer: Any = None,
        **changes: Any,
    ) -> None:
        limits = InferenceConfig(slots, LENGTH, prefill_chunk_size=64, **changes)
        self.model = random_model("serve", limits, 0, torch.device("cpu"), None, None)
        self.engine = Engine(self.model, queue, drafter)
        config = uvicorn.Config(
            make_app(self.engine, tokenizer or characters(), "tiny"),
            port=0,
            log_config=None,
            access_log=False,
            timeout_graceful_shutdown=1,
        )
        self.socket = config.bind_socket()
        ready = threading.Event()
        self.server = Server(config, self.engine, ready.set)
        self.thread = threading.Thread(target=self.server.run, args=([self.socket],))
        self.thread.start()
        assert ready.wait(30)
        url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)

    def health(self) -> dict[str, Any]:
        url = str(self.client.base_url).removesuffix("v1/") + "health"
        return self.client._client.get(url).json()

    def wait_for(self, **wanted: int) -> None:
        """Until /health says so; 20 seconds at most."""
        for _ in range(1000):
            if wanted.items() <= self.health().items():
                return
            time.sleep(0.02)
        pytest.fail(f"{self.health()}, not {wanted}")

    def complete(self, prompt: Any, **more: Any) -> str:
        return self.client.completions.create(prompt=prompt, **{**GREEDY, **more}).choices[0].text

    def stop(self) -> None:
        self.server.should_exit = True
        self.thread.join(5)
        assert not self.thread.is_alive()
        assert self.engine.join(5)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def running() -> Iterator[Running]:
    found = Running()
    yield found
    found.stop()


@pytest.fixture(scope="module")
def expected(running: Running) -> Any:
    """What the batch itself gives for a prompt."""
    tokenizer = characters()

    def text(prompt: str, count: int) -> str:
        batch = ContinuousBatch(running.model)
        batch.add(tokenizer.encode(prompt), max_new_tokens=count)
        return tokenizer.decode([new.token for new in batch.run()])

    return text


class TestAnswers:
    def test_a_completion_is_what_the_batch_gives(self, running: Running, expected: Any) -> None:
        made = running.client.completions.create(prompt="Hello", max_tokens=9, **GREEDY)
        (choice,) = made.choices
        assert choice.text == expected("Hello", 9)
        assert choice.finish_reason == "length"
        assert (made.usage.prompt_tokens, made.usage.completion_tokens) == (5, 9)
        assert made.model == "tiny"

    def test_sixteen_tokens_are_the_default(self, running: Running, expected: Any) -> None:
        assert running.complete("Hello") == expected("Hello", 16)

    def test_a_prompt_may_be_tokens_and_there_may_be_several(
        self, running: Running, expected: Any
    ) -> None:
        tokens = characters().encode("Hello")
        assert running.complete(tokens, max_tokens=4) == expected("Hello", 4)
        prompts = ["Hello", "other", "third"]
        made = running.client.completions.create(prompt=prompts, max_tokens=4, **GREEDY)
        assert [one.index for one in made.choices] == [0, 1, 2]
        assert [one.text for one in made.choices] == [expected(one, 4) for one in prompts]
        assert made.usage.total_tokens == 15 + 12

    def test_a_stream_has_the_same_text_token_by_token(
        self, running: Running, expected: Any
    ) -> None:
        stream = running.client.completions.create(
            prompt="Hello",
            max_tokens=9,
            stream=True,
            stream_options={"include_usage": True},
            **GREEDY,
        )
        *parts, usage = list(stream)
        assert "".join(part.choices[0].text for part in parts) == expected("Hello", 9)
        assert len(parts) == 9
        assert [part.choices[0].finish_reason for part in parts] == [None] * 8 + ["length"]
        assert (usage.choices, usage.usage.completion_tokens) == ([], 9)

    def test_a_chat_goes_by_the_models_template(self, running: Running, expected: Any) -> None:
        messages = [
            {"role": "system", "content": "be short"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
        ]
        wanted = expected("system: be short\nuser: hi\nassistant: ", 6)
        ask = running.client.chat.completions.create
        made = ask(messages=messages, max_tokens=6, **GREEDY)
        assert made.choices[0].message.content == wanted
        assert made.choices[0].message.role == "assistant"
        stream = list(ask(messages=messages, max_completion_tokens=6, stream=True, **GREEDY))
        assert stream[0].choices[0].delta.role == "assistant"
        assert "".join(part.choices[0].delta.content or "" for part in stream) == wanted
        assert stream[-1].choices[0].finish_reason == "length"

    def test_a_chat_without_a_limit_fills_what_is_left(self, running: Running) -> None:
        made = running.client.chat.completions.create(
            messages=[{"role": "user", "content": "x" * 100}], **GREEDY
        )
        assert made.usage.total_tokens == LENGTH

    def test_a_stop_text_ends_an_answer_before_it(self, running: Running, expected: Any) -> None:
        whole = expected("Hello", 12)
        stop = whole[5:7]
        given = {"prompt": "Hello", "max_tokens": 12, "stop": ["never there", stop], **GREEDY}
        made = running.client.completions.create(**given)
        assert made.choices[0].text == whole[: whole.index(stop)]
        assert made.choices[0].finish_reason == "stop"
        stream = list(running.client.completions.create(stream=True, **given))
        assert "".join(part.choices[0].text for part in stream) == made.choices[0].text
        running.wait_for(running=0)

    def test_a_seed_repeats_an_answer(self, running: Running) -> None:
        warm = {"temperature": 2, "max_tokens": 12}
        answers = [running.complete("Hello", seed=seed, **warm) for seed in (1, 1, 2)]
        assert answers[0] == answers[1] != answers[2]
        assert running.complete("Hello", **warm) != running.complete("Hello", **warm)
        assert running.complete("Hello", extra_body={"top_k": 1}, **warm) == running.complete(
            "Hello", max_tokens=12
        )

    def test_the_model_is_listed(self, running: Running) -> None:
        (card,) = running.client.models.list().data
        assert (card.id, card.owned_by) == ("tiny", "nsagen")
        assert running.client.models.retrieve("tiny").id == "tiny"
        assert running.health() == {"status": "ok", "running": 0, "waiting": 0}


class TestTogether:
    def test_more_clients_than_slots_get_what_each_gets_alone(
        self, running: Running, expected: Any
    ) -> None:
        prompts = [f"client {i}" * (i + 1) for i in range(5)]
        with ThreadPoolExecutor(5) as pool:
            texts = list(pool.map(lambda one: running.complete(one, max_tokens=8), prompts))
        assert texts == [expected(one, 8) for one in prompts]
        running.wait_for(running=0, waiting=0)

    def test_a_client_that_leaves_a_stream_frees_its_slot(self, running: Running) -> None:
        stream = running.client.completions.create(stream=True, **LONG)
        next(iter(stream))
        stream.close()
        running.wait_for(running=0)

    def test_a_client_that_hangs_up_frees_its_slot(self, running: Running) -> None:
        slow = threading.Event()
        with delayed(running, slow), pytest.raises(openai.APITimeoutError):
            running.client.with_options(timeout=0.3).completions.create(**LONG)
        running.wait_for(running=0)

    def test_a_client_that_leaves_the_queue_is_not_run(self, running: Running) -> None:
        slow = threading.Event()
        with delayed(running, slow), ThreadPoolExecutor(2) as pool:
            first = [pool.submit(running.complete, "go on", max_tokens=20) for _ in range(2)]
            running.wait_for(running=2)
            with pytest.raises(openai.APITimeoutError):
                running.client.with_options(timeout=0.2).completions.create(**LONG)
            running.wait_for(waiting=0)
            slow.set()
            assert first[0].result() == first[1].result()
        running.wait_for(running=0)

    def test_one_that_fails_leaves_the_others_alone(
        self, running: Running, expected: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bad = characters().encode("!")[0]
        run = running.model.pass_logits

        def failing(tokens: torch.Tensor, *more: Any) -> Any:
            if bool((tokens == bad).any()):
                raise RuntimeError("a broken pass")
            return run(tokens, *more)

        monkeypatch.setattr(running.model, "pass_logits", failing)
        with ThreadPoolExecutor(3) as pool:
            good = [pool.submit(running.complete, one, max_tokens=12) for one in ("one", "two")]
            with pytest.raises(openai.InternalServerError, match="a broken pass"):
                running.complete("oh!")
            with pytest.raises(openai.APIError, match="a broken pass"):
                list(running.client.completions.create(prompt="oh!", stream=True, **GREEDY))
            texts = [one.result() for one in good]
        monkeypatch.undo()
        assert texts == [expected(one, 12) for one in ("one", "two")]
        running.wait_for(running=0)

    def test_a_step_that_fails_for_all_ends_them_and_the_next_ones_run(
        self, running: Running, expected: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def failing(*given: Any) -> Any:
            raise RuntimeError("a broken step")

        monkeypatch.setattr(running.engine.batch, "step", failing)
        with ThreadPoolExecutor(2) as pool:
            for one in [pool.submit(running.complete, "x") for _ in range(2)]:
                with pytest.raises(openai.InternalServerError, match="a broken step"):
                    one.result()
        monkeypatch.undo()
        assert running.complete("Hello", max_tokens=4) == expected("Hello", 4)


def test_shared_prefixes_and_drafts_change_no_answer(expected: Any) -> None:
    paged = {"paged": True, "page_size": 64, "num_pages": 6, "share_prefixes": True}
    one = Running(drafter=PromptLookup, **paged)
    try:
        head = "again and again and again " * 3
        prompts = [head + word for word in ("and again", "then not", "and")]
        for prompt in (*prompts, prompts[0]):
            assert one.complete(prompt, max_tokens=20) == expected(prompt, 20)
        pages = one.engine.batch.cache.pages
        assert pages is not None
        assert pages.index.unused > 0
    finally:
        one.stop()


def test_other_requests_go_on_while_a_long_text_becomes_tokens(expected: Any) -> None:
    """And the server ends in time while one does."""
    slow, begun = threading.Event(), threading.Event()
    known = characters()

    def encode(text: str) -> list[int]:
        if text == "long":
            begun.set()
            slow.wait(20)
        return known.encode(text)

    one = Running(tokenizer=replace(known, encode=encode))
    try:
        with ThreadPoolExecutor(2) as pool:
            long = pool.submit(one.complete, "long", max_tokens=4)
            assert begun.wait(20)
            assert one.complete("Hello", max_tokens=4) == expected("Hello", 4)
            slow.set()
            assert long.result() == expected("long", 4)
            slow.clear()
            begun.clear()
            cut_off = pool.submit(one.complete, "long")
            assert begun.wait(20)
            one.stop()
            with pytest.raises(openai.APIError):
                cut_off.result(2)
    finally:
        slow.set()
        one.server.should_exit = True


def test_a_client_that_leaves_before_the_first_event_frees_its_slot() -> None:
    """Its stream, which would free the slot at its end, never begins."""
    closed, begun = [], []

    async def events() -> AsyncIterator[str]:
        begun.append(True)
        yield "data: never\n\n"

    async def receive() -> dict[str, str]:
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        await asyncio.sleep(60)

    call: Any = SimpleNamespace(close=lambda: closed.append(True))
    response = app_module._Events(call, events())
    asyncio.run(response({"type": "http"}, receive, send))
    assert (closed, begun) == ([True], [])


class delayed:
    """Makes each step of the batch take a while, until an event is set."""

    def __init__(self, running: Running, until: threading.Event) -> None:
        self.patch, self.batch, self.until = pytest.MonkeyPatch(), running.engine.batch, until

    def __enter__(self) -> None:
        step = self.batch.step

        def slowly() -> Any:
            self.until.wait(0.05)
            return step()

        self.patch.setattr(self.batch, "step", slowly)

    def __exit__(self, *_: object) -> None:
        self.patch.undo()


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"prompt": "x" * LENGTH}, f"must be at most {LENGTH} here, got {LENGTH} "),
        ({"prompt": ""}, "at least one token"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ["a", ""]}, "at least one token"),
        ({"prompt": [1, 4711]}, "vocab_size-1=95, got values from 1 to 4711"),
        ({"prompt": [True]}, "prompt"),
        ({"prompt": [1 << 70]}, "integers with shape"),
        ({"max_tokens": 0}, "max_tokens: .* got 0"),
        ({"max_tokens": LENGTH}, "got 1 .* shorten the prompt, or ask for fewer tokens"),
        ({"max_tokens": "9"}, "max_tokens"),
        ({"temperature": -1}, "temperature: .* got -1"),
        ({"temperature": "hot"}, 'temperature: .* got "hot"'),
        ({"top_p": 0}, "top_p: .* got 0"),
        ({"n": 2}, "n: must be null or 1: no other value is computed here; got 2"),
        ({"logprobs": 1}, "logprobs: must be null"),
        ({"echo": True}, "echo: must be null or False"),
        ({"presence_penalty": 0.5}, "presence_penalty"),
        ({"stop": ["a"] * 5}, "stop"),
        ({"stop": ""}, "stop: must be texts; got an empty one"),
        ({"seed": -1}, "seed"),
        ({"extra_body": {"top_k": 1 << 70}}, "top_k must be below 2"),
        ({"stream_options": {"include_usage": True}}, "stream_options: needs stream=true"),
        ({"extra_body": {"min_p": 0.1}}, "min_p: is no parameter of this endpoint"),
    ],
)
def test_what_is_not_computed_is_refused_by_name(
    running: Running, given: dict[str, Any], said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as refused:
        running.client.completions.create(**{"prompt": "a", **GREEDY, **given})
    assert refused.value.type == "invalid_request_error"
    assert running.health()["running"] == 0


def test_other_refusals_have_their_own_status(running: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="must be 'tiny'; got 'gpt'"):
        running.client.completions.create(model="gpt", prompt="a")
    with pytest.raises(openai.BadRequestError, match="messages"):
        running.client.chat.completions.create(messages=[], **GREEDY)
    with pytest.raises(openai.BadRequestError, match="tools"):
        running.client.chat.completions.create(
            messages=[{"role": "user", "content": "a"}], tools=[{"type": "function"}], **GREEDY
        )
    with pytest.raises(openai.BadRequestError, match="max_completion_tokens; got both"):
        running.client.chat.completions.create(
            messages=[{"role": "user", "content": "a"}],
            max_tokens=3,
            max_completion_tokens=4,
            **GREEDY,
        )
    with pytest.raises(openai.BadRequestError) as refused:
        running.complete("x" * LENGTH)
    assert refused.value.code == "context_length_exceeded"
    for content in (
        b"{",
        b"[]",
        b'{"model": "tiny", "prompt": "half of one: \\ud83d"}',
        b'{"model": "tiny", "prompt": "a", "stop": "\\ud83d"}',
        b'{"model": "tiny", "prompt": "a", "temperature": NaN}',
        b'{"model": "tiny", "prompt": "a", "max_tokens": ' + b"9" * 5000 + b"}",
    ):
        url = f"{running.client.base_url}completions"
        headers = {"content-type": "application/json"}
        answer = running.client._client.post(url, content=content, headers=headers)
        assert answer.status_code == 400, content
        assert answer.json()["error"]["message"]
    half = b'{"model": "tiny", "prompt": "a", "\\ud83d": 1}'
    answer = running.client._client.post(url, content=half, headers=headers)
    assert r'"\ud83d": is no parameter' in answer.json()["error"]["message"]
    answer = running.client._client.post(url, content=b'{"model": "tiny",}', headers=headers)
    assert "the body must be JSON, and is not at character 1" in answer.json()["error"]["message"]
    url = f"{running.client.base_url}completions"
    answer = running.client._client.post(url, content=b'{"model": "tiny", "prompt": "a"}')
    assert answer.status_code == 400
    assert "sent with Content-Type: application/json" in answer.json()["error"]["message"]
    nested = b'{"model": "tiny", "prompt": ' + b"[" * 50_000
    for method, path, content, status in (
        ("POST", "completions", nested, 400),
        ("POST", "nowhere", b"{}", 404),
        ("GET", "completions", b"", 405),
    ):
        url = f"{running.client.base_url}{path}"
        headers = {"content-type": "application/json"}
        answer = running.client._client.request(method, url, content=content, headers=headers)
        assert (answer.status_code, set(answer.json())) == (status, {"error"})


def test_an_answer_is_as_long_as_the_pages_allow() -> None:
    one = Running(slots=1, queue=1, paged=True, page_size=64, num_pages=1)
    try:
        said = [{"role": "user", "content": "hi"}]
        answer = one.client.chat.completions.create(messages=said, **GREEDY)
        assert answer.usage.prompt_tokens + answer.usage.completion_tokens <= 64
        with pytest.raises(openai.BadRequestError, match="at most 64 here, got 7") as refused:
            one.complete("x" * 70)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.BadRequestError, match="at most 2 prompts here; got 3"):
            one.client.completions.create(prompt=["a"] * 3, **GREEDY)
    finally:
        one.stop()


def test_too_many_that_wait_are_refused_and_all_end_with_the_server() -> None:
    """A stream gets an event with the error, the others a status."""
    running, slow = Running(slots=1, queue=1), threading.Event()
    told: list[Any] = []

    def read() -> None:
        try:
            told.extend(running.client.completions.create(stream=True, **LONG))
        except openai.APIError as error:
            told.append(error)

    with delayed(running, slow), ThreadPoolExecutor(2) as pool:
        streaming = pool.submit(read)
        running.wait_for(running=1)
        waiting = pool.submit(running.complete, "next")
        running.wait_for(waiting=1)
        with pytest.raises(openai.RateLimitError, match="too many requests wait"):
            running.complete("one more")
        started = time.monotonic()
        running.stop()
        assert time.monotonic() - started < 2
        with pytest.raises(openai.InternalServerError, match="this request was not finished"):
            waiting.result(2)
        streaming.result(2)
    assert "this request was not finished" in str(told[-1])


class TestAddresses:
    @pytest.mark.parametrize("host", ["127.0.0.1", "256.0.0.1", "[::1]", "a" * 80])
    def test_one_that_cannot_be_had_is_refused_by_name(self, host: str) -> None:
        """In words, and before a model is loaded."""
        with bound("127.0.0.1", 0) as taken:
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(InvalidInputError, match=rf"serve: .* got {re.escape(host)} and "):
                bound(host, port)

    def test_two_servers_that_start_at_once(self, engine: Engine) -> None:
        with bound("127.0.0.1", 0) as first, bound(*first.getsockname()) as second:
            first.listen()
            with pytest.raises(InvalidInputError, match="must be a free address"):
                serve(make_app(engine, characters(), "tiny"), engine, second, print)

    def test_an_address_that_nobody_can_be_told_ends_the_server(self, engine: Engine) -> None:
        """Its output goes to a full disk, or to a pipe whose reader has left."""

        def ready(url: str) -> None:
            raise OSError(errno.ENOSPC, f"no room for {url}")

        with pytest.raises(OSError, match=r"no room for http://127\.0\.0\.1:\d+$"):
            serve(make_app(engine, characters(), "tiny"), engine, bound("127.0.0.1", 0), ready)
        assert engine.join(5)

    @pytest.fixture
    def engine(self, running: Running) -> Engine:
        return Engine(running.model, 4)


def seconds_to_end(number: signal.Signals) -> float:
    """How long the command takes to end while it streams, from the signal on."""
    command = [sys.executable, "-m", "nsagen", "serve", "--port", "0", "--json"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        said = json.loads(process.stdout.readline())
        client = openai.OpenAI(base_url=said["url"], api_key="none", max_retries=0)
        given = {"model": said["model"], "prompt": "go on", "max_tokens": 8000}
        stream = iter(client.completions.create(stream=True, **given))
        next(stream)
        asked = time.monotonic()
        process.send_signal(number)
        with pytest.raises(openai.APIError, match="this request was not finished"):
            list(stream)
        _, errors = process.communicate(timeout=60)
        took = time.monotonic() - asked
    finally:
        process.kill()
        process.wait()
    assert process.returncode == 0, errors
    assert "serve: ended" in errors
    assert "Traceback" not in errors
    return took


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP],
    ids=["SIGTERM", "SIGINT", "SIGHUP"],
)
def test_the_command_ends_in_time_when_it_is_asked_to(number: signal.Signals) -> None:
    """Where all cores are taken a process may wait for one: one of three tries counts."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip(f"{number.name} is ignored here, as under nohup, and so by what is started")
    assert any(seconds_to_end(number) < 2 for _ in range(3))
