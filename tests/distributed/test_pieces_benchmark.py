"""benchmarks/pieces.py, with sizes for a CPU, where both ways take the reference."""

from __future__ import annotations

import pytest

from benchmarks import pieces
from nsagen.bench.shape import Shape


@pytest.mark.parametrize("selection", pieces.SELECTIONS)
def test_each_part_is_compared_with_the_whole(
    selection: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shape = Shape(kv_heads=1, gqa_ratio=2, head_dim=16, v_head_dim=16, dtype="float32")
    monkeypatch.setitem(pieces.SHAPES, "tiny", shape)
    monkeypatch.setattr(pieces, "CHUNK", 77)
    rows = pieces.measure("tiny", 600, selection, "cpu", lambda call: 1.0)
    assert [row["part"] for row in rows] == ["whole", "rank 0", "rank 1", "chunk"]
    assert all(row["error"] < 1 and row["repeats"] for row in rows)
    line = pieces.table(rows)
    assert line.startswith(f"tiny 600 {selection}: 1.000/1.000; ranks 2.000/2.000, 2.000 of it;")
