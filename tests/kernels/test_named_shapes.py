"""The shapes that nsagen promises, by their numbers, through every pass of every op.

test_any_shape.py draws from the whole space; here are the numbers that must never be left to
chance: groups and head sizes that are no powers of two, values of another size than keys, windows
from 8 to 128 tokens, blocks that no window divides, one to 64 blocks, none at the start.
"""

from __future__ import annotations

import pytest

from nsagen.cases.base import Sizes, cases_of
from nsagen.core.workload import STATIC_PARAMS, Workload
from nsagen.spec.shape import AttentionShape, violations
from tests.support import check_case, kernel_device, load_kernel, of_shape

NAMES = (
    *("gqa_ratio", "head_dim", "v_head_dim", "kernel_size", "kernel_stride", "block_size", "topk"),
    *("init_blocks", "local_blocks", "window_size", "dtype", "compress_type"),
)
ROWS = (
    (3, 64, 64, 64, 64, 256, 2, 1, 1, 5, "float32", "linear"),
    (5, 80, 80, 12, 6, 30, 5, 1, 2, 63, "float16", "weightedpool"),
    (6, 96, 96, 32, 16, 48, 16, 0, 2, 512, "float32", "avgpool"),
    (7, 112, 112, 128, 32, 160, 64, 1, 2, 8192, "float16", "avgpool"),
    (12, 128, 64, 16, 16, 16, 8, 2, 1, 17, "float32", "weightedpool"),
    (20, 192, 128, 48, 8, 72, 3, 0, 2, 64, "float16", "weightedpool"),
    (1, 256, 256, 8, 4, 20, 1, 0, 1, 2, "float16", "avgpool"),
)
SHAPES = [AttentionShape(**dict(zip(NAMES, row, strict=True)), with_pe=row[7] == 1) for row in ROWS]


def promised(name: str) -> set[object]:
    return {getattr(shape, name) for shape in SHAPES}


def test_every_promised_number_is_among_them() -> None:
    assert {3, 5, 6, 7, 12, 20} <= promised("gqa_ratio")
    assert {64, 80, 96, 112, 128, 192, 256} <= promised("head_dim")
    assert any((shape.head_dim, shape.v_head_dim) == (192, 128) for shape in SHAPES)
    for name, low, high in (("kernel_size", 8, 128), ("block_size", 16, 256), ("topk", 1, 64)):
        assert {low, high} <= promised(name)
    assert 8192 in promised("window_size")
    assert 0 in promised("init_blocks")
    assert sum(shape.block_size % shape.kernel_size > 0 for shape in SHAPES) >= 4
    assert not [text for shape in SHAPES for text in violations(shape)]


def cases() -> dict[str, tuple[Workload, AttentionShape]]:
    """Each workload of these shapes, once."""
    return {
        str(work): (work, shape)
        for op, pass_ in STATIC_PARAMS
        for shape in SHAPES
        if (
            work := Workload.of(
                op,
                pass_,
                dtype=shape.dtype,
                **{name: of_shape(shape, name) for name in STATIC_PARAMS[op, pass_]},
            )
        )
    }


CASES = cases()


def marked(place: int, name: str) -> object:
    """Half are slow tests, whose kernels tests/aot/test_front_end.py has accepted otherwise.

    So are long ones in the interpreter: large blocks and windows, whole products.
    """
    work, shape = CASES[name]
    many = work.op == "selected_attention" and shape.block_size * shape.head_dim >= 16000
    many |= work.op == "native_sparse_attention" and shape.window_size == 8192
    many |= (work.op, work.pass_) == ("compress", "backward") and shape.compress_type == "linear"
    many |= place % 2 == 0 and kernel_device() == "cpu"
    return pytest.param(name, marks=[pytest.mark.slow] if many else [])


@pytest.mark.kernel
@pytest.mark.parametrize("name", map(marked, range(len(CASES)), CASES))
def test_shape(name: str) -> None:
    work, shape = CASES[name]
    tokens = shape.kernel_size + 2 * shape.kernel_stride + 3
    short = ("selected_attention", "sliding_window_attention", "index_loss", "dense_index_loss")
    if work.op in short:
        tokens = min(tokens, 67)
    sizes = Sizes((2, tokens), kv_heads=1)
    if work.pass_ == "decode":
        sizes = Sizes((1, tokens), kv_heads=1, capacity=tokens + shape.kernel_size)
    check_case(load_kernel(work), cases_of(work).make_case(work, sizes, kernel_device()))
