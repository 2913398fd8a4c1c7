"""A decoding step: its buffers stay where they are, and it never asks the device."""

from __future__ import annotations

import pytest
import torch

from nsagen.model import InferenceConfig, SamplingConfig, ToyLlama, ToyNSALlama
from nsagen.model.step import DecodeStep, Row
from tests.model.tiny import dense_config, nsa_model, packed_batch

LIMITS = InferenceConfig(4, 64)
GREEDY = SamplingConfig()
WARM = SamplingConfig(temperature=1.0, top_k=5, top_p=0.9, seed=3)


def addresses(step: DecodeStep) -> list[int]:
    sampling = step.sampling
    tensors = (step.tokens, step.positions, step.slots, step.newest)
    tensors += (sampling.temperature, sampling.top_p, sampling.top_k, sampling.seed)
    return [tensor.data_ptr() for tensor in tensors]


@pytest.mark.parametrize("dense", [False, True], ids=["nsa", "dense"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_a_step_reads_no_value_on_the_host(dense: bool, sampled: bool) -> None:
    """On the meta device nothing has a value: reading one on the host would raise.

    What depends on no value can be captured in a CUDA graph.
    """
    model: ToyNSALlama | ToyLlama = ToyLlama(dense_config(), LIMITS) if dense else nsa_model(LIMITS)
    model = model.to(torch.bfloat16).to("meta")
    step = DecodeStep(model, model.new_cache())
    assert step.compute(3, sampled).shape == (3,)


@pytest.mark.parametrize("compress_type", ["weightedpool", "linear", "mlp"])
def test_a_step_on_a_narrow_cache_reads_no_value_either(compress_type: str) -> None:
    limits = InferenceConfig(4, 64, cache_dtype="int8")
    model = nsa_model(limits, compress_type=compress_type).to(torch.bfloat16).to("meta")
    assert DecodeStep(model, model.new_cache()).compute(3, sampled=False).shape == (3,)


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "in pages"])
def test_state_stays_in_place_over_changes_of_the_batch(paged: bool) -> None:
    model = nsa_model(InferenceConfig(4, 64, paged=paged, page_size=16))
    cache = model.new_cache()
    for slot in range(4):
        cache.reserve(slot, 64)
    step = DecodeStep(model, cache)
    before = addresses(step)
    ids, cu_seqlens = packed_batch([9, 20])
    with torch.no_grad():
        first = model.prefill(ids, cu_seqlens, [9, 20], cache, slots=[2, 0]).argmax(-1)
        step.newest[torch.tensor([2, 0])] = first
        step.fill([Row(2, 9, GREEDY), Row(0, 20, WARM)], kept=[])
        step.run(2, cuda_graph=True)  # a CPU has no graphs and runs as ever
        assert step.positions.tolist() == [10, 21, -1, -1]
        newest = step.tokens[:2].clone()
        step.fill([Row(0, 21, GREEDY)], kept=[1])
        assert step.tokens[0] == newest[1]
        assert step.positions.tolist() == [21, -1, -1, -1]
        step.run(2, cuda_graph=False)
    assert addresses(step) == before


@pytest.mark.parametrize("dense", [False, True], ids=["nsa", "dense"])
def test_idle_rows_change_nothing_in_the_cache(dense: bool) -> None:
    """A graph is warmed up on idle rows."""
    model: ToyNSALlama | ToyLlama = ToyLlama(dense_config(), LIMITS) if dense else nsa_model(LIMITS)
    model = model.double()
    cache = model.new_cache()
    ids, cu_seqlens = packed_batch([9, 20])
    with torch.no_grad():
        model.prefill(ids, cu_seqlens, [9, 20], cache)
        before = [tensor.clone() for tensor in cache.tensors()]
        DecodeStep(model, cache).compute(4, sampled=True)
    assert all(map(torch.equal, before, cache.tensors()))
