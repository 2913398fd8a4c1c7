"""Text models within models that take images: computed and saved with NSA, or refused."""

from __future__ import annotations

import copy
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import (  # noqa: E402
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
    SiglipVisionConfig,
)

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.transformers import apply_nsa  # noqa: E402
from nsagen.integrations.transformers_attention import TransformersNSA  # noqa: E402
from tests.integrations.tiny import (  # noqa: E402
    ATTENTION,
    as_dense,
    distance,
    sparse,
    tokens,
    trained,
)
from tests.integrations.tiny import dense as dense_text  # noqa: E402

IMAGE = 96
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}
IDS = torch.cat([tokens(1, 5) % IMAGE, torch.full((1, 4), IMAGE), tokens(1, 30) % IMAGE], 1)
PIXELS = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
WANTED = {"max_new_tokens": 4, "do_sample": False}


def llava() -> Any:
    vision, text = CLIPVisionConfig(**SIZES, projection_dim=16), dense_text().config
    torch.manual_seed(0)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=IMAGE,
        image_token_id=IMAGE,
        vision_feature_layer=-1,
    )
    return LlavaForConditionalGeneration(config).eval()


def gemma_with_images() -> Any:
    text = copy.deepcopy(dense_text("Gemma3").config)
    text.sliding_window = 8
    config = Gemma3Config(
        vision_config=SiglipVisionConfig(**SIZES),
        text_config=text,
        image_token_id=IMAGE,
        boi_token_id=95,
        eoi_token_id=94,
        mm_tokens_per_image=4,
    )
    torch.manual_seed(0)
    return Gemma3ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module")
def gemma() -> tuple[Any, Any]:
    """A Gemma 3, and the same with NSA that is dense."""
    model = gemma_with_images()
    swapped = copy.deepcopy(model)
    swapped.model.language_model = as_dense(swapped.model.language_model)
    swapped.config.text_config = swapped.model.language_model.config
    return model, swapped


def test_a_swapped_text_model_is_saved_as_one(tmp_path: Path) -> None:
    """With a config that calls it dense, the folder would be read as dense."""
    model = llava()
    trained(apply_nsa(model.model.language_model, ATTENTION))
    with pytest.raises(InvalidInputError, match=r"set model\.config\.text_config = model\.model"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
    model.config.text_config = model.model.language_model.config
    model.save_pretrained(tmp_path / "text")
    whole = apply_nsa(llava(), ATTENTION)
    trained(whole.model.language_model)
    whole.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    layers = again.model.language_model.layers
    assert all(isinstance(layer.self_attn, TransformersNSA) for layer in layers)
    inputs = {"input_ids": IDS, "pixel_values": PIXELS}
    with torch.no_grad():
        assert torch.equal(again(**inputs).logits, model(**inputs).logits)
        text = LlavaForConditionalGeneration.from_pretrained(tmp_path / "text").eval()
        assert torch.equal(text(**inputs).logits, model(**inputs).logits)
        cached = model.generate(**inputs, **WANTED)
        assert torch.equal(cached, model.generate(**inputs, **WANTED, use_cache=False))


def test_other_models_are_saved_as_ever(tmp_path: Path) -> None:
    llava().save_pretrained(tmp_path / "dense")
    sparse().save_pretrained(tmp_path / "swapped")


@torch.no_grad()
def test_sliding_layers_of_gemma_have_the_masks_it_prepares(gemma: tuple[Any, Any]) -> None:
    ids = tokens(1, 30) % 90
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    model, swapped = gemma
    assert distance(swapped(**inputs).logits, model(**inputs).logits) < 1e-5
    generated, expected = (one.generate(**inputs, **WANTED) for one in (swapped, model))
    assert torch.equal(generated, expected)


@torch.no_grad()
def test_images_whose_tokens_see_each_other_are_refused(gemma: tuple[Any, Any]) -> None:
    ids = torch.where(IDS >= 94, IDS.clamp(min=IMAGE), IDS)
    types = (ids == IMAGE).long()
    inputs = {"input_ids": ids, "pixel_values": PIXELS, "token_type_ids": types}
    for call in (gemma[1], gemma[1].generate):
        with pytest.raises(InvalidInputError, match="the mask: must be causal"):
            call(**inputs)


@torch.no_grad()
def test_a_gemma_is_saved_as_a_whole(tmp_path: Path) -> None:
    """It has a type of its own: its config makes the text model's of a fixed class."""
    model = apply_nsa(gemma_with_images(), ATTENTION)
    trained(model.model.language_model)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"].startswith("nsagen_")
    ids = tokens(1, 40) % 90
    inputs = {"input_ids": ids, "token_type_ids": torch.zeros_like(ids)}
    expected, generated = model(**inputs).logits, model.generate(**inputs, **WANTED)
    for kind in (AutoModelForImageTextToText, AutoModelForCausalLM, type(model)):
        again = kind.from_pretrained(tmp_path).eval()
        assert type(again) is type(model)
        assert isinstance(again.model.language_model.layers[1].self_attn, TransformersNSA)
        assert torch.equal(again(**inputs).logits, expected)
        assert torch.equal(again.generate(**inputs, **WANTED), generated)
    assert torch.equal(pickle.loads(pickle.dumps(model))(**inputs).logits, expected)


def test_a_swapped_text_model_of_gemma_is_not_read_as_dense(tmp_path: Path) -> None:
    """A Gemma3Config would make its text model's config a dense one, in any Transformers."""
    model = gemma_with_images()
    apply_nsa(model.model.language_model, ATTENTION)
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="call apply_nsa on the whole dense model"):
            model.save_pretrained(tmp_path)
        model.config.text_config = model.model.language_model.config
    assert not list(tmp_path.iterdir())
    apply_nsa(gemma_with_images(), ATTENTION).save_pretrained(tmp_path)
    dense_class = Gemma3ForConditionalGeneration
    for given in ({}, {"config": gemma_with_images().config}):
        with pytest.raises(InvalidInputError, match=r"must have no nsa|must not be dropped"):
            dense_class.from_pretrained(tmp_path, **given)
