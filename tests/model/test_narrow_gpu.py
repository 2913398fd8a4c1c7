"""Caches of one byte an element on a GPU: steps in graphs, and chunks that read the same cache."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.core.workload import CACHE_DTYPES
from nsagen.model import InferenceConfig, ToyNSALlama
from nsagen.model.cache import NSACache
from nsagen.model.fused import CAPTURING
from nsagen.model.prefill import Piece, PrefillRows
from nsagen.ops.reference import dequantize
from tests.model.test_gpu import SHAPE, on_gpu
from tests.model.tiny import nsa_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
LENGTHS = [1, 9, 64, 100, 150]
NEW = 24
WAYS: dict[str, dict[str, Any]] = {
    "in slots": {},
    "in chunks and pages": {"prefill_chunk_size": 37, "paged": True, "page_size": 32},
}


def narrow(cache_dtype: str, **changes: Any) -> ToyNSALlama:
    """A model in bfloat16 whose queries see every block, so that rounding selects no others."""
    limits = InferenceConfig(5, 256, NEW, cache_dtype=cache_dtype)
    sizes = {**SHAPE, "topk": 8}
    return nsa_model(dataclasses.replace(limits, **changes), torch.bfloat16, **sizes).cuda()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_graph_changes_no_token_of_a_narrow_cache(cache_dtype: str, way: str) -> None:
    model = narrow(cache_dtype, **WAYS[way])
    tokens = [model.generate(*on_gpu(LENGTHS), cuda_graph=graph) for graph in (True, False, True)]
    assert torch.equal(tokens[0], tokens[1])
    assert torch.equal(tokens[0], tokens[2])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@torch.no_grad()
def test_a_chunk_of_a_narrow_cache_is_the_steps_in_a_graph(cache_dtype: str, way: str) -> None:
    """Of one sequence behind others' lengths: logits of each token, and what the caches hold."""
    changes = {name: x for name, x in WAYS[way].items() if name != "prefill_chunk_size"}
    model, first = narrow(cache_dtype, **changes), 100
    text = on_gpu([first + NEW])[0]
    by_steps, by_chunk = model.new_cache(), model.new_cache()
    for cache in (by_steps, by_chunk):
        assert isinstance(cache, NSACache)
        cache.reserve(2, first + NEW)
        rows = PrefillRows.of([Piece(2, 0, first)], cache)
        model.hidden(text[:first], rows, cache)
    chunk = PrefillRows.of([Piece(2, first, NEW)], by_chunk)
    assert chunk.context is not None
    every = torch.arange(NEW, device="cuda")
    found = model.pass_logits(text[first:], chunk, by_chunk, every)

    token, position = text[first : first + 1].clone(), torch.full((1,), -1, device="cuda").int()
    slots, graph = torch.full((1,), 2, device="cuda").int(), torch.cuda.CUDAGraph()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):  # an idle row loads kernels, and leaves no trace
        model.step_logits(token, position, slots, by_steps)
    torch.cuda.current_stream().wait_stream(side)
    with CAPTURING, torch.cuda.graph(graph):
        logits = model.step_logits(token, position, slots, by_steps)
    steps: list[Tensor] = []
    for at in range(first, first + NEW):
        token.copy_(text[at : at + 1])
        position.fill_(at)
        graph.replay()
        steps.append(logits[0].clone())
    expected = torch.stack(steps).double()
    assert (found.double() - expected).norm() / expected.norm() < 2e-2
    for one, other in zip(by_steps, by_chunk, strict=True):
        for name in ("k", "v", "ck", "cv"):
            pairs = [(getattr(x, name), getattr(x, f"{name}_scale")) for x in (one, other)]
            values = [dequantize(*pair).double() for pair in pairs]
            assert (values[0] - values[1]).norm() / values[0].norm() < 2e-2, name


@torch.no_grad()
def test_a_chunk_takes_no_memory_but_the_keys_and_values_that_it_reads() -> None:
    """One pass over the pages: no bytes beside their values in the model's dtype."""
    model = narrow("float8_e4m3fn", paged=True, page_size=32)
    cache = model.new_cache()
    assert isinstance(cache, NSACache)
    cache.reserve(0, 200)
    rows = PrefillRows.of([Piece(0, 180, 20)], cache)
    assert rows.context is not None
    cache[0].seen(rows.context, ("k", "v"))  # compiles, and makes indices that all layers read
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    k, v = cache[0].seen(rows.context, ("k", "v"))
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before <= k.nbytes + v.nbytes + 2 * 512
