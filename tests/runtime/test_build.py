"""Misses built by the real generator, from one small template, by several processes at once."""

import itertools
import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

SPACE = """
from nsagen.codegen.space import Knob, ScheduleSpace

SPACES = (
    ScheduleSpace(
        op="rope",
        pass_="forward",
        algorithm="negate",
        knobs=(Knob("num_warps", (1, 2), "warps"),),
        rules=(),
        derive=lambda workload, schedule: {},
        shared_memory=lambda workload, schedule: 0,
        default=lambda workload, target: {"num_warps": 2},
    ),
)
"""

TEMPLATE = '''{{ header }}
"""{{ kernel_name }}: y = -x, head_dim {{ head_dim }}, {{ num_warps }} warps."""


def launch(x, cos, sin, positions, y):
    y.copy_(-x)
'''

MAIN = """
import logging, os, sys, traceback
from pathlib import Path
import nsagen.core.paths
nsagen.core.paths.templates_dir = lambda: Path(sys.argv[1])
import torch
from nsagen import ops

def call():
    logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
    x = torch.randn(5, 2, 16)
    tables = torch.ones(8, 8), torch.zeros(8, 8)
    y = ops.rope(x, *tables, torch.zeros(5, dtype=torch.int32))
    assert torch.equal(y, -x)
    assert torch.equal(ops.rope(x, *tables, torch.zeros(5, dtype=torch.int32)), -x)
    print("imported jinja2:", "jinja2" in sys.modules)

def start(output):
    if child := os.fork():
        return child
    code = 1
    try:
        sys.stdout = sys.stderr = open(output, "w", buffering=1)
        call()
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(code)

for line in sys.stdin:
    children = [start(output) for output in line.split()]
    print(*[os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children], flush=True)
"""


class Callers:
    """Processes that call an op, forked from one that has imported torch and called nothing."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._started = folder, itertools.count()
        env = {**os.environ, "TRITON_INTERPRET": "1", "NSAGEN_CACHE_DIR": str(folder / "cache")}
        command = [sys.executable, "-c", MAIN, str(folder / "templates")]
        pipes: Any = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self._parent = subprocess.Popen(command, env=env, text=True, **pipes)

    def call(self, at_once: int = 1) -> list[str]:
        """Call once in each of some new processes; what they print and log."""
        outputs = [self._folder / f"{next(self._started)}.txt" for _ in range(at_once)]
        print(*outputs, file=self._parent.stdin, flush=True)
        codes = self._parent.stdout.readline().split()
        texts = [output.read_text() for output in outputs]
        assert codes == ["0"] * at_once, texts
        return texts

    def end(self) -> None:
        """Close the parent's input: it ends."""
        self._parent.communicate(timeout=120)
        assert self._parent.returncode == 0


@pytest.fixture
def callers(tmp_path: Path) -> Iterator[Callers]:
    found = Callers(tmp_path)
    yield found
    found.end()


def test_processes_share_what_one_of_them_built(callers: Callers, tmp_path: Path) -> None:
    folder = tmp_path / "templates" / "rope"
    folder.mkdir(parents=True)
    (folder / "space.py").write_text(textwrap.dedent(SPACE))
    (folder / "forward_negate.py.j2").write_text(TEMPLATE)

    callers.call(at_once=3)
    (kernel,) = (tmp_path / "cache").rglob("*.py")
    assert kernel.parent.name.startswith("cuda-80-triton-")
    assert "head_dim 16, 2 warps" in kernel.read_text()
    assert not list((tmp_path / "cache").rglob("*.tmp"))

    (late,) = callers.call()
    assert late == "imported jinja2: False\n"  # a hit does not even import the generator

    (folder / "forward_negate.py.j2").write_text(TEMPLATE + "\n# edited\n")
    (edited,) = callers.call()
    (line,) = [line for line in edited.splitlines() if line.startswith("nsagen.runtime")]
    assert "rope forward f32_d16 for cuda:80 was in no package; built" in line
    assert len(list((tmp_path / "cache").rglob("*.py"))) == 2
