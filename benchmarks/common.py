"""What the benchmarks share: the paper's shape, timing, and results with their provenance."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton
import triton.testing

from nsagen import __version__
from nsagen.workload import STATIC_PARAMS, Workload

# The shape that public NSA implementations are measured on: 64 query heads over 4 heads.
SHAPE: dict[str, Any] = {
    "compress_type": "avgpool",
    "head_dim": 128,
    "v_head_dim": 128,
    "gqa_ratio": 16,
    "kernel_size": 32,
    "kernel_stride": 16,
    "with_pe": False,
    "block_size": 64,
    "topk": 16,
    "init_blocks": 1,
    "local_blocks": 2,
    "window_size": 512,
}
KV_HEADS = 4


def workload_of(op: str, pass_: str, dtype: str = "bfloat16", **changes: Any) -> Workload:
    """The workload of an op on `SHAPE`, with some parameters changed."""
    shape = {**SHAPE, **changes}
    names = STATIC_PARAMS[op, pass_]
    return Workload.of(op, pass_, dtype=dtype, **{name: shape[name] for name in names})


def target_name() -> str:
    """This GPU's architecture as targets are written, e.g. `cuda:90`."""
    major, minor = torch.cuda.get_device_capability()
    return f"cuda:{major}{minor}"


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU, with a cold L2 cache."""
    return float(triton.testing.do_bench(call, warmup=25, rep=150, return_mode="median"))


def provenance() -> dict[str, str]:
    """Device, versions and command: what a number needs beside it."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    return {
        "device": torch.cuda.get_device_name(),
        "driver": driver,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "nsagen": __version__,
        "command": " ".join(["python", *sys.argv]),
    }


def write_results(name: str, rows: list[dict[str, Any]]) -> Path:
    """Write rows as JSON, into $OUT if set, else benchmarks/results/<device>/."""
    slug = torch.cuda.get_device_name().lower().replace(" ", "-")
    folder = Path(os.environ.get("OUT", Path(__file__).parent / "results" / slug))
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps({"provenance": provenance(), "rows": rows}, indent=1) + "\n")
    return path
