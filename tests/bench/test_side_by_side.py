"""benchmarks/side_by_side.py, with sizes for a CPU."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import precompile
import pytest
import side_by_side
import torch
import triton
from side_by_side import M3, Run, half_shared, once, short_calls

from nsagen.bench import decode
from nsagen.bench.shape import Shape
from nsagen.model import ToyNSALlamaConfig
from nsagen.ops import _op

SHAPE = Shape(kv_heads=4, gqa_ratio=4, head_dim=16, v_head_dim=16, dtype="float32")
ATTENTION = ToyNSALlamaConfig(num_attention_heads=4, num_key_value_heads=2, head_dim=16)
TINY = Run(
    shape=SHAPE,
    m3=replace(SHAPE, block_size=16, topk=4, init_blocks=0, local_blocks=1),
    seqlens=(64, 128),
    eager=32,
    decode=decode.Plan((1,), (64,), ATTENTION, None, dtype=torch.float32),
    device="cpu",
    time=once,
)


def test_parts_write_a_row_a_call(tmp_path: Path) -> None:
    run = replace(TINY, out=tmp_path, rows=[])
    for part in ("whole", "groups", "m3"):
        side_by_side.PARTS[part](run)
    rows = json.loads((tmp_path / "side_by_side.json").read_text())["rows"]
    assert rows == run.rows
    found = {(row["what"], row["tokens"], row.get("group")) for row in rows}
    assert found >= {
        *(("backward", 128, None), ("forward and backward", 32, None)),
        ("selected attention backward", 128, 1),
        ("M3 attention, neighbours share half", 64, None),
    }


@pytest.mark.parametrize("name", [n for n in short_calls(TINY) if not n.startswith("decode")])
def test_short_calls_run(name: str) -> None:
    short_calls(TINY)[name]()


def test_neighbours_share_half_of_their_free_blocks() -> None:
    shape = replace(M3, kv_heads=1)
    topk_idx = half_shared(shape, 16384, "cpu")
    assert topk_idx.dtype == torch.int32
    lists = [set(row[row >= 0].tolist()) for row in topk_idx[0]]
    for token in (0, 127, 128, 1500, 9999, 16383):
        row, own = topk_idx[0, token], token // 128
        real = row[row >= 0].tolist()
        assert (real, max(real)) == (sorted(set(real)), own)
        assert len(real) >= min(own + 1, 14)
    late = range(8193, 16384)
    common = sum(len(lists[t] & lists[t - 1]) - (t % 128 > 0) for t in late) / len(late)
    assert common / 15 == pytest.approx(0.53, abs=0.05)  # a few are drawn again


def test_processes_share_kernels_and_launch_none(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[tuple[str, bool]] = []

    def run(self: Any, *args: Any, grid: Any, warmup: bool) -> str:
        compiled.append((self.__name__, warmup))
        return "compiled"

    @triton.jit
    def one(x):
        pass

    @triton.jit
    def other(x):
        pass

    on_gpu: Any = SimpleNamespace(is_cuda=True)
    assert _op.replays(on_gpu)
    monkeypatch.setattr(triton.JITFunction, "run", run)
    for index in (0, 1):
        with precompile.compiling(index, 2):
            found = [kernel[(1,)](None) for kernel in (one, other, one)]
            assert not _op.replays(on_gpu)  # which launches without `run`
        assert found == (["compiled", None, "compiled"] if index == 0 else [None, "compiled", None])
    assert compiled == [("one", True), ("one", True), ("other", True)]
    assert triton.JITFunction.run is run


def test_a_part_ends_when_no_time_is_left() -> None:
    with pytest.raises(side_by_side.OutOfTime):
        side_by_side.whole(replace(TINY, end=0.0, rows=[]))
