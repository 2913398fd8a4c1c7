"""No launch asks for more programs along the second or third axis than a GPU has places there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nsagen import ops
from nsagen.aot.compile import all_launches
from nsagen.cases.base import Case, Sizes, cases_of
from nsagen.codegen.template import render, space_for, spaces_of
from nsagen.core.errors import InvalidInputError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import STATIC_PARAMS, Param, Workload

FEW, MANY, LENGTH = 13, 70_000, 32
"""Sequences of a case and of the call that it is stretched to, and the tokens of each."""

PLACES = 65535
SHAPE: dict[str, Param] = {
    **{
        "head_dim": 64,
        "v_head_dim": 64,
        "index_head_dim": 64,
        "gqa_ratio": 16,
        "kernel_size": 32,
        "kernel_stride": 16,
    },
    **{"block_size": 64, "topk": 4, "init_blocks": 1, "local_blocks": 2, "window_size": 100},
}


def algorithms() -> list[tuple[Workload, str]]:
    """Each algorithm, with the compressions that it is for."""
    found = {}
    for op, pass_ in STATIC_PARAMS:
        for kind in ("avgpool", "linear", "sigmoid_mul"):
            params = {"compress_type": kind, "v_compress_type": kind, "with_pe": False, **SHAPE}
            names = params.keys() & set(STATIC_PARAMS[op, pass_])
            work = Workload.of(op, pass_, dtype="bfloat16", **{n: params[n] for n in names})
            for space in spaces_of(op, pass_):
                if space.supports(work):
                    found.setdefault((op, pass_, space.algorithm), (work, space.algorithm))
    return [found[key] for key in found if key[0] != "linear"]  # which takes 64 rows at most


def stretched(case: Case) -> Case:
    """A case on meta tensors of MANY sequences where it has FEW."""

    def stretch(x: object) -> object:
        if not isinstance(x, torch.Tensor):
            return x
        longer = {FEW: MANY, FEW + 1: MANY + 1}  # rows, windows; offsets
        longer |= {n * FEW: n * MANY for n in (2, LENGTH)}  # rows for windows, and tokens
        return x.new_empty([longer.get(n, n) for n in x.shape])

    return Case(tuple(stretch(x) for x in case.args), {}, case.expected, case.cost)


@pytest.mark.parametrize(("work", "algorithm"), algorithms(), ids=str)
def test_70000_sequences(work: Workload, algorithm: str, tmp_path: Path) -> None:
    schedule = space_for(work, algorithm).default_schedule(work, KNOWN_TARGETS["cuda:90"])
    path = tmp_path / "kernel.py"
    path.write_text(render(work, schedule, header="# one row a sequence"))
    lengths = (5,) * FEW if work.pass_ == "decode" else (LENGTH,) * FEW
    case = cases_of(work).make_case(work, Sizes(lengths, kv_heads=2, capacity=64), "meta")
    for call in all_launches(path, stretched(case)):
        grid = [int(n) for n in call.grid]
        assert max(grid[1:], default=1) <= PLACES, f"{call.kernel.__name__}: {grid}"
        assert grid[0] < 1 << 31


def test_more_heads_than_an_axis_has_places_are_refused() -> None:
    q = torch.zeros(1, PLACES + 1, 16)
    cu_seqlens = torch.tensor([0, 1], dtype=torch.int32)
    with pytest.raises(InvalidInputError, match="at most 65535 key/value heads; got 65536"):
        ops.sliding_window_attention(q, q, q, 4, cu_seqlens)
