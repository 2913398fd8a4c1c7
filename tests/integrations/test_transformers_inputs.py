"""Each input of a swapped model: every sequence is computed as if alone, or the call is refused.

`CASES` has every input that a Llama of Transformers accepts in a call, and `GENERATE` those of
`generate` that reach the model or its cache. docs/transformers.md repeats both.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, GenerationConfig, LlamaForCausalLM  # noqa: E402
from transformers.utils import TransformersKwargs  # noqa: E402

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.distributed import context_parallel  # noqa: E402
from nsagen.integrations.transformers import apply_nsa, load_nsa  # noqa: E402
from nsagen.integrations.transformers_attention import TransformersNSA  # noqa: E402
from nsagen.integrations.transformers_given import INPUTS  # noqa: E402
from tests.integrations.tiny import (  # noqa: E402
    ATTENTION,
    CACHE,
    KINDS,
    as_dense,
    build,
    dense,
    distance,
    sparse,
    tokens,
    trained,
)

PAGE = Path(__file__).parents[2] / "docs" / "transformers.md"
IDS = tokens(2, 30)
ENDS = torch.tensor([0, 12, 30], dtype=torch.int32)
RESTARTS = torch.cat([torch.arange(12), torch.arange(18)])[None]


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(sparse())


def alone(model: Any, *rows: Tensor) -> Tensor:
    """The logits of sequences [T], each by itself, one after another: [sum T, vocab]."""
    return torch.cat([model(row[None], use_cache=False).logits[0] for row in rows])


def documents(model: Any) -> Tensor:
    return alone(model, IDS[0, :12], IDS[0, 12:])


def packed(model: Any, **inputs: Any) -> Tensor:
    return model(IDS[:1], use_cache=False, **inputs).logits[0]


def left_padded() -> tuple[Tensor, Tensor]:
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :7] = mask[1, :7] = 0
    return ids, mask


Case = Callable[[Any], tuple[Tensor, Tensor]]
"""The model's result for an input, and what it must equal."""


def _with_mask(model: Any) -> tuple[Tensor, Tensor]:
    ids, mask = left_padded()
    logits = model(ids, attention_mask=mask).logits[mask == 1]
    return logits, alone(model, IDS[0], IDS[1, 7:])


def _after_cached_tokens(model: Any, name: str) -> tuple[Tensor, Tensor]:
    cache = DynamicCache()
    model(IDS[:, :20], past_key_values=cache)
    logits = model(IDS[:, 20:], **{name: cache}).logits
    return logits.flatten(0, 1), alone(model, *IDS).unflatten(0, (2, 30))[:, 20:].flatten(0, 1)


def _hidden(model: Any) -> tuple[Tensor, Tensor]:
    states = model(IDS, output_hidden_states=True).hidden_states
    assert len(states) == 3
    return model.lm_head(states[-1]).flatten(0, 1), alone(model, *IDS)


def _loss(model: Any, **more: Any) -> tuple[Tensor, Tensor]:
    loss = model(IDS[:1], labels=IDS[:1], use_cache=False, **more).loss
    logits = alone(model, IDS[0])
    expected = torch.nn.functional.cross_entropy(logits[:-1], IDS[0, 1:], reduction="sum")
    return loss, expected / int(more.get("num_items_in_batch", 29))


