"""Compression against windows pooled one at a time."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from nsagen.cases.compress import compress_weight
from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.ops import reference
from nsagen.ops.reference.compress import Weight, tensors_of
from tests.ops import dense
from tests.ops.dense import PROPERTY, SEQLENS, offsets

PUBLIC = {
    "avgpool": reference.avgpool_compress,
    "weightedpool": reference.weightedpool_compress,
    "linear": reference.linear_compress,
    "sigmoid_mul": reference.sigmoid_mul_compress,
    "mlp": reference.mlp_compress,
}


def weight(compress_type: str, heads: int, size: int, dim: int) -> Weight:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return compress_weight(compress_type, heads, size, dim, normal, hidden=6)


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
@PROPERTY
@given(SEQLENS, st.integers(1, 3), st.integers(1, 4), st.integers(1, 4), st.booleans())
def test_matches_windows_pooled_one_at_a_time(
    compress_type: str, seqlens: list[int], heads: int, width: int, stride: int, with_pe: bool
) -> None:
    torch.manual_seed(0)
    size, dim = width * stride, 4
    x = torch.randn(sum(seqlens), heads, dim, dtype=torch.float64)
    w = weight(compress_type, heads, size, dim)
    pe = torch.randn(heads, size, dim, dtype=torch.float64) if with_pe else None
    cu_seqlens = offsets(seqlens)
    expected = dense.compress(x, w, pe, seqlens, size, stride)

    y, y_cu_seqlens = PUBLIC[compress_type](x, w, cu_seqlens, size, stride, pe)
    assert y.shape == expected.shape
    assert y.is_contiguous()
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(y_cu_seqlens, reference.compressed_cu_seqlens(cu_seqlens, size, stride))

    padded, _ = reference.compress(
        x, w, pe, cu_seqlens, compress_type=compress_type, kernel_size=size, kernel_stride=stride
    )
    assert padded.shape[0] == sum(seqlens) // stride
    assert torch.equal(padded[: len(y)], y)
    assert not padded[len(y) :].any()


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_gradients(compress_type: str) -> None:
    torch.manual_seed(0)
    cu_seqlens = offsets([7, 0, 2, 5])
    x = torch.randn(14, 2, 4, dtype=torch.float64, requires_grad=True)
    pe = torch.randn(2, 4, 4, dtype=torch.float64, requires_grad=True)
    weights = [w.requires_grad_() for w in tensors_of(weight(compress_type, 2, 4, 4))]

    def pooled(x: Tensor, pe: Tensor, *weights: Tensor) -> Tensor:
        w = weights if compress_type == "mlp" else (*weights, None)[0]
        return PUBLIC[compress_type](x, w, cu_seqlens, 4, 2, pe)[0]

    assert torch.autograd.gradcheck(pooled, (x, pe, *weights))


def test_gates_of_zero_weights_give_the_mean() -> None:
    x, ends = torch.randn(40, 2, 8, dtype=torch.float64), offsets([40])
    y, _ = reference.sigmoid_mul_compress(x, x.new_zeros(2, 8, 8), ends, 8, 4)
    torch.testing.assert_close(y, reference.avgpool_compress(x, None, ends, 8, 4)[0])


def test_the_first_layer_of_an_mlp() -> None:
    x, ends = torch.randn(14, 2, 4, dtype=torch.float64), offsets([7, 0, 2, 5])
    w1, w2 = weight("mlp", 2, 4, 4)
    pe = torch.randn(2, 4, 4, dtype=torch.float64)
    before = reference.mlp_first_layer(x, w1, pe, ends, kernel_size=4, kernel_stride=2)
    y = torch.einsum("mhk,hkd->mhd", before * before.sigmoid(), w2)
    whole, _ = reference.compress(
        x, (w1, w2), pe, ends, compress_type="mlp", kernel_size=4, kernel_stride=2
    )
    torch.testing.assert_close(y, whole)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_low_precision_accumulates_wide(dtype: torch.dtype) -> None:
    x = torch.randn(64, 2, 8).to(dtype)
    y, _ = reference.avgpool_compress(x, None, offsets([64]), 32, 16)
    wide, _ = reference.avgpool_compress(x.float(), None, offsets([64]), 32, 16)
    assert y.dtype == dtype
    assert torch.equal(y, wide.to(dtype))


def test_a_sequence_without_windows_is_differentiable() -> None:
    x = torch.randn(3, 1, 4, requires_grad=True)
    y, _ = reference.avgpool_compress(x, None, offsets([3]), 8, 4)
    y.sum().backward()
    assert y.shape == (0, 1, 4)
    assert not x.grad.any()


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"kernel_stride": 3}, "not the other way round"),
        ({"cu_seqlens": torch.tensor([0, 7], dtype=torch.int32)}, "number of tokens, 8"),
        ({"cu_seqlens": torch.tensor([0, 6, 4, 8], dtype=torch.int32)}, "never fall"),
        ({"w": torch.ones(2, 5)}, r"must be \(2, 4\)"),
        ({"w": None}, "got None"),
        ({"w": (torch.ones(2, 4), torch.ones(2, 4))}, r"got \(\(2, 4\), \(2, 4\)\)"),
        ({"pe": torch.ones(4, 2, 4)}, r"pe must be \(2, 4, 4\)"),
        ({"x": torch.ones(8, 8)}, r"x must be \[N, HK, D\]"),
    ],
)
def test_wrong_inputs_say_what_to_do(change: dict[str, object], text: str) -> None:
    good = {
        "x": torch.ones(8, 2, 4),
        "w": torch.ones(2, 4),
        "cu_seqlens": offsets([8]),
        "kernel_size": 4,
        "kernel_stride": 2,
    }
    reference.weightedpool_compress(**good)
    with pytest.raises(InvalidInputError, match=text):
        reference.weightedpool_compress(**(good | change))


def test_unknown_compress_type_is_named() -> None:
    with pytest.raises(InvalidInputError, match="'maxpool'"):
        reference.compress(
            torch.ones(8, 2, 4),
            None,
            None,
            offsets([8]),
            compress_type="maxpool",
            kernel_size=4,
            kernel_stride=2,
        )


@pytest.mark.parametrize(
    ("w", "text"),
    [
        (torch.ones(2, 16, 3), r"must be \(\(2, 16, H\), \(2, H, 4\)\); got \(2, 16, 3\)"),
        ((torch.ones(2, 16, 3), torch.ones(2, 4, 4)), r"must be \(\(2, 16, 3\), \(2, 3, 4\)\)"),
        ((torch.ones(2, 16, 0), torch.ones(2, 0, 4)), "must be"),
        ((torch.ones(2, 16, 3),), "must be"),
        (None, "got None"),
    ],
)
def test_wrong_weights_of_an_mlp(w: Weight, text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        reference.mlp_compress(torch.ones(8, 2, 4), w, offsets([8]), 4, 2)
