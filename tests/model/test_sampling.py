"""Choosing tokens by chance: by the right chances, and again the same with the same seed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.model import InferenceConfig, SamplingConfig
from nsagen.model.sampling import SamplingRows, uniform
from tests.model.tiny import nsa_model, packed_batch

LOGITS = torch.tensor([1.0, 3.0, 2.0, -1.0, 2.5, 0.0])


def draws(config: SamplingConfig, logits: Tensor = LOGITS, count: int = 4000) -> Tensor:
    """How often each token is chosen at `count` positions."""
    rows = SamplingRows.of([config] * count, logits.device)
    tokens = rows.sample(logits.expand(count, -1), torch.arange(count))
    return torch.bincount(tokens, minlength=logits.shape[0]) / count


def test_uniform_numbers() -> None:
    """Spread evenly over seeds and positions, none twice, neighbours unrelated."""
    grid = uniform(torch.arange(100)[:, None], torch.arange(1000)[None])
    assert grid.dtype == torch.float64
    assert grid.min() >= 0
    assert grid.max() < 1
    counts = torch.histc(grid, 20, 0, 1) / grid.numel()
    torch.testing.assert_close(counts, torch.full_like(counts, 0.05), atol=0.003, rtol=0)
    assert grid.unique().numel() == grid.numel()
    one = torch.corrcoef(torch.stack([grid[:, :-1].flatten(), grid[:, 1:].flatten()]))[0, 1]
    assert abs(one) < 0.01


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_chances_are_the_softmax(temperature: float) -> None:
    found = draws(SamplingConfig(temperature, seed=3))
    torch.testing.assert_close(found, (LOGITS / temperature).softmax(-1), atol=0.03, rtol=0)


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 2}, [1, 4]),
        ({"top_k": 100}, [0, 1, 2, 3, 4, 5]),
        ({"top_p": 0.45}, [1]),  # the first alone has 0.46
        ({"top_p": 0.47}, [1, 4]),
        ({"top_p": 0.9}, [1, 2, 4]),
        ({"top_k": 3, "top_p": 0.55}, [1, 4]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of the two left it has 0.62
        ({"top_p": 1e-9}, [1]),
    ],
)
def test_only_the_most_likely_are_chosen(settings: dict[str, Any], kept: list[int]) -> None:
    found = draws(SamplingConfig(temperature=1.0, **settings))
    expected = torch.full_like(LOGITS, float("-inf"))
    expected[kept] = LOGITS[kept]
    torch.testing.assert_close(found, expected.softmax(-1), atol=0.03, rtol=0)
    assert found.nonzero().squeeze(1).tolist() == kept


def test_no_temperature_is_greedy_and_takes_the_first_of_equals() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0])
    assert draws(SamplingConfig(top_k=3, seed=5), logits).tolist() == [0, 1, 0, 0]
    hot = SamplingConfig(temperature=1e6)
    rows = SamplingRows.of([SamplingConfig(), hot], logits.device)
    tokens = rows.sample(logits.expand(2, -1), torch.tensor([0, 0]))
    assert tokens[0] == 1


def test_extreme_logits_choose_a_token() -> None:
    for logits in (
        torch.tensor([float("-inf")] * 3 + [0.0]),
        torch.full((4,), float("nan")),
        torch.tensor([1e30, -1e30, 0.0, 1e30]),
    ):
        found = draws(SamplingConfig(temperature=0.1, top_p=0.5), logits, count=50)
        assert found.sum() == 1


def test_a_sequence_is_the_same_in_any_batch() -> None:
    model = nsa_model(InferenceConfig(4, 64, 12))
    lengths = [9, 20, 14]
    ids, cu_seqlens = packed_batch(lengths)
    configs = [
        SamplingConfig(temperature=1.5, seed=1),
        SamplingConfig(temperature=0.8, top_k=20, seed=2),
        SamplingConfig(),
    ]
    together = model.generate(ids, cu_seqlens, sampling=configs)
    assert torch.equal(model.generate(ids, cu_seqlens, sampling=configs), together)
    for row, prompt, config in zip(together, ids.split(lengths), configs, strict=True):
        alone = torch.tensor([0, prompt.shape[0]], dtype=torch.int32)
        assert torch.equal(model.generate(prompt, alone, sampling=config)[0], row)
    other = model.generate(ids, cu_seqlens, sampling=SamplingConfig(1.5, seed=7))
    assert not torch.equal(other[0], together[0])
    assert torch.equal(together[2], model.generate(ids, cu_seqlens)[2])


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"temperature": -1}, "temperature must be a number at least 0, got -1"),
        ({"temperature": float("nan")}, "temperature must be a number at least 0, got nan"),
        ({"temperature": float("inf")}, "temperature must be a number at least 0, got inf"),
        ({"top_p": 0}, "top_p must be a number above 0 and at most 1, got 0"),
        ({"top_p": 1.5}, "top_p must be a number above 0 and at most 1, got 1.5"),
        ({"top_k": -1}, "top_k must be an integer of at least 0, got -1"),
        ({"seed": 1 << 63}, "seed must be below"),
    ],
)
def test_refusals(settings: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        SamplingConfig(**settings)


def test_as_many_settings_as_sequences() -> None:
    model = nsa_model(InferenceConfig(4, 64, 4))
    with pytest.raises(InvalidInputError, match="one for each of the 2 sequences, got 3"):
        model.generate(*packed_batch([3, 4]), sampling=[SamplingConfig()] * 3)


@pytest.mark.parametrize("kind", [np.float32, np.float64, np.float16, np.int64])
def test_numbers_of_numpy_are_taken_as_pythons(kind: Callable[[float], Any]) -> None:
    config = SamplingConfig(kind(1), np.int64(3), kind(1), seed=np.uint8(7))  # pyright: ignore
    assert repr(config) == "SamplingConfig(temperature=1.0, top_k=3, top_p=1.0, seed=7)"
    for wrong in (np.bool_(True), np.float32("nan"), np.array([0.5]), kind(-1)):
        with pytest.raises(InvalidInputError, match="temperature must be a number at least 0"):
            SamplingConfig(wrong)
    for wrong in (np.bool_(True), np.float32(2), np.array([2]), np.int8(-1)):
        with pytest.raises(InvalidInputError, match="top_k must be an integer of at least 0"):
            SamplingConfig(1.0, wrong)
