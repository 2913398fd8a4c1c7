"""What the ops hand to kernels: workloads, and arguments in the order of `launch`."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.core.workload import Workload
from nsagen.ops.block_selection import block_selection_forward
from nsagen.runtime import Dispatcher

from .inputs import STATICS, Cached, Packed

Launch = tuple[Workload, tuple[Any, ...], int, int | None]


class Recorder(Dispatcher):
    """Records every call and computes nothing."""

    def __init__(self) -> None:
        super().__init__("recorder", "", {})
        self.calls: list[Launch] = []

    def launcher(
        self,
        workload: Workload,
        device: torch.device,
        tokens: int,
        context: int | None = None,
    ) -> Callable[..., None]:
        return lambda *args: self.calls.append((workload, args, tokens, context))


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[Recorder]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return Recorder()


def shapes(args: tuple[Any, ...]) -> list[Any]:
    return [tuple(arg.shape) if isinstance(arg, Tensor) else arg for arg in args]


def test_the_whole_block(recorder: Recorder) -> None:
    args, keywords = Packed(torch.float16).block("linear")
    o = ops.native_sparse_attention(*args, **keywords, dispatcher=recorder)
    q, k, v, cu = (60, 6, 16), (60, 2, 16), (60, 2, 24), (5,)
    ck, cv, table, wide, lse = (15, 2, 16), (15, 2, 24), (64, 8), (60, 6, 24), (60, 6)
    assert [(str(w), shapes(a), n) for w, a, n, _ in recorder.calls] == [
        (
            "compress forward f16_linear_d16_l8_s4_pe",
            [k, (2, 128, 16), (2, 8, 16), cu, cu, ck],
            60,
        ),
        ("compress forward f16_linear_d24_l8_s4", [v, (2, 192, 24), None, cu, cu, cv], 60),
        ("rope forward f16_d16", [q, table, table, (60,), q], 60),
        ("rope forward f16_d16", [k, table, table, (60,), k], 60),
        ("rope forward f16_d16", [ck, table, table, (15,), ck], 15),
        (
            "compressed_attention forward f16_d16_dv24_g3_l8_s4",
            [q, ck, cv, cu, cu, wide, lse, 0.25],
            60,
        ),
        (
            "block_selection forward f16_d16_g3_l8_s4_b8_k4_i1_c2",
            [q, ck, lse, cu, cu, (2, 60, 4), 0.25],
            60,
        ),
        (
            "selected_attention forward f16_d16_dv24_g3_b8",
            [q, k, v, (2, 60, 4), cu, wide, lse, 0.25],
            60,
        ),
        (
            "sliding_window_attention forward f16_d16_dv24_g3_w9",
            [q, k, v, cu, wide, lse, 0.25, None, None, wide, wide, (60, 6, 3)],
            60,
        ),
    ]
    assert o.shape == wide
    assert recorder.calls[5][1][6].dtype == torch.float32


def test_block_selection_takes_positions_of_a_chunk(recorder: Recorder) -> None:
    x = Packed(torch.float16)
    lse = torch.zeros(60, 6)
    q_start = torch.zeros(4, dtype=torch.int32)
    keys = x.k[:15], lse, x.cu_seqlens, torch.zeros_like(x.cu_seqlens)
    args = (x.q, *keys, *STATICS.values(), 0.25, recorder.key)
    block_selection_forward(*args)
    block_selection_forward(*args, q_start)
    (_, whole, _, _), (_, chunk, _, _) = recorder.calls
    assert shapes(whole)[5:] == [(2, 60, 4), 0.25]
    assert shapes(chunk)[5:] == [(2, 60, 4), 0.25, (4,)]
    with pytest.raises(InvalidInputError, match="q_start must not be negative"):
        block_selection_forward(*args, q_start - 1)
    with pytest.raises(InvalidInputError, match=r"q_start must have shape \[batch\] = \[4\]"):
        block_selection_forward(*args, q_start[1:])


def test_chunks_hand_their_positions_to_the_kernels(recorder: Recorder) -> None:
    x = Packed(torch.float16)
    ends, q_start = x.cu_seqlens, torch.zeros(4, dtype=torch.int32)
    chunk = {"cu_seqlens_k": ends, "q_start": q_start, "dispatcher": recorder}
    ops.sliding_window_attention(x.q, x.k, x.v, 9, ends, **chunk)
    ops.sliding_window_attention(x.q, x.k, x.v, 9, ends, q_start=q_start, dispatcher=recorder)
    windows = torch.zeros_like(ends)
    ops.compressed_attention(
        *(x.q, x.k[:15], x.v[:15], 8, 4, 8, 4, ends, windows), q_start=q_start, dispatcher=recorder
    )
    (_, both, *_), (_, start, *_), (_, compressed, *_), (_, selection, *_) = recorder.calls
    assert both[7] is not None
    assert both[8] is not None
    assert start[7] is None
    assert [tuple(args[-1].shape) for args in (start, compressed, selection)] == [(4,)] * 3


def test_decoding(recorder: Recorder) -> None:
    x = Cached()
    caches = x.caches()
    statics = {"compress_type": "linear", "kernel_size": 8, "kernel_stride": 4}
    q = ops.cache_append(*x.append_inputs(), *caches, **statics, dispatcher=recorder)
    o, topk_idx = ops.compressed_attention_decode(
        q, *caches[2:4], *x.rows, **STATICS, dispatcher=recorder
    )
    args = (q, *caches[:2], topk_idx, *x.rows, o, x.gate)
    ops.native_sparse_attention_decode(
        *args, block_size=8, window_size=9, softmax_scale=0.5, dispatcher=recorder
    )
    append, compressed, block = recorder.calls
    assert str(append[0]) == "cache_append decode f32_linear_d16_dv24_g3_l8_s4_pe"
    assert append[2:] == (3, 32)
    assert shapes(append[1][10:]) == [*(tuple(c.shape) for c in caches), (3, 6, 16), None]
    assert [c.data_ptr() for c in append[1][10:15]] == [c.data_ptr() for c in caches]
    assert str(compressed[0]) == "compressed_attention decode f32_d16_dv24_g3_l8_s4_b8_k4_i1_c2"
    assert shapes(compressed[1][5:]) == [(3, 6, 24), (2, 3, 4), 0.25, None]
    assert compressed[2:] == (3, 32)
    assert str(block[0]) == "native_sparse_attention decode f32_d16_dv24_g3_b8_k4_w9"
    assert shapes(block[1][6:]) == [(3, 6, 24), (3, 6, 3), (3, 6, 24), 0.5, None]
    assert block[2:] == (3, 32)


def test_decoding_from_pages(recorder: Recorder) -> None:
    """The table is the last argument; the context is what its pages hold."""
    x = Cached()
    (*caches, k_raw), table = x.paged_caches(page_size=16)
    statics = {"compress_type": "linear", "kernel_size": 8, "kernel_stride": 4}
    keywords = {"block_table": table, "dispatcher": recorder}
    q = ops.cache_append(*x.append_inputs(), *caches, k_raw, **statics, **keywords)
    o, topk_idx = ops.compressed_attention_decode(q, *caches[2:], *x.rows, **STATICS, **keywords)
    args = (q, *caches[:2], topk_idx, *x.rows, o, x.gate)
    ops.native_sparse_attention_decode(*args, block_size=8, window_size=9, **keywords)
    for _, args, tokens, context in recorder.calls:
        assert args[-1].data_ptr() == table.data_ptr()
        assert (tokens, context) == (3, 32)


def test_no_tokens_launch_nothing(recorder: Recorder) -> None:
    args, keywords = Packed(seqlens=(0, 0)).block()
    assert ops.native_sparse_attention(*args, **keywords, dispatcher=recorder).shape == (0, 6, 24)
    assert not recorder.calls


def test_float64_has_no_kernels_and_takes_the_reference(recorder: Recorder) -> None:
    args, keywords = Packed(torch.float64).block()
    ops.native_sparse_attention(*args, **keywords, dispatcher=recorder)
    assert not recorder.calls


def test_without_the_interpreter_a_cpu_takes_the_reference(
    recorder: Recorder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET")
    args, keywords = Packed().block()
    ops.native_sparse_attention(*args, **keywords, dispatcher=recorder)
    assert not recorder.calls


def test_a_missing_kernel_is_never_replaced_silently(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    args, keywords = Packed().block()
    strict = Dispatcher("strict", "", {}, on_missing="error")
    with pytest.raises(UnsupportedWorkloadError, match=r"(?s)compress forward.*kernel_stride: 4"):
        ops.native_sparse_attention(*args, **keywords, dispatcher=strict)
    args, keywords = Packed(torch.bfloat16).block()
    with pytest.raises(InvalidInputError, match="wrongly on bfloat16"):
        ops.native_sparse_attention(*args, **keywords)
