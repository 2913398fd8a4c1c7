"""Which workloads a run is about."""

from __future__ import annotations

from dataclasses import replace

import pytest

from nsagen.cli.tune import params_of
from nsagen.core.errors import InvalidInputError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.spec import load_spec
from nsagen.tune.selection import Selection, tasks_on


def ratios(selection: Selection) -> set[object]:
    tasks = selection.tasks([load_spec("llama8b")])
    return {dict(task.workload.params).get("gqa_ratio") for task in tasks}


def test_a_parameter_selects_among_the_workloads_that_have_it() -> None:
    assert ratios(Selection()) == {None, 4, 16}
    assert ratios(Selection(params=params_of(["gqa_ratio=16"]))) == {None, 16}
    only = Selection(["selected_attention"], params=params_of(["gqa_ratio=4", "block_size=64"]))
    assert ratios(only) == {4}


def test_a_value_that_no_workload_has_is_refused() -> None:
    with pytest.raises(InvalidInputError, match="--param gqa_ratio must be one of 16, 4; got '7'"):
        ratios(Selection(params={"gqa_ratio": "7"}))
    with pytest.raises(InvalidInputError, match=r"--param must be one of .*gqa_ratio.*; got 'gqa'"):
        ratios(Selection(params={"gqa": "16"}))


@pytest.mark.parametrize("text", ["gqa_ratio", "=4", "gqa_ratio=", ""])
def test_what_is_no_pair_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="must be NAME=VALUE"):
        params_of([text])


def selected(selection: Selection, target: str) -> set[str]:
    specs = [load_spec("llama8b")]
    tasks = tasks_on(selection.tasks(specs), specs, KNOWN_TARGETS[target])
    return {t.workload.label.partition("_")[2] for t in tasks if "attention" in t.workload.op}


def test_forced_blocks_once_are_tuned_where_calls_run_them() -> None:
    """The window's kernel that gives the forced blocks' part, and selected attention from there."""
    both = ["selected_attention", "sliding_window_attention"]
    forward = Selection(both, ["forward"], params={"gqa_ratio": "16"})
    whole = {"d128_g16_b64", "d128_g16_w512"}
    assert selected(forward, "cuda:90") == whole | {
        "d128_g16_b64_i1_c2",
        "d128_g16_w512_b64_i1_c2",
    }
    assert selected(forward, "cuda:80") == whole


def test_a_parameter_tells_forced_blocks_once_from_whole_lists() -> None:
    chosen = Selection(["selected_attention"], ["forward"], params={"gqa_ratio": "16"})
    only = replace(chosen, params={**chosen.params, "local_blocks": "2"})
    assert selected(only, "cuda:90") == {"d128_g16_b64_i1_c2"}
    without = replace(chosen, params={**chosen.params, "local_blocks": "none"})
    assert selected(without, "cuda:90") == {"d128_g16_b64"}
    with pytest.raises(InvalidInputError, match="cuda:80 must run one of the workloads; got sel"):
        selected(only, "cuda:80")


def test_lists_are_as_long_as_the_specs() -> None:
    """MiniCPM's calls gather 96 blocks a token, or those that its local band leaves of them."""
    tasks = Selection(["selected_attention"], ["forward"]).tasks([load_spec("minicpm4")])
    assert {task.timed.topk for task in tasks} == {task.checked.topk for task in tasks} == {96}
    assert "1 x 2048 tokens, 2 kv heads, 96 blocks" in {task.sizes_text for task in tasks}
    of_nsa = Selection(["selected_attention"], ["forward"]).tasks([load_spec("llama8b")])
    assert {task.timed.topk for task in of_nsa} == {16}
    assert "1 x 2048 tokens, 8 kv heads" in {task.sizes_text for task in of_nsa}
