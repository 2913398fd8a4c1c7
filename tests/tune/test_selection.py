"""Which workloads a run is about."""

from __future__ import annotations

import pytest

from nsagen.cli.tune import params_of
from nsagen.core.errors import InvalidInputError
from nsagen.spec import load_spec
from nsagen.tune.selection import Selection


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
