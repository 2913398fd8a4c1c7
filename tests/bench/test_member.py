"""`nsagen bench` of the family's members besides NSA, at sizes for a CPU."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsagen.bench import decode, measure, prefill, train
from nsagen.bench.member import Member, MemberCaches, MemberInputs
from nsagen.bench.selections import check_selection
from nsagen.bench.shape import shape_of
from nsagen.cases.base import Cost
from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference
from nsagen.spec import load_spec

TINY: dict[str, Any] = {
    **{"head_dim": 16, "v_head_dim": 16, "rotary_dim": 16, "gqa_ratio": 2, "topk": 4},
    **{"block_size": 16, "dtype": "float32"},
}
OWN: dict[str, dict[str, Any]] = {
    "minimax_m3": {"index_heads": 2, "index_head_dim": 24},
    "minicpm4": {"kernel_size": 8, "kernel_stride": 4, "local_blocks": 2},
    "moba": {"kernel_size": 16, "kernel_stride": 16, "gqa_ratio": 1},
}
SELECTION = {
    "minimax_m3": ["block_selection"],
    "minicpm4": ["compress", "compressed_lse", "block_selection"],
    "moba": ["compress", "block_selection"],
}


@pytest.fixture(params=OWN)
def member(request: pytest.FixtureRequest) -> Member:
    """A shipped spec's member with small sizes."""
    shape = load_spec(request.param).shapes[0]
    return Member.of(replace(shape, **{**TINY, **OWN[request.param]}), 2)


@pytest.fixture
def _without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls run once on the CPU and take a millisecond; the GPU can do 1e12 of everything."""

    def once(call: Callable[[], object]) -> float:
        call()
        return 1.0

    class Dense:
        cost = Cost(1e9, 1e6)
        q = k = v = torch.ones(1, requires_grad=True)

        def __init__(self, *_: object, **__: object) -> None:
            pass

        def forward(self) -> torch.Tensor:
            return 2 * (self.q + self.k + self.v)

    for module in (prefill, train):
        monkeypatch.setattr(module, "host_cost", lambda call, ms: measure.HostCost(once(call), 7))
        monkeypatch.setattr(module, "DenseAttention", Dense)
    for module in (prefill, train, decode):
        monkeypatch.setattr(module, "milliseconds", once)
        monkeypatch.setattr(module, "measure_ceilings", lambda: measure.Ceilings(1e12, 1e12))
    monkeypatch.setattr(decode, "graphed", lambda call: call)
    monkeypatch.setattr(train, "peak_memory", lambda inputs: 0.5)
    random = MemberInputs.random.__func__  # type: ignore[attr-defined]

    def on_cpu(cls: type, *args: Any, **options: Any) -> MemberInputs:
        return random(cls, *args, **{**options, "device": "cpu"})

    monkeypatch.setattr(MemberInputs, "random", classmethod(on_cpu))


def test_heads_follow_from_the_spec() -> None:
    """An index has one head for each key/value head; else there are 32 query heads."""
    found = {name: shape_of(name) for name in OWN}
    assert [m.kv_heads for m in found.values()] == [4, 2, 32]
    assert [m.query_heads for m in found.values()] == [64, 32, 32]
    assert shape_of("minicpm4", ["kv_heads=8"]).query_heads == 128
    one = shape_of("moba", ["block_size=4096"])
    assert isinstance(one, Member)
    assert one.shape.topk == 12


def test_the_least_work_counts_all_selected_blocks() -> None:
    """Of MiniCPM's 96 blocks the own one is half seen on average; the first tokens have fewer."""
    member = shape_of("minicpm4")
    tokens, per_pair = 65536, 2 * 32 * (128 + 128)
    pairs = prefill.cost_of(member, "selected_attention", "forward", tokens).flops / per_pair
    assert pairs == pytest.approx(tokens * 95.5 * 64, rel=0.05)


@pytest.mark.usefixtures("_without_a_gpu")
def test_a_row_for_each_op_forward_the_whole_and_dense(
    member: Member, request: pytest.FixtureRequest
) -> None:
    rows = prefill.run(member, (100,))
    ops = [*SELECTION[request.node.callspec.params["member"]], "selected_attention"]
    assert [row["what"] for row in rows] == ["dense attention (cuDNN)", *ops, "attention"]
    assert all(set(prefill.COLUMNS) <= set(row) and row["floor_ms"] > 0 for row in rows)


@pytest.mark.usefixtures("_without_a_gpu")
def test_a_row_for_each_gradient(member: Member) -> None:
    rows = train.run(member, (100,))
    index = ["index_loss", "dense_index_loss"] if member.indexed else []
    what = ["dense attention (cuDNN)", "selected_attention", *index, "attention"]
    assert [row["what"] for row in rows] == what
    assert rows[-1]["peak_gib"] == 0.5


@pytest.mark.usefixtures("_without_a_gpu")
def test_a_row_for_each_op_of_a_step(member: Member) -> None:
    rows = decode.run(decode.Plan((1, 3), (100,), member=member), device="cpu")
    ops = ["block_selection", "selected_attention", "attention"]
    ops += [] if member.indexed else ["pool_append"]
    assert [row["what"] for row in rows] == 2 * ops
    whole = rows[2]
    assert whole["of_torch"] == 1.0
    assert whole["bytes"] < whole["dense_bytes"] + rows[0]["bytes"]


@pytest.mark.usefixtures("_without_a_gpu")
def test_narrow_caches_have_no_dense_attention_beside_them(member: Member) -> None:
    narrow = Member(replace(member.shape, cache_dtype="int8"), member.kv_heads)
    wide, found = (
        decode.run(decode.Plan((1,), (100,), member=one), device="cpu") for one in (member, narrow)
    )
    assert [row["what"] for row in wide] == [row["what"] for row in found]
    assert all(a["bytes"] < b["bytes"] for a, b in zip(found[:3], wide[:3], strict=True))
    assert "torch_ms" not in found[2]
    plan = decode.plan_of(None, None, True, "int8", "minimax_m3")
    assert plan.member is not None
    assert plan.member.shape.cache_dtype == "int8"


def test_the_calls_are_attention_to_what_the_selection_gives(member: Member) -> None:
    x = MemberInputs.random(member, 100, device="cpu")
    topk_idx = x.select()
    args = (x.q, x.k, x.v, topk_idx, member.shape.block_size, x.cu_seqlens)
    right = reference.topk_sparse_attention(*args)
    torch.testing.assert_close(x.attention(), right)
    assert topk_idx[:, -1, -1].eq(99 // member.shape.block_size).all()  # a token's own block
    cache = MemberCaches(member, 2, 100, torch.device("cpu"))
    found = cache.sparse()  # completes the last window first, which can change what is selected
    step = (cache.q, cache.k, cache.v, cache.select(), cache.positions, cache.slots)
    right = reference.selected_attention_decode(*step, block_size=member.shape.block_size)
    torch.testing.assert_close(found, right)


def test_what_is_refused() -> None:
    for spec, text in (
        ("llama8b", "another member of the family than NSA"),
        ("moba", "passes must have decode"),
    ):
        with pytest.raises(InvalidInputError, match=text):
            decode.plan_of(None, None, True, None, spec)
    with pytest.raises(InvalidInputError, match="learned is of an NSA model"):
        check_selection("learned", shape_of("minimax_m3"))
