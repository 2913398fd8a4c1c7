"""Checkpoints give the logits that Transformers computes; NSA works in its models."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.transformers import apply_nsa, load_nsa  # noqa: E402
from nsagen.model import InferenceConfig, ToyLlama, ToyNSALlamaConfig  # noqa: E402
from tests.integrations.tiny import LLAMA  # noqa: E402

KINDS = ("Llama", "Mistral", "Qwen3")
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
ATTENTION = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "topk": 4,
    "window_size": 64,
}


@functools.cache
def dense_model(kind: str, tied: bool = False, scaled: bool = False) -> Any:
    """A small random model whose attention is far from uniform."""
    rope = {"rope_theta": 10000.0, **(LLAMA3 if scaled else {"rope_type": "default"})}
    config = getattr(transformers, f"{kind}Config")(
        **LLAMA | {"initializer_range": 0.1},
        rope_parameters=rope,
        tie_word_embeddings=tied,
    )
    torch.manual_seed(0)
    return getattr(transformers, f"{kind}ForCausalLM")(config).eval()


def sparse_model(kind: str, **changes: Any) -> Any:
    return apply_nsa(copy.deepcopy(dense_model(kind)), {**ATTENTION, **changes})


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(2))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_llama_checkpoint_has_the_logits_that_transformers_computes(
    tmp_path: Path, tied: bool, scaled: bool
) -> None:
    theirs = dense_model("Llama", tied, scaled)
    theirs.save_pretrained(tmp_path / "theirs", max_shard_size="60KB")
    assert len(list((tmp_path / "theirs").glob("*.safetensors"))) > 1
    ours = ToyLlama.from_pretrained(tmp_path / "theirs", InferenceConfig(2, 80))
    ids = tokens(300)
    with torch.no_grad():
        expected = theirs(ids[None]).logits[0]
        logits = ours(ids, torch.tensor([0, 300], dtype=torch.int32))
        ours.save_pretrained(tmp_path / "ours")
        back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "ours")
        assert distance(logits, expected) < 1e-5
        assert distance(back(ids[None]).logits[0], expected) < 1e-5
        generated = theirs.generate(ids[None, :60], max_new_tokens=12, do_sample=False)
    cu_seqlens = torch.tensor([0, 60], dtype=torch.int32)
    assert torch.equal(ours.generate(ids[:60], cu_seqlens, 12), generated[:, 60:])
    assert (ours.lm_head.weight is ours.model.embed_tokens.weight) is tied


@pytest.mark.parametrize("kind", KINDS)
class TestApplyNSA:
    def test_the_projections_stay_the_models_own(self, kind: str) -> None:
        dense = copy.deepcopy(dense_model(kind))
        before = {name: id(p) for name, p in dense.named_parameters()}
        after = {name: id(p) for name, p in apply_nsa(dense, ATTENTION).named_parameters()}
        assert before.items() <= after.items()
        added = {name.split("self_attn.")[1] for name in after.keys() - before.keys()}
        new = {"gate.weight", "gate.bias"}
        new |= {"compress_key.weight", "compress_value.weight", "intra_block_pe.weight"}
        assert added == new

    @torch.no_grad()
    def test_it_starts_close_where_every_branch_sees_every_token(self, kind: str) -> None:
        """64 tokens: the window, and topk * block_size. The compressed branch has a share of
        0.002; nothing else differs."""
        ids = tokens(2, 64)
        expected = dense_model(kind)(ids).logits
        assert distance(sparse_model(kind)(ids).logits, expected) < 0.01

    @torch.no_grad()
    def test_beyond_that_it_nears_the_dense_model_as_topk_grows(self, kind: str) -> None:
        ids = tokens(1, 256)
        expected = dense_model(kind)(ids).logits
        far, near, all_ = (
            distance(sparse_model(kind, topk=topk)(ids).logits, expected) for topk in (4, 12, 16)
        )
        assert far > near > all_
        assert all_ < 0.05  # the window sees 64 of 256 tokens and has a share of 0.02

    @torch.no_grad()
    def test_generate_decodes_what_forward_computes(self, kind: str) -> None:
        model, ids = sparse_model(kind), tokens(2, 50)
        generated = model.generate(ids, max_new_tokens=30, do_sample=False)
        choices = model(generated, use_cache=False).logits.argmax(-1)
        assert torch.equal(generated[:, 50:], choices[:, 49:-1])

    @torch.no_grad()
    def test_left_padding_changes_nothing(self, kind: str) -> None:
        model, ids = sparse_model(kind), tokens(2, 50)
        mask = torch.ones_like(ids)
        ids[1, :13] = mask[1, :13] = 0
        both = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
        for row, start in ((0, 0), (1, 13)):
            alone = model.generate(ids[row : row + 1, start:], max_new_tokens=12, do_sample=False)
            assert torch.equal(both[row, start:], alone[0])


@torch.no_grad()
def test_rows_of_every_length_and_none() -> None:
    """Padding on the right, as in training; a row may be all padding."""
    model, ids = sparse_model("Llama"), tokens(4, 40)
    mask = torch.ones_like(ids)
    for row, length in enumerate((40, 3, 0, 17)):
        mask[row, length:] = 0
    logits = model(ids, attention_mask=mask, use_cache=True).logits
    assert logits.isfinite().all()
    for row, length in ((0, 40), (1, 3), (3, 17)):
        alone = model(ids[row : row + 1, :length]).logits[0]
        assert distance(logits[row, :length], alone) < 1e-5


@torch.no_grad()
def test_beam_search_reorders_the_cache() -> None:
    model, ids = sparse_model("Llama"), tokens(2, 40)
    wanted = {"max_new_tokens": 8, "num_beams": 3, "do_sample": False}
    cached, plain = (model.generate(ids, use_cache=use, **wanted) for use in (True, False))
    assert torch.equal(cached, plain)


@torch.no_grad()
def test_a_cache_goes_on_with_several_tokens_and_grows() -> None:
    """A second turn of a chat that outgrows the first turn's cache."""
    model, ids = sparse_model("Llama"), tokens(2, 300)
    first = model(ids[:, :250], use_cache=True)
    name = "cache" if "cache" in first else "past_key_values"
    second = model(ids[:, 250:], **{name: first[name]}).logits
    assert distance(second, model(ids).logits[:, 250:]) < 1e-5


