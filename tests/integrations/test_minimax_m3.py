"""MiniMax-M3 through `attn_implementation="nsagen"`, beside Transformers' eager model."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3  # noqa: E402

import nsagen.integrations.transformers  # noqa: E402, F401
from nsagen.core.errors import InvalidInputError  # noqa: E402

SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 48,
    "dense_intermediate_size": 96,
    "shared_intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "index_n_heads": 2,
    "index_head_dim": 32,
    "index_block_size": 16,
    "index_topk_blocks": 4,
    "layer_types": ["full_attention", "minimax_m3_sparse", "minimax_m3_sparse"],
    "mlp_layer_types": ["dense", "sparse", "sparse"],
    "max_position_embeddings": 2048,
    "initializer_range": 0.1,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e4,
        "partial_rotary_factor": 0.5,
    },
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
"""Two index heads, blocks of 16: from 65 tokens on, a query sees 4 blocks of more."""


@functools.cache
def eager() -> Any:
    """Transformers' own, with norms whose weights are not 0."""
    torch.manual_seed(0)
    config = m3.MiniMaxM3VLTextConfig(**SIZES)
    model = m3.MiniMaxM3VLForCausalLM._from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_norm.weight"):
                parameter.normal_(0, 0.3)
    return model.eval()


def ours(**changes: Any) -> Any:
    """The same weights with nsagen's attention."""
    config = m3.MiniMaxM3VLTextConfig(**{**SIZES, **changes})
    model = m3.MiniMaxM3VLForCausalLM._from_config(config, attn_implementation="nsagen")
    model.load_state_dict(eager().state_dict())
    return model.eval()


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(2))


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


@torch.no_grad()
def alone(ids: Tensor, **kwargs: Any) -> Tensor:
    """Transformers' logits of one sequence."""
    return eager()(ids[None], **kwargs).logits[0]


class TestLogits:
    @pytest.mark.parametrize("length", [1, 15, 16, 65, 300, 1000])
    @torch.no_grad()
    def test_they_are_transformers_own(self, length: int) -> None:
        ids = tokens(1, length)
        assert distance(ours()(ids).logits, eager()(ids).logits) < 1e-5

    @torch.no_grad()
    def test_the_sparse_layers_are_sparse(self) -> None:
        ids, few = tokens(1, 300), ours(index_topk_blocks=2)
        assert distance(few(ids).logits, eager()(ids).logits) > 1e-3

    @torch.no_grad()
    def test_a_batch_is_its_rows(self) -> None:
        ids = tokens(3, 130)
        logits = ours()(ids).logits
        for row in range(3):
            assert distance(logits[row], alone(ids[row])) < 1e-5

    @pytest.mark.parametrize("side", ["left", "right", "middle"])
    @torch.no_grad()
    def test_padding_shifts_no_block(self, side: str) -> None:
        """Transformers' own result depends on the side; the right answer is each row alone."""
        ids = tokens(2, 200)
        mask = torch.ones_like(ids)
        mask[
            0, {"left": slice(0, 37), "right": slice(163, 200), "middle": slice(90, 127)}[side]
        ] = 0
        real, positions = mask[0].bool(), (mask.cumsum(1) - 1).clamp(min=0)
        logits = ours()(ids, attention_mask=mask, position_ids=positions).logits
        assert distance(logits[0, real], alone(ids[0, real])) < 1e-5
        assert distance(logits[1], alone(ids[1])) < 1e-5

    @torch.no_grad()
    def test_documents_packed_by_position_ids_are_each_alone(self) -> None:
        ids, lengths = tokens(1, 220), (70, 1, 149)
        positions = torch.cat([torch.arange(n) for n in lengths])[None]
        logits = ours()(ids, position_ids=positions, use_cache=False).logits[0]
        for part, piece in zip(logits.split(lengths), ids[0].split(lengths), strict=True):
            assert distance(part, alone(piece)) < 1e-5


