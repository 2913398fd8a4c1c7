"""Each broken contract gives one line that names the op, the rule, what came and what to do."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.ops._launch import no_backward

from .inputs import STATICS, Cached, Packed

x = Packed()
cached = Cached()
Call = Callable[[], object]


def sliding(**changes: object) -> Call:
    inputs = {"q": x.q, "k": x.k, "v": x.v, "window_size": 9, "cu_seqlens": x.cu_seqlens}
    return lambda: ops.sliding_window_attention(**{**inputs, **changes})


def selected(topk_idx: object, **changes: object) -> Call:
    inputs = {"q": x.q, "k": x.k, "v": x.v, "block_size": 8, "cu_seqlens": x.cu_seqlens}
    return lambda: ops.topk_sparse_attention(topk_idx=topk_idx, **{**inputs, **changes})


def compressed(**changes: object) -> Call:
    ck, cu_seqlens_k = ops.avgpool_compress(x.k, None, x.cu_seqlens, 8, 4)
    cv, _ = ops.avgpool_compress(x.v, None, x.cu_seqlens, 8, 4)
    inputs = {
        **STATICS,
        **{"q": x.q, "k": ck, "v": cv},
        **{"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": cu_seqlens_k},
    }
    return lambda: ops.compressed_attention(**{**inputs, **changes})


def append(index: int, value: object) -> Call:
    inputs: list[object] = [*cached.append_inputs(), *cached.caches()]
    inputs[index] = value
    return lambda: ops.cache_append(*inputs, compress_type="linear", kernel_size=8, kernel_stride=4)


def decode(index: int, value: object) -> Call:
    inputs: list[object] = [cached.q, cached.k_cache, cached.v_cache, cached.topk_idx]
    inputs += [*cached.rows, cached.o_compressed, cached.gate]
    inputs[index] = value
    return lambda: ops.native_sparse_attention_decode(*inputs, block_size=8, window_size=9)


def paged(page_size: int, windows: int | None = None, table: Tensor | None = None) -> Call:
    """`cache_append` with pages; some windows a page."""
    (k, v, ck, cv, k_raw), right = cached.paged_caches(16)
    k, v = (x.reshape(-1, page_size, *x.shape[2:]) for x in (k, v))
    windows = page_size // 4 if windows is None else windows
    ck, cv = (x.new_zeros(k.shape[0], windows, *x.shape[2:]) for x in (ck, cv))
    inputs = (*cached.append_inputs(), k, v, ck, cv, k_raw)
    sizes = {"compress_type": "linear", "kernel_size": 8, "kernel_stride": 4}
    return lambda: ops.cache_append(*inputs, **sizes, block_table=right if table is None else table)


def decode_pages(block_size: int) -> Call:
    """Pages of 16 tokens, read by the other two ops."""
    caches, table = cached.paged_caches(16)
    inputs = (cached.q, *caches[:2], cached.topk_idx, *cached.rows)
    inputs = (*inputs, cached.o_compressed, cached.gate)
    sizes = {"block_size": block_size, "window_size": 9, "block_table": table}
    return lambda: ops.native_sparse_attention_decode(*inputs, **sizes)


def compressed_pages(block_size: int) -> Call:
    caches, table = cached.paged_caches(16)
    sizes = {**STATICS, "block_size": block_size, "block_table": table}
    return lambda: ops.compressed_attention_decode(cached.q, *caches[2:4], *cached.rows, **sizes)


FULL = torch.zeros(2, 60, 4, dtype=torch.int32)

CASES: dict[str, tuple[Call, str]] = {
    "dtypes differ": (sliding(k=x.k.half()), "q, k, v must share one float dtype; got q torch.fl"),
    "integers": (sliding(q=x.q.int()), "share one float dtype"),
    "not packed": (sliding(q=x.q[0]), r"q must have shape \[N, HQ, D\]; got \(6, 16\); reshape it"),
    "heads": (sliding(q=x.q[:, :5]), "multiple of key/value heads; got 5 and 2"),
    "head_dim": (
        sliding(q=x.q[..., :8]),
        r"k must have .* = \[60, 2, 8\]; got \(60, 2, 16\); .*D is q's",
    ),
    "values": (
        sliding(v=x.v[1:]),
        r"v must have shape \[T, HK, Dv\] = \[60, 2, Dv\]; got \(59, 2, 24\); .*T is k's",
    ),
    "tokens": (sliding(q=x.q[1:]), "same tokens; got 59 and 60"),
    "strides": (sliding(q=x.q.mT.contiguous().mT), r"q's last dimension must be contiguous; got s"),
    "int64 offsets": (sliding(cu_seqlens=x.cu_seqlens.long()), "cu_seqlens must be int32"),
    "short offsets": (sliding(cu_seqlens=x.cu_seqlens[:-1]), r"end at 60, .* got \[0, 0, 5, 35\]"),
    "falling offsets": (
        sliding(cu_seqlens=torch.tensor([0, 40, 30, 60], dtype=torch.int32)),
        "never fall",
    ),
    "2-d offsets": (sliding(cu_seqlens=x.cu_seqlens[None]), r"shape \[batch \+ 1\]; got \(1, 5\)"),
    "window": (sliding(window_size=0), "window_size must be positive; got 0"),
    "selection dtype": (selected(FULL.long()), "topk_idx must be int32; got torch.int64"),
    "selection shape": (
        selected(FULL[:1]),
        r"shape \[HK, N, topk\] = \[2, 60, topk\]; got \(1, 60, 4",
    ),
    "block": (selected(FULL, block_size=0), "block_size must be positive"),
    "stride": (compressed(kernel_size=4, kernel_stride=8), "kernel_size=4, kernel_stride=8"),
    "blocks": (compressed(block_size=6), "block_size=6"),
    "topk": (compressed(topk=2), "topk=2, init_blocks=1, local_blocks=2"),
    "weights": (
        lambda: ops.weightedpool_compress(x.k, x.randn(2, 7), x.cu_seqlens, 8, 4),
        r"must be \(2, 8\); got \(2, 7\)",
    ),
    "weight dtype": (
        lambda: ops.weightedpool_compress(x.k, x.randn(2, 8).half(), x.cu_seqlens, 8, 4),
        "the weight must be torch.float32",
    ),
    "tables": (
        lambda: ops.rope(x.q, x.cos.half(), x.sin, torch.zeros(60, dtype=torch.int32)),
        "cos must be float32; got torch.float16; pass cos",
    ),
    "gate": (
        lambda: ops.gated_sum(x.q, x.q, x.q, x.gate[..., :2].contiguous()),
        r"gate must have shape \[N, HQ, 3\] = \[60, 6, 3\]; got \(60, 6, 2\)",
    ),
    "branches": (
        lambda: ops.gated_sum(x.q, x.k, x.q, x.gate),
        r"o_selected must have shape .* = \[60, 6, 16\]; got .* HQ is o_compressed's",
    ),
    "positions": (append(8, cached.rows[0].long()), "positions must be int32"),
    "slots": (append(9, cached.rows[1][:2]), r"slots must have shape \[N\] = \[3\]; got \(2,\)"),
    "cache heads": (
        append(10, cached.k_cache[:, :, :1]),
        r"k_cache must have .* = \[4, 32, 2, 16\]",
    ),
    "cache lengths": (
        append(13, cached.cv_cache[:, 1:]),
        "cv_cache must have .* windows is ck_cache's",
    ),
    "raw keys": (
        append(14, cached.k_raw[:, 1:]),
        r"k_raw must have .* = \[4, 8, 2, 16\]; got \(4, 7, ",
    ),
    "page and stride": (
        paged(2, 1),
        "page size must be a positive multiple of kernel_stride; got 2",
    ),
    "page and windows": (paged(16, 3), "ck_cache must have 4 windows a page; got 3"),
    "page and block": (decode_pages(12), "multiple of block_size; got 16 tokens and block_size 12"),
    "windows and block": (compressed_pages(32), "multiple of block_size; got 16 tokens and block"),
    "table": (paged(16, table=torch.zeros(4, dtype=torch.int32)), r"shape \[slots, max_pages\]"),
    "table dtype": (paged(16, table=torch.zeros(4, 2)), "block_table must be int32"),
    "table slots": (
        paged(16, table=torch.zeros(3, 2, dtype=torch.int32)),
        r"block_table must have .* = \[4, max_pages\]; got \(3, 2\); .* slots is k_raw's",
    ),
    "cache dtype": (decode(1, cached.k_cache.half()), "must share one float dtype"),
    "branch": (
        decode(6, cached.o_compressed[..., :8].contiguous()),
        "o_compressed must have shape",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_broken_contracts(name: str) -> None:
    call, text = CASES[name]
    with pytest.raises(InvalidInputError, match=text) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    assert message.count("; ") >= 2


def test_gradients_on_a_gpu_are_refused_for_now() -> None:
    text = str(no_backward("selected_attention", torch.empty(0)))
    assert text.startswith("selected_attention: gradients need a kernel for the backward pass")
    assert issubclass(type(no_backward("x", torch.empty(0))), UnsupportedWorkloadError)