def _shared(model: Any) -> tuple[Tensor, Tensor]:
    """The one rank of a group has all tokens, fronts before backs; tests/distributed has more."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        shard = context_parallel(model).shard(ENDS)
        logits = model(shard.take(IDS[0])[None], nsa_shard=shard).logits[0]
        return shard.whole(logits), documents(model)
    finally:
        dist.destroy_process_group()


CASES: dict[str, Case | str] = {
    "input_ids": lambda m: (m(input_ids=IDS).logits.flatten(0, 1), alone(m, *IDS)),
    "inputs_embeds": lambda m: (
        m(inputs_embeds=m.get_input_embeddings()(IDS)).logits.flatten(0, 1),
        alone(m, *IDS),
    ),
    "attention_mask": _with_mask,
    "position_ids": lambda m: (packed(m, position_ids=RESTARTS), documents(m)),
    "cache": lambda m: _after_cached_tokens(m, CACHE),
    "past_key_values": lambda m: _after_cached_tokens(m, "past_key_values"),
    "use_cache": lambda m: (m(IDS, use_cache=True).logits.flatten(0, 1), alone(m, *IDS)),
    "cache_position": lambda m: (
        m(IDS, cache_position=torch.arange(30)).logits.flatten(0, 1),
        alone(m, *IDS),
    ),
    "cu_seq_lens_q": lambda m: (packed(m, cu_seq_lens_q=ENDS), documents(m)),
    "cu_seq_lens_k": lambda m: (
        packed(m, cu_seq_lens_q=ENDS, cu_seq_lens_k=ENDS.clone()),
        documents(m),
    ),
    "max_length_q": lambda m: (packed(m, cu_seq_lens_q=ENDS, max_length_q=18), documents(m)),
    "max_length_k": lambda m: (packed(m, cu_seq_lens_q=ENDS, max_length_k=18), documents(m)),
    "seq_idx": lambda m: (
        packed(m, seq_idx=torch.tensor([[0] * 12 + [1] * 18], dtype=torch.int32)),
        documents(m),
    ),
    "nsa_shard": _shared,
    "labels": _loss,
    "num_items_in_batch": lambda m: _loss(m, num_items_in_batch=torch.tensor(7)),
    "shift_labels": lambda m: _loss(
        m, shift_labels=torch.nn.functional.pad(IDS[:1, 1:], (0, 1), value=-100)
    ),
    "logits_to_keep": lambda m: (m(IDS[:1], logits_to_keep=3).logits[0], alone(m, IDS[0])[-3:]),
    "output_hidden_states": _hidden,
    "output_router_logits": lambda m: (
        m(IDS, output_router_logits=False).logits.flatten(0, 1),
        alone(m, *IDS),
    ),
    "return_dict": lambda m: (m(IDS, return_dict=False)[0].flatten(0, 1), alone(m, *IDS)),
    "output_attentions": "never forms the weights",
    "is_causal": "must not be False",
    "kwargs": "",
}
"""How each input is computed, or the text of the refusal."""

REFUSED_VALUES = {"output_attentions": True, "is_causal": False}


def accepted() -> set[str]:
    """Every input that a call of a Llama may have."""
    named = set(inspect.signature(inspect.unwrap(LlamaForCausalLM.forward)).parameters) - {"self"}
    return named | set(TransformersKwargs.__annotations__)


def test_every_input_of_a_llama_has_a_case() -> None:
    assert accepted() <= set(CASES)
    assert set(INPUTS) <= set(CASES)


@pytest.mark.parametrize("name", sorted(CASES.keys() - {"kwargs"}))
@torch.no_grad()
def test_an_input_is_computed_as_each_sequence_alone_or_refused(model: Any, name: str) -> None:
    case = CASES[name]
    if isinstance(case, str):
        with pytest.raises(InvalidInputError, match=f"{name}: .*{case}"):
            model(IDS, **{name: REFUSED_VALUES[name]})
    else:
        assert distance(*case(model)) < 1e-5


@pytest.mark.parametrize("value", [1, np.True_, torch.tensor(True)], ids=["1", "numpy", "tensor"])
def test_flags_are_read_by_their_truth(model: Any, value: Any) -> None:
    with pytest.raises(InvalidInputError, match="output_attentions: must not be True"):
        model(IDS, output_attentions=value)
    with pytest.raises(InvalidInputError, match="is_causal: must not be False"):
        model(IDS, is_causal=value - value if isinstance(value, int) else ~value)


@pytest.mark.parametrize(
    "inputs",
    [
        {"cu_seq_lens_q": [0, 30]},
        {"cu_seq_lens_q": torch.tensor([0, 30]), "cu_seq_lens_k": [0, 30]},
        {"cu_seq_lens_q": torch.tensor([0, 30]), "max_length_k": "30"},
        {"cu_seq_lens_q": torch.tensor([0, 30]), "max_length_q": 30.5},
        {"cache_position": list(range(30))},
        {"cache_position": torch.arange(30.0)},
        {"position_ids": list(range(30))},
        {"seq_idx": [0] * 30},
    ],
)
def test_values_of_other_types_are_refused(model: Any, inputs: Any) -> None:
    with pytest.raises(InvalidInputError, match=f"{list(inputs)[-1]}: must be"):
        model(IDS[:1], use_cache=False, **inputs)


def test_an_input_that_no_model_knows_is_refused(model: Any) -> None:
    with pytest.raises(InvalidInputError, match="got token_type_ids; leave it out"):
        model(IDS, token_type_ids=torch.zeros_like(IDS))


def test_arguments_by_position(model: Any) -> None:
    """Too many arguments, or one given twice, raise the dense model's TypeError."""
    base, mask = model.model, torch.ones_like(IDS)
    assert base(IDS, mask).last_hidden_state.shape == (2, 30, 32)
    for args, kwargs in (((IDS, *[None] * 12), {}), ((IDS,), {"input_ids": IDS})):
        with pytest.raises(TypeError, match="argument"):
            base(*args, **kwargs)


def test_the_page_lists_every_input() -> None:
    text = PAGE.read_text()
    for name in (CASES.keys() - {"kwargs"}) | GENERATE.keys():
        assert f"| `{name}` |" in text, name


def test_tokens_of_other_shapes(model: Any) -> None:
    for name, wrong in (
        ("input_ids", IDS[0]),
        ("input_ids", IDS[:, :0]),
        ("inputs_embeds", torch.zeros(2, 30)),
    ):
        with pytest.raises(InvalidInputError, match=rf"{name}: must be \[batch, tokens"):
            model(**{name: wrong})


