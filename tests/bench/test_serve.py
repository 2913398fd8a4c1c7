"""`nsagen bench serve`: the same load from a seed, and what its answers amount to."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import json
import socket
import threading
from collections.abc import AsyncIterator, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from nsagen.bench import load as loads
from nsagen.bench import serve
from nsagen.bench.load import ARRIVING, FEWEST, Answer, Load, Planned, planned, row_of, warm_up
from nsagen.bench.plot import plot
from nsagen.bench.results import write_results
from nsagen.bench.serve import run_batch, run_http
from nsagen.cli import bench as commands
from nsagen.cli.app import main
from nsagen.cli.models import random_model
from nsagen.core.errors import InvalidInputError, NsagenError
from nsagen.model import ContinuousBatch, InferenceConfig
from nsagen.serve.text import CHARACTERS

LOAD = Load(requests=400, rate=5.0, prompt=(16, 512), new=(8, 64), seed=3)


def test_a_seed_gives_the_same_load() -> None:
    assert planned(LOAD) == planned(LOAD)
    assert planned(LOAD) != planned(Load(400, 5.0, (16, 512), (8, 64), seed=4))


def test_arrivals_are_a_poisson_process_of_the_rate() -> None:
    """Gaps are exponential: their mean and deviation are both 1 / rate."""
    times = [one.at for one in planned(LOAD)]
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    deviation = (sum((gap - mean) ** 2 for gap in gaps) / len(gaps)) ** 0.5
    assert times[0] == 0
    assert mean == pytest.approx(0.2, rel=0.15)
    assert deviation == pytest.approx(0.2, rel=0.2)


def test_lengths_fill_their_ranges() -> None:
    requests = planned(LOAD)
    lengths = [len(one.prompt) for one in requests]
    assert 16 <= min(lengths) < 20
    assert 400 < max(lengths) <= 512
    assert sum(length < 91 for length in lengths) == pytest.approx(200, abs=50)  # their middle
    assert {8, 64} <= {one.new for one in requests} <= set(range(8, 65))
    assert all(0 <= token < FEWEST for token in requests[0].prompt)
    assert len(CHARACTERS) == FEWEST


def test_a_row_counts_from_when_each_request_was_sent() -> None:
    load = Load(3, 1.0, (1, 1), (3, 3))
    answers = [
        Answer(0.0, [0.1, 0.2, 0.3], 3, ended=True),
        Answer(1.0, [1.3, 1.5, 2.0], 3, ended=True),
        Answer(2.0, error="refused"),
    ]
    row = row_of("here", load, answers)
    assert (row["failed"], row["new_tokens"], row["errors"]) == (1, 6, ["refused"])
    assert row["seconds"] == 2.0
    assert row["new_tokens_s"] == 3.0
    assert row["first_token_ms_p50"] == pytest.approx(200)
    assert row["first_token_ms_p99"] == pytest.approx(298)
    assert row["token_ms_p50"] == pytest.approx((100 + 350) / 2)


def test_what_a_limit_cuts_off_counts_with_what_came() -> None:
    """Of its tokens, and of its time: it has waited that long at least."""
    load = Load(9, 1.0, (1, 1), (3, 3), limit=4.0)
    answers = [
        Answer(0.0, [0.1, 0.3, 0.5], 3, ended=True),
        Answer(1.0, [3.0, 3.5], 2),
        Answer(2.0),
    ]
    row = row_of("here", load, answers)
    assert (row["requests"], row["failed"], row["unfinished"]) == (3, 0, 2)
    assert (row["seconds"], row["new_tokens"], row["new_tokens_s"]) == (4.0, 5, 1.25)
    assert row["first_token_ms_p50"] == pytest.approx(2000)
    assert row["first_token_ms_p99"] == pytest.approx(2000)
    assert row["token_ms_p50"] == pytest.approx((200 + 500) / 2)


def test_requests_arrive_early_in_a_limit() -> None:
    limited = planned(Load(400, 5.0, (16, 512), (8, 64), seed=3, limit=10.0))
    assert limited == planned(LOAD)[: len(limited)]
    assert 20 < len(limited) < 45
    assert limited[-1].at <= ARRIVING * 10


def test_warming_up_uses_each_number_of_slots_and_the_longest_prompt() -> None:
    requests, *_ = warm_up(LOAD, [], 4)
    assert [one.new for one in requests] == [2, 4, 6, 8] + [2] * 5
    assert [len(one.prompt) for one in requests[:5]] == [16] * 4 + [512]
    assert len({len(one.prompt) for one in requests[5:]}) == 4
    (short,) = warm_up(Load(1, 1.0, (4, 9), (1, 2)), [], 16)
    assert max(len(one.prompt) + one.new for one in short) == 11


def test_warming_up_ends_with_prompts_of_the_load_one_by_one() -> None:
    """A pass over one prompt has other shapes than one over several."""
    sent = planned(LOAD)
    _, *later = warm_up(LOAD, sent, 4)
    prompts = [one.prompt for (one,) in later]
    assert all(prompt in [one.prompt for one in sent] for prompt in prompts)
    assert sorted(len(one).bit_length() for one in prompts) == [5, 6, 7, 8, 9]


def test_loads_of_one_seed_begin_with_the_same_requests() -> None:
    """So the prompts of the longest are those of all."""
    slow, fast = (planned(dataclasses.replace(LOAD, rate=rate, limit=9.0)) for rate in (1, 4))
    assert [one.prompt for one in slow] == [one.prompt for one in fast][: len(slow)]


class Clock:
    """In place of the time: each look at it takes a tenth of a second."""

    def __init__(self) -> None:
        self.now = 0.0

    def perf_counter(self) -> float:
        self.now += 0.1
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


def test_a_batch_is_cut_off_at_the_limit_and_empty_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(serve, "time", clock := Clock())
    limits = InferenceConfig(2, 64)
    batch = ContinuousBatch(random_model("serve", limits, 0, torch.device("cpu"), None, None))
    requests = [Planned(0.0, [1, 2], 3)] * 4 + [Planned(60.0, [1], 2)]
    done: list[None] = []
    answers = run_batch(batch, requests, 20.0, lambda: done.append(None))
    assert 20 < clock.now < 21
    assert [(one.count, one.ended) for one in answers] == [(3, True)] * 4 + [(0, False)]
    assert len(done) == 4
    assert (batch.idle, batch.free_slots) == (True, 2)
    (cut,) = run_batch(batch, requests[:1], 0.05, lambda: None)
    assert (cut.count, cut.ended, cut.error) == (0, False, "")


def test_a_server_is_cut_off_at_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    left: list[str] = []

    async def tokens(count: int) -> AsyncIterator[Any]:
        try:
            for _ in range(count):
                yield SimpleNamespace(choices=[None], usage=None)
                await asyncio.sleep(0.02)
        finally:
            left.append("a stream")

    class Client:
        def __init__(self) -> None:
            self.completions = SimpleNamespace(create=self.create)
            self.models = SimpleNamespace(list=self.list)

        async def __aenter__(self) -> Client:
            return self

        async def __aexit__(self, *_: object) -> None:
            left.append("the client")

        async def list(self) -> Any:
            return SimpleNamespace(data=[SimpleNamespace(id="one")])

        async def create(self, max_tokens: int, **given: Any) -> AsyncIterator[Any]:
            # As a part of `prompt`, the client would look at each token for tens of microseconds.
            assert (given["prompt"], given["extra_body"]) == ("", {"prompt": [1]})
            return tokens(max_tokens)

    monkeypatch.setattr(serve, "_client", lambda url: Client())
    monkeypatch.setattr(serve, "SETTLING_S", 0.0)
    requests = [Planned(0.0, [1], 2), Planned(0.0, [1], 1000), Planned(60.0, [1], 2)]
    first, second, third = run_http("http://here", requests, 0.3, lambda: None)
    assert (first.count, first.ended) == (2, True)
    assert 2 < second.count < 100
    assert (third.count, second.ended, third.ended) == (0, False, False)
    assert left == ["a stream", "a stream", "the client"]


def test_servers_are_drawn_over_their_rates(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    rows = [
        row_of(over, Load(1, rate, (1, 1), (3, 3)), [Answer(0.0, [0.1, 0.2, 0.4], 3, True)])
        for over in ("nsagen serve", "Transformers, dense")
        for rate in (1.0, 0.5)
    ]
    figure = plot(write_results("serve", rows, tmp_path))
    assert figure == tmp_path / "serve.png"
    assert figure.read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    "given", [{"prompt": (0, 4)}, {"prompt": (9, 4)}, {"new": (2, 1)}, {"rate": 0.0}]
)
def test_a_load_without_sense_is_refused(given: dict) -> None:
    with pytest.raises(InvalidInputError, match="bench serve: --"):
        Load(**{"requests": 1, "rate": 1.0, "prompt": (1, 2), "new": (1, 2), **given})


def measured(words: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The rows of a small load."""
    load = "bench serve --rates 50 --requests 3 --prompt 4,9 --new 2,4 "
    load += "--max-batch-size 2 --json --out out"
    with pytest.raises(SystemExit) as ended:
        main([*load.split(), *words.split()])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    content = json.loads(said.out)
    assert content == json.loads(Path("out/serve.json").read_text())
    rows = content["rows"]
    for row in rows:
        assert (row["failed"], row["unfinished"], row["requests"]) == (0, 0, 3)
        assert 0 < row["first_token_ms_p50"] <= row["first_token_ms_p99"]
        assert 0 < row["token_ms_p50"] <= row["token_ms_p99"]
        assert row["new_tokens"] == rows[0]["new_tokens"] > 0
    return rows


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def test_the_command_measures_a_server_and_the_batch_itself(
    here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = measured("--direct --seconds 60 --kernels tiny", capsys)
    assert [row["over"] for row in rows] == ["nsagen serve", "ContinuousBatch"]


def test_servers_share_the_seconds_of_all(
    here: None, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow start leaves the first less, and the second has what the first did not take.

    Warming up leaves the rows half.
    """
    now, limits = [100.0], []

    def run(sent: list[Planned], limit: float | None, done: Any) -> list[Answer]:
        limits.append(limit)
        now[0] += min(4.0, limit or 4.0)
        return [Answer(0.0, [1.0, 2.0], 2, ended=True) for _ in sent]

    @contextlib.contextmanager
    def starting(*given: Any) -> Iterator[Any]:
        now[0] += 3.0
        yield run

    monkeypatch.setattr(loads, "time", SimpleNamespace(monotonic=lambda: now[0]))
    monkeypatch.setattr(commands, "_server", starting)
    monkeypatch.setattr(commands, "_batch", starting)
    words = "bench serve --rates 1,2 --requests 2 --seconds 9 --total-seconds 20 --direct --json"
    with pytest.raises(SystemExit):
        main([*words.split(), "--out", "out"])
    said = capsys.readouterr()
    rows = json.loads(said.out)["rows"]
    # To warm up, and of a row; then of the second server.
    assert limits == [3.5, 3.5, 3.5, 3.5]
    assert [(row["over"], row["rate"]) for row in rows] == [
        ("nsagen serve", 1),
        ("ContinuousBatch", 1),
    ]
    assert {(row["start_s"], row["warm_up_s"], row["limit"]) for row in rows} == {(3.0, 3.5, 3.5)}
    assert said.err.count("at 2 requests a second: no time is left of --total-seconds") == 2
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", "--total-seconds", "2", "--json", "--out", "out"])
    assert ended.value.code == 1
    assert "--total-seconds must leave time for a row; got 2" in capsys.readouterr().err


def test_the_first_server_may_compile_while_the_rows_of_all_still_fit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(loads, "time", SimpleNamespace(monotonic=lambda: now[0]))
    clock = loads.Clock(195.0, servers=3, rows=24.0)
    clock.begin()
    assert clock.left == 195 - 2 * 24
    now[0] = 67.0  # it started and warmed up
    assert (clock.left, clock.until(clock.rows_begin())) == (80, 80 - 24)
    now[0] = 91.0
    clock.begin()
    assert clock.left == 195 - 24 - 91
    now[0] = 150.0
    clock.begin()
    assert (clock.left, clock.until(clock.rows_begin())) == (45, 22.5)  # half at least


@pytest.mark.slow  # it builds Transformers' own server
def test_the_command_measures_transformers_beside_it(
    here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    transformers = pytest.importorskip("transformers")
    rows = measured("--transformers", capsys)
    dense = f"Transformers {transformers.__version__}, dense"
    assert [row["over"] for row in rows] == ["nsagen serve", dense]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rates fast", "--rates must be numbers; got 'fast'"),
        ("--prompt 9", "--prompt must be least and greatest; got '9'"),
        ("--url http://127.0.0.1:9 --direct", "--direct runs a model here"),
        ("--url http://127.0.0.1:9 --kernels tiny", "--kernels runs a model here"),
        ("--url http://127.0.0.1:9 --sizes guide", "--sizes runs a model here"),
        ("--attention dense --kernels tiny", "--kernels is for native sparse attention"),
        ("--url http://[::1/v1", "--url must be a server's address; got 'http://[::1/v1': Invalid"),
        ("--url http://127.0.0.1:x", "--url must be a server's address; got 'http://127.0.0.1:x'"),
        ("--url localhost:8000", "got 'localhost:8000': no http:// or https:// with a host"),
    ],
)
def test_wrong_usage_exits_with_2(
    words: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "serve", *words.split()])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_server_that_does_not_answer_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(SystemExit) as ended:
            main(["bench", "serve", "--url", url])
    assert ended.value.code == 1
    said = f"bench serve: a server must answer at {url}/v1/models; it said: Connection error."
    assert said in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", "serve", "--url", f"{url}/v1"])
    assert said in capsys.readouterr().err, "as nsagen serve --json says it"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('{"object": "list", "data": []}', "must serve a model; it lists none"),
        ('{"detail": "hello"}', "must serve a model; it lists none"),
        ("<html>", "a server must answer at"),
    ],
)
def test_a_server_of_something_else_is_refused(body: str, said: str) -> None:
    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json" if body[0] == "{" else "text/html")
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Page) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            with pytest.raises(NsagenError, match=said):
                run_http(f"http://127.0.0.1:{server.server_port}", [], None, lambda: None)
        finally:
            server.shutdown()
