"""benchmarks/distributed.py, with sizes for a CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.distributed import SPLITS, TINY, measure
from tests.distributed.ranks import on_ranks
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")


def test_every_case_is_measured_alone_and_together() -> None:
    rows: list[dict[str, Any]]
    for rows in on_ranks(2, lambda rank: measure(TINY, torch.device("cpu"))):
        cases = [(row["what"], row["tokens"], row["split"]) for row in rows]
        assert cases == [
            *(("attention", 96, split) for split in SPLITS),
            *(("training step", 96, split) for split in SPLITS),
            ("training step", 128, "context"),
        ]
        assert all(row["ms"] > 0 for row in rows)
        assert all((row["split"] == "context") == ("exchange_ms" in row) for row in rows)
        assert [row["of_alone"] for row in rows if row["split"] == "alone"] == [1.0, 1.0]
