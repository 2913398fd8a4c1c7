"""Default schedules for Hopper, against what benchmarks/default_rules.py measured on an H200."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from nsagen.codegen.template import default_schedule
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Workload
from nsagen.records.files import load_folder

ROOT = Path(__file__).parents[2]
MEASURED = ROOT / "benchmarks" / "results" / "nvidia-h200" / "default_rules.json"


@pytest.fixture(scope="module")
def slowdowns() -> dict[str, float]:
    """Each workload's and size's time with its default, beside its fastest candidate's."""
    times: dict[str, dict[tuple[str, str], float]] = defaultdict(dict)
    for row in json.loads(MEASURED.read_text())["rows"]:
        times[row["workload"]][row["sizes"], row["schedule"]] = row["ms"]
    (records,) = load_folder(ROOT / "specs" / "tuned" / "llama8b")
    found: dict[str, float] = {}
    for workload in dict.fromkeys(record.workload for record in records.records):
        found |= of_workload(workload, times[str(workload)])
    return found


def of_workload(workload: Workload, times: dict[tuple[str, str], float]) -> dict[str, float]:
    schedule, found = str(default_schedule(workload, KNOWN_TARGETS["cuda:90"])), {}
    for sizes in dict.fromkeys(sizes for sizes, _ in times):
        best = min(ms for (of, _), ms in times.items() if of == sizes)
        if ms := times.get((sizes, schedule)):
            found[f"{workload}, {sizes}"] = ms / best
    return found


def test_defaults_were_measured(slowdowns: dict[str, float]) -> None:
    """A default that this fails for has not run on a GPU beside the others: measure it again."""
    assert len(slowdowns) >= 100


def test_most_defaults_are_within_a_tenth_of_the_fastest(slowdowns: dict[str, float]) -> None:
    slow = {name: ratio for name, ratio in slowdowns.items() if ratio > 1.1}
    assert len(slow) <= 0.14 * len(slowdowns), slow


def test_no_default_takes_half_as_long_again(slowdowns: dict[str, float]) -> None:
    assert {name: ratio for name, ratio in slowdowns.items() if ratio > 1.5} == {}


def test_small_groups_take_the_faster_gradients() -> None:
    """Of benchmarks/small_groups.py's forms that keep no stack, at its longest sequences."""
    rows = json.loads((MEASURED.parent / "small_groups.json").read_text())["rows"]
    for row in (row for row in rows if row["tokens"] == 65536):
        heads = {"head_dim": 128, "v_head_dim": 128, "gqa_ratio": row["group"]}
        windows = {"kernel_size": 32, "kernel_stride": 16}
        w = Workload.of(row["op"], "backward", dtype="bfloat16", **heads, **windows)
        schedule = default_schedule(w, KNOWN_TARGETS["cuda:90"])
        knobs = dict(schedule.knobs)
        form = f"pipeline, hide {knobs['hide']}" if "hide" in knobs else schedule.algorithm
        assert row["ms"][form] == min(row["ms"][n] for n in ("two_passes", "pipeline, hide scores"))
