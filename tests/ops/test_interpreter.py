"""The public functions with real kernels, built on a miss and run by Triton's interpreter."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.cases.compress import compress_weight
from nsagen.core.paths import templates_dir
from nsagen.core.workload import COMPRESS_TYPES, STATIC_PARAMS
from nsagen.ops import SeparateKV, reference
from nsagen.runtime import Dispatcher

from .inputs import STATICS, Cached, Packed

MISSING = sorted({op for op, _ in STATIC_PARAMS if not (templates_dir() / op).is_dir()})

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.skipif(bool(MISSING), reason=f"no templates yet for {', '.join(MISSING)}"),
]


@pytest.fixture
def dispatcher(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Dispatcher]:
    folder: Path = tmp_path_factory.getbasetemp() / "cache"  # one for all tests of the session
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(folder))
    yield Dispatcher("interpreted", "", {})
    assert list(folder.rglob("*.py"))


def assert_close(out: Tensor, expected: Tensor) -> None:
    assert relative_error(out, expected) <= THRESHOLDS[out.dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_the_whole_block(dispatcher: Dispatcher, dtype: torch.dtype, compress_type: str) -> None:
    args, keywords = Packed(dtype).block(compress_type)
    # No sequence has more blocks than topk: rounding cannot change which ones are selected.
    o = ops.native_sparse_attention(*args, **keywords, dispatcher=dispatcher)
    assert_close(o, reference.native_sparse_attention(*args, **keywords))


def test_gradients_take_the_reference(dispatcher: Dispatcher) -> None:
    args, keywords = Packed(requires_grad=True).block("linear")
    o = ops.native_sparse_attention(*args, **keywords, dispatcher=dispatcher)
    expected = reference.native_sparse_attention(*args, **keywords)
    found = torch.autograd.grad(o.sum(), args)
    for ours, theirs in zip(found, torch.autograd.grad(expected.sum(), args), strict=True):
        assert_close(ours, theirs)


def test_decoding(dispatcher: Dispatcher) -> None:
    x = Cached()
    ours, theirs = x.caches(), x.caches()
    statics = {"compress_type": "linear", "kernel_size": 8, "kernel_stride": 4}
    q = ops.cache_append(*x.append_inputs(), *ours, **statics, dispatcher=dispatcher)
    expected = reference.cache_append(*x.append_inputs(), *theirs, **statics)
    live = [row for row, position in enumerate(x.positions) if position >= 0]
    assert_close(q[live], expected[live])
    for one, other in zip(ours, theirs, strict=True):
        assert_close(one, other)
    q = expected
    args = (q, *theirs[2:4], *x.rows)
    o, topk_idx = ops.compressed_attention_decode(*args, **STATICS, dispatcher=dispatcher)
    expected, expected_idx = reference.compressed_attention_decode(*args, **STATICS)
    assert_close(o[live], expected[live])
    assert torch.equal(topk_idx[:, live], expected_idx[:, live])
    args = (q, *theirs[:2], expected_idx, *x.rows, expected, x.gate)
    sizes = {"block_size": 8, "window_size": 9}
    o = ops.native_sparse_attention_decode(*args, **sizes, dispatcher=dispatcher)
    assert_close(o[live], reference.native_sparse_attention_decode(*args, **sizes)[live])


@pytest.mark.parametrize("types", [("mlp", "mlp"), ("mlp", "avgpool"), ("avgpool", "mlp")])
def test_decoding_of_separate_branches(dispatcher: Dispatcher, types: tuple[str, str]) -> None:
    x = Cached()
    ours, theirs, own = x.caches(), x.caches(), x.separate()
    theirs_own = SeparateKV(*own.rows, *(cache.clone() for cache in own.caches))
    *inputs, positions, slots = x.append_inputs()
    inputs[5:7] = (
        compress_weight(kind, 2, 8, dim, torch.randn, hidden=20)
        for kind, dim in zip(types, (16, 24), strict=True)
    )
    statics = {
        **{"compress_type": types[0], "v_compress_type": types[1]},
        **{"kernel_size": 8, "kernel_stride": 4, "pe_v": x.randn(2, 8, 24)},
    }
    args = (*inputs, positions, slots)
    q = ops.cache_append(*args, *ours, **statics, separate=own, dispatcher=dispatcher)
    expected = reference.cache_append(*args, *theirs, **statics, separate=theirs_own)
    live = [row for row, position in enumerate(x.positions) if position >= 0]
    assert_close(q[live], expected[live])
    for one, other in zip((*ours, *own.caches), (*theirs, *theirs_own.caches), strict=True):
        assert_close(one, other)
    args = (q, *ours[:2], x.topk_idx, *x.rows, x.o_compressed, x.gate)
    sizes = {"block_size": 8, "window_size": 9}
    window = {"k_window_cache": own.k_window_cache, "v_window_cache": own.v_window_cache}
    o = ops.native_sparse_attention_decode(*args, **sizes, **window, dispatcher=dispatcher)
    expected = reference.native_sparse_attention_decode(*args, **sizes, **window)
    assert_close(o[live], expected[live])
