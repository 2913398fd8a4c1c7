"""Checkpoint folders without Transformers: round trips, and what is wrong with a folder."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

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
        ({"attention_bias": True}, "attention_bias must be False, got True"),
        ({"hidden_act": "gelu"}, "hidden_act must be 'silu', got 'gelu'"),
        ({"num_hidden_layers": 1}, "an unknown model.layers.1."),
        ({"num_hidden_layers": 3}, "no model.layers.2."),
        ({"vocab_size": 500}, "must have shape [500, 64], got [512, 64]"),
        ({"dtype": "int8"}, "got 'int8'"),
        ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type must be one of default, llama3"),
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
    from safetensors.torch import load_file, save_file

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
        index = {"weight_map": {"lm_head.weight": file}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        with pytest.raises(InvalidInputError, match="each file must lie in the folder"):
            ToyLlama.from_pretrained(folder)


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
