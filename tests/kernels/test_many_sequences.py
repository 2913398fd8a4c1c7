"""Batches of many sequences, among which a program finds that of its tile."""

from __future__ import annotations

import pytest
import torch

from nsagen.cases.base import Sizes, cases_of
from nsagen.codegen.template import space_for, spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import STATIC_PARAMS, Param, Workload
from tests.support import check_case, is_hopper, kernel_device, load_kernel

SHAPE: dict[str, Param] = {
    **{
        "head_dim": 16,
        "v_head_dim": 16,
        "index_head_dim": 16,
        "gqa_ratio": 2,
        "kernel_size": 4,
        "kernel_stride": 2,
    },
    **{"block_size": 4, "topk": 2, "init_blocks": 1, "local_blocks": 1, "window_size": 3},
}
FOR_HOPPER: dict[str, Param] = {
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


def lengths(count: int, longest: int = 70) -> tuple[int, ...]:
    """Some empty, most shorter than a tile, some longer than one."""
    found = (n for i in range(43) for n in (i % 6, 0, longest if i % 16 == 5 else 1))
    return tuple(found)[:count]


COUNTS = (63, 64, 65, 127) if torch.cuda.is_available() else (67,)
"""tests/codegen/test_searches.py has every count for the searches alone."""


def workload(op: str, pass_: str, shape: dict[str, Param], kind: str, dtype: str) -> Workload:
    params = {"compress_type": kind, "with_pe": False, **shape}
    return Workload.of(op, pass_, dtype=dtype, **{n: params[n] for n in STATIC_PARAMS[op, pass_]})


def cases() -> list[tuple[Workload, str]]:
    """Each algorithm that meets sequences, and one type of compression for each of compress's."""
    found = {}
    for op, pass_ in STATIC_PARAMS:
        for space in spaces_of(op, pass_):
            if pass_ == "decode" or op in ("rope", "gated_sum"):
                continue
            if not (space.general or is_hopper()):
                continue
            shape, dtype = (SHAPE, "float32") if space.general else (FOR_HOPPER, "float16")
            for kind in ("avgpool", "linear", "sigmoid_mul"):
                work = workload(op, pass_, shape, kind, dtype)
                if space.supports(work):
                    found.setdefault((op, pass_, space.algorithm), (work, space.algorithm))
    return list(found.values())


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize(("work", "algorithm"), cases(), ids=str)
def test_many_sequences(work: Workload, algorithm: str, count: int) -> None:
    space = space_for(work, algorithm)
    schedule = space.default_schedule(work, KNOWN_TARGETS["cuda:90"])
    longest = 70
    if kernel_device() == "cpu" and (algorithm == "query_major" or work.op == "index_loss"):
        longest = 15  # their tiles are single tokens and blocks
    sizes = Sizes(lengths(count, longest), kv_heads=1)
    case = cases_of(work).make_case(work, sizes, kernel_device())
    check_case(load_kernel(work, schedule), case)
