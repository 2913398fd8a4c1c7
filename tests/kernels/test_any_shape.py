"""Kernels of shapes drawn from all that a spec may say agree with the float64 reference.

Two examples of each op and pass by default, always the same ones. `make test-shapes` draws new
ones for as long as SHAPES_SECONDS says; a failure prints the line that runs its shape again.
"""

import os
import time

import hypothesis
import pytest
from hypothesis import strategies as st

from nsagen.cases.base import Sizes
from nsagen.cases.reproduce import Reproduction
from nsagen.codegen.template import default_schedule, spaces_of
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import (
    BRANCH_KV,
    COMPRESS_TYPES,
    FORCED,
    STATIC_PARAMS,
    Workload,
    parameter_names,
)
from nsagen.spec.shape import AttentionShape, violations
from tests.support import kernel_device, kernel_dtypes, of_shape

SECONDS = float(os.environ.get("SHAPES_SECONDS", "0"))
SMALL = hypothesis.settings(max_examples=2, phases=[hypothesis.Phase.generate])
NEW = hypothesis.settings(SMALL, max_examples=10, derandomize=False, database=None)
HEAD_SIZES = (16, 64, 80, 96, 112, 128, 192, 256)
GROUPS = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 20, 32, 48, 64)

OPS = sorted(STATIC_PARAMS)


def often(usual, low, high, step=1):
    """One of the usual values or any number from low to high."""
    return st.one_of(
        st.sampled_from(usual), st.integers(low // step, high // step).map(lambda n: n * step)
    )


@st.composite
def attention_shapes(draw) -> AttentionShape:
    """Any shape that the rules between parameters allow."""
    head_dim = often(HEAD_SIZES, 16, 256, 8)
    kernel_size = draw(often((8, 16, 32, 64), 8, 128))
    # Windows that overlap a hundredfold make the reference slow and nothing else.
    strides = [
        n for n in range(1, kernel_size + 1) if kernel_size % n == 0 and n * 16 >= kernel_size
    ]
    stride = draw(st.sampled_from(strides))
    init_blocks, local_blocks = draw(st.integers(0, 2)), draw(st.integers(0, 3))
    dim = draw(head_dim)
    shape = AttentionShape(
        head_dim=dim,
        v_head_dim=draw(st.one_of(st.just(dim), head_dim)),
        gqa_ratio=draw(often(GROUPS, 1, 64)),
        dtype=draw(st.sampled_from(kernel_dtypes())),
        compress_type=draw(st.sampled_from(COMPRESS_TYPES)),
        kernel_size=kernel_size,
        kernel_stride=stride,
        block_size=stride * draw(st.integers(-(-16 // stride), 256 // stride)),
        topk=draw(often((8, 16), max(1, init_blocks + local_blocks), 64)),
        init_blocks=init_blocks,
        local_blocks=local_blocks,
        window_size=draw(often((1, 2, 64, 512, 8192), 1, 8192)),
        with_pe=draw(st.booleans()),
        v_compress_type=draw(st.sampled_from(("", *COMPRESS_TYPES))),
        mlp_hidden=draw(often((32, 128, 192), 8, 256, 8)),
        v_with_pe=draw(st.booleans()),
        branch_kv=draw(st.sampled_from(BRANCH_KV)),
    )
    assert not list(violations(shape))
    return shape


@st.composite
def sizes_for(draw, shape: AttentionShape, pass_: str) -> Sizes:
    """Up to three sequences as long as windows and blocks or nearly so, and a longer one."""
    longest, most = (160, 96) if SECONDS else (64, 64)  # more is left to the longer run
    edges = [shape.kernel_size, shape.block_size, min(shape.window_size, 96)]
    edge = st.sampled_from([edge + by for edge in edges for by in (-1, 0, 1)])
    lengths = st.one_of(st.sampled_from((0, 1, 2)), edge.map(lambda n: min(n, most)))
    seqlens = (*draw(st.lists(lengths, max_size=3)), draw(st.integers(33, longest)))
    kv_heads = draw(st.integers(1, 2 if shape.gqa_ratio <= 4 else 1))
    order = draw(st.permutations(seqlens))
    if pass_ != "decode":
        return Sizes(tuple(order), kv_heads)
    return Sizes(tuple(n - 1 for n in order), kv_heads, capacity=max(order) + shape.kernel_size)


@st.composite
def trials(draw, op: str, pass_: str) -> Reproduction:
    shape = draw(attention_shapes())
    params = {name: of_shape(shape, name) for name in parameter_names(op, pass_)}
    if op == "sliding_window_attention":  # forced blocks beside it are Hopper's pipeline alone
        blocks = draw(st.integers(0, 3))  # of a window that ends with a token's own, or a plain one
        params |= dict.fromkeys(FORCED[op, pass_], 0)
        if blocks:
            params |= {"block_size": shape.block_size, "window_size": blocks * shape.block_size}
    workload = Workload.of(op, pass_, dtype=shape.dtype, **params)
    target = draw(st.sampled_from(sorted(KNOWN_TARGETS)))
    # What is made for one architecture runs there only, and not in the interpreter.
    spaces = [space for space in spaces_of(op, pass_) if space.general and space.supports(workload)]
    algorithm = draw(st.sampled_from([space.algorithm for space in spaces]))
    sizes = draw(sizes_for(shape, pass_))
    # The gradients of a softmax over one key are zero, and no error is small relative to that.
    if pass_ == "backward":
        hypothesis.assume(shape.window_size > 1 or op != "sliding_window_attention")
        windows = (max(sizes.seqlens) - shape.kernel_size) // shape.kernel_stride + 1
        hypothesis.assume(windows > 1 or op != "compressed_attention")
    alone = op in ("index_loss", "dense_index_loss") and max(sizes.seqlens) <= 8
    hypothesis.assume(not alone)  # nor is the loss over one key
    return Reproduction(workload, target, sizes, algorithm, seed=draw(st.integers(0, 99)))


def check(op: str, pass_: str, settings: hypothesis.settings) -> int:
    """Run drawn trials; how many ran."""
    ran = 0

    @settings
    @hypothesis.given(trials(op, pass_))
    def agrees(trial):
        nonlocal ran
        try:
            wrong = trial.run()
            ran += 1
        except UnsupportedWorkloadError:  # the algorithm has no schedule; others have
            default_schedule(trial.workload, KNOWN_TARGETS[trial.target])
            return
        except Exception as error:
            raise AssertionError(f"to reproduce: {trial.command}") from error
        assert not wrong, f"{'; '.join(wrong)}\nto reproduce: {trial.command}"

    agrees()
    return ran


@pytest.mark.skipif(kernel_device() == "cuda", reason="compiles many kernels; make test-shapes")
@pytest.mark.parametrize(("op", "pass_"), OPS)
def test_drawn_shapes(op, pass_):
    assert check(op, pass_, SMALL)


@pytest.mark.slow
@pytest.mark.skipif(not SECONDS, reason="needs SHAPES_SECONDS; make test-shapes")
@pytest.mark.parametrize(("op", "pass_"), OPS)
def test_many_drawn_shapes(op, pass_):
    end, ran = time.monotonic() + SECONDS / len(OPS), 0
    while time.monotonic() < end:
        ran += check(op, pass_, NEW)
    print(f"{op} {pass_}: {ran} shapes")
