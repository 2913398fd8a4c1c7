"""MiniCPM4 from folders as released: its dense mathematics, and InfLLM-V2 where it is sparse."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from safetensors.torch import save_file  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

import nsagen.integrations.transformers  # noqa: E402, F401
from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.minicpm import MiniCPMConfig, MiniCPMForCausalLM  # noqa: E402
from tests.integrations.plain_forms import INFLLM, distance, plain  # noqa: E402

FACTORS = [1.0 + 0.05 * i for i in range(16)]
SPARSE = {
    "kernel_size": 8,
    "kernel_stride": 4,
    "init_blocks": 1,
    "block_size": 16,
    "window_size": 16,
    "topk": 3,
    "use_nope": False,
    "dense_len": 0,
}
"""As `INFLLM`: a window of one block is 2 local ones, on top of 3 blocks."""

RELEASED = {
    "architectures": ["MiniCPMForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_minicpm.MiniCPMConfig",
        "AutoModelForCausalLM": "modeling_minicpm.MiniCPMForCausalLM",
    },
    "bos_token_id": 1,
    "eos_token_id": [2, 96],
    "hidden_act": "silu",
    "hidden_size": 128,
    "initializer_range": 0.1,
    "intermediate_size": 96,
    "max_position_embeddings": 1024,
    "model_type": "minicpm",
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "rope_type": "longrope",
        "long_factor": [2 * f for f in FACTORS],
        "short_factor": FACTORS,
        "original_max_position_embeddings": 160,
    },
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
    "use_cache": True,
    "vocab_size": 97,
    "scale_emb": 12,
    "dim_model_base": 16,
    "scale_depth": 1.4,
    "mup_denominator": 32,
    "tie_word_embeddings": False,
    "sparse_config": SPARSE,
}
"""A released config.json, its sizes small."""


def weights(layers: int = 2) -> dict[str, Tensor]:
    """Random ones, under the released names."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int, scale: float = 0.1) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    made = {
        "model.embed_tokens.weight": normal(97, 128, scale=0.05),
        "model.norm.weight": 1 + normal(128),
        "lm_head.weight": normal(97, 128),
    }
    for i in range(layers):
        here = f"model.layers.{i}"
        made |= {
            f"{here}.self_attn.q_proj.weight": normal(128, 128, scale=0.2),
            f"{here}.self_attn.k_proj.weight": normal(64, 128, scale=0.2),
            f"{here}.self_attn.v_proj.weight": normal(64, 128),
            f"{here}.self_attn.o_proj.weight": normal(128, 128),
            f"{here}.mlp.gate_proj.weight": normal(96, 128),
            f"{here}.mlp.up_proj.weight": normal(96, 128),
            f"{here}.mlp.down_proj.weight": normal(128, 96),
            f"{here}.input_layernorm.weight": 1 + normal(128),
            f"{here}.post_attention_layernorm.weight": 1 + normal(128),
        }
    return made


def folder(path: Path, sparse: dict[str, Any] | None = SPARSE, **changes: Any) -> Path:
    """A checkpoint in the released layout."""
    path.mkdir(exist_ok=True)
    config = {**RELEASED, "sparse_config": sparse, **changes}
    (path / "config.json").write_text(json.dumps(config))
    save_file(weights(), path / "model.safetensors", {"format": "pt"})
    return path


def model(path: Path, sparse: dict[str, Any] | None = SPARSE, **changes: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder(path, sparse, **changes)).eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(2))


def plain_dense(ids: Tensor) -> Tensor:
    """Logits [T, vocab] of one sequence, from the formulas of the model's report."""
    w, scale = weights(), 1.4 / math.sqrt(2)
    places = torch.arange(len(ids))

    def norm(x: Tensor, name: str) -> Tensor:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * w[f"{name}.weight"]

    def roped(x: Tensor) -> Tensor:
        factors = torch.tensor(FACTORS) * (2 if len(ids) > 160 else 1)
        angles = places[:, None] / (factors * 10000 ** (torch.arange(0, 32, 2) / 32))
        more = math.sqrt(1 + math.log(1024 / 160) / math.log(160))
        cos, sin = angles.cos() * more, angles.sin() * more
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)

    x = w["model.embed_tokens.weight"][ids] * 12
    for i in range(2):
        here = f"model.layers.{i}"
        y = norm(x, f"{here}.input_layernorm")
        q, k, v = (
            (y @ w[f"{here}.self_attn.{n}_proj.weight"].T).unflatten(-1, (-1, 32)).transpose(0, 1)
            for n in "qkv"
        )
        q, k = roped(q), roped(k)
        k, v = k.repeat_interleave(2, 0), v.repeat_interleave(2, 0)
        scores = (q @ k.transpose(1, 2)) / math.sqrt(32)
        scores = scores.masked_fill(places > places[:, None], float("-inf"))
        o = (scores.softmax(-1) @ v).transpose(0, 1).flatten(1)
        x = x + (o @ w[f"{here}.self_attn.o_proj.weight"].T) * scale
        y = norm(x, f"{here}.post_attention_layernorm")
        gate, up = (y @ w[f"{here}.mlp.{n}_proj.weight"].T for n in ("gate", "up"))
        down = w[f"{here}.mlp.down_proj.weight"]
        x = x + (torch.nn.functional.silu(gate) * up @ down.T) * scale
    return norm(x, "model.norm") / (128 / 16) @ w["lm_head.weight"].T


