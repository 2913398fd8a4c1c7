"""`nsagen bench serve`: the same load from a seed, and what its answers amount to."""

from __future__ import annotations

import itertools
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("openai")
pytest.importorskip("fastapi")

from nsagen.bench.serve import FEWEST, Answer, Load, planned, row_of, run_http
from nsagen.cli.app import main
from nsagen.core.errors import InvalidInputError, NsagenError
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
        Answer(0.0, [0.1, 0.2, 0.3], 3),
        Answer(1.0, [1.3, 1.5, 2.0], 3),
        Answer(2.0, error="refused"),
    ]
    row = row_of("here", load, answers)
    assert (row["failed"], row["new_tokens"], row["errors"]) == (1, 6, ["refused"])
    assert row["seconds"] == 2.0
    assert row["new_tokens_s"] == 3.0
    assert row["first_token_ms_p50"] == pytest.approx(200)
    assert row["first_token_ms_p99"] == pytest.approx(298)
    assert row["token_ms_p50"] == pytest.approx((100 + 350) / 2)


@pytest.mark.parametrize(
    "given", [{"prompt": (0, 4)}, {"prompt": (9, 4)}, {"new": (2, 1)}, {"rate": 0.0}]
)
def test_a_load_without_sense_is_refused(given: dict) -> None:
    with pytest.raises(InvalidInputError, match="bench serve: --"):
        Load(**{"requests": 1, "rate": 1.0, "prompt": (1, 2), "new": (1, 2), **given})


def measured(words: str, capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """The rows of a small load."""
    load = "bench serve --rates 50 --requests 3 --prompt 4,9 --new 2,4 --json --out out"
    with pytest.raises(SystemExit) as ended:
        main([*load.split(), *words.split()])
    said = capsys.readouterr()
    assert not ended.value.code, said.err
    content = json.loads(said.out)
    assert content == json.loads(Path("out/serve.json").read_text())
    rows = content["rows"]
    for row in rows:
        assert (row["failed"], row["requests"]) == (0, 3)
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
    rows = measured("--direct", capsys)
    assert [row["over"] for row in rows] == ["nsagen serve", "ContinuousBatch"]


@pytest.mark.slow  # it builds Transformers' own server
def test_the_command_measures_transformers_beside_it(
    here: None, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("transformers")
    rows = measured("--transformers", capsys)
    assert [row["over"] for row in rows] == ["nsagen serve", "Transformers, dense"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--rates fast", "--rates must be numbers; got 'fast'"),
        ("--prompt 9", "--prompt must be least and greatest; got '9'"),
        ("--url http://127.0.0.1:9 --direct", "--direct runs a model here"),
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
                run_http(f"http://127.0.0.1:{server.server_port}", [], lambda: None)
        finally:
            server.shutdown()
