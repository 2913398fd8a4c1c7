"""Selected attention's backward kernels against the gradients of the float64 reference."""

import pytest
import torch

from nsagen.cases.base import Case, Sizes
from nsagen.cases.selected_attention_backward import make_case
from nsagen.codegen.template import spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

RAGGED = (0, 3, 40, 1)  # empty, shorter than a block, longer
SPACES = [space for space in spaces_of("selected_attention", "backward") if space.general]


def workload(dtype="float32", dim=32, v_dim=None, group=2, block_size=16):
    return Workload.of(
        "selected_attention",
        "backward",
        dtype=dtype,
        head_dim=dim,
        v_head_dim=v_dim or dim,
        gqa_ratio=group,
        block_size=block_size,
    )


def case_of(w: Workload, seqlens=RAGGED, kv_heads=1) -> Case:
    return make_case(w, Sizes(seqlens, kv_heads), kernel_device(), seed=1)


def schedule_of(w: Workload, algorithm: str, **knobs) -> Schedule:
    """A schedule whose parts are so short that some lists have several."""
    space = next(space for space in SPACES if space.algorithm == algorithm)
    default = space.default(w, KNOWN_TARGETS["cuda:90"])
    return Schedule.of(algorithm, {**default, "part_tokens": 16, **knobs})


def each_algorithm(function):
    return pytest.mark.parametrize("algorithm", [space.algorithm for space in SPACES])(function)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("group", [1, 2, 3, 4, 6, 16])
@each_algorithm
def test_group_sizes(dtype, group, algorithm):
    w = workload(dtype, group=group)
    check_case(load_kernel(w, schedule_of(w, algorithm)), case_of(w))


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (64, 64), (128, 128), (24, 80), (192, 128)])
@each_algorithm
def test_head_sizes(dtype, dim, v_dim, algorithm):
    w = workload(dtype, dim, v_dim)
    check_case(load_kernel(w, schedule_of(w, algorithm)), case_of(w, (17, 0, 5)))


@pytest.mark.parametrize("block_size", [16, 24, 64, 80])
@pytest.mark.parametrize("key_orientation", ["keys", "queries"])
@each_algorithm
def test_blocks(key_orientation, block_size, algorithm):
    """Blocks that are powers of two and others; short last blocks."""
    w = workload("float16", block_size=block_size)
    schedule = schedule_of(w, algorithm, key_orientation=key_orientation)
    check_case(load_kernel(w, schedule), case_of(w, (2, block_size + 5)))


@pytest.mark.parametrize("orientation", ["rows", "columns"])
@pytest.mark.parametrize(("block_size", "block_n"), [(24, 32), (32, 16), (80, 16), (43, 16)])
def test_steps_of_the_first_pass(orientation, block_size, block_n):
    w = workload("float16", block_size=block_size)
    schedule = schedule_of(w, "two_pass", orientation=orientation, block_n=block_n)
    check_case(load_kernel(w, schedule), case_of(w, (block_size + 5, 3)))


@pytest.mark.parametrize("part_tokens", [16, 64, 512])
@each_algorithm
def test_lists_of_one_part_and_of_many(part_tokens, algorithm):
    """Lists from no token to all 133 of them."""
    w = workload("float16", group=1)
    random = torch.Generator().manual_seed(0)
    topk_idx = torch.rand((1, 135, 8), generator=random).argsort(-1)
    topk_idx[..., 0] = topk_idx[..., 0].where(topk_idx[..., 0] < 1, -1)
    topk_idx[..., 1:3] = topk_idx[..., 1:3].where(topk_idx[..., 1:3] != 5, -1)
    schedule = schedule_of(w, algorithm, part_tokens=part_tokens)
    case = make_case(
        w, Sizes((133, 2), kv_heads=1), kernel_device(), topk_idx=topk_idx[..., :3].contiguous()
    )
    check_case(load_kernel(w, schedule), case)


@pytest.mark.parametrize(
    ("block_size", "key_tile", "group", "block_m", "part_tokens"),
    [(32, 16, 3, 16, 512), (40, 16, 20, 16, 16), (24, 16, 20, 16, 512), (64, 32, 5, 32, 16)],
)
def test_blocks_in_tiles_and_steps_of_parts_of_groups(
    block_size, key_tile, group, block_m, part_tokens
):
    """What makes long blocks and wide groups fit; some tiles are past a sequence's end."""
    w = workload("float16", group=group, block_size=block_size)
    knobs = {"key_tile": key_tile, "block_m": block_m, "part_tokens": part_tokens}
    schedule = schedule_of(w, "two_pass", **knobs)
    check_case(load_kernel(w, schedule), case_of(w, (block_size + 5, 3, 0), kv_heads=1))


def test_wide_float32_groups_in_two_programs():
    w = workload("float32", dim=256, v_dim=256, group=20, block_size=16)
    case = case_of(w, (9,), kv_heads=1)
    check_case(load_kernel(w, schedule_of(w, "two_pass")), case)


def test_shares_of_some_heads_at_once(monkeypatch):
    """Memory for two heads of three, and for none."""
    w = workload("float16", group=1)
    case = case_of(w, (30, 0, 9), kv_heads=3)
    module = load_kernel(w, schedule_of(w, "key_major"))
    for limit in (1, 2 * 39 * 16 * 32 * 4):
        monkeypatch.setattr(module, "SHARES_BYTES", limit)
        check_case(module, case)


