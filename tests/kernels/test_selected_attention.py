"""Selected attention's forward kernels against the float64 reference."""

import pytest
import torch

from nsagen.cases.base import Case, Cost, Sizes
from nsagen.cases.selected_attention import make_case, make_inputs
from nsagen.codegen.template import spaces_of
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import reference
from tests.support import check_case, kernel_device, kernel_dtypes, load_kernel

RAGGED = (0, 3, 50, 1, 17)  # empty, shorter than a block, longer
SPACES = spaces_of("selected_attention", "forward")


def workload(dtype="float32", dim=32, v_dim=None, group=2, block_size=16):
    return Workload.of(
        "selected_attention",
        "forward",
        dtype=dtype,
        head_dim=dim,
        v_head_dim=v_dim or dim,
        gqa_ratio=group,
        block_size=block_size,
    )


def case_of(w: Workload, seqlens=RAGGED, kv_heads=2, topk_idx=None) -> Case:
    """The usual case, or the same one with other blocks chosen."""
    if topk_idx is None:
        return make_case(w, Sizes(seqlens, kv_heads), kernel_device(), seed=1)
    drawn = case_of(w, seqlens, kv_heads)
    drawn.args[3].resize_(topk_idx.shape).copy_(topk_idx)  # what `expected` reads, too
    return drawn


def blocks_of(heads: int, tokens: int, topk: int) -> torch.Tensor:
    """Distinct blocks of 0 .. 6 in any order, of which each token sees some."""
    random = torch.Generator().manual_seed(0)
    drawn = torch.rand((heads, tokens, 7), generator=random).argsort(-1)
    return drawn[..., :topk].contiguous()


def schedule_of(w: Workload, algorithm: str, **knobs) -> Schedule:
    space = next(space for space in SPACES if space.algorithm == algorithm)
    return Schedule.of(algorithm, {**space.default(w, KNOWN_TARGETS["cuda:90"]), **knobs})


def each_algorithm(function):
    """Each algorithm in plain Triton, as Gluon has no interpreter."""
    names = [space.algorithm for space in SPACES if space.general]
    return pytest.mark.parametrize("algorithm", names)(function)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize("group", [1, 2, 3, 16, 48])
@each_algorithm
def test_group_sizes(dtype, group, algorithm):
    w = workload(dtype, group=group)
    # Large groups are slow in the interpreter: two blocks, the last one short, are enough.
    case = case_of(w, kv_heads=2) if group <= 3 else case_of(w, (0, 3, 21, 1), kv_heads=1)
    check_case(load_kernel(w, schedule_of(w, algorithm)), case)


@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(("dim", "v_dim"), [(16, 16), (64, 64), (128, 128), (24, 80), (192, 128)])
@each_algorithm
def test_head_sizes(dtype, dim, v_dim, algorithm):
    w = workload(dtype, dim, v_dim)
    check_case(load_kernel(w, schedule_of(w, algorithm)), case_of(w, (33, 0, 20), kv_heads=1))


@pytest.mark.parametrize("orientation", ["rows", "columns"])
@pytest.mark.parametrize(
    ("block_size", "block_n"),
    [(16, 16), (24, 32), (32, 16), (64, 64), (64, 16), (80, 128), (80, 16), (96, 32), (43, 16)],
)
def test_blocks_and_steps(orientation, block_size, block_n):
    """Blocks that steps tile exactly and ones that a longer step covers; short last blocks."""
    w = workload("float16", block_size=block_size)
    schedule = schedule_of(w, "query_major", orientation=orientation, block_n=block_n)
    case = case_of(w, (10, block_size + 5), kv_heads=1)
    check_case(load_kernel(w, schedule), case)


@pytest.mark.parametrize("group", [1, 3])
@pytest.mark.parametrize("block_size", [16, 24, 64, 80])
def test_key_blocks_in_parts(block_size, group):
    """Blocks that are powers of two and others; lists of one part and of several."""
    w = workload("float16", block_size=block_size, group=group)
    schedule = schedule_of(w, "key_major", part_tokens=16)
    check_case(load_kernel(w, schedule), case_of(w, (10, 2 * block_size + 5), kv_heads=1))


@pytest.mark.parametrize("limit", [1, 20_000, 60_000])
def test_partial_results_for_some_heads_or_tokens_at_once(limit, monkeypatch):
    """Memory for one chunk of a head's tokens, for a part of them, and for two heads of three."""
    w = workload("float16", group=1)
    case = case_of(w, (1, 50, 0, 9), kv_heads=3)
    module = load_kernel(w, schedule_of(w, "key_major"))
    monkeypatch.setattr(module, "PARTIALS_BYTES", limit)
    monkeypatch.setattr(module, "CHUNKS", 8)
    check_case(module, case)


