"""Recordings, and searches that replay them."""

from __future__ import annotations

import gzip
import json
import math
import os
from pathlib import Path

import optuna
import pytest

from benchmarks.score_samplers import random_score, score
from nsagen.cases.sizes import Sizes
from nsagen.core.bucket import Bucket
from nsagen.core.errors import TuneError
from nsagen.core.workload import Schedule, Workload
from nsagen.tune import session
from nsagen.tune.outcome import Outcome
from nsagen.tune.recording import Recording, check_free, load_recording
from nsagen.tune.sampler import DEFAULT_SAMPLER, SAMPLERS
from nsagen.tune.search import Budget
from nsagen.tune.selection import Selection
from nsagen.tune.session import Places
from nsagen.tune.settings import Settings
from nsagen.tune.task import Task
from tests.tune.conftest import Silent, World

ROOT = Path(__file__).resolve().parents[2]
RECORDINGS = sorted((ROOT / "benchmarks" / "recordings").glob("*.jsonl.gz"))


def bowl(size: int = 12, good: int = 5) -> Recording:
    """A recording of a smooth bowl over two knobs, where one corner fails."""
    workload = Workload.of("gated_sum", "forward", dtype="float16", v_head_dim=32)
    task = Task(workload, Bucket(), Sizes((4096,)), Sizes((64,)))
    outcomes = {}
    for x in range(size):
        for y in range(size):
            ms = 1 + 0.02 * ((x - good) ** 2 + (y - good) ** 2)
            failed = x + y > 2 * size - 6
            repeats = (ms, 1.001 * ms, 1.002 * ms)
            outcome = Outcome(reason="crash") if failed else Outcome(ms, repeats=repeats)
            outcomes[Schedule.of("a", {"x": x, "y": y})] = outcome
    return Recording(task, Schedule.of("a", {"x": 0, "y": 0}), True, {}, outcomes, {})


def record(world: World, path: Path, **settings: float) -> session.Result:
    return session.record(
        str(world.spec),
        Selection(seqlens=(4096,)),
        path,
        Settings(**settings),  # type: ignore[arg-type]
        Places(jobs=1),
        Silent(),
    )


def test_a_recording_has_every_schedule_failures_included(world: World, tmp_path: Path) -> None:
    world.behave({"num_stages=4": "illegal", "compile@block=32,": "memory"})
    path = tmp_path / "all.jsonl.gz"
    record(world, path)
    found = load_recording(path)
    failed = {s: o.reason for s, o in found.outcomes.items() if not o.ok}
    assert any(reason.startswith("compile: MemoryError") for reason in failed.values())
    assert any(reason.startswith("RuntimeError: CUDA error") for reason in failed.values())
    assert all(s.num_stages == 4 or s.block == 32 for s in failed)
    assert not found.synthetic
    assert found.facts["device"] == "nvidia-h200"
    assert found.default in found.outcomes
    assert len(found.refined) == 10
    assert all(len(o.repeats) == 3 for o in found.outcomes.values() if o.ok)
    assert not path.with_suffix("").exists()


def test_a_stopped_recording_goes_on(world: World, tmp_path: Path) -> None:
    path = tmp_path / "some.jsonl"
    record(world, path, seconds=1e-9)
    first = load_recording(path)
    assert not first.outcomes
    with path.open("a") as file:
        file.write('{"algorithm": "elementw')  # a crash in the midst of a line
    record(world, path)
    whole = load_recording(path)
    assert len(whole.outcomes) == len(set(whole.outcomes)) == 72
    assert len(path.read_text().splitlines()) == 74


