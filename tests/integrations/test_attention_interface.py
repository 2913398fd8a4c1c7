"""`attn_implementation="nsagen"` in dense models: InfLLM-V2 and MoBA, beside their formulas."""

from __future__ import annotations

import copy
import functools
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache  # noqa: E402

import nsagen.integrations.transformers  # noqa: E402
from nsagen import ops  # noqa: E402
from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations import block_attention  # noqa: E402
from nsagen.integrations.attention_layout import Layout  # noqa: E402
from nsagen.model import forms  # noqa: E402
from nsagen.ops.compress import compress  # noqa: E402
from tests.integrations.plain_forms import INFLLM, MOBA, distance, plain  # noqa: E402
from tests.integrations.tiny import LLAMA  # noqa: E402

KINDS = ("Llama", "Qwen3", "Gemma3", "Mistral")
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)
EVERY_FORM = pytest.mark.parametrize("form", [INFLLM, MOBA], ids=["infllm_v2", "moba"])
GREEDY = {"max_new_tokens": 8, "do_sample": False}


@functools.cache
def dense(kind: str) -> Any:
    """A small random model whose attention is far from even. Of Gemma's layers two slide."""
    own: dict[str, Any] = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "num_hidden_layers": 2,
    }
    if kind == "Gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        rope = dict.fromkeys(set(kinds), own["rope_parameters"])
        own = {
            "layer_types": kinds,
            "sliding_window": 24,
            "num_hidden_layers": 3,
            "rope_parameters": rope,
            "query_pre_attn_scalar": 32,
        }
    if kind == "Mistral":
        own["sliding_window"] = None
    text = "Text" if kind == "Gemma3" else ""
    config = getattr(transformers, f"{kind}{text}Config")(
        **LLAMA | {"initializer_range": 0.2} | own
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    model.generation_config.cache_implementation = None
    return model


def sparse(kind: str, form: dict[str, Any], **changes: Any) -> Any:
    model = copy.deepcopy(dense(kind))
    model.config.nsagen = {**form, **changes}
    model.set_attn_implementation("nsagen")
    return model


def oracle(kind: str, form: dict[str, Any], ids: Tensor, dense_at: Any = lambda t: False) -> Tensor:
    """Logits [T, vocab] of one sequence."""
    with plain(copy.deepcopy(dense(kind)), form, dense_at) as model:
        return model(ids[None], use_cache=False).logits[0]


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(2))


def positions_of(mask: Tensor) -> Tensor:
    return (mask.cumsum(1) - 1).clamp(min=0)


@EVERY_KIND
@EVERY_FORM
class TestEveryModel:
    @torch.no_grad()
    def test_it_is_the_dense_model_where_all_blocks_are_selected(
        self, kind: str, form: dict[str, Any]
    ) -> None:
        ids = tokens(2, 150)
        mask = torch.ones_like(ids)
        mask[0, :20] = 0
        given = {"attention_mask": mask, "position_ids": positions_of(mask)}
        expected = dense(kind)(ids, **given).logits[mask.bool()]
        logits = sparse(kind, form, topk=32)(ids, **given).logits[mask.bool()]
        assert distance(logits, expected) < 1e-5

    @torch.no_grad()
    def test_it_is_the_formula_where_they_are_not(self, kind: str, form: dict[str, Any]) -> None:
        ids = tokens(1, 130)
        logits = sparse(kind, form)(ids).logits
        expected = oracle(kind, form, ids[0])
        assert distance(logits[0], expected) < 1e-5
        assert distance(dense(kind)(ids).logits[0], expected) > 1e-4

    @torch.no_grad()
    def test_steps_behind_the_models_own_cache_are_the_formula(
        self, kind: str, form: dict[str, Any]
    ) -> None:
        """A prompt in two chunks, then steps; MoBA's steps are dense."""
        model, ids = sparse(kind, form), tokens(1, 110)
        cache, logits = None, []
        for first, end in [(0, 61), (61, 97), *((t, t + 1) for t in range(97, 110))]:
            out = model(ids[:, first:end], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits[0])
        steps = form["form"] == "moba"
        expected = oracle(kind, form, ids[0], lambda t: steps and t >= 97)
        assert distance(torch.cat(logits), expected) < 1e-5

    def test_it_trains_as_the_formula(self, kind: str, form: dict[str, Any]) -> None:
        ids, model = tokens(1, 80), sparse(kind, form).train()
        model(ids, labels=ids).loss.backward()
        with plain(copy.deepcopy(dense(kind)).train(), form) as other:
            other(ids, labels=ids, use_cache=False).loss.backward()
        for (name, mine), theirs in zip(model.named_parameters(), other.parameters(), strict=True):
            assert distance(mine.grad, theirs.grad) < 1e-4, name


