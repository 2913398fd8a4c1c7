"""The public functions on a CPU: the same results and gradients as the reference."""

import inspect

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.ops import reference
from nsagen.ops.reference.compress import tensors_of

from .inputs import STATICS, Cached, Packed

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
EXACT_TYPES = [kind for kind in COMPRESS_TYPES if kind != "mlp"]
"""An mlp's second layer is PyTorch's own product, in the tensors' dtype."""


def assert_equal(out: object, expected: object) -> None:
    torch.testing.assert_close(out, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("compress_type", EXACT_TYPES)
def test_the_whole_block(dtype: torch.dtype, compress_type: str) -> None:
    args, keywords = Packed(dtype).block(compress_type)
    o = ops.native_sparse_attention(*args, **keywords)
    assert o.dtype == dtype
    assert_equal(o, reference.native_sparse_attention(*args, **keywords))


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_gradients_of_the_whole_block(compress_type: str) -> None:
    x = Packed(requires_grad=True)
    args, keywords = x.block(compress_type)
    weights = [t for name in ("w_k", "w_v", "pe") for t in tensors_of(keywords[name])]
    d_o = torch.randn(60, 6, 24)

    def gradients(function: object) -> tuple[Tensor, ...]:
        return torch.autograd.grad(function(*args, **keywords), [*args, *weights], d_o)

    found = gradients(ops.native_sparse_attention)
    expected = gradients(reference.native_sparse_attention)
    torch.testing.assert_close(found, expected)
    assert all(gradient.abs().sum() > 0 for gradient in found)


@pytest.mark.parametrize("seqlens", [(), (0,), (0, 0), (1,), (7,), (3, 0, 7, 1), (8,), (60,)])
def test_short_and_empty_sequences(seqlens: tuple[int, ...]) -> None:
    args, keywords = Packed(seqlens=seqlens, requires_grad=True).block()
    o = ops.native_sparse_attention(*args, **keywords)
    assert_equal(o, reference.native_sparse_attention(*args, **keywords))
    assert not o.isnan().any()
    gradients = torch.autograd.grad(o.sum(), args)
    assert not any(gradient.isnan().any() for gradient in gradients)


def test_without_rope() -> None:
    args, keywords = Packed().block()
    keywords |= {"cos": None, "sin": None}
    o = ops.native_sparse_attention(*args, **keywords)
    assert_equal(o, reference.native_sparse_attention(*args, **keywords))


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
@pytest.mark.parametrize("with_pe", [True, False])
def test_compression_returns_exactly_the_windows(compress_type: str, with_pe: bool) -> None:
    x = Packed()
    w, _ = x.weights(compress_type)
    args = (x.k, w, x.cu_seqlens, 8, 4, x.pe if with_pe else None)
    name = f"{compress_type}_compress"
    y, y_cu_seqlens = getattr(ops, name)(*args)
    assert y.shape[0] == y_cu_seqlens[-1] == 0 + 0 + 6 + 5
    expected = getattr(reference, name)(*args)
    if compress_type == "mlp":
        torch.testing.assert_close((y, y_cu_seqlens), expected)
    else:
        assert_equal((y, y_cu_seqlens), expected)


@pytest.mark.parametrize(
    ("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.float16, 2e-3)]
)
def test_an_mlp_is_the_references(dtype: torch.dtype, error: float) -> None:
    args, keywords = Packed(dtype).block("mlp")
    o = ops.native_sparse_attention(*args, **keywords)
    expected = reference.native_sparse_attention(*args, **keywords)
    assert (o - expected).norm() <= error * expected.norm()


@pytest.mark.parametrize("v_compress_type", COMPRESS_TYPES)
def test_values_of_another_type(v_compress_type: str) -> None:
    x = Packed(torch.float64)
    args, keywords = x.block("weightedpool")
    keywords["w_v"] = x.weight(v_compress_type, x.v_head_dim)
    keywords |= {"v_compress_type": v_compress_type, "pe_v": x.randn(2, 8, x.v_head_dim)}
    o = ops.native_sparse_attention(*args, **keywords)
    torch.testing.assert_close(o, reference.native_sparse_attention(*args, **keywords))
    del keywords["pe_v"]
    assert not torch.equal(o, ops.native_sparse_attention(*args, **keywords))


def test_compressed_attention_ignores_the_lengths_that_it_does_not_need() -> None:
    x = Packed()
    ck, cu_seqlens_k = ops.avgpool_compress(x.k, None, x.cu_seqlens, 8, 4)
    cv, _ = ops.avgpool_compress(x.v, None, x.cu_seqlens, 8, 4)
    args = (x.q, ck, cv, 8, 4, 8, 4, x.cu_seqlens, cu_seqlens_k)
    expected = reference.compressed_attention(*args)
    assert_equal(ops.compressed_attention(*args), expected)
    assert_equal(ops.compressed_attention(*args, 30, 6, 16**-0.5, 1, 2), expected)


@pytest.mark.parametrize("name", [n for n in ops.__all__ if n in reference.__all__])
def test_signatures_are_the_references(name: str) -> None:
    ours = list(inspect.signature(getattr(ops, name)).parameters.values())
    assert ours[-1].name == "dispatcher"
    assert ours[-1].default is None
    assert ours[-1].kind is inspect.Parameter.KEYWORD_ONLY
    theirs = inspect.signature(getattr(reference, name)).parameters.values()
    assert [(p.name, p.kind) for p in ours[:-1]] == [(p.name, p.kind) for p in theirs]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_decoding(dtype: torch.dtype) -> None:
    x = Cached(dtype)
    ours, theirs = x.caches(), x.caches()
    statics = {"compress_type": "linear", "kernel_size": 8, "kernel_stride": 4}
    q = ops.cache_append(*x.append_inputs(), *ours, **statics)
    assert_equal(q, reference.cache_append(*x.append_inputs(), *theirs, **statics))
    assert_equal(ours, theirs)
    assert not torch.equal(ours[2], x.ck_cache)  # the token at 23 completed a window
    args = (q, *ours[2:4], *x.rows)
    o, topk_idx = ops.compressed_attention_decode(*args, **STATICS)
    assert_equal((o, topk_idx), reference.compressed_attention_decode(*args, **STATICS))
    args = (q, *ours[:2], topk_idx, *x.rows, o, x.gate)
    sizes = {"block_size": 8, "window_size": 9}
    expected = reference.native_sparse_attention_decode(*args, **sizes)
    assert_equal(ops.native_sparse_attention_decode(*args, **sizes), expected)
