"""Misses built by the real generator, from one small template, by several processes at once."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

SPACE = """
from nsagen.codegen.space import Choice, ScheduleSpace

SPACES = (
    ScheduleSpace(
        op="rope",
        pass_="forward",
        algorithm="negate",
        knobs=(Choice("num_warps", (1, 2), "warps"),),
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

CALL = """
import logging, sys
from pathlib import Path
import nsagen.core.paths
nsagen.core.paths.templates_dir = lambda: Path(sys.argv[1])
logging.basicConfig(level=logging.INFO, format="%(name)s: %(message)s")
import torch
from nsagen import ops
x = torch.randn(5, 2, 16)
tables = torch.ones(8, 8), torch.zeros(8, 8)
y = ops.rope(x, *tables, torch.zeros(5, dtype=torch.int32))
assert torch.equal(y, -x)
assert torch.equal(ops.rope(x, *tables, torch.zeros(5, dtype=torch.int32)), -x)
print("jinja2" in sys.modules)
"""


def call(tmp_path: Path) -> subprocess.Popen[str]:
    env = {**os.environ, "TRITON_INTERPRET": "1", "NSAGEN_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", CALL, str(tmp_path / "templates")]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, env=env, text=True, **pipes)


def test_processes_share_what_one_of_them_built(tmp_path: Path) -> None:
    folder = tmp_path / "templates" / "rope"
    folder.mkdir(parents=True)
    (folder / "space.py").write_text(textwrap.dedent(SPACE))
    (folder / "forward_negate.py.j2").write_text(TEMPLATE)

    for process in [call(tmp_path) for _ in range(3)]:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    (kernel,) = (tmp_path / "cache").rglob("*.py")
    assert kernel.parent.name == "cuda-80"
    assert "head_dim 16, 2 warps" in kernel.read_text()
    assert not list((tmp_path / "cache").rglob("*.tmp"))

    output, errors = (late := call(tmp_path)).communicate(timeout=120)
    assert late.returncode == 0, errors
    assert output.strip() == "False"  # a hit does not even import the generator
    assert "nsagen.runtime" not in errors

    (folder / "forward_negate.py.j2").write_text(TEMPLATE + "\n# edited\n")
    _, errors = (edited := call(tmp_path)).communicate(timeout=120)
    assert edited.returncode == 0, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("nsagen.runtime")]
    assert "rope forward f32_d16 for cuda:80 was in no package; built" in line
    assert len(list((tmp_path / "cache").rglob("*.py"))) == 2