class TestSequences:
    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    @EVERY_FORM
    @torch.no_grad()
    def test_padding_takes_no_part(self, side: str, form: dict[str, Any]) -> None:
        ids = tokens(2, 120)
        mask = torch.ones_like(ids)
        mask[0, {"left": slice(0, 19), "right": slice(101, 120), "middle": slice(50, 69)}[side]] = 0
        logits = sparse("Llama", form)(
            ids, attention_mask=mask, position_ids=positions_of(mask)
        ).logits
        for row in range(2):
            real = mask[row].bool()
            assert distance(logits[row, real], oracle("Llama", form, ids[row, real])) < 1e-5

    @EVERY_FORM
    @torch.no_grad()
    def test_documents_packed_into_a_row_are_each_alone(self, form: dict[str, Any]) -> None:
        ids, lengths = tokens(1, 150), (60, 1, 89)
        model = sparse("Llama", form)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        ends = torch.tensor([0, 60, 61, 150], dtype=torch.int32)
        for given in (
            {"position_ids": positions},
            {"position_ids": positions, "cu_seq_lens_q": ends, "cu_seq_lens_k": ends},
        ):
            logits = model(ids, use_cache=False, **given).logits[0]
            for part, piece in zip(logits.split(lengths), ids[0].split(lengths), strict=True):
                assert distance(part, oracle("Llama", form, piece)) < 1e-5

    @torch.no_grad()
    def test_a_row_of_padding_alone_gives_zeros_and_no_nan(self) -> None:
        ids = tokens(2, 90)
        mask = torch.ones_like(ids)
        mask[0] = 0
        logits = sparse("Llama", INFLLM)(ids, attention_mask=mask).logits
        assert torch.isfinite(logits).all()
        assert distance(logits[1], oracle("Llama", INFLLM, ids[1])) < 1e-5

    @torch.no_grad()
    def test_rows_are_dense_below_dense_len_and_sparse_from_it_on(self) -> None:
        ids, model = tokens(2, 100), sparse("Llama", INFLLM, dense_len=90)
        mask = torch.ones_like(ids)
        mask[0, :20] = 0
        logits = model(ids, attention_mask=mask, position_ids=positions_of(mask)).logits
        assert distance(logits[0, 20:], dense("Llama")(ids[:1, 20:]).logits[0]) < 1e-5
        assert distance(logits[1], oracle("Llama", INFLLM, ids[1])) < 1e-5

    @torch.no_grad()
    def test_a_second_turn_behind_padding(self) -> None:
        """Turns of two lengths, padded on the right, and what follows."""
        model, ids = sparse("Llama", INFLLM), tokens(2, 130)
        mask = torch.ones_like(ids)
        mask[0, 40:60] = 0
        mask[1, 120:] = 0
        positions, cache, logits = positions_of(mask), None, []
        for first, end in ((0, 60), (60, 129), (129, 130)):
            out = model(
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
            expected = oracle("Llama", INFLLM, ids[row, real])
            assert distance(torch.cat(logits, 1)[row, real], expected) < 1e-5


class TestCaches:
    @torch.no_grad()
    def test_means_of_keys_are_on_the_caches_layers_and_made_once(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        made, means = [], block_attention._means

        def counted(*args: Any) -> Tensor:
            made.append(means(*args))
            return made[-1]

        monkeypatch.setattr(block_attention, "_means", counted)
        model, ids, cache = sparse("Llama", INFLLM), tokens(1, 100), DynamicCache()
        model(ids[:, :60], past_key_values=cache)
        before = {name: id(value) for name, value in vars(model.model.layers[0].self_attn).items()}
        for t in range(60, 100):
            model(ids[:, t : t + 1], past_key_values=cache)
        # 60 tokens have 14 windows of 8 every 4; each 4 steps one more; of two layers.
        assert sum(one.shape[2] for one in made) == 2 * (14 + 10)
        assert cache.layers[0].kept.shape[2] >= cache.layers[0].counts[0] == 24
        attention = model.model.layers[0].self_attn
        assert {name: id(value) for name, value in vars(attention).items()} == before

    @pytest.mark.parametrize("cache", [None, "static"])
    @torch.no_grad()
    def test_generated_tokens_are_the_formulas(self, cache: str | None) -> None:
        ids = tokens(1, 80)
        made = sparse("Llama", INFLLM).generate(ids, cache_implementation=cache, **GREEDY)[0]
        expected = oracle("Llama", INFLLM, made[:-1])[79:].argmax(-1)
        assert torch.equal(made[80:], expected)

    @pytest.mark.parametrize("dense_decode", [False, True])
    @EVERY_FORM
    @torch.no_grad()
    def test_left_padded_prompts_go_on_as_each_alone(
        self, form: dict[str, Any], dense_decode: bool
    ) -> None:
        ids = tokens(3, 80)
        model = sparse("Llama", form, dense_len=60, dense_decode=dense_decode)
        mask = torch.ones_like(ids)
        mask[0, :37], mask[1, :22] = 0, 0
        made = model.generate(ids, attention_mask=mask, **GREEDY)[:, 80:]
        for row, first in enumerate((37, 22, 0)):
            alone = model.generate(ids[row : row + 1, first:], **GREEDY)[0, 80 - first :]
            assert torch.equal(made[row], alone)

    @torch.no_grad()
    def test_a_step_behind_padding_copies_no_cache(self, monkeypatch: pytest.MonkeyPatch) -> None:
        ids, model = tokens(2, 90), sparse("Llama", INFLLM, dense_len=80)
        mask = torch.ones(2, 91, dtype=torch.int64)
        mask[0, :15] = 0
        cache = model(ids, attention_mask=mask[:, :90], use_cache=True).past_key_values
        monkeypatch.setattr(Layout, "pack_keys", lambda *_: pytest.fail("packed"))
        model(ids[:, :1], attention_mask=mask, past_key_values=cache)

    @torch.no_grad()
    def test_beams_carry_their_means(self) -> None:
        """Each beam goes on as a prompt of its own would."""
        ids, model = tokens(2, 80), sparse("Llama", INFLLM)
        settings = {**GREEDY, "num_beams": 3}
        made = model.generate(ids, **settings)
        assert torch.equal(made, model.generate(ids, use_cache=False, **settings))

    @torch.no_grad()
    def test_rejected_drafts_leave_nothing_behind(self) -> None:
        """Drafts are repeats of the prompt; some are rejected, and the cache is cropped."""
        ids, model = tokens(1, 20).repeat(1, 4), sparse("Llama", INFLLM)
        settings = {"max_new_tokens": 24, "do_sample": False}
        drafted = model.generate(ids, prompt_lookup_num_tokens=5, **settings)
        assert torch.equal(drafted, model.generate(ids, **settings))

    @pytest.mark.parametrize("padded", [False, True])
    @torch.no_grad()
    def test_other_tokens_in_the_place_of_cropped_ones(self, padded: bool) -> None:
        model, ids, other = sparse("Llama", INFLLM), tokens(2, 100), tokens(2, 130)[:, 100:]
        mask = torch.ones(2, 112, dtype=torch.int64)
        mask[0, : 12 * padded] = 0
        cache = DynamicCache()
        for first, end in ((0, 80), (80, 81), (81, 100)):
            model(ids[:, first:end], attention_mask=mask[:, :end], past_key_values=cache)
        cache.crop(-18)
        both = torch.cat([ids[:, :82], other], 1)
        logits = model(other, attention_mask=mask, past_key_values=cache).logits
        for row, first in enumerate((12 * padded, 0)):
            expected = oracle("Llama", INFLLM, both[row, first:])[82 - first :]
            assert distance(logits[row], expected) < 1e-5

    @pytest.mark.parametrize("new", [1, 9])
    @torch.no_grad()
    def test_a_mask_that_changes_for_cached_tokens(self, new: int) -> None:
        """As where nothing of it was kept: windows count from each row's first real token."""
        model, ids = sparse("Llama", {**INFLLM, "dense_decode": False}), tokens(2, 90)
        mask = torch.ones(2, 80 + new, dtype=torch.int64)
        mask[0, :13] = 0
        logits = []
        for forget in (False, True):
            cache = DynamicCache()
            for first, end in ((0, 78), (78, 80)):
                model(ids[:, first:end], past_key_values=cache)
            for layer in cache.layers:
                assert layer.kept is not None
                if forget:
                    layer._forget()
            given = {"attention_mask": mask, "past_key_values": cache}
            logits.append(model(ids[:, 80 : 80 + new], **given).logits)
        assert distance(*logits) < 1e-5

    @pytest.mark.parametrize("static", [False, True])
    @torch.no_grad()
    def test_a_mask_of_too_few_tokens(self, static: bool) -> None:
        model, ids = sparse("Llama", INFLLM), tokens(2, 40)
        with pytest.raises(InvalidInputError, match="must cover all 40 tokens; got 30"):
            model(ids, attention_mask=torch.ones(2, 30), use_cache=False)
        sizes = {"config": model.config, "max_cache_len": 64}
        cache = transformers.StaticCache(**sizes) if static else DynamicCache()
        model(ids, past_key_values=cache)
        for width in (1, 40):
            with pytest.raises(InvalidInputError, match=f"must cover all 41 tokens; got {width}"):
                model(ids[:, :1], attention_mask=torch.ones(2, width), past_key_values=cache)

    @torch.no_grad()
    def test_rows_can_be_repeated_and_chosen(self) -> None:
        model, ids, cache = sparse("Llama", INFLLM), tokens(2, 90), DynamicCache()
        model(ids[:, :80], past_key_values=cache)
        model(ids[:, 80:84], past_key_values=cache)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0]))
        logits = model(ids[:, 84:].flip(0), past_key_values=cache).logits
        for row in range(2):
            expected = oracle("Llama", INFLLM, ids[1 - row])[84:]
            assert distance(logits[row], expected) < 1e-5

    @torch.no_grad()
    def test_a_cache_can_be_copied_and_pickled(self) -> None:
        model, ids, cache = sparse("Llama", INFLLM), tokens(1, 84), DynamicCache()
        for first, end in ((0, 80), (80, 83)):
            model(ids[:, first:end], past_key_values=cache)
        expected = oracle("Llama", INFLLM, ids[0])[83:]
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert distance(model(ids[:, 83:], past_key_values=other).logits[0], expected) < 1e-5

    def test_tensors_of_inference_mode_can_be_gone_on_from(self) -> None:
        model, ids, cache = sparse("Llama", INFLLM), tokens(1, 90), DynamicCache()
        with torch.inference_mode():
            for first, end in ((0, 80), (80, 81)):
                model(ids[:, first:end], past_key_values=cache)
        with torch.no_grad():
            for t in range(81, 90):
                logits = model(ids[:, t : t + 1], past_key_values=cache).logits
        assert distance(logits[0], oracle("Llama", INFLLM, ids[0])[89:]) < 1e-5


