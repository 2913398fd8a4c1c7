"""Every model that NSA fits into and every rope type, against the dense model."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from packaging.version import Version  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.transformers import apply_nsa  # noqa: E402
from nsagen.integrations.transformers_attention import TransformersNSA  # noqa: E402
from tests.integrations.tiny import (  # noqa: E402
    ATTENTION,
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
    # Phi-3's generate recomputes its cache at this length.
    original = {"original_max_position_embeddings": 48}
    model = build(KINDS[kind], rope_parameters={**THETA, **parameters}, **original)
    wanted = {"max_new_tokens": 12, "do_sample": False}
    expected, generated = (
        one.generate(tokens(1, 42), **wanted) for one in (model, as_dense(model))
    )
    assert torch.equal(generated, expected)


@torch.no_grad()
def test_dynamic_rope_generates_with_a_cache_as_the_dense_model_does() -> None:
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


class Int8Weight(nn.Linear):
    """As bitsandbytes has it: an integer weight, and what scales it beside."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__(layer.in_features, layer.out_features, layer.bias is not None)
        scale = layer.weight.detach().abs().amax(1, keepdim=True) / 127
        self.weight = nn.Parameter((layer.weight / scale).round().to(torch.int8), False)
        self.bias = layer.bias
        self.register_buffer("scale", scale)

    def dense(self) -> Tensor:
        return self.weight * self.scale

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dense().to(input.dtype), self.bias)


class Packed(nn.Module):
    """As GPTQ has it: buffers, and no weight."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", layer.weight.detach().to(torch.float16))
        self.bias = layer.bias

    def dense(self) -> Tensor:
        return self.qweight.float()

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, self.dense().to(input.dtype), self.bias)


def quantized(model: Any, how: Any) -> tuple[Any, Any]:
    """The model with quantized attention, and one with the weights that these stand for."""
    plain = copy.deepcopy(model)
    for layer, other in zip(model.model.layers, plain.model.layers, strict=True):
        for name, projection in list(layer.self_attn.named_children()):
            if name.endswith("_proj"):
                setattr(layer.self_attn, name, how(projection))
                weight = getattr(layer.self_attn, name).dense()
                getattr(other.self_attn, name).weight.data = weight.to(projection.weight.dtype)
    return model, plain


class TestQuantizedProjections:
    @pytest.mark.parametrize("how", [Int8Weight, Packed])
    @pytest.mark.parametrize("kind", ["Qwen3", "Phi3"])
    @torch.no_grad()
    def test_they_compute_what_their_weights_stand_for(self, how: Any, kind: str) -> None:
        """The gate and compression have the dtype of the rest of the model."""
        model, plain = quantized(dense(kind).to(torch.bfloat16), how)
        model, plain = (apply_nsa(one, ATTENTION) for one in (model, plain))
        assert model.model.layers[1].self_attn.gate.weight.dtype == torch.bfloat16
        ids = tokens(2, 30)
        assert distance(model(ids).logits, plain(ids).logits) < 0.02
        wanted = {"max_new_tokens": 3, "do_sample": False}
        assert model.generate(ids, **wanted).shape == (2, 33)

    @torch.no_grad()
    def test_copies_of_quantized_keys(self) -> None:
        model, plain = quantized(dense("Qwen2"), Int8Weight)
        separate = {**ATTENTION, "branch_kv": "separate"}
        model, plain = (apply_nsa(one, separate) for one in (model, plain))
        ids = tokens(2, 30)
        assert distance(model(ids).logits, plain(ids).logits) < 1e-5

    @pytest.mark.parametrize("how", [Int8Weight, Packed])
    def test_a_joined_projection_cannot_be_split(self, how: Any) -> None:
        model, _ = quantized(dense("Phi3"), how)
        before = [type(layer.self_attn) for layer in model.model.layers]
        with pytest.raises(
            InvalidInputError, match=f"qkv_proj: must be plain .*got {how.__name__}"
        ):
            apply_nsa(model, {**ATTENTION, "branch_kv": "separate"})
        assert [type(layer.self_attn) for layer in model.model.layers] == before
