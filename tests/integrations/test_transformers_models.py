"""Every model that NSA fits into and every rope type, against the dense model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from packaging.version import Version  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from nsagen.integrations.transformers_attention import TransformersNSA  # noqa: E402
from tests.integrations.tiny import (  # noqa: E402
    KINDS,
    as_dense,
    build,
    dense,
    distance,
    sparse,
    tokens,
    trained,
)

THETA = {"rope_theta": 10000.0}
ROPES: dict[str, tuple[str, dict[str, Any]]] = {
    "yarn": (
        "Llama",
        {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    ),
    "llama3": (
        "Llama",
        {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ),
    "linear": ("Qwen2", {"rope_type": "linear", "factor": 2.0}),
    "dynamic": ("Llama", {"rope_type": "dynamic", "factor": 2.0}),
    "longrope": (
        "Phi3",
        {
            "rope_type": "longrope",
            "partial_rotary_factor": 0.5,
            "short_factor": [1.0, 1.1, 1.2, 1.3],
            "long_factor": [1.0, 2.0, 3.0, 4.0],
            "original_max_position_embeddings": 48,
        },
    ),
    "partial": (
        "Phi3",
        {"rope_type": "default", "partial_rotary_factor": 0.25},
    ),
}


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_with_every_block_and_gates_of_one_it_is_the_dense_model(kind: str) -> None:
    ids, mask = tokens(2, 60), torch.ones(2, 60, dtype=torch.long)
    mask[1, :9] = 0
    model = dense(kind)
    expected, logits = (one(ids, attention_mask=mask).logits for one in (model, as_dense(model)))
    assert distance(logits[mask == 1], expected[mask == 1]) < 1e-5


@pytest.mark.parametrize("kind", KINDS)
@torch.no_grad()
def test_generate_with_a_cache_is_generate_without_and_after_saving(
    kind: str, tmp_path: Path
) -> None:
    model, ids = trained(sparse(kind)), tokens(2, 40)
    mask = torch.ones_like(ids)
    mask[1, :7] = 0
    wanted = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
    cached, plain = (model.generate(ids, use_cache=use, **wanted) for use in (True, False))
    assert torch.equal(cached, plain)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(again) is type(model)
    assert torch.equal(again(ids).logits, model(ids).logits)


@pytest.mark.parametrize("name", ROPES)
@torch.no_grad()
def test_rope_of_every_type_is_the_dense_models(name: str) -> None:
    """In short rows and in rows longer than the model was trained for."""
    kind, parameters = ROPES[name]
    longer = {"max_position_embeddings": 48} if name == "dynamic" else {}
    model = build(KINDS[kind], rope_parameters={**THETA, **parameters}, **longer)
    sparse_model = as_dense(model)
    for length in (40, 90):
        ids = tokens(2, length)
        assert distance(sparse_model(ids).logits, model(ids).logits) < 1e-5


@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5.24"),
    reason="its generate gives Phi-3 one token without the cache where rope changes",
)
@torch.no_grad()
def test_longrope_goes_from_short_to_long_as_the_dense_model_does() -> None:
    kind, parameters = ROPES["longrope"]
    # Where Phi-3's generate looks for the length at which it computes its cache anew.
    original = {"original_max_position_embeddings": 48}
    model = build(KINDS[kind], rope_parameters={**THETA, **parameters}, **original)
    wanted = {"max_new_tokens": 12, "do_sample": False}
    expected, generated = (
        one.generate(tokens(1, 42), **wanted) for one in (model, as_dense(model))
    )
    assert torch.equal(generated, expected)


@torch.no_grad()
def test_dynamic_rope_generates_behind_its_cache_as_the_dense_model_does() -> None:
    kind, parameters = ROPES["dynamic"]
    rope = {"rope_parameters": {**THETA, **parameters}, "max_position_embeddings": 48}
    model = build(KINDS[kind], **rope)
    wanted = {"max_new_tokens": 12, "do_sample": False}
    expected, generated = (
        one.generate(tokens(1, 42), **wanted) for one in (model, as_dense(model))
    )
    assert torch.equal(generated, expected)


@torch.no_grad()
def test_positions_past_max_position_embeddings() -> None:
    model = build(KINDS["Llama"], max_position_embeddings=32)
    ids = tokens(1, 50)
    assert distance(as_dense(model)(ids).logits, model(ids).logits) < 1e-5


def test_sliding_layers_among_others_stay_dense() -> None:
    for kind in ("Gemma3", "Qwen2", "Qwen3"):
        alternating = {
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 24,
            "use_sliding_window": True,
        }
        model = as_dense(build(KINDS[kind], **alternating))
        swapped = [isinstance(layer.self_attn, TransformersNSA) for layer in model.model.layers]
        assert swapped == [False, True]


@torch.no_grad()
def test_a_model_whose_layers_all_slide_sees_everything() -> None:
    model = build(KINDS["Mistral"], sliding_window=16)
    wide = build(KINDS["Mistral"], sliding_window=None)
    ids = tokens(2, 50)
    assert distance(as_dense(model)(ids).logits, wide(ids).logits) < 1e-5


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("Qwen2", "Model"),
        ("Llama", "ForSequenceClassification"),
        ("Gemma3", "TextModel"),
        ("Qwen3", "ForTokenClassification"),
        ("Mistral", "ForQuestionAnswering"),
    ],
)
@torch.no_grad()
def test_any_head(kind: str, head: str, tmp_path: Path) -> None:
    model, ids = build(KINDS[kind], head), tokens(2, 30)
    swapped = as_dense(model)
    assert distance(swapped(ids)[0], model(ids)[0]) < 1e-5
    swapped.save_pretrained(tmp_path)
    assert torch.equal(type(swapped).from_pretrained(tmp_path)(ids)[0], swapped(ids)[0])


@torch.no_grad()
def test_separate_keys_start_as_copies_of_a_joined_projection() -> None:
    ids = tokens(2, 10)
    model = sparse("Phi3", branch_kv="separate")
    assert distance(model(ids).logits, dense("Phi3")(ids).logits) < 0.01