@pytest.mark.parametrize("own_keys", [False, True])
@pytest.mark.parametrize("starts", [False, True])
@pytest.mark.parametrize("dtype", kernel_dtypes())
@each_algorithm
def test_queries_that_are_a_part_of_their_sequences(dtype, starts, own_keys, algorithm):
    """A later chunk of each sequence's queries over all keys up to it; one has no key."""
    w = workload(dtype, group=3)
    lengths, first = (0, 7, 60, 33, 20), (0, 0, 41, 16, 0)
    keys = lengths if own_keys else (0, 7, 19, 17, 20)
    queries = [n - skipped for n, skipped in zip(lengths, first, strict=True)]
    if own_keys:
        queries[0], queries[4] = 2, 0
    x = make_inputs(w, Sizes(tuple(queries)), kernel_device(), seed=2)
    over = make_inputs(w, Sizes(keys), kernel_device(), seed=3)
    topk_idx = torch.rand((2, sum(queries), 5), device=x.q.device).argsort(-1).int() - 1
    args = (x.q, over.k, over.v, topk_idx, x.cu_seqlens)
    chunk = {
        "cu_seqlens_k": over.cu_seqlens if own_keys else None,
        "q_start": torch.tensor(first, dtype=torch.int32).to(x.q.device) if starts else None,
    }
    o, lse = x.outputs()

    def expected():
        q, k, v, *rest = args
        wide = (q.double(), k.double(), v.double())
        found = reference.selected_attention(*wide, *rest, block_size=16, **chunk)
        return dict(zip(("o", "lse"), found, strict=True))

    call = (*args, o, lse, x.softmax_scale, *chunk.values())
    check_case(
        load_kernel(w, schedule_of(w, algorithm)),
        Case(call, {"o": o, "lse": lse}, expected, Cost(0, 0)),
    )


def test_wide_float32_groups_in_two_programs():
    w = workload("float32", dim=256, v_dim=256, group=20, block_size=16)
    case = case_of(w, (19,), kv_heads=1, topk_idx=blocks_of(1, 19, 3))
    check_case(load_kernel(w, schedule_of(w, "query_major")), case)


@each_algorithm
def test_more_blocks_than_topk(algorithm):
    w = workload("float16", block_size=16)
    case = case_of(w, (16 * 6 + 3,), kv_heads=1, topk_idx=blocks_of(1, 99, 3))
    check_case(load_kernel(w, schedule_of(w, algorithm)), case)


@pytest.mark.parametrize("topk", [1, 3, 8])
@each_algorithm
def test_any_order_padding_and_entries_out_of_range(topk, algorithm):
    """A set: any order, repeats, -1, blocks of the future, and numbers that name no block."""
    w = workload(block_size=16)
    random = torch.Generator().manual_seed(topk)
    drawn = torch.randint(-2, 6, (2, 71, 8), generator=random)
    odd = torch.tensor([2**31 - 1, -(2**31), 2**27, 10**6])
    strange = torch.randint(4, drawn.shape, generator=random)
    topk_idx = torch.where(drawn < 0, odd[strange], drawn)[..., :topk].contiguous()
    case = case_of(w, (0, 3, 50, 1, 17), topk_idx=topk_idx)
    check_case(load_kernel(w, schedule_of(w, algorithm)), case)


@each_algorithm
def test_rows_with_no_block_are_empty(algorithm):
    w = workload()
    case = case_of(w, (20, 3), topk_idx=torch.full((2, 23, 5), -1))
    check_case(load_kernel(w, schedule_of(w, algorithm)), case)
    assert case.outputs["o"].count_nonzero() == 0
    assert torch.isneginf(case.outputs["lse"]).all()


@pytest.mark.parametrize("dtype", kernel_dtypes())
@each_algorithm
def test_views_with_any_token_and_head_strides(dtype, algorithm):
    """q, k and v as slices of one projection, and k with heads outside tokens."""
    w = workload(dtype, group=3)
    case = case_of(w)
    q, k, v, *rest = case.args
    packed = torch.cat([q, k, v], 1)
    q = packed[:, : q.shape[1]]
    v = packed[:, -v.shape[1] :]
    k = k.transpose(0, 1).contiguous().transpose(0, 1)
    module = load_kernel(w, schedule_of(w, algorithm))
    check_case(module, Case((q, k, v, *rest), case.outputs, case.expected, case.cost))


@each_algorithm
def test_sequences_do_not_read_each_other(algorithm):
    """NaN in the other sequences reaches none of this one's rows."""
    w = workload(block_size=16)
    case = case_of(w, (20, 21, 5))
    expected = case.expected()
    for x in case.args[1:3]:  # k and v
        x[:20] = float("nan")
        x[41:] = float("nan")
    load_kernel(w, schedule_of(w, algorithm)).launch(*case.args)
    for name, out in case.outputs.items():
        torch.testing.assert_close(out[20:41].double(), expected[name][20:41], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("magnitude", [0.0, 1e3])
@each_algorithm
def test_equal_and_huge_scores(magnitude, algorithm):
    w = workload()
    case = case_of(w)
    case.args[0].mul_(magnitude)
    check_case(load_kernel(w, schedule_of(w, algorithm)), case)


@each_algorithm
def test_nothing_to_do(algorithm):
    w = workload()
    for seqlens in ((), (0,), (0, 0, 0)):
        load_kernel(w, schedule_of(w, algorithm)).launch(*case_of(w, seqlens).args)


@each_algorithm
def test_a_wrong_call_is_refused(algorithm):
    w = workload()
    q, k, v, topk_idx, cu_seqlens, o, lse, scale = case_of(w).args
    launch = load_kernel(w, schedule_of(w, algorithm)).launch
    with pytest.raises(ValueError, match="gqa_ratio 2"):
        launch(q[:, :3], k, v, topk_idx, cu_seqlens, o, lse, scale)
    with pytest.raises(ValueError, match="topk_idx must be contiguous"):
        launch(q, k, v, topk_idx.transpose(0, 1), cu_seqlens, o, lse, scale)
    with pytest.raises(ValueError, match="softmax_scale must be positive"):
        launch(q, k, v, topk_idx, cu_seqlens, o, lse, 0.0)
