"""The sizes that stand for the calls of a workload."""

from __future__ import annotations

import pytest

from nsagen.core.workload import Workload
from nsagen.spec import load_spec
from nsagen.tune.selection import Selection
from nsagen.tune.task import tasks_of


def heads(workload: Workload, kv_heads: int | None = None) -> set[int]:
    return {task.timed.kv_heads for task in tasks_of([workload], kv_heads=kv_heads)}


@pytest.mark.parametrize("given", [None, 8])
def test_an_index_has_one_key_head(given: int | None) -> None:
    """Its query heads share it; attention has as many as 32 query heads need."""
    of_op = {(w.op, w.pass_): w for w in load_spec("minimax_m3").workloads()}
    assert heads(of_op["block_selection", "forward"], given) == {1}
    assert heads(of_op["block_selection", "decode"], given) == {1}
    assert heads(of_op["selected_attention", "forward"], given) == {given or 2}


def test_a_specs_index_says_how_many_heads_attention_has() -> None:
    def of(name: str, **chosen: int) -> dict[str, set[int]]:
        tasks = Selection(passes=["decode"], **chosen).tasks([load_spec(name)])
        ops = {task.workload.op for task in tasks}
        return {op: {t.timed.kv_heads for t in tasks if t.workload.op == op} for op in ops}

    assert of("minimax_m3") == {"block_selection": {1}, "selected_attention": {4}}
    assert of("minimax_m3", kv_heads=8) == {"block_selection": {1}, "selected_attention": {8}}
    assert of("minicpm4")["selected_attention"] == {2}
