"""Rope frequencies against the formula as Transformers states it, and tables that stay exact."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable

import pytest
import torch

from nsagen.core.errors import InvalidInputError
from nsagen.model import RopeConfig, ToyLlama, ToyNSALlama
from nsagen.model.rope import RotaryEmbedding, inverse_frequencies, rope_tables
from tests.model.tiny import dense_config, nsa_config, packed_batch


def llama3_frequency(pair: int, config: RopeConfig) -> float:
    """One frequency by cases, in float64."""
    assert config.rope_scaling is not None
    scaling = config.rope_scaling
    frequency = config.rope_theta ** (-2 * pair / config.head_dim)
    wavelength = 2 * math.pi / frequency
    original = scaling["original_max_position_embeddings"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if wavelength < original / high:
        return frequency
    if wavelength > original / low:
        return frequency / scaling["factor"]
    smooth = (original / wavelength - low) / (high - low)
    return (1 - smooth) * frequency / scaling["factor"] + smooth * frequency


@pytest.mark.parametrize("head_dim", [32, 128])
@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_frequencies(head_dim: int, factor: float) -> None:
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = RopeConfig(head_dim=head_dim, rope_scaling=scaling)
    expected = [llama3_frequency(pair, config) for pair in range(head_dim // 2)]
    actual = inverse_frequencies(config)
    assert actual.dtype == torch.float32
    torch.testing.assert_close(actual.double(), torch.tensor(expected).double(), rtol=1e-6, atol=0)


def test_llama3_leaves_fast_pairs_and_divides_slow_ones() -> None:
    plain = inverse_frequencies(RopeConfig(rope_scaling=None))
    scaled = inverse_frequencies(RopeConfig())
    assert torch.equal(scaled[:20], plain[:20])
    torch.testing.assert_close(scaled[-20:], plain[-20:] / 8)


def test_tables_hold_hand_computed_values() -> None:
    cos, sin = rope_tables(RopeConfig(128, head_dim=16, rope_theta=10000.0, rope_scaling=None))
    assert cos.shape == sin.shape == (128, 8)
    assert cos.dtype == sin.dtype == torch.float32
    assert cos[0].tolist() == [1.0] * 8
    assert sin[1, 0].item() == pytest.approx(math.sin(1), abs=1e-7)
    assert cos[100, 4].item() == pytest.approx(math.cos(1), abs=1e-6)
    assert sin[10, 7].item() == pytest.approx(math.sin(10 * 10000 ** (-7 / 8)), abs=1e-7)


def test_tables_stay_float32_and_out_of_the_state_dict() -> None:
    rope = RotaryEmbedding(RopeConfig(64, head_dim=16))
    exact = rope.cos.clone()
    for dtype in (torch.bfloat16, torch.float64):
        rope = copy.deepcopy(rope).to(dtype)
        assert rope.cos.dtype == rope.sin.dtype == torch.float32
        assert torch.equal(rope.cos, exact)
    assert rope.state_dict() == {}


@pytest.mark.parametrize(
    "make", [lambda: ToyNSALlama(nsa_config()), lambda: ToyLlama(dense_config())]
)
def test_a_model_built_on_meta_brings_its_tables_with_assigned_weights(
    make: Callable[[], ToyNSALlama | ToyLlama],
) -> None:
    model, batch = make(), packed_batch([9, 30])
    with torch.device("meta"):
        empty = make()
    empty.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(empty(*batch), model(*batch))
    again = pickle.loads(pickle.dumps(empty))
    assert torch.equal(again(*batch), model(*batch))


def test_a_model_built_on_meta_gets_its_tables_when_it_lands() -> None:
    with torch.device("meta"):
        rope = RotaryEmbedding(RopeConfig(64, head_dim=16))
    assert rope.cos.is_meta
    rope = rope.to_empty(device="cpu")
    assert torch.equal(rope.cos, rope_tables(rope.config)[0])


@pytest.mark.parametrize(
    ("scaling", "text"),
    [
        ({"type": "linear", "factor": 2.0}, "got 'linear'; use a model that was trained with one"),
        ({"factor": 2.0}, "got factor; name the rope_type that they belong to"),
    ],
)
def test_no_advice_leads_to_another_rope(scaling: dict[str, object], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        RopeConfig(rope_scaling=scaling)
