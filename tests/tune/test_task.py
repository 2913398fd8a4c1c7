"""The sizes that stand for the calls of a workload."""

from __future__ import annotations

import pytest

from nsagen.core.workload import Workload
from nsagen.spec import load_spec
from nsagen.tune.task import tasks_of


def heads(workload: Workload, kv_heads: int | None = None) -> set[int]:
    return {task.timed.kv_heads for task in tasks_of([workload], kv_heads=kv_heads)}


@pytest.mark.parametrize(("given", "expected"), [(None, {1}), (2, {2})])
def test_an_index_has_one_key_head_unless_told_otherwise(
    given: int | None, expected: set[int]
) -> None:
    """Its query heads share it; attention has as many as 32 query heads need."""
    of_op = {(w.op, w.pass_): w for w in load_spec("minimax_m3").workloads()}
    assert heads(of_op["block_selection", "forward"], given) == expected
    assert heads(of_op["block_selection", "decode"], given) == expected
    assert heads(of_op["selected_attention", "forward"], given) == {given or 2}