class TestPositionIds:
    @torch.no_grad()
    def test_shifted_positions_are_the_same_text(self, model: Any) -> None:
        shifted = torch.arange(30)[None] + 17
        for use_cache in (True, False):
            logits = model(IDS, position_ids=shifted, use_cache=use_cache).logits
            assert distance(logits.flatten(0, 1), alone(model, *IDS)) < 1e-5

    @torch.no_grad()
    def test_several_rows_of_documents(self, model: Any) -> None:
        other = torch.cat([torch.arange(3), torch.arange(27)])[None]
        positions = torch.cat([RESTARTS, other])
        logits = model(IDS, position_ids=positions, use_cache=False).logits.flatten(0, 1)
        rows = (IDS[0, :12], IDS[0, 12:], IDS[1, :3], IDS[1, 3:])
        assert distance(logits, alone(model, *rows)) < 1e-5

    @torch.no_grad()
    def test_a_jump_ahead_begins_a_document_as_in_the_dense_model(self) -> None:
        positions = torch.cat([torch.arange(12), 40 + torch.arange(18)])[None]
        one = dense()
        expected, logits = (
            m(IDS[:1], position_ids=positions, use_cache=False).logits for m in (one, as_dense(one))
        )
        assert distance(logits, expected) < 1e-5

    @pytest.mark.parametrize("second", [0, 40])
    @pytest.mark.parametrize("inputs", [{}, {"attention_mask": torch.ones(1, 30)}])
    def test_documents_with_a_cache_or_a_mask_are_refused(
        self, model: Any, inputs: Any, second: int
    ) -> None:
        positions = torch.cat([torch.arange(12), second + torch.arange(18)])[None]
        cached = "attention_mask" not in inputs
        with pytest.raises(InvalidInputError, match=r"use_cache=False,? and no attention_mask"):
            model(IDS[:1], position_ids=positions, use_cache=cached, **inputs)

    def test_they_go_on_from_the_cache(self, model: Any) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            model(IDS[:, :20], past_key_values=cache, position_ids=torch.arange(5, 25)[None])
            for wrong in (torch.arange(20, 30)[None], None):
                with pytest.raises(InvalidInputError, match="position_ids: must increase by one"):
                    model(IDS[:, 20:], past_key_values=cache, position_ids=wrong)
            for wrong in (torch.tensor([[20]]), None):
                with pytest.raises(InvalidInputError, match="position_ids: must increase by one"):
                    model(IDS[:, 20:21], past_key_values=cache, position_ids=wrong)
            logits = model(
                IDS[:, 20:], past_key_values=cache, position_ids=torch.arange(25, 35)[None]
            ).logits
            whole = model(IDS, use_cache=False).logits[:, 20:]
        assert distance(logits, whole) < 1e-5

    def test_other_shapes(self, model: Any) -> None:
        bools = torch.ones(1, 30, dtype=torch.bool)
        for wrong in (torch.arange(30), torch.arange(29)[None], torch.zeros(3, 2, 30), bools):
            with pytest.raises(InvalidInputError, match=r"position_ids: must be integers \[1 or 2"):
                model(IDS, position_ids=wrong)