def test_a_finished_recording_goes_on_and_loses_nothing(world: World, tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl.gz"
    record(world, path)
    whole = load_recording(path)
    lines = gzip.decompress(path.read_bytes()).splitlines(keepends=True)
    path.write_bytes(gzip.compress(b"".join([*lines[:50], lines[-1]])))  # its time was up
    record(world, path, seconds=1e-9)
    part = load_recording(path)
    assert part.outcomes.items() == dict(list(whole.outcomes.items())[:49]).items()
    record(world, path)
    assert load_recording(path).outcomes.keys() == whole.outcomes.keys()


@pytest.mark.parametrize(
    ("was", "now", "text"),
    [
        ('"fingerprint": "', '"fingerprint": "0', "72 outcomes of kernels that have changed"),
        ('"device": "nvidia-h200"', '"device": "nvidia-h100"', "got one of nvidia-h100"),
    ],
)
@pytest.mark.parametrize("name", ["all.jsonl", "all.jsonl.gz"])
def test_a_finished_recording_of_something_else_is_refused(
    world: World, tmp_path: Path, name: str, was: str, now: str, text: str
) -> None:
    path = tmp_path / name
    record(world, path)
    data = path.read_bytes()
    lines = (gzip.decompress(data) if path.suffix == ".gz" else data).decode().replace(was, now)
    path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    before = path.read_bytes()
    with pytest.raises(TuneError, match=text):
        record(world, path)
    assert path.read_bytes() == before
    assert path == tmp_path / "all.jsonl" or not path.with_suffix("").exists()


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{}", b"not json", b"[" * 100_000, gzip.compress(b'{"format": 99}', mtime=0)),
        b"\x1f\x8b broken",
        b"\x1f\x8b\x08" + b"\x00" * 7 + b"\xff" * 9,  # whole in front, damaged behind
    ],
)
def test_what_is_no_recording_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / ("x.jsonl.gz" if content[:2] == b"\x1f\x8b" else "x.jsonl")
    path.write_bytes(content)
    with pytest.raises(TuneError, match="must be a recording"):
        load_recording(path)


