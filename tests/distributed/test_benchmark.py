"""benchmarks/distributed.py, with sizes for a CPU."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch

from benchmarks.distributed import RUNS, SPLITS, TINY, USUAL, Meter, covered, measure, run_alone
from nsagen.estimate.model import GPUS
from tests.distributed.ranks import on_ranks
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")


def test_every_case_is_measured_alone_and_together() -> None:
    kept: list[int] = []

    def run(rank: int) -> tuple[list[dict[str, Any]], list[int]]:
        rows = measure(TINY, Meter(CPU, 1), GPUS["h200"], lambda rows: kept.append(len(rows)))
        return rows, kept

    for rows, counts in on_ranks(2, run):
        assert [(row["what"], row["tokens"], row["split"]) for row in rows] == TINY.cases()
        assert counts == [*range(1, len(rows) + 1)], "each row is kept at once"
        assert all(row["ms"] > 0 for row in rows)
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
    assert USUAL.cases()[:2] == [("attention", 131072, "alone"), ("attention", 131072, "context")]
    assert set(USUAL.cases()) >= set(itertools.product(RUNS, USUAL.tokens, SPLITS))
    assert on_ranks(2, lambda rank: measure(TINY, Meter(CPU, 1, seconds=0.0))) == [[], []]


def test_kernels_are_compiled_by_processes_of_their_own() -> None:
    """Each runs one case to its end."""

    def run(rank: int) -> None:
        for what, split in itertools.product(RUNS, SPLITS):
            run_alone(TINY, CPU, 2, what, split)

    on_ranks(1, run)


def test_time_under_several_spans() -> None:
    assert covered([]) == 0
    assert covered([(5, 7), (0, 2), (1, 3), (1.5, 2)]) == pytest.approx(5)
    assert math.isclose(covered([(0, 10), (2, 3), (9, 12)]), 12)