class TestMasks:
    @torch.no_grad()
    def test_a_second_turn_of_padded_rows(self, model: Any) -> None:
        """Row 0 says 5 and 4 tokens, row 1 8 and 6; then each 3, one by one, one row pausing."""
        ids = tokens(2, 17)
        mask = torch.ones_like(ids)
        mask[0, :3] = mask[0, 8:10] = 0
        mask[1, 15] = 0
        cache, logits = DynamicCache(), []
        for start, end in ((0, 8), (8, 14), (14, 15), (15, 16), (16, 17)):
            seen = mask[:, :end]
            logits.append(
                model(ids[:, start:end], past_key_values=cache, attention_mask=seen).logits
            )
        whole = torch.cat(logits, 1)
        for row in range(2):
            kept = mask[row] == 1
            assert distance(whole[row, kept], alone(model, ids[row, kept])) < 1e-5

    @torch.no_grad()
    def test_sliding_layers_get_the_positions_that_padding_leaves(self) -> None:
        one = build(KINDS["Gemma3"])
        ids, mask = tokens(2, 16), torch.ones(2, 16, dtype=torch.long)
        mask[0, 10:13] = 0
        cache, model = DynamicCache(config=one.config), as_dense(one)
        model(ids[:, :10], past_key_values=cache)
        logits = model(ids[:, 10:], past_key_values=cache, attention_mask=mask).logits[0, -1]
        kept = torch.cat([ids[0, :10], ids[0, 13:]])
        assert distance(logits, alone(one, kept)[-1]) < 1e-5

    def test_the_cache_knows_what_was_padding(self, model: Any) -> None:
        ids, mask = left_padded()
        other = mask.clone()
        other[1, 3] = 1
        with torch.no_grad():
            for new in (1, 3):
                cache = DynamicCache()
                model(ids[:, :20], past_key_values=cache, attention_mask=mask[:, :20])
                more = {"input_ids": ids[:, 20 : 20 + new], "past_key_values": cache}
                with pytest.raises(InvalidInputError, match="must not change for tokens"):
                    model(attention_mask=other[:, : 20 + new], **more)
                with pytest.raises(InvalidInputError, match="must be given when the cache"):
                    model(**more)
                with pytest.raises(
                    InvalidInputError, match=rf"\[batch, tokens\] = \[2, {20 + new}"
                ):
                    model(attention_mask=mask[:, 20 : 20 + new], **more)

    @pytest.mark.parametrize("kind", ["Gemma3", "Llama"])
    @torch.no_grad()
    def test_padding_inside_the_window_of_a_sliding_layer(self, kind: str) -> None:
        """Dense sliding layers would count it; NSA layers don't."""
        model, ids = trained(sparse(kind)), tokens(1, 44)
        mask = torch.ones_like(ids)
        mask[0, 20:23] = 0
        cache = DynamicCache(config=model.config)
        first = model(ids[:, :24], past_key_values=cache, attention_mask=mask[:, :24])
        whole = alone(model, ids[0, mask[0] == 1])
        assert distance(first.logits[0, -1], whole[20]) < 1e-5
        for new in (1, 20):  # a step, and a pass
            given = {"input_ids": ids[:, 24 : 24 + new], "attention_mask": mask[:, : 24 + new]}
            held = copy.deepcopy(cache)
            if kind == "Gemma3":
                with pytest.raises(InvalidInputError, match="no padding between the last 24"):
                    model(past_key_values=held, **given)
            else:
                logits = model(past_key_values=held, **given).logits[0]
                assert distance(logits, whole[21 : 21 + new]) < 1e-5

    @pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_masks_of_any_dtype(self, model: Any, dtype: torch.dtype) -> None:
        ids, mask = left_padded()
        logits = model(ids, attention_mask=mask.to(dtype)).logits[mask == 1]
        assert distance(logits, alone(model, IDS[0], IDS[1, 7:])) < 1e-5

    @pytest.mark.parametrize("kind", ["additive", "numbers of documents", "nan"])
    def test_masks_that_are_not_ones_and_zeros(self, model: Any, kind: str) -> None:
        masks = {
            "additive": torch.zeros(2, 30).index_fill(1, torch.arange(7), float("-inf")),
            "numbers of documents": torch.tensor([1] * 12 + [2] * 18).expand(2, -1),
            "nan": torch.full((2, 30), float("nan")),
        }
        with pytest.raises(InvalidInputError, match="must be 1 for a token and 0 for padding; got"):
            model(IDS, attention_mask=masks[kind])

    def test_prepared_masks_are_refused(self, model: Any) -> None:
        with pytest.raises(InvalidInputError, match=r"got \[1, 1, 30, 30\]; NSA decides"):
            model(IDS, attention_mask=torch.ones(1, 1, 30, 30))


class TestPackedLengths:
    @pytest.mark.parametrize(
        ("inputs", "error"),
        [
            ({"cu_seq_lens_k": torch.tensor([0, 13, 30])}, "must equal cu_seq_lens_q"),
            ({"cu_seq_lens_k": torch.tensor([0, 30])}, "must equal cu_seq_lens_q"),
            ({"max_length_q": 17}, "max_length_q: must be at least the length of the longest"),
            ({"max_length_k": 17}, "max_length_k: must be at least the length of the longest"),
            ({"cu_seq_lens_q": torch.tensor([0, 12, 29])}, "must run from 0 to 30"),
            ({"position_ids": torch.arange(30)[None]}, "position_ids: must start documents where"),
            ({"seq_idx": torch.zeros(1, 30, dtype=torch.int32)}, "seq_idx: must start documents"),
            ({"use_cache": True}, "must come without cache"),
            ({"attention_mask": torch.ones(1, 30)}, "must come without cache and attention_mask"),
        ],
    )
    def test_inputs_that_disagree(self, model: Any, inputs: Any, error: str) -> None:
        given = {"cu_seq_lens_q": ENDS, "use_cache": False, **inputs}
        with pytest.raises(InvalidInputError, match=error):
            model(IDS[:1], **given)

    def test_several_rows_and_lengths_without_ends(self, model: Any) -> None:
        with pytest.raises(InvalidInputError, match="is for one row; got 2 rows"):
            model(IDS, cu_seq_lens_q=ENDS, use_cache=False)
        with pytest.raises(InvalidInputError, match="must come with cu_seq_lens_q"):
            model(IDS, max_length_q=30, use_cache=False)

    @torch.no_grad()
    @pytest.mark.parametrize(
        "inputs",
        [
            {"cu_seq_lens_q": torch.tensor([0, 1])},
            {"seq_idx": torch.zeros(1, 1, dtype=torch.int32)},
        ],
    )
    def test_a_step_takes_no_documents(self, model: Any, inputs: Any) -> None:
        cache = DynamicCache()
        model(IDS[:1], past_key_values=cache)
        with pytest.raises(InvalidInputError, match="must come without cache"):
            model(IDS[:1, :1], past_key_values=cache, **inputs)

    @torch.no_grad()
    def test_sliding_layers_learn_of_documents(self) -> None:
        one = build(KINDS["Gemma3"])
        assert distance(packed(as_dense(one), cu_seq_lens_q=ENDS), documents(one)) < 1e-5


