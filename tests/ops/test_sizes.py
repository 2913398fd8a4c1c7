"""A name means the same in every op: static parameters and checks take what they need by name."""

from __future__ import annotations

import pytest
import torch

from nsagen.core.workload import STATIC_PARAMS
from nsagen.ops._op import by_name
from nsagen.ops._sizes import reader, tokens_of_windows

TENSORS = {
    "q": torch.zeros(5, 6, 16),
    "k": torch.zeros(5, 2, 16),
    "v": torch.zeros(5, 2, 24),
    "index_q": torch.zeros(5, 2, 40),
    "topk_idx": torch.zeros(2, 5, 3),
    "pe": None,
}
TOLD = {"head_dim": 16, "v_head_dim": 24, "gqa_ratio": 3, "index_head_dim": 40, "topk": 3}
TOLD |= {"with_pe": False}


def read(param: str, **given: object) -> object:
    found = reader(param, list(given))
    return None if found is None else found(tuple(given.values()))


@pytest.mark.parametrize("param", TOLD)
def test_tensors_tell_static_parameters(param: str) -> None:
    assert read(param, **TENSORS) == TOLD[param]


def test_a_parameter_tells_itself_first() -> None:
    assert read("topk", topk_idx=TENSORS["topk_idx"], topk=16) == 16


def test_caches_tell_what_packed_tensors_do() -> None:
    q, cache = TENSORS["q"], torch.zeros(3, 32, 2, 16)
    assert read("gqa_ratio", q=q, k_cache=cache) == read("gqa_ratio", q=q, ck_cache=cache) == 3
    assert read("v_head_dim", v_cache=cache) == read("v_head_dim", cv_cache=cache) == 16
    assert read("cache_dtype", k_cache=cache, k_scale=None) == ""
    assert read("cache_dtype", k_cache=cache.to(torch.int8), k_scale=cache[..., 0]) == "int8"


def test_what_no_tensor_tells_is_a_parameter() -> None:
    told = {
        p for params in STATIC_PARAMS.values() for p in params if read(p, **TENSORS) is not None
    }
    assert told == {*TOLD}


def test_the_last_window_reaches_past_a_cache_but_not_past_its_pages() -> None:
    cache, table = torch.zeros(3, 10, 2, 16), torch.zeros(3, 4)
    assert tokens_of_windows(8, 4, None, ck_cache=cache) == 10 * 4 + 4
    assert tokens_of_windows(8, 4, table, k_cache=cache) == 4 * 10 * 4


def test_values_by_name() -> None:
    check = by_name(lambda op, k, more=7: (op, k, more), ("q", "k", "op"))
    assert check((1, 2, "rope")) == ("rope", 2, 7)
    assert by_name(lambda call: call.q, ("q", "k"))((1, 2)) == 1
    with pytest.raises(TypeError, match=r"takes \['v'\]; there are \['q'\]"):
        by_name(lambda v: v, ("q",))
