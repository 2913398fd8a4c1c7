"""Where selected attention reads unions of neighbours' blocks unless tuning says otherwise."""

from __future__ import annotations

from typing import Any

import pytest

from nsagen.codegen.template import default_schedule, fallback_schedule, is_offered
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Workload

SHAPE = {"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16, "block_size": 64}
FORCED = {"init_blocks": 1, "local_blocks": 2}


def workload(changes: dict[str, Any]) -> Workload:
    given = {"dtype": "bfloat16", **SHAPE, **changes}
    return Workload.of("selected_attention", "forward", **given)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (FORCED, "union_tiles"),
        ({}, "query_major"),  # lists of 96 blocks (MiniCPM4) were not timed
        ({"block_size": 128}, "union_tiles"),
        ({"init_blocks": 0, "local_blocks": 33}, "query_major"),  # nor a wide band
        ({"dtype": "float16"}, "query_major"),
        ({"gqa_ratio": 8}, "query_major"),
        ({"gqa_ratio": 12}, "query_major"),
        ({"gqa_ratio": 4}, "key_major"),
        ({"block_size": 256}, "query_major"),
        ({"head_dim": 64, "v_head_dim": 64}, "query_major"),
    ],
    ids=str,
)
def test_what_was_measured_faster_is_the_default(changes: dict[str, Any], expected: str) -> None:
    w = workload(changes)
    assert default_schedule(w, KNOWN_TARGETS["cuda:90"]).algorithm == expected


@pytest.mark.parametrize("changes", [{"block_size": 128}, FORCED], ids=str)
def test_elsewhere_each_token_reads_its_own(changes: dict[str, Any]) -> None:
    """On other GPUs, and with releases of Triton that Gluon's pipelines were not tried with."""
    w = workload(changes)
    for target in ("cuda:80", "cuda:100"):
        assert default_schedule(w, KNOWN_TARGETS[target]).algorithm == "query_major"
    assert fallback_schedule(w, KNOWN_TARGETS["cuda:90"]).algorithm == "query_major"


def test_the_free_blocks_of_small_groups_are_not_offered() -> None:
    assert is_offered(workload(FORCED), KNOWN_TARGETS["cuda:90"])
    assert not is_offered(workload({**FORCED, "gqa_ratio": 4}), KNOWN_TARGETS["cuda:90"])
