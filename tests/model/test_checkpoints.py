"""Checkpoint folders without Transformers: round trips, and what is wrong with a folder."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from nsagen.core.errors import InvalidInputError
from nsagen.model import InferenceConfig, ToyLlama, ToyNSALlama
from nsagen.model.initial import INITIAL_GATES, constant_gate
from tests.model.forms import EVERY
from tests.model.tiny import SPARSITY, dense_config, nsa_config, packed_batch

ROOT = Path(__file__).parents[2]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small dense checkpoint."""
    model = ToyLlama(dense_config(), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    return tmp_path


def edit(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.mark.parametrize("shard", [5 * 10**9, 50_000, 1])
def test_a_dense_model_comes_back_whole(tmp_path: Path, shard: int) -> None:
    model = ToyLlama(dense_config(), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path, shard)
    again = ToyLlama.from_pretrained(tmp_path, InferenceConfig(1, 16))
    assert again.config == model.config
    assert again.inference_config == InferenceConfig(1, 16)
    ids, cu_seqlens = packed_batch([9, 30])
    assert torch.equal(again(ids, cu_seqlens), model(ids, cu_seqlens))


@pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)
def test_a_sparse_model_comes_back_whole(tmp_path: Path, changes: dict[str, Any]) -> None:
    config = nsa_config(**changes)
    model = ToyNSALlama(config, generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    again = ToyNSALlama.from_pretrained(tmp_path)
    assert again.config == config
    ids, cu_seqlens = packed_batch([9, 60])
    assert torch.equal(again(ids, cu_seqlens), model(ids, cu_seqlens))


@pytest.mark.parametrize("compress_type", ["weightedpool", "linear"])
def test_a_dense_checkpoint_becomes_sparse_and_starts_equal(
    folder: Path, compress_type: str
) -> None:
    dense = ToyLlama.from_pretrained(folder)
    changes = {"window_size": 64, "compress_type": compress_type}
    sparse = ToyNSALlama.from_pretrained(folder, **{**SPARSITY, **changes})
    ids, cu_seqlens = packed_batch([64, 40])  # topk * block_size and the window are 64
    expected = dense(ids, cu_seqlens)
    assert ((sparse(ids, cu_seqlens) - expected).norm() / expected.norm()).item() < 1e-5
    sparse.save_pretrained(folder)
    again = ToyNSALlama.from_pretrained(folder)
    assert torch.equal(again(ids, cu_seqlens), sparse(ids, cu_seqlens))


@pytest.mark.parametrize(
    "changes",
    [
        {"branch_kv": "separate", "gate_type": "mlp"},
        {"compress_type": "mlp", "v_with_pe": True},
        {"branch_kv": "separate", "compress_type": "mlp", "branches": ["compressed", "selected"]},
        {"v_compress_type": "linear", "compress_type": "sigmoid_mul", "branch_kv": "separate"},
    ],
    ids=str,
)
def test_a_dense_checkpoint_starts_equal_in_the_papers_form(
    folder: Path, changes: dict[str, Any]
) -> None:
    """Selected and sliding gates of 1/2 add up to dense attention; one alone is half of it."""
    dense = ToyLlama.from_pretrained(folder)
    sparse = ToyNSALlama.from_pretrained(folder, **{**SPARSITY, "window_size": 64, **changes})
    ids, cu_seqlens = packed_batch([64, 40])
    if "branches" in changes:
        for layer in sparse.model.layers:
            layer.self_attn.o_proj.weight.data *= 2
    expected = dense(ids, cu_seqlens)
    assert ((sparse(ids, cu_seqlens) - expected).norm() / expected.norm()).item() < 1e-5
    sparse(ids, cu_seqlens).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in sparse.parameters())


def test_the_default_settings_are_stored_as_ever(tmp_path: Path) -> None:
    ToyNSALlama(nsa_config()).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert set(stored["nsa"]) == {*SPARSITY, "compress_type"}
    assert stored["model_type"] == "nsagen_toy_llama"  # no dense Llama to Transformers
    assert "v_head_dim" not in stored
    config = nsa_config(branches=("sliding",), v_head_dim=16)
    ToyNSALlama(config).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert (stored["nsa"]["branches"], stored["nsa"]["v_head_dim"]) == (["sliding"], 16)
    assert ToyNSALlama.from_pretrained(tmp_path).config == config


def test_saving_fewer_files_leaves_none_of_the_old(tmp_path: Path) -> None:
    model = ToyLlama(dense_config())
    model.save_pretrained(tmp_path, 50_000)
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    (tmp_path / "mine.safetensors").touch()
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"config.json", "model.safetensors", "mine.safetensors"}


