"""A GPU that does not exist: servers for the worker protocol whose kernels behave as a test asks.

The environment variable FAKE names a JSON file {key: behaviour}; a schedule whose text contains
the key behaves so when it is measured, or compiled or certified if the key begins with
`compile@` or `certify@`. The key `#3` stands for the third schedule that gets there, whichever it
is, and each time it does. All others take a time that follows from their knobs.
"""

from __future__ import annotations

import errno
import json
import os
import random
import re
import signal
import time
from collections.abc import Sequence
from pathlib import Path

from nsagen.codegen.fingerprint import source_fingerprint
from nsagen.codegen.template import render
from nsagen.core.files import replace_file
from nsagen.core.workload import Schedule, Workload
from nsagen.tune.compiler import Compiled
from nsagen.tune.outcome import Timing, WrongOutputError
from nsagen.tune.task import Task

FACTS = {
    "device": "nvidia-h200",
    "name": "NVIDIA H200",
    "target": "cuda:90",
    "driver": "570.1",
    "triton": "3.6.0",
    "torch": "2.11.0",
}


def fake_ms(text: str) -> float:
    """A smooth time with one best place: 64 rows, 4 warps, 3 stages or as near as can be."""
    ms = 1.0
    for name, best in (("block", 64), ("num_warps", 4), ("num_stages", 3)):
        for value in re.findall(rf"{name}\w*=(\d+)", text):
            ms += abs((int(value)).bit_length() - best.bit_length()) * 0.1
    return ms


def _nth(text: str, stage: str) -> str:
    """Which schedule of a stage this is, in the order of their first time there: `#1`, `#2`, ..."""
    path = Path(f"{os.environ['FAKE']}.{stage or 'measure'}")
    seen = path.read_text().splitlines() if path.exists() else []
    if text not in seen:
        seen.append(text)
        path.write_text("\n".join(seen))
    return f"#{seen.index(text) + 1}"


def _misbehave(text: str, stage: str = "") -> None:
    behaviours = json.loads(Path(os.environ["FAKE"]).read_text()) if "FAKE" in os.environ else {}
    for key, behaviour in behaviours.items():
        of, _, rest = key.rpartition("@")
        if of != stage:
            continue
        if rest != _nth(text, stage) if rest.startswith("#") else rest not in text:
            continue
        if behaviour == "crash":
            os.kill(os.getpid(), signal.SIGSEGV)
        if behaviour == "exit":
            print("ptxas fatal: out of luck", flush=True)
            os._exit(3)
        if behaviour == "hang":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            time.sleep(1e6)
        if behaviour == "illegal":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        if behaviour == "memory":
            raise MemoryError("out of memory: tried to allocate 80 GiB")
        if behaviour == "full":
            raise OSError(errno.ENOSPC, "No space left on device")
        if behaviour == "wrong":
            raise WrongOutputError("o: relative error 3.0e-01 (limit 1e-02)")
        if behaviour.startswith("slow "):
            time.sleep(float(behaviour.split()[1]))


class FakeMeasurer:
    """Answers as GpuMeasurer does."""

    def __init__(self) -> None:
        self._broken = False
        self._open: Task | None = None

    def is_broken_by(self, error: Exception) -> bool:
        return "CUDA error" in str(error)

    def identify(self) -> dict[str, str]:
        return FACTS

    def open(self, task: Task) -> None:
        assert not self._broken
        self._open = task

    def measure(self, path: Path, best_ms: float | None) -> Timing:
        assert self._open is not None, "a task must be open"
        text = path.read_text().splitlines()[0]
        _misbehave(text)
        ms, noise = fake_ms(text), random.Random(text)
        return Timing.of([ms * (1 + 0.002 * noise.random()) for _ in range(9)], 1e-3)

    def certify(self, path: Path) -> float:
        assert self._open is not None
        _misbehave(path.read_text().splitlines()[0], "certify")
        return 1e-3

    def compare(self, paths: Sequence[Path], rounds: int) -> list[list[float]]:
        texts = [path.read_text().splitlines()[0] for path in paths]
        return [[fake_ms(text) * (1 + 0.001 * i) for i in range(rounds)] for text in texts]


class FakeCompiler:
    """Answers as Compiler does, with resources that fit any target."""

    def is_broken_by(self, error: Exception) -> bool:
        return False

    def compile(
        self, path: Path, workload: Workload, schedule: Schedule, target: str, sizes: object
    ) -> Compiled:
        source = render(workload, schedule, header=f"# {workload}: {schedule}")
        replace_file(path, source)
        text = source.splitlines()[0]
        _misbehave(text, "compile")
        kernel = {
            "kernel": path.stem,
            "target": target,
            "registers": 64,
            "spill_bytes": 0,
            "shared_bytes": 1024,
            "matrix": "wgmma",
            "programs": 1024,
            "num_warps": 4,
            "num_stages": 3,
        }
        return Compiled((kernel,), path.stem, source_fingerprint(source, path.stem))
