"""The public block selection and log-sum-exp: on a CPU the reference's results, and contracts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen import ops
from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference

from .inputs import STATICS, Cached, Packed

WINDOWS = {name: STATICS[name] for name in ("kernel_size", "kernel_stride")}
INDEX: dict[str, Any] = {
    **STATICS,
    **{"kernel_size": 1, "kernel_stride": 1},
    **{"score_norm": "none", "score_heads": "each", "score_pool": "max"},
}


def test_the_reference_on_a_cpu() -> None:
    x = Packed()
    ck, ends = ops.avgpool_compress(x.k, None, x.cu_seqlens, 8, 4)
    args = (x.q, ck, x.cu_seqlens, ends)
    lse = ops.compressed_lse(*args, **WINDOWS)
    assert torch.equal(lse, reference.compressed_lse(*args, **WINDOWS))
    args = (x.q, ck, lse, x.cu_seqlens, ends)
    for pool in ("overlap", "max"):
        came = ops.block_selection(*args, **STATICS, score_pool=pool)
        assert torch.equal(came, reference.block_selection(*args, **STATICS, score_pool=pool))


def test_an_index_selects_once_per_query_head() -> None:
    x = Packed()
    args = (x.q, x.k[:, :1], None, x.cu_seqlens, x.cu_seqlens)
    came = ops.block_selection(*args, **INDEX)
    assert came.shape == (6, 60, 4)
    assert torch.equal(came, reference.block_selection(*args, **INDEX))


def test_nothing_learns_through_a_selection() -> None:
    x = Packed(requires_grad=True)
    ck, ends = ops.avgpool_compress(x.k, None, x.cu_seqlens, 8, 4)
    lse = ops.compressed_lse(x.q, ck, x.cu_seqlens, ends, **WINDOWS)
    came = ops.block_selection(x.q, ck, lse, x.cu_seqlens, ends, **STATICS)
    assert not lse.requires_grad
    assert not came.requires_grad


def test_compiled_code_sees_the_shapes() -> None:
    x = Packed()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def chosen(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return ops.block_selection(q, k, None, x.cu_seqlens, x.cu_seqlens, **INDEX) + 1

    expected = ops.block_selection(x.q, x.k[:, :1], None, x.cu_seqlens, x.cu_seqlens, **INDEX)
    assert torch.equal(chosen(x.q, x.k[:, :1].contiguous()), expected + 1)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"score_norm": "softmax"}, "lse must be given with score_norm 'softmax'"),
        ({"score_norm": "sigmoid"}, "score_norm must be one of softmax, none"),
        ({"score_pool": "overlap"}, "score_pool 'overlap' needs score_norm 'softmax'"),
        ({"topk": 0}, "topk must be positive"),
        ({"softmax_scale": 0.0}, "softmax_scale: must be positive"),
    ],
)
def test_what_is_refused(change: dict[str, Any], text: str) -> None:
    x = Packed()
    with pytest.raises(InvalidInputError, match=text):
        ops.block_selection(
            x.q, x.k[:, :1], None, x.cu_seqlens, x.cu_seqlens, **{**INDEX, **change}
        )


def test_decoding_selects_what_the_prompt_selects() -> None:
    """Each token as the last one so far, from a cache, in both forms of a cache."""
    x = Packed(seqlens=(40,))
    ck, ends = ops.avgpool_compress(x.k, None, x.cu_seqlens, 8, 4)
    lse = ops.compressed_lse(x.q, ck, x.cu_seqlens, ends, **WINDOWS)
    for form in ("overlap", "max"):
        whole = ops.block_selection(x.q, ck, lse, x.cu_seqlens, ends, **STATICS, score_pool=form)
        rows = torch.arange(40, dtype=torch.int32), torch.zeros(40, dtype=torch.int32)
        came = ops.block_selection_decode(x.q, ck[None], *rows, **STATICS, score_pool=form)
        assert torch.equal(came, whole)
    index = (x.q, x.k[:, :1], None, x.cu_seqlens, x.cu_seqlens)
    cache = x.k[:, :1].contiguous()
    table = torch.tensor([[3, 0, 4, 1, 2]], dtype=torch.int32)
    pages = torch.empty(5, 8, 1, 16)
    pages[table[0].long()] = cache.view(5, 8, 1, 16)
    whole = ops.block_selection(*index, **INDEX)
    assert torch.equal(ops.block_selection_decode(x.q, cache[None], *rows, **INDEX), whole)
    assert torch.equal(
        ops.block_selection_decode(x.q, pages, *rows, **INDEX, block_table=table), whole
    )


def test_decoding_agrees_with_compressed_attentions_own_selection() -> None:
    x = Cached()
    args = (x.q, x.ck_cache, *x.rows)
    _, expected = ops.compressed_attention_decode(x.q, x.ck_cache, x.cv_cache, *x.rows, **STATICS)
    assert torch.equal(ops.block_selection_decode(*args, **STATICS), expected)


@pytest.mark.parametrize("new_tokens", [1, 3, 40])
def test_appended_means_are_those_of_the_whole(new_tokens: int) -> None:
    """Token by token, a few at a time, or all at once: the compressed keys of the prompt."""
    x = Packed(seqlens=(40,))
    ck, _ = ops.avgpool_compress(x.k, None, x.cu_seqlens, 8, 4)
    cache, slot = torch.full((1, 10, 2, 16), torch.inf), torch.zeros(1, dtype=torch.int32)
    for end in range(new_tokens, 40 + new_tokens, new_tokens):
        position = torch.tensor([min(end, 40) - 1], dtype=torch.int32)
        ops.pool_append(x.k[None], cache, position, slot, **WINDOWS, new_tokens=new_tokens)
    torch.testing.assert_close(cache[0, :9], ck)
    assert cache[0, 9].isinf().all()
