"""benchmarks/distributed.py, with sizes for a CPU."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import distributed_plan
from benchmarks.distributed import RUNS, kind_or_row, measure, run_alone
from benchmarks.distributed_cases import SPLITS, TINY, USUAL, Case
from benchmarks.distributed_meter import Meter, covered, watched
from benchmarks.distributed_plan import estimate, predicted, share_of_roofline
from benchmarks.precompile import compiling
from nsagen.estimate import training
from nsagen.estimate.model import GPUS
from tests.distributed.ranks import on_ranks
from tests.faults.support import exit_code, start_child
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "nvidia-h200"


def test_every_case_is_measured_alone_and_together() -> None:
    kept: list[int] = []

    what = ("attention", "step", "longest")

    def run(rank: int) -> tuple[list[dict[str, Any]], list[int]]:
        gpu = GPUS["h200"]
        rows = measure(TINY, Meter(CPU, 1), gpu, lambda rows: kept.append(len(rows)), what)
        return rows, kept

    for rows, counts in on_ranks(2, run):
        assert [tuple(row[name] for name in Case._fields) for row in rows] == TINY.cases(what)
        assert counts == [*range(1, len(rows) + 1)], "each row is kept at once"
        assert all(row["ms"] > 0 and row["host_ms"] > 0 for row in rows)
        assert all(row["around_ms"] > 0 for row in rows if row["what"] == "training step")
        for row in rows:
            compared = {"of_alone", "of_predicted", "exchange_share"} & row.keys()
            if row["split"] == "alone":
                assert compared == {"of_alone"}
            elif row["tokens"] == TINY.longest:
                assert compared == {"of_predicted", "exchange_share"}
            else:
                assert compared == {"of_alone", "of_predicted", "exchange_share"}
        losses = {row["tokens"]: row["loss"] for row in rows if row.get("loss")}
        assert all(
            row["loss"] == pytest.approx(losses[row["tokens"]], rel=1e-5)
            for row in rows
            if row.get("loss")
        )


def test_what_says_most_comes_first_and_nothing_starts_late() -> None:
    first, second, *_ = USUAL.cases()
    assert first == ("attention", 131072, "alone", False)
    assert second == ("attention", 131072, "context", False)
    assert {case[:3] for case in USUAL.cases()} >= {*itertools.product(RUNS, USUAL.tokens, SPLITS)}
    assert on_ranks(2, lambda rank: measure(TINY, Meter(CPU, 1, seconds=0.0))) == [[], []]


def test_single_rows_come_in_their_order() -> None:
    names = ["graph/16384/context", "attention/131072/alone"]
    assert USUAL.cases([kind_or_row(name) for name in names]) == [
        Case("training step", 16384, "context", True),
        Case("attention", 131072, "alone"),
    ]
    for wrong in ("longer", "step/16384", "step/all/context", "longest/1/context", "step/1/heads"):
        with pytest.raises(
            argparse.ArgumentTypeError, match=f"must be attention, .* got '{wrong}'"
        ):
            kind_or_row(wrong)


def test_an_error_is_a_row() -> None:
    """A CPU has no graphs; each case says so, and the next one begins."""
    for rows in on_ranks(2, lambda rank: measure(TINY, Meter(CPU, 1), what=["graph"])):
        assert [row["split"] for row in rows] == [*SPLITS]
        assert {row["error"] for row in rows} == {
            "ValueError: --graph needs a GPU; got cpu; leave it out"
        }


def test_a_row_that_does_not_end_is_written_and_ends_the_run(tmp_path: Path) -> None:
    def hang(rows: list[dict[str, Any]]) -> None:
        with watched(0.05, rows, lambda rows: (tmp_path / "rows").write_text(json.dumps(rows))):
            time.sleep(60)

    began = time.monotonic()
    assert exit_code(start_child(lambda: hang([{"ms": 1.0}, {"what": "attention"}]))) == 1
    assert time.monotonic() - began < 20
    assert json.loads((tmp_path / "rows").read_text()) == [
        {"ms": 1.0},
        {"what": "attention", "error": "no end within 0 s"},
    ]


def test_kernels_are_compiled_by_processes_of_their_own() -> None:
    """Each runs one case to its end."""

    def run(rank: int) -> None:
        with compiling(0, 2):
            for what, split in itertools.product(RUNS, SPLITS):
                run_alone(TINY, CPU, 2, what, split)

    on_ranks(1, run)


def test_time_under_several_spans() -> None:
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1.5, 2)]) == pytest.approx(5)
    assert math.isclose(covered([(0, 10), (2, 3), (9, 12)]), 12)


def measured() -> dict[Case, dict[str, Any]]:
    """The committed rows of two H200s, but for those that an earlier version took."""
    rows = json.loads((RESULTS / "distributed.json").read_text())["rows"]
    return {
        Case(*(row[name] for name in Case._fields)): row for row in rows if "earlier" not in row
    }


def test_graphs_had_the_same_losses() -> None:
    """To the bit, those of the first step."""
    rows = measured()
    for case, row in rows.items():
        if case.graph and (same := rows.get(case._replace(graph=False))):
            assert row["loss"] == same["loss"]


@pytest.mark.parametrize(
    "case",
    [case for case in measured() if case.split != "alone"],
    ids=lambda case: " ".join(map(str, case)),
)
def test_two_gpus_took_what_is_predicted(case: Case) -> None:
    """Within 15%, from what one of them took in the same run."""
    rows, gpu = measured(), GPUS["h200"]
    ones = [rows[case._replace(tokens=n, split="alone")] for n in sorted(USUAL.tokens)]
    shares = tuple((float(row["tokens"]), share_of_roofline(USUAL, gpu, row)) for row in ones)
    assert rows[case]["ms"] == pytest.approx(predicted(USUAL, gpu, case, 2, shares), rel=0.15)


def test_the_hosts_constants_are_what_it_took() -> None:
    """Not fitted to the times of steps: from what the host, and what is around passes, took."""
    rows = [row for case, row in measured().items() if case.what == "training step"]
    assert [row["around_ms"] for row in rows] == pytest.approx(
        [1e3 * training.AROUND_SECONDS] * len(rows), abs=1.1
    )
    case = Case("training step", USUAL.tokens[1], "alone")
    for split in ("alone", "context"):
        row = measured()[case._replace(split=split)]
        step = estimate(USUAL, GPUS["h200"], case._replace(split=split), 2, ())
        passes = row["host_ms"] - row["around_ms"]
        assert 1e3 * step.host == pytest.approx(passes, rel=0.05)


LONG = [case for case in measured() if case.split != "alone" and case.tokens == USUAL.tokens[0]]


@pytest.mark.parametrize("case", LONG, ids=lambda case: " ".join(map(str, case)))
def test_long_sequences_are_predicted_without_constants_fitted_to_them(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From one GPU's rows and the rate of the links alone."""
    for name in ("EXCHANGE_SECONDS", "AROUND_SECONDS", "HOST_SECONDS", "HOST_EXCHANGE_SECONDS"):
        for module in (training, distributed_plan):
            monkeypatch.setattr(module, name, 0.0, raising=False)
    test_two_gpus_took_what_is_predicted(case)
