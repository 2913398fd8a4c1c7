"""Caches of one byte an element: half the memory, and the same tokens however they arrive."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import CACHE_DTYPES, COMPRESS_TYPES
from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    NSACache,
    ToyLlama,
    ToyNSALlama,
    ToyNSALlamaConfig,
)
from nsagen.model.cache import check_narrow_cache
from nsagen.model.prefill import Piece, PrefillRows
from nsagen.ops.reference import dequantize
from tests.model.test_prefill import in_pieces
from tests.model.test_serving import collect
from tests.model.tiny import dense_config, nsa_config, nsa_model, packed_batch

LIMITS = InferenceConfig(4, 128, 8, cache_dtype="float8_e4m3fn")
PAGED = dataclasses.replace(LIMITS, paged=True, page_size=16)
INT8 = dataclasses.replace(LIMITS, cache_dtype="int8")


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_bytes_are_what_is_allocated_and_half_of_bfloat16(cache_dtype: str, paged: bool) -> None:
    """An element takes a byte, and a head of 128 a scale of 4: 132 bytes in place of 256."""
    config = ToyNSALlamaConfig(num_hidden_layers=2)
    plain = InferenceConfig(4, 4096, paged=paged, page_size=64)
    limits = dataclasses.replace(plain, cache_dtype=cache_dtype)
    cache = NSACache(config, limits, "meta")
    assert cache.nbytes == limits.cache_bytes(config)
    assert 132 / 256 <= cache.nbytes / plain.cache_bytes(config) < 0.53


@pytest.mark.parametrize("limits", [LIMITS, INT8], ids=["float8", "int8"])
@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
@pytest.mark.parametrize("sizes", [[1] * 20 + [50], [33, 37], [3, 67]], ids=str)
def test_pieces_leave_the_cache_of_the_whole(
    limits: InferenceConfig, compress_type: str, sizes: list[int]
) -> None:
    """Every number and scale, to the bit."""
    model = nsa_model(limits, compress_type=compress_type)
    prompts = list(packed_batch([70] * 2)[0].split(70))
    logits, cache = in_pieces(model, prompts, sizes)
    expected, whole = in_pieces(model, prompts, [70])
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert isinstance(cache, NSACache)
    assert isinstance(whole, NSACache)
    for one, other in zip(cache, whole, strict=True):
        for name, x in one.tensors().items():
            y = other.tensors()[name]
            if name.endswith("_raw"):
                torch.testing.assert_close(x, y, rtol=1e-9, atol=1e-9)
            else:
                assert torch.equal(
                    x.contiguous().view(torch.int8), y.contiguous().view(torch.int8)
                ), name


@pytest.mark.parametrize("limits", [LIMITS, PAGED, INT8], ids=["float8", "in pages", "int8"])
def test_decoding_leaves_the_cache_of_prefill(limits: InferenceConfig) -> None:
    model = nsa_model(limits)
    ids, _ = packed_batch([60])
    cache, whole = model.new_cache(), model.new_cache()
    for one in (cache, whole):
        one.reserve(0, 60)
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (37, 60)]
    model.prefill(ids[:37], ends[0], [37], cache)
    slots = torch.zeros(1, dtype=torch.int32)
    logits = torch.empty(0)
    for t in range(37, 60):
        position = torch.tensor([t], dtype=torch.int32)
        logits = model.decode(ids[t : t + 1], position, slots, cache)
    expected = model.prefill(ids, ends[1], [60], whole)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    for one, other in zip(cache, whole, strict=True):
        for name in ("k", "v", "ck", "cv"):
            pairs = [(getattr(x, name), getattr(x, f"{name}_scale")) for x in (one, other)]
            assert torch.equal(*(dequantize(*pair) for pair in pairs)), name


@pytest.mark.parametrize("limits", [LIMITS, PAGED, INT8], ids=["float8", "in pages", "int8"])
@torch.no_grad()
def test_a_chunk_is_the_steps(limits: InferenceConfig) -> None:
    """Each token's logits, beside another sequence that has less before its chunk."""
    model, first, new = nsa_model(limits), (37, 9), 23
    texts = packed_batch([first[0] + new, first[1] + new])[0].split([n + new for n in first])
    by_steps, by_chunk = model.new_cache(), model.new_cache()
    for cache in (by_steps, by_chunk):
        for slot, (text, n) in enumerate(zip(texts, first, strict=True)):
            cache.reserve(slot, n + new)
            rows = PrefillRows.of([Piece(slot, 0, n)], cache)
            model.hidden(text[:n], rows, cache)
    pieces = [Piece(slot, n, new) for slot, n in enumerate(first)]
    tokens = torch.cat([text[n:] for text, n in zip(texts, first, strict=True)])
    found = model.pass_logits(tokens, PrefillRows.of(pieces, by_chunk), by_chunk)
    slots, starts = torch.arange(2).int(), torch.tensor(first).int()
    steps = [
        model.decode(torch.stack([text[n + i] for text, n in pairs]), starts + i, slots, by_steps)
        for pairs in [list(zip(texts, first, strict=True))]
        for i in range(new)
    ]
    expected = torch.stack(steps, 1).flatten(0, 1)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6, check_dtype=False)


