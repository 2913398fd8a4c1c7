"""A swapped model's folder is the NSA model or an error, never a dense model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

transformers = pytest.importorskip("transformers")

from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, pipeline  # noqa: E402
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES  # noqa: E402

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.transformers import apply_nsa, load_nsa  # noqa: E402
from nsagen.integrations.transformers_attention import TransformersNSA  # noqa: E402
from nsagen.integrations.transformers_models import MODELS  # noqa: E402
from tests.integrations.tiny import dense, sparse, tokens, trained  # noqa: E402

IDS = tokens(2, 30)


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(sparse("Qwen3", compress_type="linear"))


@pytest.fixture(scope="module")
def folder(model: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("swapped")
    model.save_pretrained(path)
    words = {"<unk>": 0, **{f"w{i}": i for i in range(1, 97)}}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()  # type: ignore[assignment]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>"
    ).save_pretrained(path)
    return path


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def test_no_plain_transformers_knows_the_type(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nsagen_qwen3"
    assert config["architectures"] == ["NsagenQwen3ForCausalLM"]
    assert not hasattr(transformers, "NsagenQwen3ForCausalLM")
    for facts in MODELS:
        assert f"nsagen_{facts.module}" not in CONFIG_MAPPING_NAMES


def test_the_auto_classes_make_the_nsa_model(model: Any, folder: Path) -> None:
    again = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(again.model.layers[1].self_attn, TransformersNSA)
    assert again.config.nsa == model.config.nsa
    assert torch.equal(logits(again), logits(model))
    config = AutoConfig.from_pretrained(folder)
    assert type(config) is type(model.config)
    headless = transformers.AutoModel.from_pretrained(folder)
    with torch.no_grad():
        expected = model(IDS, output_hidden_states=True).hidden_states[-1]
        assert torch.equal(headless(IDS).last_hidden_state, expected)


def test_a_pipeline_runs_the_nsa_model(model: Any, folder: Path) -> None:
    pipe = pipeline("text-generation", model=str(folder))
    assert type(pipe.model) is type(model)
    text = pipe("w3 w14 w15", max_new_tokens=4, do_sample=False)[0]["generated_text"]
    ids = torch.tensor([[3, 14, 15]])
    generated = model.generate(ids, max_new_tokens=4, do_sample=False)[0]
    assert text.replace(" ", "") == "".join(f"w{i}" for i in generated.tolist())


def test_in_another_dtype_and_in_parts(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(logits(load_nsa(tmp_path)), logits(model))
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("change", ["missing", "strange"])
def test_weights_that_do_not_fit_are_refused(folder: Path, tmp_path: Path, change: str) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path, name = copy / "model.safetensors", "model.layers.1.self_attn.gate.bias"
    weights = load_file(path)
    if change == "missing":
        del weights[name]
    else:
        weights[name.replace("bias", "extra")] = weights[name].clone()
    save_file(weights, path, {"format": "pt"})
    for load in (AutoModelForCausalLM.from_pretrained, load_nsa):
        with pytest.raises(InvalidInputError, match=r"must have the attention's weights.*gate"):
            load(copy)


def test_settings_in_from_pretrained_change_those_that_they_name(model: Any, folder: Path) -> None:
    wide = AutoModelForCausalLM.from_pretrained(folder, nsa={"window_size": 20})
    expected = {**model.config.nsa, "window_size": 20}
    assert wide.config.nsa == expected
    assert wide.model.layers[0].self_attn.sparsity.window_size == 20
    whole = AutoModelForCausalLM.from_pretrained(folder, nsa=expected)
    assert torch.equal(logits(whole), logits(wide))
    with pytest.raises(InvalidInputError, match="windows"):
        AutoModelForCausalLM.from_pretrained(folder, nsa={"windows": 20})


def test_a_config_without_settings_is_refused(folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    config = json.loads((copy / "config.json").read_text())
    del config["nsa"]
    (copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InvalidInputError, match="its config must have nsa"):
        AutoModelForCausalLM.from_pretrained(copy)
    with pytest.raises(InvalidInputError, match="call apply_nsa on the dense model instead"):
        load_nsa(copy)
    (copy / "config.json").write_text(json.dumps({**config, "nsa": "the defaults"}))
    for load in (AutoModelForCausalLM.from_pretrained, load_nsa):
        with pytest.raises(
            InvalidInputError, match=r"must have nsa, a mapping .*got 'the defaults'"
        ):
            load(copy)


@pytest.mark.parametrize("kind", [transformers.Qwen3ForCausalLM, transformers.Qwen3Model])
def test_a_dense_class_refuses_the_folder(folder: Path, kind: Any) -> None:
    with pytest.raises(InvalidInputError, match=r"must have no nsa, .*open the folder with load_"):
        kind.from_pretrained(folder)


def test_a_dense_config_does_not_drop_the_weights(folder: Path) -> None:
    """Passed in memory, it says nothing of the folder; the dense model would lack NSA's weights."""
    config = dense("Qwen3").config
    for kind in (AutoModelForCausalLM, AutoModel, transformers.Qwen3ForCausalLM):
        with pytest.raises(InvalidInputError, match=r"must not be dropped, got a Qwen3Config"):
            kind.from_pretrained(folder, config=config)