class TestTraining:
    @pytest.mark.parametrize("new", [1, 6])
    @pytest.mark.parametrize("branch_kv", ["shared", "separate"])
    def test_gradients_after_cached_tokens(self, new: int, branch_kv: str) -> None:
        """Those of the last layer's own parameters: they do not depend on the prefix's history."""
        model = trained(sparse(branch_kv=branch_kv, compress_type="avgpool"))
        ids = tokens(2, 10 + new)
        ids_of = [n for n, _ in model.named_parameters() if n.endswith("1.self_attn.o_proj.weight")]
        grads = []
        for cached in (False, True):
            model.zero_grad()
            cache = DynamicCache() if cached else None
            if cached:
                with torch.no_grad():
                    model(ids[:, :10], past_key_values=cache)
            rest = ids[:, 10:] if cached else ids
            logits = model(rest, past_key_values=cache, use_cache=cached).logits
            logits[:, -new:].square().mean().backward()
            grads.append(dict(model.named_parameters())[ids_of[0]].grad.clone())
        assert distance(grads[1], grads[0]) < 1e-5

    def test_gradients_of_new_keys_and_windows(self) -> None:
        """Against autograd through the whole, with the prefix's keys and values held fixed: one
        layer, whose inputs are embeddings; so only the new tokens' may have gradients."""
        model = trained(build_one_layer())
        ids = tokens(2, 26)
        embeds = model.get_input_embeddings()(ids).detach()
        whole = embeds.clone().requires_grad_()
        model(inputs_embeds=whole, use_cache=False).logits[:, 15:].square().mean().backward()
        cache, new = DynamicCache(), embeds[:, 15:].clone().requires_grad_()
        with torch.no_grad():
            model(inputs_embeds=embeds[:, :15], past_key_values=cache)
        model(inputs_embeds=new, past_key_values=cache).logits.square().mean().backward()
        assert new.grad is not None
        assert whole.grad is not None
        assert distance(new.grad, whole.grad[:, 15:]) < 1e-5

    @pytest.mark.parametrize("new", [1, 6])
    def test_gradients_that_a_hook_brings_into_a_frozen_model(self, new: int) -> None:
        """A trainable vector is added to the new tokens after the first layer. Without a cache, the
        last layer's keys of the prefix don't depend on it either."""
        model, ids = trained(sparse()).requires_grad_(False), tokens(2, 10 + new)
        vector = torch.full((32,), 0.1, requires_grad=True)
        layer, cache = model.model.layers[0], DynamicCache()
        with torch.no_grad():
            model(ids[:, :10], past_key_values=cache)
        layer.register_forward_hook(
            lambda _, __, x: (
                x + nn.functional.pad(vector.expand(new, 32), (0, 0, x.shape[1] - new, 0))
            )
        )
        logits = model(ids, use_cache=False).logits[:, 10:]
        (expected,) = torch.autograd.grad(logits.square().mean(), vector)
        if new == 1:
            with pytest.raises(InvalidInputError, match=r"gradients: .* announced.*forward hook"):
                model(ids[:, 10:], past_key_values=cache)
            model.model.norm.requires_grad_()
        logits = model(ids[:, 10:], past_key_values=cache).logits
        (gradient,) = torch.autograd.grad(logits.square().mean(), vector)
        assert distance(gradient, expected) < 1e-5

    @pytest.mark.parametrize("new", [1, 6])
    def test_gradients_of_a_hook_into_a_recorded_prefix_are_refused(self, new: int) -> None:
        model, cache = sparse().requires_grad_(False), DynamicCache()
        vector = torch.zeros(32, requires_grad=True)
        model.model.layers[0].register_forward_hook(lambda _, __, x: x + vector)
        model(IDS[:, :20], past_key_values=cache)
        with pytest.raises(InvalidInputError, match=r"must be filled under torch\.no_grad"):
            model(IDS[:, 20 : 20 + new], past_key_values=cache)

    def test_gradients_into_a_recorded_prefix_are_refused(self, model: Any) -> None:
        cache = DynamicCache()
        model(IDS[:, :20], past_key_values=cache)
        with pytest.raises(InvalidInputError, match=r"must be filled under torch\.no_grad"):
            model(IDS[:, 20:], past_key_values=cache)
        with torch.no_grad():
            model(IDS[:, 20:], past_key_values=cache)

    def test_the_default_cache_changes_no_gradient(self) -> None:
        model = trained(sparse())
        losses = [model(IDS, labels=IDS, use_cache=use).loss for use in (True, False)]
        first, second = (torch.autograd.grad(loss, model.lm_head.weight)[0] for loss in losses)
        assert torch.equal(first, second)

    def test_attention_dropout_is_refused_in_training_alone(self) -> None:
        model = sparse()
        model.config.attention_dropout = 0.1
        model(IDS)
        with pytest.raises(InvalidInputError, match="attention_dropout: must be 0 in training"):
            model.train()(IDS)