class TestDense:
    @pytest.mark.parametrize("length", [7, 150, 170])
    @torch.no_grad()
    def test_it_is_the_formula_and_granite(self, tmp_path: Path, length: int) -> None:
        """Below and above the length from which rope has its long factors."""
        ids = tokens(1, length)
        released = copy.deepcopy(RELEASED)  # the config puts things into its rope_scaling
        granite = transformers.GraniteForCausalLM(
            transformers.GraniteConfig(
                **{k: v for k, v in released.items() if k not in ("model_type", "auto_map")},
                embedding_multiplier=12,
                residual_multiplier=1.4 / math.sqrt(2),
                logits_scaling=128 / 16,
                attention_multiplier=32**-0.5,
            )
        )
        granite.load_state_dict(weights())
        logits = model(tmp_path, None)(ids).logits
        assert distance(logits, granite(ids).logits) < 2e-7
        assert distance(logits[0], plain_dense(ids[0])) < 1e-5

    @torch.no_grad()
    def test_without_a_sparse_config_attention_is_transformers_own(self, tmp_path: Path) -> None:
        assert model(tmp_path, None).config._attn_implementation == "sdpa"


def oracle(path: Path, ids: Tensor, dense: Any = lambda t: False) -> Tensor:
    """Logits [T, vocab] of one sequence."""
    with plain(model(path, None), INFLLM, dense) as one:
        return one(ids[None]).logits[0]


class TestSparse:
    @pytest.mark.parametrize("length", [1, 8, 80, 81, 200])
    @torch.no_grad()
    def test_it_is_the_formula(self, tmp_path: Path, length: int) -> None:
        ids = tokens(1, length)
        logits = model(tmp_path)(ids).logits[0]
        assert distance(logits, oracle(tmp_path / "dense", ids[0])) < 1e-5

    @torch.no_grad()
    def test_it_is_not_dense(self, tmp_path: Path) -> None:
        ids = tokens(1, 150)
        assert distance(model(tmp_path)(ids).logits[0], plain_dense(ids[0])) > 1e-3

    @pytest.mark.parametrize("side", ["left", "right"])
    @torch.no_grad()
    def test_rows_of_a_padded_batch_are_each_alone(self, tmp_path: Path, side: str) -> None:
        ids = tokens(2, 130)
        mask = torch.ones_like(ids)
        mask[0, slice(0, 29) if side == "left" else slice(101, 130)] = 0
        logits = model(tmp_path)(
            ids, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)
        ).logits
        for row in range(2):
            real = mask[row].bool()
            expected = oracle(tmp_path / "dense", ids[row, real])
            assert distance(logits[row, real], expected) < 1e-5

    def test_it_trains_through_the_attention_alone(self, tmp_path: Path) -> None:
        ids, one = tokens(1, 120), model(tmp_path)
        one(ids, labels=ids).loss.backward()
        with plain(model(tmp_path / "dense", None), INFLLM) as other:
            other(ids, labels=ids).loss.backward()
        for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
            assert distance(mine.grad, theirs.grad) < 1e-4, name

    @torch.no_grad()
    def test_generated_tokens_are_the_formulas(self, tmp_path: Path) -> None:
        ids, one = tokens(1, 100), model(tmp_path)
        made = one.generate(ids, max_new_tokens=10, min_new_tokens=10, do_sample=False)[0]
        with plain(model(tmp_path / "dense", None), INFLLM) as other:
            for end in range(100, 110, 3):
                logits = other(made[None, :end]).logits[0, -1]
                logits[[2, 96]] = float("-inf")  # ends of a text, which min_new_tokens forbids
                assert made[end] == logits.argmax()