@torch.no_grad()
def test_packed_sequences_in_one_row() -> None:
    model, ids = sparse_model("Llama"), tokens(1, 90)
    ends = torch.tensor([0, 30, 90], dtype=torch.int32)
    positions = torch.cat([torch.arange(30), torch.arange(60)])[None]
    limits = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 60, "max_length_k": 60}
    packed = model(ids, position_ids=positions, use_cache=False, **limits).logits
    apart = [model(part).logits for part in (ids[:, :30], ids[:, 30:])]
    assert distance(packed, torch.cat(apart, 1)) < 1e-5


def test_training_reaches_every_new_parameter() -> None:
    model, ids = sparse_model("Qwen3"), tokens(2, 50)
    mask = torch.ones_like(ids)
    mask[0, 40:] = 0
    model(ids, attention_mask=mask, labels=ids).loss.backward()
    attention = model.model.layers[0].self_attn
    for parameter in attention.parameters():
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()
        assert parameter.grad.norm() > 0


FORMS: dict[str, dict[str, Any]] = {
    "the paper's": {
        "branch_kv": "separate",
        "compress_type": "mlp",
        "v_with_pe": True,
        "gate_type": "mlp",
    },
    "gated values": {"v_compress_type": "sigmoid_mul"},
    "no window": {"window_size": 0, "branch_kv": "separate"},
    "compressed alone": {"branches": ("compressed",)},
    "sliding alone": {"branches": ["sliding"]},
}


def trained_form(form: str) -> Any:
    """A Qwen3 (it normalizes heads) whose new parameters differ from their initial values."""
    model = sparse_model("Qwen3", **FORMS[form])
    generator = torch.Generator().manual_seed(4)
    new = ("gate.", "compress", "intra_block", "_sliding")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(part in name.partition("self_attn.")[2] for part in new):
                parameter += torch.randn(parameter.shape, generator=generator) * 0.1
    return model