def build_one_layer() -> Any:
    return apply_nsa(build(KINDS["Llama"], num_hidden_layers=1), ATTENTION)


class TestCaches:
    @torch.no_grad()
    def test_a_prompt_in_chunks(self, model: Any) -> None:
        ids, cache = tokens(2, 300), DynamicCache()
        parts = [model(part, past_key_values=cache).logits for part in ids.split(70, 1)]
        assert distance(torch.cat(parts, 1).flatten(0, 1), alone(model, *ids)) < 1e-5

    def test_several_tokens_take_one_pass(self, model: Any, monkeypatch: Any) -> None:
        """Cached or not, a pass never loops over tokens."""
        calls: list[str] = []
        step = TransformersNSA._step
        monkeypatch.setattr(
            TransformersNSA, "_step", lambda *args: calls.append("step") or step(*args)
        )
        cache = DynamicCache()
        with torch.no_grad():
            model(IDS[:, :20], past_key_values=cache)
            model(IDS[:, 20:], past_key_values=cache)
            assert not calls
            model(IDS[:, :1], past_key_values=cache)
        assert calls == ["step"] * 2

    def test_a_cache_that_holds_a_dense_models_tokens(self, model: Any) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            dense()(IDS, past_key_values=cache)
            with pytest.raises(InvalidInputError, match="DynamicLayer that holds tokens"):
                model(IDS, past_key_values=cache)

    @torch.no_grad()
    def test_a_cache_under_both_of_its_names(self, model: Any) -> None:
        cache, other = DynamicCache(), DynamicCache()
        model.model(IDS[:, :20], cache=cache)
        with pytest.raises(InvalidInputError, match="past_key_values: must not differ from cache"):
            model.model(IDS[:, 20:], cache=cache, past_key_values=other)
        with pytest.raises(InvalidInputError, match="past_key_values: must not differ from cache"):
            model(IDS[:, 20:], cache=cache, past_key_values=other)
        states = model.model(IDS[:, 20:], cache=cache, past_key_values=cache).last_hidden_state
        whole = model(IDS, use_cache=False).logits[:, 20:]
        assert distance(model.lm_head(states), whole) < 1e-5

    def test_a_cache_of_a_model_with_other_settings(self, model: Any) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            sparse(kernel_size=16, kernel_stride=8, block_size=16)(IDS, past_key_values=cache)
            with pytest.raises(InvalidInputError, match=r"cache: .*the same settings of attention"):
                model(IDS, past_key_values=cache)

    def test_a_cache_that_a_failed_call_left_uneven(self, model: Any) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            cache.layers[1].reset()
            with pytest.raises(
                InvalidInputError, match=r"as many tokens in every layer.*\[0, 30\]"
            ):
                model(IDS, past_key_values=cache)

    def test_other_rows_kinds_and_positions(self, model: Any) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            model(IDS, past_key_values=cache)
            with pytest.raises(InvalidInputError, match="as many rows as the batch, 1; got 2"):
                model(IDS[:1], past_key_values=cache)
            wrong = torch.arange(3)
            with pytest.raises(
                InvalidInputError,
                match=r"cache_position: .* cached tokens, 30",
            ):
                model(IDS[:, :3], past_key_values=cache, cache_position=wrong)
            both = transformers.EncoderDecoderCache(DynamicCache(), DynamicCache())
            with pytest.raises(InvalidInputError, match=r"got an? EncoderDecoderCache"):
                model(IDS, past_key_values=both)

    def test_gradient_checkpointing_after_cached_tokens(self) -> None:
        model, cache = sparse(), DynamicCache()
        with torch.no_grad():
            model(IDS, past_key_values=cache)
        model.gradient_checkpointing_enable()
        with pytest.raises(InvalidInputError, match="must be empty under gradient checkpointing"):
            model.train()(IDS, past_key_values=cache)

    def test_a_layer_alone(self, model: Any) -> None:
        with pytest.raises(InvalidInputError, match="needs the layout that its base model"):
            model.model.layers[0].self_attn(torch.zeros(1, 3, 32))