class TestDecoding:
    @pytest.mark.parametrize("cache", [None, "static"])
    @torch.no_grad()
    def test_greedy_tokens_are_transformers_own(self, cache: str | None) -> None:
        ids, settings = tokens(2, 90), {"max_new_tokens": 12, "do_sample": False}
        expected = eager().generate(ids, **settings)
        assert torch.equal(ours().generate(ids, cache_implementation=cache, **settings), expected)

    @torch.no_grad()
    def test_left_padded_prompts_go_on_as_each_alone(self) -> None:
        ids, settings = tokens(2, 100), {"max_new_tokens": 12, "do_sample": False}
        mask = torch.ones_like(ids)
        mask[0, :37] = 0
        made = ours().generate(ids, attention_mask=mask, **settings)[:, 100:]
        for row, first in ((0, 37), (1, 0)):
            expected = eager().generate(ids[row : row + 1, first:], **settings)[0, 100 - first :]
            assert torch.equal(made[row], expected)

    @pytest.mark.parametrize("how", [{"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 32}])
    @torch.no_grad()
    def test_drafts_and_chunks_change_no_token(self, how: dict[str, int]) -> None:
        """Drafts are repeats of the prompt; some are rejected, and the cache is cropped."""
        ids, model = tokens(1, 20).repeat(1, 4), ours()
        settings = {"max_new_tokens": 16, "do_sample": False}
        assert torch.equal(model.generate(ids, **how, **settings), model.generate(ids, **settings))

    @torch.no_grad()
    def test_beams_carry_their_index_keys(self) -> None:
        settings = {"max_new_tokens": 6, "do_sample": False, "num_beams": 3}
        ids = tokens(2, 70)
        assert torch.equal(ours().generate(ids, **settings), eager().generate(ids, **settings))

    @pytest.mark.parametrize("padded", [False, True])
    @torch.no_grad()
    def test_several_tokens_behind_a_cache_are_one_pass(self, padded: bool) -> None:
        """A prompt in chunks; padded: a second turn behind turns of several lengths."""
        ids, model = tokens(2, 150), ours()
        mask = torch.ones_like(ids)
        if padded:
            mask[0, 60:80] = 0  # the first turn's right padding
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        cache, logits = None, []
        for first, end in ((0, 80), (80, 81), (81, 150)):
            out = model(
                ids[:, first:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, first:end],
                **({} if cache is None else {"past_key_values": cache}),
                use_cache=True,
            )
            cache = out.past_key_values
            logits.append(out.logits)
        for row in range(2):
            real = mask[row].bool()
            assert distance(torch.cat(logits, 1)[row, real], alone(ids[row, real])) < 1e-5


def plain_index_loss(ids: Tensor) -> float:
    """KL(attention || index) from the weights that the eager model forms."""
    model, taken = copy.deepcopy(eager()), []
    for layer in model.model.layers[1:]:
        layer.self_attn.indexer.register_forward_pre_hook(lambda m, args: taken.append((m, args)))
    with torch.no_grad():
        weights = model(ids, output_attentions=True).attentions[1:]
        losses = []
        for (indexer, (x, rope, *_)), attention in zip(taken, weights, strict=True):
            size = (*x.shape[:2], -1, indexer.head_dim)
            q = indexer.q_norm(indexer.q_proj(x).view(size)).transpose(1, 2)
            k = indexer.k_norm(indexer.k_proj(x).view(size)).transpose(1, 2)
            q, k = m3.apply_rotary_pos_emb(q, k, *rope)
            teacher = attention.unflatten(1, (2, 2)).mean(2)
            scores = (q @ k.transpose(-1, -2)) * indexer.head_dim**-0.5
            student = scores.masked_fill(teacher == 0, float("-inf")).log_softmax(-1)
            terms = torch.special.xlogy(teacher, teacher) - teacher * student.masked_fill(
                teacher == 0, 0
            )
            losses.append(terms.sum(-1).mean())
    return float(torch.stack(losses).mean())


class TestTraining:
    def test_the_index_loss_is_an_output_and_in_the_loss(self) -> None:
        ids, model = tokens(2, 120), ours(nsagen={"index_loss_coef": 0.5}).train()
        out = model(ids, labels=ids)
        expected = eager()(ids, labels=ids).loss
        assert out.index_loss.item() == pytest.approx(plain_index_loss(ids), rel=1e-4)
        assert out.loss.item() == pytest.approx((expected + 0.5 * out.index_loss).item(), rel=1e-5)
        assert model.eval()(ids, labels=ids).index_loss is None

    def test_only_the_index_learns_from_it(self) -> None:
        ids, model = tokens(1, 100), ours().train()
        model(ids).index_loss.backward()
        learning = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
        assert learning == {n for n, _ in model.named_parameters() if ".indexer." in n}

    def test_the_rest_learns_as_from_the_eager_model(self) -> None:
        ids, model, dense = tokens(1, 100), ours().train(), copy.deepcopy(eager()).train()
        model(ids, labels=ids).loss.backward()
        dense(ids, labels=ids).loss.backward()
        for (name, mine), theirs in zip(model.named_parameters(), dense.parameters(), strict=True):
            if ".indexer." not in name:
                assert distance(mine.grad, theirs.grad) < 1e-4, name

    def test_it_falls_as_the_index_learns(self) -> None:
        ids, model = tokens(1, 100), ours().train()
        index = [p for n, p in model.named_parameters() if ".indexer." in n]
        optimizer, losses = torch.optim.Adam(index, lr=1e-2), []
        for _ in range(8):
            losses.append(model(ids).index_loss)
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
        assert losses[-1].item() < 0.7 * losses[0].item()

    def test_a_warm_up_attends_to_everything_and_scores_all_tokens(self) -> None:
        ids, settings = tokens(1, 100), {"nsagen": {"index_warmup": True}}
        all_blocks = ours(index_topk_blocks=64).train()(ids)
        warm = ours(**settings).train()(ids)
        assert distance(warm.logits, all_blocks.logits) < 1e-5
        assert warm.index_loss.item() == pytest.approx(all_blocks.index_loss.item(), rel=1e-4)

    def test_checkpointing_computes_the_same_gradients(self) -> None:
        ids, plain, again = tokens(1, 70), ours().train(), ours().train()
        again.gradient_checkpointing_enable({"use_reentrant": False})
        for model in (plain, again):
            model(ids, labels=ids).loss.backward()
        for mine, theirs in zip(again.parameters(), plain.parameters(), strict=True):
            assert torch.allclose(mine.grad, theirs.grad, atol=1e-6)

    def test_padding_and_documents_take_no_part_in_it(self) -> None:
        ids, model = tokens(1, 150), ours().train()
        mask = torch.ones_like(ids)
        mask[0, 100:] = 0
        padded = model(ids, attention_mask=mask).index_loss
        assert padded.item() == pytest.approx(model(ids[:, :100]).index_loss.item(), rel=1e-5)

    def test_parts_of_a_batch_sum_to_it(self) -> None:
        """As a trainer that accumulates gradients over parts counts the labels of them all."""
        ids, model = tokens(2, 80), ours().train()
        whole = model(ids, labels=ids).loss
        items = torch.tensor(2 * 79)
        parts = [model(row[None], labels=row[None], num_items_in_batch=items).loss for row in ids]
        assert sum(parts).item() == pytest.approx(whole.item(), rel=1e-5)

    def test_a_tuple_has_it_last(self) -> None:
        ids, model = tokens(1, 40), ours().train()
        out = model(ids, labels=ids, return_dict=False)
        assert torch.equal(out[-1], model(ids, labels=ids).index_loss)


def refused(text: str, model: Any, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(InvalidInputError, match=text):
        model(*args, **kwargs)


def test_what_is_not_computed_is_refused_by_name() -> None:
    ids = tokens(1, 40)
    refused("index_lost_coef", ours(nsagen={"index_lost_coef": 1.0}), ids)
    refused("nowhere", ours(nsagen={"package": "nowhere"}), ids)
    refused("at least 0", ours(nsagen={"index_loss_coef": -1.0}), ids)
    refused("attention_dropout", ours(attention_dropout=0.1).train(), ids)
    refused("output_attentions", ours(), ids, output_attentions=True)
    refused("attention_mask", ours(), ids, attention_mask=torch.ones(1, 1, 40, 40))
    refused("inputs.*s_aux", ours(), ids, s_aux=torch.ones(4))
    reentrant = ours().train()
    reentrant.gradient_checkpointing_enable({"use_reentrant": True})
    embeds = reentrant.get_input_embeddings()(ids)
    refused("reentrant", reentrant, inputs_embeds=embeds)
    behind = ours()(ids, use_cache=True).past_key_values
    refused("whole sequences", ours().train(), ids, past_key_values=behind)
    with torch.no_grad():
        mixed = ours()(ids, use_cache=True).past_key_values
    mixed.layers[1].idx_keys = mixed.layers[1].idx_keys[:, :, :30]
    refused("an index key for each", ours(), ids, past_key_values=mixed)
    refused("index would not learn", ours().train().model, ids)
    wide = m3.MiniMaxM3VLTextConfig(**{**SIZES, "index_n_heads": 4})
    model = m3.MiniMaxM3VLForCausalLM._from_config(wide, attn_implementation="nsagen")
    refused("index_n_heads", model, ids)


@torch.no_grad()
def test_a_cache_without_index_keys_is_refused() -> None:
    """One that was made without the model's config."""
    with pytest.raises(InvalidInputError, match="cache: must have room for index keys; got a"):
        ours()(tokens(1, 20), past_key_values=transformers.DynamicCache())


def test_a_saved_folder_opens_with_it(tmp_path: Path) -> None:
    ids, model = tokens(1, 80), ours(nsagen={"index_loss_coef": 0.1})
    model.save_pretrained(tmp_path)
    again = m3.MiniMaxM3VLForCausalLM.from_pretrained(tmp_path, attn_implementation="nsagen")
    assert again.config.nsagen == {"index_loss_coef": 0.1}
    assert torch.equal(again(ids).logits, model(ids).logits)


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 56,
}


@pytest.fixture(scope="module")
def released(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as released: of the model that sees images, under its names, with `eager`'s text."""
    config = m3.MiniMaxM3VLConfig(
        text_config=SIZES,
        vision_config=VISION,
        image_token_index=95,
        video_token_index=96,
        projector_hidden_size=64,
    )
    made = m3.MiniMaxM3SparseForConditionalGeneration._from_config(config)
    made.model.language_model.load_state_dict(eager().model.state_dict())
    made.lm_head.load_state_dict(eager().lm_head.state_dict())
    folder = tmp_path_factory.mktemp("released")
    made.save_pretrained(folder)
    return folder


def opened(folder: Path, attention: str = "nsagen") -> Any:
    kind = transformers.AutoModelForImageTextToText
    return kind.from_pretrained(folder, attn_implementation=attention).eval()


class TestReleasedFolder:
    """AutoModelForImageTextToText opens it; the text model's class has other names."""

    @torch.no_grad()
    def test_text_is_the_text_models(self, released: Path) -> None:
        ids, model = tokens(1, 150) % 95, opened(released)
        assert distance(model(ids).logits, eager()(ids).logits) < 1e-5
        how = {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(model.generate(ids, **how), eager().generate(ids, **how))

    @torch.no_grad()
    def test_images_are_transformers_own(self, released: Path) -> None:
        ids = tokens(1, 150) % 95
        ids[0, 50:54] = 95  # 4 x 4 patches, merged by twos
        patches = torch.randn(16, 3 * 2 * 14 * 14, generator=torch.Generator().manual_seed(1))
        image = {"pixel_values": patches, "image_grid_thw": torch.tensor([[1, 4, 4]])}
        found, expected = (
            opened(released, name)(ids, **image).logits for name in ("nsagen", "eager")
        )
        assert distance(found, expected) < 1e-5

    def test_it_trains_as_the_text_model(self, released: Path) -> None:
        ids, settings = tokens(1, 100) % 95, {"index_loss_coef": 0.5}
        model, text = opened(released).train(), ours(nsagen=settings).train()
        model.config.text_config.nsagen = settings
        out, expected = model(ids, labels=ids), text(ids, labels=ids)
        assert out.index_loss.item() == pytest.approx(expected.index_loss.item(), rel=1e-5)
        assert out.loss.item() == pytest.approx(expected.loss.item(), rel=1e-5)
        out.loss.backward()
        learns = [p for n, p in model.named_parameters() if ".indexer." in n]
        assert learns
        assert all(p.grad is not None for p in learns)

    def test_settings_beside_the_text_config_are_refused(self, released: Path) -> None:
        model = opened(released)
        model.config.nsagen = {"index_loss_coef": 0.5}
        refused("text_config.nsagen", model, tokens(1, 20) % 95)

    @torch.no_grad()
    def test_its_cache_may_be_narrow(self, released: Path) -> None:
        ids, model = tokens(1, 100) % 95, opened(released)
        model.config.text_config.nsagen = {"cache_dtype": "int8"}
        cache = model(ids, use_cache=True).past_key_values
        assert {layer.keys.dtype for layer in cache.layers} == {torch.int8}


@torch.no_grad()
def test_other_implementations_are_as_they_were() -> None:
    ids, model = tokens(1, 80), ours()
    model.set_attn_implementation("eager")
    assert torch.equal(model(ids).logits, eager()(ids).logits)


@pytest.mark.parametrize("warm", [False, True])
def test_autocast_trains_the_index_near_float32(warm: bool) -> None:
    """Rope leaves index heads in float32 there, and the attention's own are in bfloat16."""
    ids, found = tokens(1, 80), []
    for enabled in (False, True):
        model = ours(nsagen={"index_warmup": warm}).train()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = model(ids, labels=ids)
        out.loss.backward()
        grad = model.model.layers[1].self_attn.indexer.q_proj.weight.grad
        assert grad.isfinite().all()
        assert grad.any()
        found.append(out.index_loss.item())
    assert found[1] == pytest.approx(found[0], rel=0.1)