def refused(text: str, model: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(InvalidInputError, match=text):
        model(*args, **kwargs)


class TestRefusals:
    @pytest.mark.parametrize(
        ("settings", "text"),
        [
            (None, "must name the form"),
            ("infllm_v2", "mapping"),
            ({"form": "nsa"}, "infllm_v2, moba"),
            ({"form": "infllm_v2", "top_k": 4}, "top_k"),
            ({"form": "infllm_v2", "topk": 8}, "init_blocks"),
            ({"form": "infllm_v2", "kernel_stride": 5}, "multiple of kernel_stride"),
            ({"form": "infllm_v2", "dense_len": True}, "dense_len"),
            ({"form": "infllm_v2", "dense_decode": 1}, "dense_decode"),
            ({"form": "moba", "kernel_size": 32}, "one window a block"),
        ],
    )
    def test_settings_that_say_nothing_clear(self, settings: Any, text: str) -> None:
        model = copy.deepcopy(dense("Llama"))
        model.config.nsagen = settings
        model.set_attn_implementation("nsagen")
        refused(text, model, tokens(1, 8))

    def test_inputs_that_would_change_attention(self) -> None:
        ids, model = tokens(1, 40), sparse("Llama", INFLLM)
        refused("output_attentions", model, ids, output_attentions=True)
        refused("prepared elsewhere", model, ids, attention_mask=torch.ones(1, 1, 40, 40))
        refused("softcap", model, ids, softcap=30.0)
        refused("causal", model, ids, is_causal=False)
        ends = torch.tensor([0, 30], dtype=torch.int32)
        refused("cu_seq_lens_q", model, ids, cu_seq_lens_q=ends)
        refused("cu_seq_lens_q", model, ids.repeat(2, 1), cu_seq_lens_q=ends)

    @pytest.mark.parametrize("name", ["cu_seq_lens_q", "cu_seq_lens_k"])
    def test_ends_of_documents_are_tensors(self, name: str) -> None:
        ends = {"cu_seq_lens_q": torch.tensor([0, 20]), name: [0, 20]}
        with pytest.raises(InvalidInputError, match=f"{name}: must be a tensor of integers"):
            sparse("Llama", INFLLM)(tokens(1, 20), use_cache=False, **ends)

    def test_documents_that_layers_with_a_window_would_not_see(self) -> None:
        ids, model, ends = tokens(1, 40), sparse("Gemma3", INFLLM), torch.tensor([0, 9, 40])
        refused("position_ids", model, ids, cu_seq_lens_q=ends, use_cache=False)
        positions = torch.cat([torch.arange(9), torch.arange(31)])[None]
        model(ids, cu_seq_lens_q=ends, position_ids=positions, use_cache=False)

    def test_dropout_of_attention_in_training(self) -> None:
        model = sparse("Llama", INFLLM).train()
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = 0.1
        refused("attention_dropout", model, tokens(1, 40))

    def test_a_window_in_every_layer(self) -> None:
        """Nothing would be sparse."""
        config = copy.deepcopy(dense("Mistral").config)
        config.sliding_window, config.nsagen = 32, INFLLM
        model = transformers.MistralForCausalLM._from_config(config, attn_implementation="nsagen")
        refused("sliding_window", model, tokens(1, 40))

    def test_gradients_behind_a_cache(self) -> None:
        """On a CPU they are the dense model's where all blocks are selected; a GPU refuses them."""
        ids, gradients = tokens(1, 90), []
        for model in (sparse("Llama", INFLLM, topk=64), copy.deepcopy(dense("Llama"))):
            cache = DynamicCache()
            with torch.no_grad():
                model(ids[:, :80], past_key_values=cache)
            model(ids[:, 80:], past_key_values=cache, labels=ids[:, 80:]).loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        assert distance(*gradients) < 1e-5


@torch.no_grad()
def test_a_saved_folder_keeps_its_form(tmp_path: Path) -> None:
    ids, model = tokens(1, 100), sparse("Qwen3", INFLLM)
    model.save_pretrained(tmp_path)
    again = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="nsagen"
    )
    assert torch.equal(again(ids).logits, model(ids).logits)


