"""`attn_implementation="nsagen"` on real kernels: each kind of call that models make of the ops."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3  # noqa: E402

import nsagen.integrations.transformers  # noqa: E402, F401
from nsagen.integrations.attention_cache import remember_caches  # noqa: E402
from nsagen.ops.reference.quantize import round_trip  # noqa: E402
from tests.integrations.plain_forms import INFLLM, MOBA, distance, plain  # noqa: E402
from tests.integrations.test_minimax_m3 import SIZES, tokens  # noqa: E402

pytestmark = [pytest.mark.interpreter, pytest.mark.kernel]

SMALL = {
    "num_hidden_layers": 1,
    "hidden_size": 32,
    "head_dim": 16,
    "initializer_range": 0.3,
}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path / "cache"))


def calls(model: Any, ids: Any, *cuts: int) -> Any:
    """Logits of a prompt, of chunks and of steps behind it."""
    cache, logits, first = None, [], 0
    for end in cuts:
        out = model(ids[:, first:end], past_key_values=cache, use_cache=True)
        cache, first = out.past_key_values, end
        logits.append(out.logits)
    return torch.cat(logits, 1)


@torch.no_grad()
def test_minimax_m3_prompts_chunks_and_steps() -> None:
    kinds = {"layer_types": ["minimax_m3_sparse"], "mlp_layer_types": ["dense"]}
    sizes = {"index_head_dim": 16, "index_topk_blocks": 2}
    config = m3.MiniMaxM3VLTextConfig(**{**SIZES, **SMALL, **kinds, **sizes})
    torch.manual_seed(0)
    model = m3.MiniMaxM3VLForCausalLM._from_config(config, attn_implementation="nsagen").eval()
    ids = tokens(1, 40)
    logits = calls(model, ids, 36, 39, 40)
    model.set_attn_implementation("eager")
    assert distance(logits, model(ids).logits) < 1e-5


@pytest.mark.parametrize("form", [INFLLM, MOBA], ids=["infllm_v2", "moba"])
@torch.no_grad()
def test_a_forms_prompts_chunks_and_steps(form: dict[str, Any]) -> None:
    form = {**form, "topk": 3 if form is INFLLM else 2}
    config = transformers.LlamaConfig(
        **SMALL, vocab_size=97, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1
    )
    config.nsagen = {**form, "dense_decode": False}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="nsagen").eval()
    tokens_in_all = 52 if form["topk"] == 3 else 36  # a block more than are chosen
    ids = tokens(1, tokens_in_all)
    logits = calls(model, ids, tokens_in_all - 4, tokens_in_all - 1, tokens_in_all)
    with plain(model, form) as other:
        assert distance(logits[0], other(ids, use_cache=False).logits[0]) < 1e-5


@torch.no_grad()
def test_a_form_on_a_cache_of_int8() -> None:
    """Rows and means are stored, and steps read them, by kernels; float8 takes the same path."""
    config = transformers.LlamaConfig(
        **SMALL, vocab_size=97, intermediate_size=32, num_attention_heads=2, num_key_value_heads=1
    )
    form = {**INFLLM, "topk": 3}
    config.nsagen = {**form, "cache_dtype": "int8"}
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM._from_config(config, attn_implementation="nsagen").eval()
    remember_caches(model)
    ids = tokens(1, 52)
    logits = calls(model, ids, 48, 51, 52)
    with plain(model, form, kept=partial(round_trip, dtype=torch.int8)) as other:
        assert distance(logits[0], other(ids, use_cache=False).logits[0]) < 1e-4


@torch.no_grad()
def test_minimax_m3_on_a_cache_of_int8() -> None:
    """Its index keys too: the step selects as the chunks before it do, token by token."""
    kinds = {"layer_types": ["minimax_m3_sparse"], "mlp_layer_types": ["dense"]}
    sizes = {"index_head_dim": 16, "index_topk_blocks": 2, "nsagen": {"cache_dtype": "int8"}}
    config = m3.MiniMaxM3VLTextConfig(**{**SIZES, **SMALL, **kinds, **sizes})
    torch.manual_seed(0)
    model = m3.MiniMaxM3VLForCausalLM._from_config(config, attn_implementation="nsagen").eval()
    ids = tokens(1, 35)
    assert distance(calls(model, ids, 33, 34, 35), calls(model, ids, 35)) < 1e-4
