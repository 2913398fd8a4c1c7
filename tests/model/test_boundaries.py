"""Every way to run a prompt gives the same tokens, at every length around every boundary."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.model import InferenceConfig, ToyNSALlama
from tests.model.tiny import SPARSITY, nsa_model, packed_batch

STEPS = 5
LONGEST = 3 * SPARSITY["window_size"]

WAYS: dict[str, dict[str, Any]] = {
    "contiguous": {},
    "in pages": {"paged": True, "page_size": 16},
    "in chunks": {"prefill_chunk_size": 13},
    "in chunks and pages": {"prefill_chunk_size": 40, "paged": True, "page_size": 32},
}

# Shapes of llama8b in a narrow model: the head size, windows, blocks and both group sizes.
LLAMA8B: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "head_dim": 128,
    "kernel_size": 32,
    "kernel_stride": 16,
    "block_size": 64,
    "window_size": 512,
    "max_position_embeddings": 2048,
}


def forced(model: ToyNSALlama, ids: Tensor, lengths: list[int], tokens: Tensor) -> Tensor:
    """forward's greedy choices at the places of `tokens`, [batch, steps]."""
    texts = [torch.cat([a, b]) for a, b in zip(ids.split(lengths), tokens, strict=True)]
    ends = torch.tensor([0] + [len(text) for text in texts]).cumsum(0).to(torch.int32)
    choices = model(torch.cat(texts), ends).argmax(-1)
    steps = tokens.shape[1]
    return torch.stack([choices[end - steps - 1 : end - 1] for end in ends[1:].tolist()])


@torch.no_grad()
def check_all_ways(model: ToyNSALlama, lengths: list[int], unit: int = 16) -> None:
    """All `WAYS` and teacher forcing agree on every token of a batch of these prompts."""
    ids, cu_seqlens = packed_batch(lengths)
    limits = InferenceConfig(len(lengths), max(lengths) + STEPS, STEPS)
    expected = None
    for name, changes in WAYS.items():
        scaled = {k: v if k == "paged" else v * unit // 16 for k, v in changes.items()}
        model.inference_config = dataclasses.replace(limits, **scaled)
        tokens = model.generate(ids, cu_seqlens)
        if expected is None:
            expected = forced(model, ids, lengths, tokens)
        wrong = (tokens != expected).any(1).nonzero().squeeze(1).tolist()
        assert not wrong, f"{name}: prompt lengths {[lengths[i] for i in wrong]} differ"


def test_prompts_around_every_boundary() -> None:
    """One less, exactly and one more than windows, strides, blocks, pages and chunks."""
    near = {n + d for n in (1, 4, 8, 12, 13, 16, 26, 32, 39, 48, 64, 80) for d in (-1, 0, 1)}
    check_all_ways(nsa_model(), sorted(near - {0}))


@pytest.mark.slow
@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
@pytest.mark.parametrize("changes", [{}, {"num_attention_heads": 6}, {"local_blocks": 0}])
def test_every_length_to_three_windows(compress_type: str, changes: dict[str, int]) -> None:
    model = nsa_model(compress_type=compress_type, **changes)
    check_all_ways(model, list(range(1, LONGEST + 1)))


@pytest.mark.parametrize("way", WAYS)
def test_an_empty_prompt_is_refused_by_name(way: str) -> None:
    model = nsa_model(InferenceConfig(4, 64, STEPS, **WAYS[way]))
    with pytest.raises(InvalidInputError, match="sequence 1: a prompt must have at least one"):
        model.generate(*packed_batch([3, 0, 5]))


def test_shapes_of_llama8b() -> None:
    model = nsa_model(**LLAMA8B, num_attention_heads=8, num_key_value_heads=2, topk=16)
    check_all_ways(model, [1, 47, 64, 513], unit=64)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("heads", "topk"), [((32, 2), 8), ((32, 8), 16)], ids=["guide", "Llama 3.1"]
)
def test_many_lengths_on_shapes_of_llama8b(heads: tuple[int, int], topk: int) -> None:
    shape = {"num_attention_heads": heads[0], "num_key_value_heads": heads[1], "topk": topk}
    lengths = [1, 15, 16, 31, 32, 33, 63, 64, 65, 127, 128, 511, 512, 513, 1023, 1025, 1536]
    check_all_ways(nsa_model(**LLAMA8B, **shape), lengths, unit=64)