def test_what_another_version_says_in_a_recording_is_told(
    world: World, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "all.jsonl"
    record(world, path, seconds=0.001)
    whole = load_recording(path)
    assert not caplog.messages
    head, *rows = path.read_text().splitlines()
    rows = [row.replace('{"algorithm"', '{"joules": 3, "algorithm"', 1) for row in rows]
    path.write_text("\n".join([head.replace("{", '{"clock": 1980, ', 1), *rows]) + "\n")
    assert load_recording(path) == whole
    expected = f"{path}: says clock, joules, which is not understood here; it is not used"
    assert caplog.messages == [expected]


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.stem)
def test_shipped_recordings_are_understood_whole(
    path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    load_recording(path)
    assert not caplog.messages


def test_a_simulated_search_tells_how_good_its_choice_is(world: World, tmp_path: Path) -> None:
    path = tmp_path / "all.jsonl.gz"
    record(world, path)
    result = session.simulate(path, Settings(budget=Budget(30)), Places(), Silent())
    (found,) = result.records
    optimum = load_recording(path).optimum_ms
    assert found.ms <= 1.05 * optimum
    assert result.notes[0].startswith(f"the recording's optimum is {optimum:.4g} ms; what was")


@pytest.mark.parametrize(
    "sampler",
    [pytest.param(s, marks=[pytest.mark.slow] if s == "optuna-gp" else []) for s in SAMPLERS],
)
def test_a_resumed_search_makes_the_choices_of_an_uninterrupted_one(sampler: str) -> None:
    from nsagen.tune.encoding import Encoding
    from nsagen.tune.search import Search
    from nsagen.tune.simulate import ReplayEvaluator

    recording = bowl()

    def tried(*parts: int) -> list[Schedule]:
        storage, count = optuna.storages.InMemoryStorage(), 0
        for part in parts:
            encoding = Encoding(tuple(recording.outcomes))
            first = [recording.default]
            search = Search(
                recording.task, encoding, storage, scope="", first=first, sampler=sampler
            )
            evaluator = ReplayEvaluator(recording)
            for _ in range(part):
                candidate = search.ask()
                assert candidate is not None
                search.tell(candidate, evaluator.finish(recording.task, candidate.schedule, None))
                count += 1
        return [m.schedule for m in search.measured()]

    straight = tried(24)
    assert tried(9, 8, 7) == straight
    assert len(set(straight)) == 24
    assert straight[0] == recording.default


def test_random_search_in_closed_form() -> None:
    recording = bowl(size=12)
    good = sum(recording.true_ms(s) <= 1.02 * recording.optimum_ms for s in recording.outcomes)
    assert good == 5
    found = random_score(recording, budget=1)
    assert found.hit_rate == pytest.approx(good / 144)
    enough = random_score(recording, budget=144)
    assert enough.hit_rate == 1.0
    n = int(enough.evaluations[1])
    miss = math.comb(139, n) / math.comb(144, n)
    assert miss <= 0.5 < math.comb(139, n - 1) / math.comb(144, n - 1)


def test_the_default_sampler_halves_the_evaluations_of_random_search() -> None:
    recording = bowl()
    found = score(recording, DEFAULT_SAMPLER, seeds=3, budget=60)
    assert found.hit_rate == 1.0
    assert found.evaluations[1] <= 0.6 * random_score(recording).evaluations[1]


@pytest.mark.parametrize("path", RECORDINGS, ids=lambda path: path.name)
def test_shipped_recordings_are_whole_and_honest(path: Path) -> None:
    recording = load_recording(path)
    assert recording.synthetic == path.name.startswith("synthetic_")
    assert recording.default in recording.outcomes
    if recording.synthetic:  # on a GPU nothing need fail
        assert {o.ok for o in recording.outcomes.values()} == {True, False}
    assert min(recording.refined.values()) == recording.optimum_ms
    assert min(map(recording.true_ms, recording.outcomes)) == recording.optimum_ms
    head = json.loads(gzip.decompress(path.read_bytes()).splitlines()[0])
    assert head["format"] == 1


@pytest.mark.parametrize("where", ["x.jsonl", "x.jsonl.gz"])
@pytest.mark.parametrize(
    "content",
    [b'{"version": 3, "mine": true}\n', b"notes\n", b"[1, 2]\n", b"{\n}\n", b"\xff\xfe\0"],
)
def test_a_file_of_the_users_beside_a_recording_is_refused_before_any_work(
    tmp_path: Path, where: str, content: bytes
) -> None:
    path = tmp_path / where
    path.write_bytes(content)
    with pytest.raises(TuneError, match="must be free, or a recording to go on with"):
        check_free(tmp_path / "x.jsonl.gz", bowl().task)
    assert path.read_bytes() == content


def test_a_pipe_is_no_recording(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "x.jsonl")
    with pytest.raises(TuneError, match="it is not a regular file"):
        check_free(tmp_path / "x.jsonl", bowl().task)


def test_a_recording_of_another_task_is_refused(world: World, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl.gz"
    record(world, path, seconds=1e-9)
    before = path.read_bytes()
    with pytest.raises(TuneError, match=r"must be free, or a recording of .*; got one of "):
        check_free(path, bowl().task)
    assert path.read_bytes() == before


@pytest.mark.parametrize("values", [None, 3, [], {}, {"ms": "fast"}, {"ms": float("nan")}])
def test_an_outcome_that_cannot_be_read_is_none(values: object) -> None:
    assert Outcome.of_trial({"schedule": "a()", "outcome": values}) is None
    assert Outcome.of_trial({"schedule": "a()"}) is None
    assert Outcome.of_trial({"outcome": {"ms": 1.0}}) is None


def test_what_a_newer_version_adds_to_an_outcome_is_passed_over() -> None:
    newer = {**Outcome(2.0).as_json(), "joules": 1.0}
    assert Outcome.of_trial({"schedule": "a()", "outcome": newer}) == Outcome(2.0)