@pytest.mark.parametrize("form", FORMS)
class TestForms:
    @torch.no_grad()
    def test_generate_decodes_what_forward_computes(self, form: str, tmp_path: Path) -> None:
        """With padding, over beams, and after saving and loading."""
        model, ids = trained_form(form), tokens(2, 40)
        generated = model.generate(ids, max_new_tokens=20, do_sample=False)
        choices = model(generated, use_cache=False).logits.argmax(-1)
        assert torch.equal(generated[:, 40:], choices[:, 39:-1])
        mask = torch.ones_like(ids)
        ids[1, :13] = mask[1, :13] = 0
        wanted = {"attention_mask": mask, "max_new_tokens": 6, "num_beams": 2, "do_sample": False}
        both, plain = (model.generate(ids, use_cache=use, **wanted) for use in (True, False))
        assert torch.equal(both, plain)
        model.save_pretrained(tmp_path)
        assert torch.equal(load_nsa(tmp_path)(ids).logits, model(ids).logits)

    def test_training_reaches_every_new_parameter(self, form: str) -> None:
        model, ids = trained_form(form), tokens(2, 50)
        model(ids, labels=ids).loss.backward()
        for name, parameter in model.model.layers[0].self_attn.named_parameters():
            assert parameter.grad is not None, name
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.norm() > 0, name


@torch.no_grad()
@pytest.mark.parametrize("compress_type", ["mlp", "sigmoid_mul"])
def test_the_papers_form_starts_close(compress_type: str) -> None:
    ids = tokens(2, 64)
    expected = dense_model("Llama")(ids).logits
    form = {**FORMS["the paper's"], "compress_type": compress_type}
    assert distance(sparse_model("Llama", **form)(ids).logits, expected) < 0.01


def test_a_swapped_model_is_saved_and_loaded(tmp_path: Path) -> None:
    model, ids = sparse_model("Qwen3", compress_type="linear"), tokens(1, 100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name or "compress" in name:
                parameter += torch.randn(parameter.shape) * 0.1
        model.save_pretrained(tmp_path)
        again = load_nsa(tmp_path)
        assert torch.equal(again(ids).logits, model(ids).logits)


def test_the_settings_may_come_from_an_object() -> None:
    config = ToyNSALlamaConfig(topk=5, block_size=32)
    model = apply_nsa(copy.deepcopy(dense_model("Llama")), config)
    assert (model.config.nsa["topk"], model.config.nsa["block_size"]) == (5, 32)


class TestErrors:
    def test_another_model(self) -> None:
        config = transformers.GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=20)
        with pytest.raises(
            InvalidInputError, match=r"must be a LlamaConfig, .*Olmo2Config, got GPT2"
        ):
            apply_nsa(transformers.GPT2Model(config))

    def test_twice(self) -> None:
        with pytest.raises(InvalidInputError, match="swapped once"):
            apply_nsa(sparse_model("Llama"))

    def test_an_unknown_setting(self) -> None:
        with pytest.raises(InvalidInputError, match="got head_dim; correct the name"):
            apply_nsa(copy.deepcopy(dense_model("Llama")), {"head_dim": 64})
        with pytest.raises(InvalidInputError, match=r"got v_head_dim; correct .* the model's own"):
            apply_nsa(copy.deepcopy(dense_model("Llama")), {"v_head_dim": 16})

    def test_a_mask_that_is_not_padding(self) -> None:
        with pytest.raises(InvalidInputError, match=r"got \[1, 1, 8, 8\]"):
            sparse_model("Llama")(tokens(1, 8), attention_mask=torch.ones(1, 1, 8, 8))

    def test_an_offloaded_cache(self) -> None:
        model = sparse_model("Llama")
        with pytest.raises(InvalidInputError, match="a DynamicCache that offloads"):
            model.generate(tokens(1, 8), max_new_tokens=2, cache_implementation="offloaded")