class TestLayersRemovedOrAdded:
    """Depth pruning and up-scaling, before or after the swap."""

    @staticmethod
    def of(places: list[int], renumbered: bool, swap_first: bool = True) -> Any:
        model = build(KINDS["Llama"], num_hidden_layers=3)
        if swap_first:
            apply_nsa(model, ATTENTION)
        layers = [copy.deepcopy(model.model.layers[place]) for place in places]
        for place, layer in enumerate(layers if renumbered else []):
            layer.self_attn.layer_idx = place
        model.model.layers = torch.nn.ModuleList(layers)
        model.config.num_hidden_layers = len(layers)
        return trained(model if swap_first else apply_nsa(model, ATTENTION))

    @pytest.mark.parametrize("swap_first", [True, False])
    @pytest.mark.parametrize("places", [[0, 2], [1], [0, 1, 1, 2, 2]])
    @torch.no_grad()
    def test_each_layer_has_its_place_in_a_cache(
        self, places: list[int], swap_first: bool, tmp_path: Path
    ) -> None:
        model = self.of(places, renumbered=True, swap_first=swap_first)
        wanted = {"max_new_tokens": 6, "do_sample": False}
        expected = model.generate(IDS, use_cache=False, **wanted)
        assert torch.equal(model.generate(IDS, **wanted), expected)
        model.save_pretrained(tmp_path)
        assert torch.equal(load_nsa(tmp_path).generate(IDS, **wanted), expected)

    @pytest.mark.parametrize("places", [[0, 2], [1], [0, 1, 1]])
    @torch.no_grad()
    def test_places_that_collide_or_are_left_out(self, places: list[int]) -> None:
        model = self.of(places, renumbered=False)
        model(IDS, use_cache=False)
        rule = rf"layer_idx: .*a cache; got \[{', '.join(map(str, places))}\]"
        layer = model.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("too late"))
        for call in (model, model.generate):
            with pytest.raises(InvalidInputError, match=rule):
                call(IDS)
        layer.remove()


def test_the_config_may_refuse_too() -> None:
    model = sparse()
    model.config.is_causal = False
    with pytest.raises(InvalidInputError, match="is_causal: must not be False"):
        model(IDS)


GENERATE: dict[str, dict[str, Any] | str] = {
    "use_cache": {"use_cache": False},
    "cache_implementation": {"cache_implementation": "static"},
    "num_beams": {"num_beams": 3},
    "num_return_sequences": {"num_beams": 3, "num_return_sequences": 2},
    "prompt_lookup_num_tokens": {"prompt_lookup_num_tokens": 4},
    "prefill_chunk_size": {"prefill_chunk_size": 8},
    "output_hidden_states": {"output_hidden_states": True},
    "output_attentions": "output_attentions: must not be True",
    "guidance_scale": {"guidance_scale": 1.5},
    "assistant_early_exit": {"assistant_early_exit": 1},
}
"""The settings of `generate` that decide which calls the model gets: dense and NSA agree, or the
text of the refusal."""


@pytest.mark.parametrize("name", GENERATE)
@torch.no_grad()
def test_a_setting_of_generate_is_honoured_or_refused(name: str) -> None:
    one, case = dense(), GENERATE[name]
    model, prompt = as_dense(one), IDS[:1]
    if isinstance(case, str):
        with pytest.raises(InvalidInputError, match=case):
            model.generate(prompt, max_new_tokens=3, **{name: True}, return_dict_in_generate=True)
        return
    wanted = {"max_new_tokens": 12, "do_sample": False, **case}
    expected, generated = (m.generate(prompt, **wanted) for m in (one, model))
    assert torch.equal(generated, expected)


@torch.no_grad()
def test_an_assistant_that_exits_before_the_first_layer_with_nsa() -> None:
    model, prompt = sparse("Gemma3"), IDS[:1, :10]  # the first layer slides
    wanted = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(prompt, **wanted)
    assert torch.equal(model.generate(prompt, assistant_early_exit=1, **wanted), expected)


@pytest.mark.parametrize("kind", ["Llama", "Phi3"])
def test_prompts_padded_on_the_right_are_refused_before_any_layer(kind: str) -> None:
    model, mask = sparse(kind), torch.ones_like(IDS)
    mask[1, 20:] = 0
    model.model.layers[0].forward = None  # nothing may run
    with pytest.raises(InvalidInputError, match="a prompt must end with a token; got padding on"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=2)
    with pytest.raises(InvalidInputError, match="pad on the left"):
        model.generate(IDS * mask, max_new_tokens=2)  # generate finds the padding itself
    with pytest.raises(InvalidInputError, match="pad on the left"):
        model.generate(IDS, attention_mask=mask, max_new_tokens=2, prefill_chunk_size=8)


