"""Selected attention whose queries stay in registers, against the reference.

Gluon has no interpreter: these run on a GPU only. What is common to all algorithms is in
test_selected_attention.py.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.harness.base import Case, Cost, Sizes
from nsagen.harness.selected_attention import make_inputs
from nsagen.ops import reference
from nsagen.workload import Schedule, Workload
from tests.kernels.test_selected_attention import blocks_of, case_of, schedule_of, workload
from tests.support import check_case, load_kernel

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

each_schedule = pytest.mark.parametrize(
    "knobs", [{"num_stages": n, "lazy": lazy} for n in (2, 3, 4) for lazy in (False, True)], ids=str
)


def of(dim: int = 64, **changes: Any) -> Workload:
    return workload(**({"dtype": "bfloat16", "dim": dim, "group": 16, "block_size": 64} | changes))


def in_registers(w: Workload, **knobs: Any) -> Schedule:
    return schedule_of(w, "query_registers", **knobs)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("group", [1, 3, 8, 16])
def test_group_sizes(group: int, dtype: str) -> None:
    w = of(group=group, dtype=dtype)
    check_case(load_kernel(w, in_registers(w)), case_of(w, (0, 700, 31, 1, 1033, 7)))


@each_schedule
@pytest.mark.parametrize(("dim", "v_dim"), [(64, 64), (128, 128), (64, 128), (128, 64)])
def test_head_sizes_and_schedules(dim: int, v_dim: int, knobs: dict[str, Any]) -> None:
    w = of(dim, v_dim=v_dim)
    check_case(load_kernel(w, in_registers(w, **knobs)), case_of(w, (0, 700, 31, 1, 1033, 7)))


@pytest.mark.parametrize("block_size", [16, 32, 48, 64, 128, 256])
def test_block_sizes(block_size: int) -> None:
    w = of(block_size=block_size)
    case = case_of(w, (10, 2 * block_size + 5, 5 * block_size), kv_heads=1)
    check_case(load_kernel(w, in_registers(w)), case)


@pytest.mark.parametrize("topk", [1, 3, 8])
def test_any_order_padding_and_entries_out_of_range(topk: int) -> None:
    w = of(block_size=16)
    random = torch.Generator().manual_seed(topk)
    drawn = torch.rand((2, 71, 8), generator=random).argsort(-1) - 2
    odd = torch.tensor([2**31 - 1, -(2**31), 2**27, 10**6])
    strange = torch.randint(4, drawn.shape, generator=random)
    topk_idx = torch.where(drawn < 0, odd[strange], drawn)[..., :topk].contiguous()
    case = case_of(w, (0, 3, 50, 1, 17), topk_idx=topk_idx)
    check_case(load_kernel(w, in_registers(w)), case)


def test_more_blocks_than_topk() -> None:
    w = of(block_size=16)
    case = case_of(w, (16 * 6 + 3,), kv_heads=1, topk_idx=blocks_of(1, 99, 3))
    check_case(load_kernel(w, in_registers(w)), case)


def test_rows_with_no_block_are_empty() -> None:
    w = of()
    case = case_of(w, (20, 3), topk_idx=torch.full((2, 23, 5), -1))
    check_case(load_kernel(w, in_registers(w)), case)
    assert case.outputs["o"].count_nonzero() == 0
    assert torch.isneginf(case.outputs["lse"]).all()


def test_scores_that_grow_from_block_to_block() -> None:
    """Each step raises the maximum by more than what is let pass, or by just less."""
    w = of(block_size=16)
    for growth in (0.5, 4.0, 100.0):
        case = case_of(w, (200,), kv_heads=1)
        q, k = case.args[:2]
        assert isinstance(q, torch.Tensor)
        assert isinstance(k, torch.Tensor)
        q.fill_(1.0)
        k.copy_(torch.arange(200, device=k.device).view(-1, 1, 1) * growth / 128)
        check_case(load_kernel(w, in_registers(w)), case)


@pytest.mark.parametrize("own_keys", [False, True])
def test_queries_that_are_a_part_of_their_sequences(own_keys: bool) -> None:
    w = of(block_size=16)
    lengths, first = (0, 7, 60, 33, 20), (0, 0, 41, 16, 0)
    keys = lengths if own_keys else (0, 7, 19, 17, 20)
    queries = tuple(n - skipped for n, skipped in zip(lengths, first, strict=True))
    x = make_inputs(w, Sizes(queries), "cuda", seed=2)
    over = make_inputs(w, Sizes(keys), "cuda", seed=3)
    topk_idx = torch.rand((2, sum(queries), 5), device="cuda").argsort(-1).int() - 1
    args = (x.q, over.k, over.v, topk_idx, x.cu_seqlens)
    chunk = {
        "cu_seqlens_k": over.cu_seqlens if own_keys else None,
        "q_start": torch.tensor(first, dtype=torch.int32).cuda(),
    }
    o, lse = x.outputs()

    def expected() -> dict[str, torch.Tensor]:
        q, k, v, *rest = args
        wide = (q.double(), k.double(), v.double())
        found = reference.selected_attention(*wide, *rest, block_size=16, **chunk)
        return dict(zip(("o", "lse"), found, strict=True))

    call = (*args, o, lse, x.softmax_scale, *chunk.values())
    case = Case(call, {"o": o, "lse": lse}, expected, Cost(0, 0))
    check_case(load_kernel(w, in_registers(w)), case)


def test_views_of_any_alignment() -> None:
    """Rows that start at any even address are loaded in smaller pieces."""
    w = of(group=3)
    case = case_of(w, (300, 41))
    q, k, v, *rest = case.args
    assert isinstance(q, torch.Tensor)
    assert isinstance(k, torch.Tensor)
    assert isinstance(v, torch.Tensor)
    odd = [torch.nn.functional.pad(x, (1, 2))[..., 1:-2] for x in (q, k, v)]
    packed = torch.cat([q, k, v], 1)
    q_of, k_of, v_of = packed.split([q.shape[1], k.shape[1], v.shape[1]], 1)
    module = load_kernel(w, in_registers(w))
    for views in (odd, (q_of, k_of.transpose(0, 1).contiguous().transpose(0, 1), v_of)):
        check_case(module, Case((*views, *rest), case.outputs, case.expected, case.cost))


def test_sequences_do_not_read_each_other() -> None:
    w = of(block_size=16)
    case = case_of(w, (20, 21, 5))
    expected = case.expected()
    for x in case.args[1:3]:
        assert isinstance(x, torch.Tensor)
        x[:20] = float("nan")
        x[41:] = float("nan")
    load_kernel(w, in_registers(w)).launch(*case.args)
    for name, wanted in expected.items():
        assert not case.outputs[name][20:41].isnan().any()
        torch.testing.assert_close(
            case.outputs[name][20:41].double(), wanted[20:41], rtol=0.02, atol=0.02
        )


def test_the_same_bits_every_time() -> None:
    w = of(128)
    case = case_of(w, (3000, 17))
    module = load_kernel(w, in_registers(w))
    module.launch(*case.args)
    first = case.outputs["o"].clone()
    for _ in range(20):
        module.launch(*case.args)
        assert torch.equal(case.outputs["o"], first)
