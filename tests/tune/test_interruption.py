"""kill -9 and Ctrl-C: at most what was running is lost, and the same command goes on."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.trial import TrialState

from nsagen.tune.storage import open_storage

MAIN = """
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in a shell's background
from nsagen.tune import session
session.MEASURER = "tests.tune.fake:FakeMeasurer"
session.COMPILER = "tests.tune.fake:FakeCompiler"
from nsagen.cli.app import main
main()
"""


ROOT = Path(__file__).resolve().parents[2]
SPEC = """
name: one
attention: {head_dim: 64, gqa_ratio: 4, dtype: float16, compress_type: avgpool, kernel_size: 8,
  kernel_stride: 4, block_size: 16, topk: 4, window_size: 32, with_pe: false}
targets: ["cuda:90"]
"""


class World:
    """A folder with a spec and a study, and the command line in processes of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.url = f"sqlite:///{folder / 'study.db'}"
        (folder / "one.yaml").write_text(SPEC)

    def behave(self, behaviours: dict[str, str]) -> None:
        (self.folder / "fake.json").write_text(json.dumps(behaviours))

    def start(self, trials: int, *more: str) -> subprocess.Popen[str]:
        """`nsagen tune` on the fake GPU; options in `more` override the usual ones."""
        command = [sys.executable, "-c", MAIN, "tune", str(self.folder / "one.yaml")]
        command += ["--op", "sliding_window_attention", "--pass", "forward", "--seqlens", "4096"]
        command += ["--trials", str(trials), "--study", self.url, "--jobs", "1", "--json"]
        command += ["--out", str(self.folder / "out"), *more]
        fake, cache = self.folder / "fake.json", self.folder / "cache"
        env = {"FAKE": str(fake), "NSAGEN_CACHE_DIR": str(cache), "PYTHONPATH": str(ROOT)}
        env["TMPDIR"] = str(self.folder)
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, text=True, env={**os.environ, **env}, **pipes)

    def run(self, trials: int, *more: str) -> list[dict[str, Any]]:
        """The records of a run that ends by itself."""
        output, errors = (process := self.start(trials, *more)).communicate(timeout=120)
        assert process.returncode == 0, errors
        return json.loads(output)["records"]


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def states(world: World) -> list[TrialState]:
    """Of every trial but those that keep no schedule: killed before their process signed them.

    They are taken back when they are old.
    """
    storage = open_storage(world.url)
    names = optuna.get_all_study_names(storage)
    found = [t for n in names for t in optuna.load_study(study_name=n, storage=storage).trials]
    return [t.state for t in found if t.state != TrialState.RUNNING or "owner" in t.user_attrs]


def wait_for(world: World, complete: int) -> None:
    end = time.monotonic() + 120
    while time.monotonic() < end:
        with contextlib.suppress(sqlite3.OperationalError):  # it is not there yet
            file = sqlite3.connect(f"file:{world.folder / 'study.db'}?mode=ro", uri=True)
            ((count,),) = file.execute("SELECT count(*) FROM trials WHERE state = 'COMPLETE'")
            if count >= complete:
                return
        time.sleep(0.1)
    raise AssertionError(f"{complete} trials were not completed in time")


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_stopped_search_goes_on(world: World, sign: signal.Signals) -> None:
    world.behave({"": "slow 0.1"})
    process = world.start(trials=500)
    wait_for(world, complete=3)
    process.send_signal(sign)
    _, errors = process.communicate(timeout=30)
    if sign == signal.SIGINT:
        assert process.returncode == 1
        assert errors.splitlines()[-1] == (
            "nsagen: tune: stopped; the same command goes on from here"
        )
        assert TrialState.RUNNING not in states(world)
        assert not _children_named(world.folder)
        return  # going on is the same as below
    if sign == signal.SIGTERM:
        assert (process.returncode, errors) == (128 + sign, "")
        assert TrialState.RUNNING not in states(world)
        assert not _children_named(world.folder)
        assert not list(world.folder.glob("nsagen-tune-*"))
        return
    assert not _children_named(world.folder)
    done = states(world).count(TrialState.COMPLETE)
    assert done >= 3

    world.behave({})
    (record,) = world.run(trials=done + 4)
    assert record["measured"] == done + 4
    after = states(world)
    assert after.count(TrialState.COMPLETE) == done + 4
    assert TrialState.RUNNING not in after


def test_nothing_that_a_kernel_does_ends_the_search(world: World) -> None:
    """A compiler that dies, crashes, illegal accesses, out of memory, wrong outputs.

    By the order of their turn: which schedules a search asks for depends on how fast others are.
    """
    faults = {3: "illegal", 5: "wrong", 7: "crash", 9: "memory"}
    world.behave({"compile@#4": "exit", **{f"#{turn}": fault for turn, fault in faults.items()}})
    (record,) = world.run(trials=14)
    assert record["measured"] == 14
    assert record["failed"] == 1 + len(faults)
    measured = (world.folder / "fake.json.measure").read_text().splitlines()
    assert len(measured) == 14 - 1
    knobs = [f"{name}={value}" for name, value in record["knobs"].items()]
    knobs.append(f" {record['algorithm']}(")
    (won,) = (turn for turn, text in enumerate(measured, 1) if all(k in text for k in knobs))
    assert won not in faults


def _children_named(folder: Path) -> list[str]:
    """Command lines of workers that still run with this test's folder in their environment."""
    time.sleep(0.3)
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            environment = (path / "environ").read_bytes()
            line = (path / "cmdline").read_bytes().decode().replace("\0", " ")
        except OSError:
            continue
        if str(folder).encode() in environment and "nsagen.core.worker" in line:
            found.append(line)
    return found