@torch.no_grad()
def test_padding_at_the_end_of_a_chunk_is_not_that_of_a_prompt(model: Any) -> None:
    mask = torch.ones_like(IDS)
    mask[1, 10:16] = 0
    wanted = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(IDS, **wanted)
    assert torch.equal(model.generate(IDS, prefill_chunk_size=8, **wanted), expected)


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
@pytest.mark.parametrize(
    "setting",
    [
        {},
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"prefill_chunk_size": 8},
        {"num_beams": 2},
    ],
    ids=str,
)
def test_a_row_of_padding_changes_no_other_row(kind: str, setting: dict[str, Any]) -> None:
    """Its first token is the first that `generate` makes, at a position that `generate` chose."""
    model, mask = trained(sparse(kind)), torch.ones_like(IDS)
    mask[0] = 0
    wanted = {"max_new_tokens": 12, "do_sample": False, **setting}
    expected = model.generate(IDS[1:], **wanted)
    assert torch.equal(model.generate(IDS, attention_mask=mask, **wanted)[1:], expected)


@torch.no_grad()
@pytest.mark.parametrize("static", [False, True])
def test_a_row_may_begin_at_any_position_in_a_step(model: Any, static: bool) -> None:
    mask = torch.ones_like(IDS)
    mask[0, :20] = 0
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    counted[0] += 7
    capacity = {"config": model.config, "max_cache_len": 32}
    cache = transformers.StaticCache(**capacity) if static else DynamicCache()
    logits = []
    for start, end in ((0, 20), *((n, n + 1) for n in range(20, 25)), (25, 30)):
        inputs = {"attention_mask": mask[:, :end], "position_ids": counted[:, start:end]}
        logits.append(model(IDS[:, start:end], past_key_values=cache, **inputs).logits)
    found = torch.cat(logits, 1)[mask == 1]
    assert distance(found, alone(model, IDS[0, 20:], IDS[1])) < 1e-5
    counted[0, 25] += 1
    cache.crop(-5)
    inputs = {"attention_mask": mask[:, :26], "position_ids": counted[:, 25:26]}
    with pytest.raises(InvalidInputError, match="position_ids: must increase by one"):
        model(IDS[:, 25:26], past_key_values=cache, **inputs)


@torch.no_grad()
def test_a_prompt_padded_by_whole_chunks(model: Any) -> None:
    """The first chunk of a row may be all padding: that isn't padding on the right."""
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    ids[1, :19] = mask[1, :19] = 0
    wanted = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
    expected = model.generate(ids, **wanted)
    assert torch.equal(model.generate(ids, prefill_chunk_size=8, **wanted), expected)


@pytest.mark.parametrize("implementation", ["quantized", "offloaded", "offloaded_static"])
def test_other_caches_are_refused(model: Any, implementation: str) -> None:
    if implementation == "quantized":
        cache = transformers.DynamicCache(config=model.config)
        cache.layers[0].__class__ = type("QuantizedLayer", (type(cache.layers[0]),), {})
        with pytest.raises(InvalidInputError, match="got a QuantizedLayer"):
            model(IDS, past_key_values=cache)
        return
    with pytest.raises(InvalidInputError, match="that offloads"):
        model.generate(IDS, max_new_tokens=2, cache_implementation=implementation)


def test_every_setting_of_generate_is_known() -> None:
    """A setting that a later Transformers adds must be listed here."""
    known = set(GENERATE) | ON_LOGITS | WITH_OTHERS
    fields = {n for n in vars(GenerationConfig()) if not n.startswith("_")}
    if dataclasses.is_dataclass(GenerationConfig):
        fields |= {field.name for field in dataclasses.fields(GenerationConfig)}
    assert {n for n in fields if not n.startswith("_")} <= known


ON_LOGITS = {
    "bad_words_ids",
    "begin_suppress_tokens",
    "bos_token_id",
    "constraints",
    "decoder_start_token_id",
    "diversity_penalty",
    "do_sample",
    "early_stopping",
    "encoder_no_repeat_ngram_size",
    "encoder_repetition_penalty",
    "eos_token_id",
    "epsilon_cutoff",
    "eta_cutoff",
    "exponential_decay_length_penalty",
    "force_words_ids",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "length_penalty",
    "max_length",
    "max_new_tokens",
    "max_time",
    "min_length",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beam_groups",
    "output_logits",
    "output_scores",
    "pad_token_id",
    "penalty_alpha",
    "remove_invalid_values",
    "renormalize_logits",
    "repetition_penalty",
    "return_dict_in_generate",
    "sequence_bias",
    "stop_strings",
    "suppress_tokens",
    "temperature",
    "token_healing",
    "top_h",
    "top_k",
    "top_p",
    "transformers_version",
    "typical_p",
    "watermarking_config",
}
"""Settings that decide how tokens are chosen from logits, or when to stop."""

WITH_OTHERS = {
    "assistant_confidence_threshold",
    "assistant_ensemble_weight",
    "assistant_lookbehind",
    "cache_config",
    "compile_config",
    "continuous_batching_config",
    "disable_compile",
    "dola_layers",
    "is_assistant",
    "low_memory",
    "max_cache_len",
    "max_matching_ngram_size",
    "num_assistant_tokens",
    "num_assistant_tokens_schedule",
    "speculation_type",
    "target_lookbehind",
    "use_mtp",
}
"""Settings of assistants, compilation and caches, without effect on their own."""