class TestDenseLen:
    @torch.no_grad()
    def test_a_sequence_is_dense_below_it_and_sparse_from_it_on(self, tmp_path: Path) -> None:
        one = model(tmp_path, {**SPARSE, "dense_len": 120})
        below, at = tokens(1, 119), tokens(1, 120)
        assert distance(one(below).logits[0], plain_dense(below[0])) < 1e-5
        assert distance(one(at).logits[0], oracle(tmp_path / "dense", at[0])) < 1e-5

    @torch.no_grad()
    def test_each_row_has_its_own(self, tmp_path: Path) -> None:
        one, ids = model(tmp_path, {**SPARSE, "dense_len": 120}), tokens(2, 140)
        mask = torch.ones_like(ids)
        mask[0, :30] = 0
        logits = one(ids, attention_mask=mask).logits
        assert distance(logits[0, 30:], plain_dense(ids[0, 30:])) < 1e-5
        assert distance(logits[1], oracle(tmp_path / "dense", ids[1])) < 1e-5

    @pytest.mark.parametrize("padded", [False, True])
    @torch.no_grad()
    def test_decoding_becomes_sparse_when_it_is_reached(self, tmp_path: Path, padded: bool) -> None:
        """Earlier tokens have seen everything, in a prompt and in steps."""
        one, ids = model(tmp_path, {**SPARSE, "dense_len": 120}), tokens(2, 130)
        mask = torch.ones_like(ids)
        mask[0, : 10 * padded] = 0
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, logits = None, []
        for first, end in [(0, 112), *((t, t + 1) for t in range(112, 130))]:
            out = one(
                ids[:, first:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, first:end],
                past_key_values=cache,
                use_cache=True,
            )
            cache = out.past_key_values
            logits.append(out.logits)
        for row in range(2):
            real = mask[row].bool()
            expected = oracle(tmp_path / "dense", ids[row, real], lambda t: t + 1 < 120)
            assert distance(torch.cat(logits, 1)[row, real], expected) < 1e-5


class TestFolders:
    def test_the_auto_classes_open_a_released_one(self, tmp_path: Path) -> None:
        path = folder(tmp_path)
        assert isinstance(AutoConfig.from_pretrained(path), MiniCPMConfig)
        one = AutoModelForCausalLM.from_pretrained(path)
        assert isinstance(one, MiniCPMForCausalLM)
        assert one.config._attn_implementation == "nsagen"
        assert AutoModel.from_pretrained(path, attn_implementation="sdpa") is not None

    def test_a_sparse_config_added_later_is_no_dense_model(self, tmp_path: Path) -> None:
        path = folder(tmp_path, None)
        config = AutoConfig.from_pretrained(path)
        config.sparse_config = SPARSE
        one = AutoModelForCausalLM.from_pretrained(path, config=config)
        assert one.config._attn_implementation == "nsagen"
        one = AutoModelForCausalLM.from_pretrained(path)
        with pytest.raises(InvalidInputError, match="would stay dense"):
            one.config.sparse_config = SPARSE
        one.set_attn_implementation("nsagen")
        one.config.sparse_config = SPARSE
        one(tokens(1, 20))

    @torch.no_grad()
    def test_one_is_saved_as_it_was_released(self, tmp_path: Path) -> None:
        ids, one = tokens(1, 170), model(tmp_path / "released")
        one.save_pretrained(tmp_path / "saved")
        saved = json.loads((tmp_path / "saved" / "config.json").read_text())
        changed = {name for name, value in RELEASED.items() if saved.get(name) != value}
        assert changed == {"auto_map", "torch_dtype"}  # the former's code is not there
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
        assert torch.equal(again(ids).logits, one(ids).logits)

    def test_a_default_is_minicpm4s(self) -> None:
        settings = MiniCPMConfig(sparse_config={}).nsagen
        assert settings is not None
        assert (settings["topk"], settings["local_blocks"], settings["init_blocks"]) == (96, 33, 1)
        assert settings["dense_len"] == 8192

    @pytest.mark.parametrize(
        ("sparse", "text"),
        [
            ({"use_nope": True}, "use_nope"),
            ({"block": 64}, "block_size"),
            ({"window_size": 100}, "multiple of block_size"),
            ({"topk": -40}, "at least 1, got -40"),
            ({"topk": "64"}, "at least 1, got '64'"),
            ({"window_size": True}, "multiple of block_size"),
            ({"kernel_stride": 5}, "kernel_size must be a multiple"),
            ("yes", "mapping"),
        ],
    )
    def test_a_sparse_config_that_is_not_computed_is_refused(self, sparse: Any, text: str) -> None:
        with pytest.raises(InvalidInputError, match=text):
            MiniCPMConfig(sparse_config=sparse)

    def test_weights_that_do_not_fit_are_refused(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="unexpected_keys"):
            AutoModelForCausalLM.from_pretrained(folder(tmp_path, num_hidden_layers=1))
        with pytest.raises(InvalidInputError, match="num_experts"):
            AutoConfig.from_pretrained(folder(tmp_path, num_experts=8))