def test_other_folders_are_opened_as_ever(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(model) is transformers.LlamaForCausalLM
    assert not info["unexpected_keys"]
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is transformers.LlamaForCausalLM


def test_a_folder_elsewhere(model: Any, folder: Path, tmp_path: Path) -> None:
    """A subfolder, and the layout of the hub's cache."""
    shutil.copytree(folder, tmp_path / "models--me--mine" / "snapshots" / "abc" / "sub")
    refs = tmp_path / "models--me--mine" / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    there = {"cache_dir": tmp_path, "local_files_only": True, "subfolder": "sub"}
    assert torch.equal(logits(load_nsa("me/mine", **there)), logits(model))
    snapshot = tmp_path / "models--me--mine" / "snapshots" / "abc"
    old_folder(model, snapshot / "sub")
    assert torch.equal(logits(load_nsa("me/mine", **there)), logits(model))
    assert torch.equal(logits(load_nsa(snapshot, subfolder="sub")), logits(model))


def old_folder(model: Any, path: Path) -> None:
    """The folder of a swapped model from when its config said it was a Qwen3."""
    model.save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    config |= {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]}
    (path / "config.json").write_text(json.dumps(config))
    weights = load_file(path / "model.safetensors")
    own = ("compress_key.weight", "compress_value.weight", "intra_block_pe.weight")
    renamed = {n.removesuffix(".weight") if n.endswith(own) else n: w for n, w in weights.items()}
    save_file(renamed, path / "model.safetensors", {"format": "pt"})


def test_older_folders_are_read_and_converted(model: Any, tmp_path: Path) -> None:
    old_folder(model, tmp_path / "old")
    for load in (AutoModelForCausalLM, transformers.Qwen3ForCausalLM):
        with pytest.raises(InvalidInputError, match="open the folder with load_nsa"):
            load.from_pretrained(tmp_path / "old")
    again = load_nsa(tmp_path / "old")
    assert torch.equal(logits(again), logits(model))
    again.save_pretrained(tmp_path / "new")
    assert torch.equal(
        logits(AutoModelForCausalLM.from_pretrained(tmp_path / "new")), logits(model)
    )


def test_an_older_folder_without_weights_is_refused(model: Any, tmp_path: Path) -> None:
    old_folder(model, tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    kept = {name: tensor for name, tensor in weights.items() if "gate.bias" not in name}
    save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(InvalidInputError, match=r"must have NSA's weights.*gate\.bias"):
        load_nsa(tmp_path)


def test_a_dense_folder_is_no_swapped_one(tmp_path: Path) -> None:
    dense().save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="call apply_nsa on the dense model instead"):
        load_nsa(tmp_path)


def test_a_swapped_model_forgets_the_dense_folder(tmp_path: Path) -> None:
    """Else an adapter's config would name that folder as its base."""
    dense().save_pretrained(tmp_path)
    model = apply_nsa(AutoModelForCausalLM.from_pretrained(tmp_path), {"topk": 4})
    assert str(tmp_path) not in (model.name_or_path, model.config._name_or_path)
