"""Swapped Transformers models whose sequences ranks share."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from nsagen.core.errors import InvalidInputError
from nsagen.distributed import context_parallel, tensor_parallel
from nsagen.integrations.transformers import apply_nsa
from tests.distributed.ranks import on_ranks
from tests.distributed.test_context_parallel import Found, assert_equal, offsets_of
from tests.integrations.tiny import ATTENTION, KINDS, build, dense, sparse, trained
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

LENGTHS = [7, 0, 64, 2]
IDS = torch.randint(1, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


def gradients(model: Any, logits: Tensor, targets: Tensor) -> Found:
    F.cross_entropy(logits.double(), targets, reduction="sum").backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_logits_and_gradients_are_one_process_s(kind: str) -> None:
    model = trained(sparse(kind)).double()
    targets = IDS.roll(-1)
    starts = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    logits = model(input_ids=IDS[None], position_ids=starts, use_cache=False).logits[0]
    expected = {**gradients(model, logits, targets), "logits": logits.detach()}

    def run(rank: int) -> Found:
        model.zero_grad()
        shard = context_parallel(model).shard(offsets_of(LENGTHS))
        mine = model(input_ids=shard.take(IDS)[None], nsa_shard=shard).logits[0]
        found = gradients(model, mine, shard.take(targets))
        for one in found.values():
            if one is not None:
                dist.all_reduce(one)
        return {**found, "logits": shard.whole(mine)}

    for found in on_ranks(2, run):
        assert_equal(found, expected, kind)


def test_heads_of_a_swapped_model_for_training_and_generation() -> None:
    """A hook and DTensor parameters take the place of Transformers' own plan."""
    model = trained(sparse()).double()
    targets, starts = IDS.roll(-1), torch.cat([torch.arange(n) for n in LENGTHS])[None]
    prompt = IDS[7:57].view(2, 25)

    def run(model: Any) -> tuple[Found, Tensor]:
        logits = model(input_ids=IDS[None], position_ids=starts, use_cache=False).logits[0]
        found = {**gradients(model, logits, targets), "logits": logits.detach()}
        generated = model.generate(prompt, max_new_tokens=4, do_sample=False)
        whole = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in found.items()}
        return whole, generated

    expected, tokens = run(model)

    def spread(rank: int) -> tuple[Found, Tensor]:
        model.zero_grad()
        return run(tensor_parallel(model, init_device_mesh("cpu", (2,))))

    for found, generated in on_ranks(2, spread):
        assert_equal(found, expected, "heads")
        assert torch.equal(generated, tokens)

    def refused(rank: int) -> list[str]:
        texts = []
        for kind in ("Qwen3", "Phi3"):
            with pytest.raises(InvalidInputError) as error:
                tensor_parallel(sparse(kind), init_device_mesh("cpu", (2,)))
            texts.append(str(error.value))
        return texts

    norms, joined = on_ranks(2, refused)[0]
    assert "and no norms, got q_norm, k_norm" in norms
    assert "projections of their own, and no norms, got one joined projection" in joined


@pytest.mark.parametrize("kind", ["Llama", "Qwen3"])
def test_transformers_own_plan(kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """`tp_plan="auto"` spreads feed-forwards and heads; heads with norms stay whole, by name."""
    model = trained(sparse_of_even_vocabulary(kind)).double()
    prompt = torch.randint(1, 97, (2, 40), generator=torch.Generator().manual_seed(1))
    expected = {**gradients_of(model, prompt), "logits": model(prompt).logits.detach()}
    tokens = model.generate(prompt, max_new_tokens=4, do_sample=False)
    model.save_pretrained(tmp_path / "whole")

    def run(rank: int) -> tuple[Found, Tensor, list[int], str]:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        config = DistributedConfig(tp_plan="auto")
        spread = AutoModelForCausalLM.from_pretrained(
            tmp_path / "whole", dtype=torch.float64, distributed_config=config
        )
        layer = spread.model.layers[0]
        local = [
            _local(w).shape[0] for w in (layer.mlp.up_proj.weight, layer.self_attn.q_proj.weight)
        ]
        found = {**gradients_of(spread, prompt), "logits": spread(prompt).logits.detach()}
        whole = {n: x.full_tensor() if isinstance(x, DTensor) else x for n, x in found.items()}
        made = spread.generate(prompt, max_new_tokens=4, do_sample=False)
        spread.save_pretrained(tmp_path / "spread")
        dist.barrier()
        return whole, made, local, caplog.text

    for found, made, local, log in on_ranks(2, run):
        assert_equal(found, expected, kind)
        assert torch.equal(made, tokens)
        assert local == [24, 32 if kind == "Llama" else 64]
        assert ("this attention stays whole on each rank" in log) == (kind == "Qwen3")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "spread", dtype=torch.float64)
    assert torch.equal(again(prompt).logits, expected["logits"])  # type: ignore[arg-type]


def _local(weight: Tensor) -> Tensor:
    return weight.to_local() if isinstance(weight, DTensor) else weight


def sparse_of_even_vocabulary(kind: str) -> Any:
    """Transformers' plan shares out the rows of the head too."""
    return apply_nsa(build(KINDS[kind], vocab_size=98), ATTENTION)


def gradients_of(model: Any, ids: Tensor) -> Found:
    model.zero_grad()
    F.cross_entropy(model(ids).logits.flatten(0, 1), ids.roll(-1).flatten()).backward()
    return {name: p.grad for name, p in model.named_parameters()}


def test_what_a_shard_does_not_go_with() -> None:
    model, mixed = sparse(), sparse("Gemma3")

    def run(rank: int) -> list[str]:
        shard = context_parallel(model).shard(offsets_of(LENGTHS))
        ids = shard.take(IDS)[None]
        calls: list[Callable[[], Any]] = [
            lambda: context_parallel(dense()),
            lambda: context_parallel(mixed),
            lambda: mixed(input_ids=ids, nsa_shard=shard),
            lambda: model(input_ids=IDS[None], nsa_shard=shard),
            lambda: model(input_ids=ids, nsa_shard=offsets_of(LENGTHS)),
            lambda: model(input_ids=ids, nsa_shard=shard, position_ids=ids),
            lambda: model(input_ids=ids, nsa_shard=shard, use_cache=True),
            lambda: model(input_ids=ids, nsa_shard=shard, labels=ids),
        ]
        texts = []
        for call in calls:
            with pytest.raises(InvalidInputError) as error:
                call()
            texts.append(str(error.value))
        return texts

    expected = [
        "model.layers.0.self_attn of class LlamaAttention",
        "self_attn of class Gemma3Attention",
        "needs NSA in every layer; got 1 that are dense",
        "needs input_ids of shape [1, 36]",
        "must be a shard",
        "says where all tokens are; got position_ids",
        "has no cache; got use_cache=True",
        "goes with no labels: a token's successor may be on another rank",
    ]
    for text, part in zip(on_ranks(2, run)[0], expected, strict=True):
        assert part in text