@torch.no_grad()
def test_a_pickled_model_computes_the_same() -> None:
    ids, model = tokens(1, 90), sparse("Llama", INFLLM)
    logits = model(ids).logits
    assert torch.equal(pickle.loads(pickle.dumps(model))(ids).logits, logits)


def test_checkpointing_computes_the_same_gradients() -> None:
    ids, one, again = tokens(1, 80), sparse("Llama", INFLLM), sparse("Llama", INFLLM)
    again.gradient_checkpointing_enable()
    for model in (one.train(), again.train()):
        model(ids, labels=ids).loss.backward()
    for mine, theirs in zip(again.parameters(), one.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)


def test_autocast_trains_and_generates_near_float32() -> None:
    """Where queries and keys are float32 after rope, and values bfloat16."""
    ids, model = tokens(1, 90), sparse("Llama", INFLLM)
    with torch.no_grad():
        expected = model(ids).logits
    with torch.autocast("cpu", torch.bfloat16):
        out = model(ids, labels=ids)
        assert model.generate(ids, **GREEDY).shape == (1, 98)
    out.loss.backward()
    assert distance(out.logits.detach().float(), expected) < 0.05


class TestPackages:
    @torch.no_grad()
    def test_every_op_gets_the_dispatcher_of_the_package(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """In a prompt, in chunks and in steps; on a CPU it changes nothing."""
        given, ids = [], tokens(1, 80)
        for home in (block_attention, forms):
            for name in vars(ops).keys() & vars(home).keys() - {"reference"}:
                monkeypatch.setattr(home, name, noting(getattr(home, name), given))
        monkeypatch.setattr(block_attention, "compress", noting(compress, given))
        for form in (INFLLM, {**MOBA, "dense_decode": False}):
            plain, named = sparse("Llama", form), sparse("Llama", form, package="tiny")
            cache = DynamicCache()
            for first, end in ((0, 60), (60, 79), (79, 80)):
                named(ids[:, first:end], past_key_values=cache)
            assert {one.key for one in given} == {nsagen.load("tiny").key}
            given.clear()
            assert torch.equal(named(ids).logits, plain(ids).logits)
            given.clear()

    def test_one_that_is_not_there_is_refused(self) -> None:
        refused("nowhere", sparse("Llama", INFLLM, package="nowhere"), tokens(1, 80))
        refused("package", sparse("Llama", INFLLM, package=3), tokens(1, 80))


def noting(op: Any, given: list[Any]) -> Any:
    def noted(*args: Any, **kwargs: Any) -> Any:
        given.append(kwargs["dispatcher"])
        return op(*args, **kwargs)

    return noted
