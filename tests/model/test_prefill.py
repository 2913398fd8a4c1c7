"""Prefill in pieces leaves the cache and the logits of prefill at once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from nsagen.core.errors import CapacityError
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.model import InferenceConfig, ToyLlama, ToyNSALlama
from nsagen.model.cache import NSACache
from nsagen.model.prefill import Piece, PrefillRows
from tests.model.tiny import dense_config, nsa_config, nsa_model, packed_batch

LIMITS = InferenceConfig(max_batch_size=3, max_length=128)


def in_pieces(
    model: ToyNSALlama | ToyLlama, prompts: list[Tensor], sizes: list[int]
) -> tuple[Tensor, object]:
    """Prefill prompts of equal length, `sizes` tokens of each at a time: logits and cache."""
    cache, start = model.new_cache(), 0
    logits = torch.empty(0)
    for size in sizes:
        ids = torch.cat([prompt[start : start + size] for prompt in prompts])
        lengths = [size] * len(prompts)
        cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
        starts = [start] * len(prompts)
        with torch.no_grad():
            logits = model.prefill(ids, cu_seqlens, lengths, cache, starts=starts)
        start += size
    return logits, cache


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
@pytest.mark.parametrize(
    "sizes", [[1] * 20 + [50], [7, 1, 8, 54], [8, 4, 58], [33, 37], [69, 1], [3, 67]], ids=str
)
def test_pieces_leave_the_cache_of_the_whole(compress_type: str, sizes: list[int]) -> None:
    model = nsa_model(LIMITS, compress_type=compress_type)
    total = sum(sizes)
    prompts = list(packed_batch([total] * 2)[0].split(total))
    logits, cache = in_pieces(model, prompts, sizes)
    expected, whole = in_pieces(model, prompts, [total])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
    assert isinstance(cache, NSACache)
    assert isinstance(whole, NSACache)
    for one, other in zip(cache, whole, strict=True):
        for name in ("k", "v", "ck", "cv", "k_raw"):
            a, b = getattr(one, name), getattr(other, name)
            torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9, msg=f"{name} differs")


def test_pieces_of_a_dense_model() -> None:
    model = ToyLlama(dense_config(), LIMITS, generator=torch.Generator().manual_seed(1)).double()
    prompts = list(packed_batch([40] * 2)[0].split(40))
    logits, _ = in_pieces(model, prompts, [1, 6, 33])
    expected, _ = in_pieces(model, prompts, [40])
    torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)


def test_one_sequence_reads_its_cache_in_place() -> None:
    cache = NSACache(nsa_config(), LIMITS, dtype=torch.float32)
    rows = PrefillRows.of([Piece(slot=2, start=30, length=5)], cache)
    assert rows.context is not None
    assert rows.windows is not None
    assert rows.windows.context is not None
    for context, tensor, entries in (
        (rows.context, cache[0].k, 35),
        (rows.windows.context, cache[0].ck, 7),
    ):
        seen = context.of(tensor)
        assert seen.data_ptr() == tensor[2].data_ptr()
        assert torch.equal(tensor[context.index], seen)
        assert seen.shape[0] == entries


def test_ragged_pieces_some_of_which_begin() -> None:
    """Sequences in other slots than their order, at other places, one of them at its start."""
    model = nsa_model(LIMITS)
    ids, _ = packed_batch([90])
    cache = model.new_cache()
    with torch.no_grad():
        model.prefill(ids[:21], torch.tensor([0, 21], dtype=torch.int32), [21], cache, slots=[2])
        ends = torch.tensor([0, 10, 15, 50], dtype=torch.int32)
        pieces = torch.cat([ids[:10], ids[21:26], ids[40:75]])
        logits = model.prefill(pieces, ends, [10, 5, 35], cache, slots=[0, 2, 1], starts=[0, 21, 0])
        expected = [
            model(text, torch.tensor([0, text.shape[0]], dtype=torch.int32))[-1]
            for text in (ids[:10], ids[:26], ids[40:75])
        ]
    torch.testing.assert_close(logits, torch.stack(expected), rtol=1e-5, atol=1e-5)


def test_a_slot_without_pages_is_refused() -> None:
    model = nsa_model(InferenceConfig(2, 64, paged=True, page_size=16))
    ids, cu_seqlens = packed_batch([20])
    cache = model.new_cache()
    cache.reserve(0, 16)
    with pytest.raises(CapacityError, match=r"slot 0 must hold 20 tokens, got room for 16"):
        model.prefill(ids, cu_seqlens, [20], cache)