def test_the_dtype_is_the_folders_unless_given(folder: Path) -> None:
    assert ToyLlama.from_pretrained(folder).lm_head.weight.dtype is torch.float32
    model = ToyLlama.from_pretrained(folder, dtype=torch.bfloat16)
    assert model.lm_head.weight.dtype is torch.bfloat16
    assert model.model.rotary_emb.cos.dtype is torch.float32


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"model_type": "mistral"}, "model_type must be llama, got 'mistral'; for a Mistral"),
        ({"model_type": "nsagen_llama"}, "load it with nsagen.integrations.transformers.load_nsa"),
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_hidden_layers": 1}, "an unknown model.layers.1."),
        ({"num_hidden_layers": 3}, "no model.layers.2."),
        ({"vocab_size": 500}, "must have shape [500, 64], got [512, 64]"),
        ({"dtype": "int8"}, "got 'int8'"),
        (
            {"rope_parameters": {"rope_type": "yarn"}, "rope_scaling": None},
            "rope_type must be one of default, llama3, got 'yarn'; use a model that was",
        ),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}, "rope_parameters": None},
            "with another rope its weights give wrong results",
        ),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_parameters must say the same"),
        ({"rope_theta": 10.0}, "must say the same"),
        ({"rope_theta": "big"}, "rope_theta must be a positive number, got 'big'"),
        ({"rope_scaling": {"full": {"rope_type": "default"}}}, "the same for all layers"),
        ({"rope_scaling": [1]}, "must be a JSON object of numbers"),
        ({"partial_rotary_factor": 0.5}, "whole heads, got partial_rotary_factor=0.5"),
        ({"quantization_config": {"quant_method": "fp8"}}, "without quantization_config"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a positive integer, got 0"),
        ({"hidden_size": "64"}, "hidden_size must be a positive integer, got '64'"),
        ({"dtype": "float8_e4m3fn"}, "got 'float8_e4m3fn'; pass dtype=torch.bfloat16"),
        (
            {"tie_word_embeddings": "false"},
            "tie_word_embeddings must be true or false, got 'false'",
        ),
        ({"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, got 1; correct"),
        ({"head_dim": 0}, "head_dim must be an integer of at least 1, got 0"),
        ({"num_key_value_heads": 0}, "num_key_value_heads must be an integer of at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_named(folder: Path, changes: dict[str, object], text: str) -> None:
    edit(folder, **changes)
    with pytest.raises(InvalidInputError) as caught:
        ToyLlama.from_pretrained(folder)
    assert text in str(caught.value)


def test_sparse_weights_in_a_dense_model_point_to_the_sparse_one(tmp_path: Path) -> None:
    ToyNSALlama(nsa_config()).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match=r"load it with ToyNSALlama\.from_pretrained"):
        ToyLlama.from_pretrained(tmp_path)


def test_a_swapped_models_weights_point_to_its_loader(folder: Path) -> None:
    path = folder / "model.safetensors"
    bias = {"model.layers.0.self_attn.gate.bias": torch.zeros(12)}
    save_file({**load_file(path), **bias}, path)
    with pytest.raises(InvalidInputError, match=r"load it with .*\.load_nsa"):
        ToyNSALlama.from_pretrained(folder)


def test_an_unknown_setting_is_refused(folder: Path) -> None:
    with pytest.raises(InvalidInputError, match="got top_k; correct the name"):
        ToyNSALlama.from_pretrained(folder, top_k=4)
    with pytest.raises(InvalidInputError, match="got topk"):
        ToyLlama.from_pretrained(folder, topk=4)


class TestFiles:
    def test_no_folder(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match=r"needs a readable config\.json"):
            ToyLlama.from_pretrained(tmp_path / "none")

    def test_no_weights(self, folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        with pytest.raises(InvalidInputError, match="check the path"):
            ToyLlama.from_pretrained(folder)
        (folder / "pytorch_model.bin").touch()
        with pytest.raises(InvalidInputError, match=r"pytorch_model\.bin may hold code"):
            ToyLlama.from_pretrained(folder)

    def test_a_damaged_file(self, folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"not what it says")
        with pytest.raises(InvalidInputError, match="cannot be read"):
            ToyLlama.from_pretrained(folder)

    @pytest.mark.parametrize("file", ["../model.safetensors", "gone.safetensors"])
    def test_an_index_that_points_elsewhere(self, folder: Path, file: str) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        index = {"weight_map": {"lm_head.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InvalidInputError, match="each file must lie in the folder"):
            ToyLlama.from_pretrained(folder)

    def test_an_index_with_a_tensor_that_its_file_lacks(self, folder: Path) -> None:
        (folder / "model.safetensors").rename(folder / "other.safetensors")
        index = {"weight_map": {"absent.weight": "other.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        text = "other.safetensors: must hold absent.weight, as the index says; it does not; fetch"
        with pytest.raises(InvalidInputError, match=text):
            ToyLlama.from_pretrained(folder)

    @pytest.mark.parametrize(
        ("old", "new", "advice"),
        [
            ("", "module.", "save the model itself, not what wraps it"),
            ("", "_orig_mod.", "save the model itself, not what wraps it"),
            ("model.", "", "load it with Transformers' LlamaForCausalLM, whose names these lack"),
        ],
    )
    def test_advice_about_other_prefixes(
        self, folder: Path, old: str, new: str, advice: str
    ) -> None:
        path = folder / "model.safetensors"
        tensors = {new + name.removeprefix(old): t for name, t in load_file(path).items()}
        save_file(tensors, path)
        with pytest.raises(InvalidInputError, match=advice):
            ToyLlama.from_pretrained(folder)

    def test_a_whole_file_goes_before_an_index(self, tmp_path: Path) -> None:
        """As an earlier checkpoint in several files leaves it; also while these still lie there."""
        old, new = ToyLlama(dense_config()), ToyLlama(dense_config())
        old.save_pretrained(tmp_path, 50_000)
        index = tmp_path / "model.safetensors.index.json"
        kept = index.read_text()
        new.save_pretrained(tmp_path)
        index.write_text(kept)
        again = ToyLlama.from_pretrained(tmp_path)
        assert torch.equal(again.lm_head.weight, new.lm_head.weight)

    @pytest.mark.parametrize("kind", ["other file", "not in it", "dot", "folder"])
    def test_the_files_of_an_index_say_what_is_in_them(self, tmp_path: Path, kind: str) -> None:
        """As in Transformers, an index is read for its files alone."""
        model = ToyLlama(dense_config())
        model.save_pretrained(tmp_path, 50_000)
        path = tmp_path / "model.safetensors.index.json"
        files = json.loads(path.read_text())["weight_map"]
        if kind == "other file":
            names = sorted(files.values())
            files = dict(zip(files, (*names[1:], names[0]), strict=True))
        elif kind == "not in it":
            files = {name: file for file, name in {f: n for n, f in files.items()}.items()}
        elif kind == "dot":
            files = {name: f"./{file}" for name, file in files.items()}
        else:
            (tmp_path / "parts").mkdir()
            for file in set(files.values()):
                (tmp_path / file).rename(tmp_path / "parts" / file)
            files = {name: f"parts/{file}" for name, file in files.items()}
        path.write_text(json.dumps({"weight_map": files}))
        again = ToyLlama.from_pretrained(tmp_path)
        assert torch.equal(again(*packed_batch([9])), model(*packed_batch([9])))

    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
    def test_json_nested_too_deeply(self, folder: Path, name: str) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_text("[" * 100_000)
        with pytest.raises(InvalidInputError, match=f"{name}: .*recursion"):
            ToyLlama.from_pretrained(folder)

    def test_something_else_than_an_object(self, folder: Path) -> None:
        (folder / "config.json").write_text("[1]")
        with pytest.raises(InvalidInputError, match="must be a JSON object, got a list; fix it"):
            ToyLlama.from_pretrained(folder)
        (folder / "config.json").unlink()
        ToyNSALlama(nsa_config()).save_pretrained(folder)
        edit(folder, nsa=3)
        with pytest.raises(InvalidInputError, match="nsa: must be a JSON object, got a int"):
            ToyNSALlama.from_pretrained(folder)

    def test_an_adapter_beside_the_weights(self, folder: Path) -> None:
        (folder / "adapter_config.json").touch()
        with pytest.raises(InvalidInputError, match=r"an adapter beside them .*; merge it"):
            ToyLlama.from_pretrained(folder)

    def test_sizes_of_files_are_bytes(self, folder: Path) -> None:
        for size in ("5GB", 0, -1, 1.5, True):
            with pytest.raises(InvalidInputError, match="must be a positive number of bytes"):
                ToyLlama(dense_config()).save_pretrained(folder, size)  # type: ignore[arg-type]


class TestSavingTouchesOnlyWhatNsagenWrote:
    @pytest.mark.parametrize(
        "name",
        [
            "model-00001-of-00002.safetensors",
            "model.safetensors",
            "model.safetensors.index.json",
            "config.json",
        ],
    )
    @pytest.mark.parametrize("shard", [5 * 10**9, 50_000])
    @pytest.mark.parametrize("content", ["whole", "damaged", "link"])
    def test_a_file_of_another_checkpoint(
        self, tmp_path: Path, name: str, shard: int, content: str
    ) -> None:
        path = tmp_path / name
        if content == "link":
            path.symlink_to(tmp_path / "not there")
        elif content == "damaged":
            path.write_bytes(b"\xff[")
        elif path.suffix == ".json":
            path.write_text('{"metadata": {"total_size": 1}, "weight_map": {}}')
        else:
            save_file({"theirs": torch.ones(1)}, path, {"format": "pt"})
        before = contents(tmp_path)
        with pytest.raises(InvalidInputError, match=f"got {name}, which it did not write; nothing"):
            ToyLlama(dense_config()).save_pretrained(tmp_path, shard)
        assert contents(tmp_path) == before

    def test_everything_else_in_the_folder_stays(self, folder: Path) -> None:
        others = ("tokenizer.json", "model.safetensors.tmp", "model-mine.safetensors", "a/x.py")
        (folder / "a").mkdir()
        for name in others:
            (folder / name).write_text("mine")
        for shard in (50_000, 5 * 10**9, 1):
            ToyLlama(dense_config()).save_pretrained(folder, shard)
        assert {(folder / name).read_text() for name in others} == {"mine"}
        assert not list(folder.glob(".*")), "neither locks nor temporary files are left"

    def test_a_file_where_the_folder_belongs(self, tmp_path: Path) -> None:
        (tmp_path / "mine").write_text("mine")
        with pytest.raises(InvalidInputError, match="must be given a folder; got the file"):
            ToyLlama(dense_config()).save_pretrained(tmp_path / "mine")


def contents(folder: Path) -> dict[str, object]:
    """The files of a folder by name: their bytes, or where a link leads."""
    return {
        path.name: path.readlink() if path.is_symlink() else path.read_bytes()
        for path in folder.iterdir()
    }


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    """Change the tensors of a folder's file."""
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


Q_PROJ = "model.layers.0.self_attn.q_proj.weight"
EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize(
    "dtype", [torch.int8, torch.uint8, torch.bool, torch.int32, torch.float8_e4m3fn], ids=str
)
def test_weights_that_are_no_plain_numbers_are_refused(folder: Path, dtype: torch.dtype) -> None:
    rewrite(folder, lambda t: t.update({Q_PROJ: (t[Q_PROJ] * 100).to(dtype)}))
    with pytest.raises(InvalidInputError, match=rf"got {Q_PROJ} of .*; give the folder of the mod"):
        ToyLlama.from_pretrained(folder)


def test_scales_beside_weights_are_refused(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({f"{Q_PROJ}_scale_inv": torch.ones(1)}))
    with pytest.raises(InvalidInputError, match=r"an unknown .*; give the folder of the model"):
        ToyLlama.from_pretrained(folder)


@pytest.mark.parametrize("stored", ["lm_head.weight", EMBEDDING, "equal", "different"])
def test_tied_weights_under_either_name(folder: Path, stored: str) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        if stored == "equal":
            tensors["lm_head.weight"] = tensors[EMBEDDING].clone()
        elif stored != "different":
            tensors[stored] = tensors[EMBEDDING].clone()
            del tensors["lm_head.weight" if stored == EMBEDDING else EMBEDDING]

    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    rewrite(folder, change)
    edit(folder, tie_word_embeddings=True)
    model = ToyLlama.from_pretrained(folder)
    assert torch.equal(model.model.embed_tokens.weight, embedding)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == (stored != "different"), "as Transformers does"
    model.save_pretrained(folder / "again")
    again = ToyLlama.from_pretrained(folder / "again")
    ids, cu_seqlens = packed_batch([9])
    assert torch.equal(again(ids, cu_seqlens), model(ids, cu_seqlens))


def test_advice_about_a_head_that_is_missing_works(folder: Path) -> None:
    rewrite(folder, lambda t: t.__delitem__("lm_head.weight"))
    with pytest.raises(InvalidInputError, match="set tie_word_embeddings to true in its config"):
        ToyLlama.from_pretrained(folder)
    edit(folder, tie_word_embeddings=True)
    ToyLlama.from_pretrained(folder)


def test_a_reward_model_is_not_taken_for_a_language_model(folder: Path) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["score.weight"] = tensors.pop("lm_head.weight")[:1].clone()

    rewrite(folder, change)
    text = "no lm_head.weight, an unknown score.weight; give the folder of a language model"
    with pytest.raises(InvalidInputError, match=text):
        ToyLlama.from_pretrained(folder)


@pytest.mark.parametrize("tied", [False, True])
def test_advice_about_a_second_head_works(folder: Path, tmp_path: Path, tied: bool) -> None:
    """As a value head beside the language model, or a reward model's with a tied embedding."""
    transformers = pytest.importorskip("transformers")

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["v_head.summary.weight"] = torch.ones(1, 64)
        if tied:
            del tensors["lm_head.weight"]

    rewrite(folder, change)
    edit(folder, tie_word_embeddings=tied)
    advice = "unknown v_head.summary.weight; load it with Transformers' LlamaForCausalLM, which"
    with pytest.raises(InvalidInputError, match=advice):
        ToyLlama.from_pretrained(folder)
    again = tmp_path / "again"
    transformers.LlamaForCausalLM.from_pretrained(folder).save_pretrained(again)
    loaded = ToyLlama.from_pretrained(again)
    embedding = load_file(folder / "model.safetensors")[EMBEDDING]
    assert torch.equal(loaded.model.embed_tokens.weight, embedding.to(loaded.lm_head.weight.dtype))


@pytest.mark.parametrize(
    ("stored", "wanted"),
    [("weightedpool", "linear"), ("linear", "avgpool"), ("avgpool", "mlp"), ("mlp", "linear")],
)
def test_advice_about_another_compress_type_works(tmp_path: Path, stored: str, wanted: str) -> None:
    ToyNSALlama(nsa_config(compress_type=stored)).save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="; leave out compress_type, with which its weigh"):
        ToyNSALlama.from_pretrained(tmp_path, compress_type=wanted, topk=5)
    assert ToyNSALlama.from_pretrained(tmp_path, topk=5).config.topk == 5


def test_a_folder_of_nsa_without_its_parameters_is_not_taken_for_a_dense_one(
    tmp_path: Path,
) -> None:
    ToyNSALlama(nsa_config()).save_pretrained(tmp_path)

    def drop(tensors: dict[str, torch.Tensor]) -> None:
        for name in [n for n in tensors if "gate." in n or "compress" in n or "intra" in n]:
            del tensors[name]

    rewrite(tmp_path, drop)
    with pytest.raises(
        InvalidInputError, match=r"got no model\.layers\.0\.self_attn\.compress_key"
    ):
        ToyNSALlama.from_pretrained(tmp_path)


def test_the_dtype_is_the_files_where_no_config_says(folder: Path) -> None:
    path = folder / "config.json"
    raw = json.loads(path.read_text())
    del raw["dtype"]
    path.write_text(json.dumps(raw))
    assert ToyLlama.from_pretrained(folder).lm_head.weight.dtype is torch.float32
    with pytest.raises(InvalidInputError, match=r"from_pretrained: dtype must be .*got torch.int8"):
        ToyLlama.from_pretrained(folder, dtype=torch.int8)


def test_what_could_not_be_read_back_is_not_written(tmp_path: Path) -> None:
    model = ToyLlama(dense_config())
    model.model.layers[0].mlp.up_proj.lora = torch.nn.Linear(2, 2)
    with pytest.raises(InvalidInputError, match=r"got model.layers.0.mlp.up_proj.lora.bias, .*mer"):
        model.save_pretrained(tmp_path / "made")
    model = ToyLlama(dense_config())
    model.lm_head.to(torch.float8_e4m3fn)
    with pytest.raises(InvalidInputError, match=r"got lm_head.weight of torch.float8_e4m3fn"):
        model.save_pretrained(tmp_path / "made")
    with pytest.raises(InvalidInputError, match="on the meta device"):
        ToyLlama(dense_config()).to("meta").save_pretrained(tmp_path / "made")
    model = ToyLlama(dense_config())
    weight = model.lm_head.weight.detach().to_sparse()
    model.lm_head.weight = torch.nn.Parameter(weight, requires_grad=False)
    with pytest.raises(InvalidInputError, match=r"got lm_head.weight with layout torch.sparse_coo"):
        model.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made").exists()


def test_other_sizes_than_the_configs_are_not_written(tmp_path: Path) -> None:
    """As after a change of the vocabulary; the advice works."""
    model = ToyLlama(dense_config(), InferenceConfig(2, 64, 4))
    model.model.embed_tokens = torch.nn.Embedding(520, 64)
    model.lm_head = torch.nn.Linear(64, 520, bias=False)
    with pytest.raises(
        InvalidInputError, match=r"got .*embed_tokens.weight with shape \[520, 64\] instead of"
    ):
        model.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    model.config = dataclasses.replace(model.config, vocab_size=520)
    model.save_pretrained(tmp_path / "made")
    again = ToyLlama.from_pretrained(tmp_path / "made")
    assert torch.equal(again.lm_head.weight, model.lm_head.weight)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_what_is_no_tensor_is_not_written(tmp_path: Path) -> None:
    """Modules may put any object into a state dict."""

    class Tagged(torch.nn.Linear):
        def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
            destination[prefix + "weight"] = torch.qint8

    model = ToyLlama(dense_config())
    model.lm_head = Tagged(64, 512, bias=False)
    with pytest.raises(InvalidInputError, match=r"in memory.*got lm_head.weight of dtype; take"):
        model.save_pretrained(tmp_path / "made")
    model = ToyNSALlama(nsa_config(), InferenceConfig(2, 64, 4))
    torch.ao.quantization.quantize_dynamic(model, {torch.nn.Linear}, inplace=True)
    assert not any(type(module) is torch.nn.Linear for module in model.modules())
    with pytest.raises(
        InvalidInputError, match=r"must be those of the model's config, got lm_head\._packed_"
    ):
        model.save_pretrained(tmp_path / "made")
    assert not (tmp_path / "made").exists()
    ids, cu_seqlens = packed_batch([9])
    first = model(ids, cu_seqlens)[-1:].argmax(-1)
    assert model.generate(ids, cu_seqlens)[0, :1].tolist() == first.tolist()


def test_layers_that_share_weights_are_written_for_each(tmp_path: Path) -> None:
    model = ToyLlama(dense_config())
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    model.save_pretrained(tmp_path)
    ids, cu_seqlens = packed_batch([9])
    again = ToyLlama.from_pretrained(tmp_path)
    assert torch.equal(again(ids, cu_seqlens), model(ids, cu_seqlens))


def test_a_constant_gate_is_the_same_for_every_input() -> None:
    gate = constant_gate(8, 3)
    values = gate(torch.randn(5, 8)).sigmoid().unflatten(-1, (3, 3))
    assert torch.allclose(values, torch.tensor(INITIAL_GATES).expand(5, 3, 3))
    assert INITIAL_GATES[1] + INITIAL_GATES[2] == 1
    mlp = constant_gate(8, 3, on=("compressed", "selected"), hidden=6)
    values = mlp(torch.randn(5, 8)).sigmoid().unflatten(-1, (3, 2))
    assert torch.allclose(values, torch.tensor(INITIAL_GATES[:2]).expand(5, 3, 2))
    with pytest.raises(InvalidInputError, match="three numbers between 0 and 1"):
        constant_gate(8, 3, (0.0, 1.0, 0.0))


def test_nothing_here_needs_transformers() -> None:
    code = (
        "import sys, nsagen.model, nsagen.model.checkpoints\n"
        "sys.exit('transformers' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True)
    assert done.returncode == 0, done.stderr
