"""Block selection's kernels in the forms of the family's other members."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.cases.base import Sizes
from nsagen.cases.block_selection import make_case
from nsagen.core.workload import Schedule, Workload
from tests.kernels.small_selections import RAGGED, small, workload_of
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

FORMS = (
    ("softmax", "sum", "max"),
    ("softmax", "each", "overlap"),
    ("softmax", "each", "max"),
    ("none", "sum", "max"),
    ("none", "each", "max"),
)


def largest(**knobs: Any) -> Schedule:
    """Tiles of few tokens, and a step of few windows."""
    knobs = {"block_m": 16, "block_n": 16, "num_warps": 2, "num_stages": 1} | knobs
    more = {"loads": "pointers", "workspace": 64}
    return Schedule.of("largest_products", more | knobs)


def check(workload: Workload, seqlens: tuple[int, ...] = RAGGED, **knobs: Any) -> None:
    case = make_case(workload, Sizes(seqlens, 2), kernel_device())
    check_case(load_kernel(workload, small(**knobs)), case)


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("dtype", kernel_dtypes())
def test_forms(form: tuple[str, str, str], dtype: str) -> None:
    check(workload_of(dtype, form=form))


@pytest.mark.parametrize("form", FORMS, ids="-".join)
@pytest.mark.parametrize("shape", [(1, 1, 8), (8, 8, 8), (32, 16, 64), (5, 1, 3)], ids=str)
def test_windows_and_blocks(form: tuple[str, str, str], shape: tuple[int, int, int]) -> None:
    """Tokens one by one, blocks that are one window, windows that straddle, odd ratios."""
    size, stride, block = shape
    workload = workload_of(form=form, kernel_size=size, kernel_stride=stride, block_size=block)
    check(workload, (2, 9 * block + 5))


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[4]], ids="-".join)
@pytest.mark.parametrize("choice", [(1, 0, 0), (5, 0, 0), (3, 1, 2), (40, 1, 33)], ids=str)
def test_choices(form: tuple[str, str, str], choice: tuple[int, int, int]) -> None:
    """Without forced blocks a block may score -inf, and more blocks than 32 may be wanted."""
    topk, init_blocks, local_blocks = choice
    workload = workload_of(form=form, topk=topk, init_blocks=init_blocks, local_blocks=local_blocks)
    check(workload, (*RAGGED, 310) if topk > 32 else RAGGED)


@pytest.mark.parametrize("gqa_ratio", [1, 3, 8])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3], FORMS[4]], ids="-".join)
def test_group_sizes(form: tuple[str, str, str], gqa_ratio: int) -> None:
    check(workload_of(form=form, gqa_ratio=gqa_ratio), (0, 3, 70), tokens=8)


@pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
def test_products_of_one_sign(sign: float) -> None:
    """All scores below 0, all equal, all above: ties fall to the lower index, -0.0 is 0.0."""
    workload = workload_of(form=FORMS[4], kernel_size=1, kernel_stride=1, init_blocks=0)
    case = make_case(workload, Sizes((90,), 1), kernel_device())
    q, k = case.args[0], case.args[1]
    assert isinstance(q, torch.Tensor)
    assert isinstance(k, torch.Tensor)
    q.abs_()
    k.copy_(sign * k.abs())
    check_case(load_kernel(workload, small()), case)


def test_no_softmax_takes_no_log_sum_exp() -> None:
    workload = workload_of(form=FORMS[4])
    case = make_case(workload, Sizes((9,), 1), kernel_device())
    args = list(case.args)
    args[2] = torch.zeros(9, 2, device=kernel_device())
    with pytest.raises(ValueError, match="lse must be None"):
        load_kernel(workload, small()).launch(*args)


class TestLargestProducts:
    """The kernel for raw products of heads apart, whose windows lie in one block."""

    def check(
        self, workload: Workload, seqlens: tuple[int, ...] = (3, 0, 41, 1), **knobs: Any
    ) -> None:
        case = make_case(workload, Sizes(seqlens, 1), kernel_device())
        check_case(load_kernel(workload, largest(**knobs)), case)

    def workload(self, dtype: str = "float32", **params: Any) -> Workload:
        return workload_of(dtype, form=FORMS[4], **{"kernel_size": 1, "kernel_stride": 1, **params})

    @pytest.mark.parametrize("dtype", kernel_dtypes())
    @pytest.mark.parametrize("gqa_ratio", [1, 4])
    def test_groups(self, gqa_ratio: int, dtype: str) -> None:
        self.check(self.workload(dtype, gqa_ratio=gqa_ratio))

    @pytest.mark.parametrize("head_dim", [24, 128])
    @pytest.mark.parametrize("shape", [(1, 1, 16), (8, 8, 8), (4, 4, 16)], ids=str)
    def test_blocks(self, shape: tuple[int, int, int], head_dim: int) -> None:
        """A block that fills a step, blocks that are one window, several blocks a step."""
        size, stride, block = shape
        workload = self.workload(
            head_dim=head_dim, kernel_size=size, kernel_stride=stride, block_size=block
        )
        self.check(workload, (2, 4 * block + 5))

    @pytest.mark.parametrize(
        "choice", [(1, 0, 0), (5, 0, 0), (3, 0, 1), (6, 2, 3), (36, 1, 2)], ids=str
    )
    def test_choices(self, choice: tuple[int, int, int]) -> None:
        """Without forced blocks the own one is masked; more than 32 may be wanted."""
        topk, init_blocks, local_blocks = choice
        rule = {"init_blocks": init_blocks, "local_blocks": local_blocks, "gqa_ratio": 1}
        self.check(self.workload(topk=topk, block_size=1 if topk > 32 else 4, **rule))

    def test_bulk_copies(self) -> None:
        self.check(self.workload("float16"), (3, 50, 0, 37), loads="descriptors", block_n=32)

    def test_tiles_take_turns_in_the_workspace(self, monkeypatch: pytest.MonkeyPatch) -> None:
        workload = self.workload()
        kernel = load_kernel(workload, largest())
        monkeypatch.setattr(kernel, "WORKSPACE", 1 << 12)
        check_case(kernel, make_case(workload, Sizes((30, 0, 21), 1), kernel_device()))

    @pytest.mark.parametrize("sign", [-1.0, 0.0, 1.0])
    def test_products_of_one_sign(self, sign: float) -> None:
        """Ties fall to the lower index, and -0.0 is 0.0."""
        workload = self.workload(init_blocks=0)
        case = make_case(workload, Sizes((40,), 1), kernel_device())
        q, k = case.args[0], case.args[1]
        assert isinstance(q, torch.Tensor)
        assert isinstance(k, torch.Tensor)
        q.abs_()
        k.copy_(sign * k.abs())
        check_case(load_kernel(workload, largest()), case)

    def test_chunks_of_a_prompt(self) -> None:
        """The last queries of a sequence, with their position, choose what the whole chooses."""
        workload = self.workload()
        case = make_case(workload, Sizes((49,), 1), kernel_device())
        q, k, _, _, ends, whole, scale = case.args
        kernel = load_kernel(workload, largest())
        kernel.launch(*case.args)
        assert isinstance(q, torch.Tensor)
        assert isinstance(whole, torch.Tensor)
        few, start = (torch.tensor(x, dtype=torch.int32, device=q.device) for x in ([0, 20], [29]))
        part = torch.empty_like(whole[:, :20])
        kernel.launch(q[29:], k, None, few, ends, part, scale, start)
        assert torch.equal(part, whole[:, 29:])