def test_sums_of_some_heads_at_once(monkeypatch):
    """The sums of long blocks' lists, in memory for all heads, for two of three, and for none."""
    w = workload("float16", group=1, block_size=64)
    module = load_kernel(w, schedule_of(w, "two_pass", key_tile=32))
    found = []
    for limit in (1 << 30, 2 * 8 * 64 * (2 * 32) * 4, 1):  # of two heads: 8 parts each
        monkeypatch.setattr(module, "SUMS_BYTES", limit)
        case = make_case(w, Sizes((34, 0, 2), kv_heads=3, topk=2), kernel_device(), seed=1)
        module.launch(*case.args)
        found.append(case.outputs)
    check_case(module, case)
    assert all(torch.equal(found[0][name], other[name]) for other in found for name in other)


@pytest.mark.parametrize("topk", [1, 3, 8])
@each_algorithm
def test_any_order_padding_and_entries_out_of_range(topk, algorithm):
    """A set: any order, repeats, -1, blocks of the future, and numbers that name no block."""
    w = workload(block_size=16)
    random = torch.Generator().manual_seed(topk)
    drawn = torch.randint(-2, 6, (2, 44, 8), generator=random)
    odd = torch.tensor([2**31 - 1, -(2**31), 2**27, 10**6])
    strange = torch.randint(4, drawn.shape, generator=random)
    topk_idx = torch.where(drawn < 0, odd[strange], drawn)[..., :topk].contiguous()
    case = make_case(w, Sizes(RAGGED), kernel_device(), seed=1, topk_idx=topk_idx)
    check_case(load_kernel(w, schedule_of(w, algorithm)), case)


@each_algorithm
def test_rows_with_no_block_have_no_gradient(algorithm):
    w = workload()
    topk_idx = torch.full((2, 44, 5), -1)
    topk_idx[:, 20:30, 0] = 0  # some rows of the second long sequence see its first block
    case = make_case(w, Sizes(RAGGED), kernel_device(), seed=1, topk_idx=topk_idx)
    check_case(load_kernel(w, schedule_of(w, algorithm)), case)
    assert case.outputs["dq"][:20].count_nonzero() == 0


@pytest.mark.parametrize("dtype", kernel_dtypes())
@each_algorithm
def test_views_with_any_strides(dtype, algorithm):
    """q, k and v as slices of one projection, heads outside tokens, and gradients of any layout."""
    w = workload(dtype, group=3)
    case = case_of(w)
    module = load_kernel(w, schedule_of(w, algorithm))
    do, q, k, v, *rest = case.args
    packed = torch.cat([q, k, v], 1)
    q = packed[:, : q.shape[1]]
    v = packed[:, -v.shape[1] :]
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    for strided in (do.transpose(0, 1).contiguous().transpose(0, 1), do.mT.contiguous().mT):
        check_case(module, Case((strided, q, k, v, *rest), *_results(case)))


def test_the_gradient_of_a_sum_has_no_strides():
    w = workload()
    do = torch.ones((), device=kernel_device()).expand(44, 2, 32)
    case = case_of(w)
    case.args[0].copy_(do)
    for algorithm in (space.algorithm for space in SPACES):
        module = load_kernel(w, schedule_of(w, algorithm))
        check_case(module, Case((do, *case.args[1:]), *_results(case)))


def _results(case: Case):
    return case.outputs, case.expected, case.cost


@each_algorithm
def test_sequences_do_not_read_each_other(algorithm):
    """NaN in the other sequences reaches none of this one's rows."""
    w = workload(block_size=16)
    case = case_of(w, (20, 21, 5))
    expected = case.expected()
    for x in case.args[:4]:  # do, q, k and v
        x[:20] = float("nan")
        x[41:] = float("nan")
    load_kernel(w, schedule_of(w, algorithm)).launch(*case.args)
    for name, out in case.outputs.items():
        torch.testing.assert_close(
            out[20:41].double().cpu(), expected[name][20:41].cpu(), atol=1e-5, rtol=1e-5
        )


@each_algorithm
def test_the_same_input_gives_the_same_bits(algorithm):
    w = workload("float16", group=4, block_size=16)
    case = case_of(w, (50, 9))
    module = load_kernel(w, schedule_of(w, algorithm))
    found = []
    for _ in range(2):
        for out in case.outputs.values():
            out.fill_(float("nan"))
        module.launch(*case.args)
        found.append([out.clone() for out in case.outputs.values()])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@each_algorithm
def test_nothing_to_do(algorithm):
    w = workload()
    for seqlens in ((), (0,), (0, 0, 0)):
        load_kernel(w, schedule_of(w, algorithm)).launch(*case_of(w, seqlens).args)


@each_algorithm
def test_a_wrong_call_is_refused(algorithm):
    w = workload()
    do, q, *rest, scale = case_of(w, kv_heads=2).args
    launch = load_kernel(w, schedule_of(w, algorithm)).launch
    with pytest.raises(ValueError, match="gqa_ratio 2"):
        launch(do, q[:, :3], *rest, scale)
    with pytest.raises(ValueError, match="do must be contiguous"):
        launch(do[1:], q, *rest, scale)
    with pytest.raises(ValueError, match="softmax_scale must be positive"):
        launch(do, q, *rest, 0.0)