def near(model: ToyNSALlama, plain: ToyNSALlama, prompt: torch.Tensor) -> float:
    """The relative error of the last token's logits."""
    logits = [in_pieces(m, [prompt], [prompt.shape[0]])[0] for m in (model, plain)]
    return float((logits[0] - logits[1]).norm() / logits[1].norm())


@pytest.mark.parametrize(("limits", "bound"), [(LIMITS, 0.2), (INT8, 0.05)], ids=["float8", "int8"])
def test_logits_are_near_those_of_a_full_cache(limits: InferenceConfig, bound: float) -> None:
    """Of random weights, which keep no distance between blocks' scores."""
    model, plain = (nsa_model(x) for x in (limits, dataclasses.replace(limits, cache_dtype=None)))
    assert 0 < near(model, plain, packed_batch([70])[0]) < bound


@pytest.mark.parametrize("changes", [{}, {"paged": True, "page_size": 16, "share_prefixes": True}])
@pytest.mark.parametrize("chunk", [None, 13])
def test_sequences_get_the_same_tokens_together_and_alone(
    changes: dict[str, Any], chunk: int | None
) -> None:
    """In chunks or whole, in slots or in pages that sequences with one beginning share."""
    model = nsa_model(dataclasses.replace(LIMITS, prefill_chunk_size=chunk, **changes))
    prompt = packed_batch([60])[0].tolist()
    prompts = [prompt, prompt[:40], prompt[:35] + prompt[:9], prompt[50:]]
    alone = nsa_model(LIMITS)
    expected = []
    for each in prompts:
        cu_seqlens = torch.tensor([0, len(each)], dtype=torch.int32)
        expected.append(alone.generate(torch.tensor(each), cu_seqlens).tolist()[0])
    batch = ContinuousBatch(model)
    numbers = [batch.add(each) for each in prompts]
    tokens = collect(batch)
    assert [tokens[number] for number in numbers] == expected


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"branch_kv": "separate"}, "needs branches that share keys and values, got branch_kv='se"),
    ],
)
def test_models_that_it_is_not_for(changes: dict[str, str], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        nsa_model(LIMITS, **changes)


def test_other_refusals() -> None:
    with pytest.raises(InvalidInputError, match="one of float8_e4m3fn, int8, got 'float8_e5m2'"):
        InferenceConfig(cache_dtype="float8_e5m2")
    with pytest.raises(InvalidInputError, match="float8_e4m3fn with ToyLlamaConfig; leave it out"):
        ToyLlama(dense_config(), LIMITS)
    with pytest.raises(InvalidInputError, match=r"bfloat16 or float32, .* got torch\.float16"):
        NSACache(nsa_config(), LIMITS, dtype=torch.float16)


@pytest.mark.parametrize("target", ["cuda:80", "cuda:86", "hip:gfx942"])
def test_a_gpu_that_cannot_convert_float8_is_told_of_int8(
    target: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a cache of any kind is made, before it takes memory."""
    monkeypatch.setattr("nsagen.model.cache.target_of", lambda device: target)
    given = (torch.device("cuda"), torch.bfloat16)
    with pytest.raises(InvalidInputError, match=f"8.9 or newer, got {target}; use int8"):
        check_narrow_cache("cache", "float8_e4m3fn", *given)
    check_narrow_cache("cache", "int8", *given)
    check_narrow_cache("cache", None, *given)
