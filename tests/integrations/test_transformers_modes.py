"""A swapped model in the modes of PyTorch and Transformers: the same results in each."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.transformers import apply_nsa  # noqa: E402
from tests.integrations.tiny import (  # noqa: E402
    ATTENTION,
    KINDS,
    as_dense,
    build,
    dense,
    distance,
    sparse,
    tokens,
    trained,
)

IDS = tokens(2, 30)
KINDS_OF_COMPRESSION = ("weightedpool", "linear", "mlp", "avgpool", "sigmoid_mul")


@pytest.fixture
def model() -> Any:
    return trained(sparse())


def gradients(model: Any, **inputs: Any) -> dict[str, Tensor]:
    model.zero_grad()
    model(IDS, labels=IDS, **inputs).loss.backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, gradient in one.items():
        assert distance(other[name], gradient) < 1e-5, name


class TestInferenceMode:
    def test_generate_in_it_then_train(self, model: Any) -> None:
        expected = gradients(model)
        with torch.inference_mode():
            model.generate(IDS, max_new_tokens=3, do_sample=False)
        assert_same(gradients(model), expected)

    @pytest.mark.parametrize("new", [1, 5])
    def test_a_cache_filled_in_it_serves_outside(self, model: Any, new: int) -> None:
        whole = model(IDS, use_cache=False).logits[:, 20 : 20 + new].detach()
        for mode in (torch.no_grad, torch.enable_grad):
            cache = DynamicCache()
            with torch.inference_mode():
                model(IDS[:, :20], cache=cache)
            with mode():
                logits = model(IDS[:, 20 : 20 + new], cache=cache).logits
            assert distance(logits, whole) < 1e-5
        logits.square().mean().backward()

    def test_a_model_made_in_it(self) -> None:
        with torch.inference_mode():
            swapped = trained(sparse())
            assert swapped.generate(IDS, max_new_tokens=2).shape == (2, 32)


class TestAutocast:
    @pytest.mark.parametrize("kind", KINDS_OF_COMPRESSION)
    def test_train_and_generate(self, kind: str) -> None:
        model = trained(sparse("Qwen3", compress_type=kind))
        plain = model(IDS).logits
        with torch.autocast("cpu", torch.bfloat16):
            assert distance(model(IDS).logits.float(), plain) < 0.05
            for gradient in gradients(model).values():
                assert gradient.isfinite().all()
            generated = model.generate(IDS, max_new_tokens=4, do_sample=False)
            with torch.no_grad():
                logits = model(generated, use_cache=False).logits[:, 29:-1]
        chosen = logits.gather(-1, generated[:, 30:, None])
        assert (logits.max(-1, keepdim=True).values - chosen).max() < 0.3  # all but ties

    def test_a_cache_of_another_dtype(self, model: Any) -> None:
        cache = DynamicCache()
        with torch.no_grad():
            with torch.autocast("cpu", torch.bfloat16):
                model(IDS[:, :20], cache=cache)
            with pytest.raises(InvalidInputError, match="use the same autocast for all calls"):
                model(IDS[:, 20:], cache=cache)


class TestCopies:
    def test_pickled_and_copied_after_calls_of_every_kind(self, model: Any) -> None:
        mask = torch.ones_like(IDS)
        mask[0, :7] = 0
        with torch.no_grad():
            before = pickled(model)
            model(IDS, attention_mask=mask)
            model.generate(IDS, attention_mask=mask, max_new_tokens=2)
            expected = model(IDS, attention_mask=mask).logits
            for other in (before, pickled(model), copy.deepcopy(model)):
                assert type(other) is type(model)
                assert torch.equal(other(IDS, attention_mask=mask).logits, expected)

    def test_a_copy_has_weights_of_its_own(self, model: Any) -> None:
        other = copy.deepcopy(model)
        with torch.no_grad():
            other.model.layers[0].self_attn.gate.bias.zero_()
            assert not torch.equal(other(IDS).logits, model(IDS).logits)

    def test_a_config_that_a_dense_model_shares_stays_dense(self) -> None:
        one = dense()
        other = type(one)(one.config).eval()
        as_dense(one)
        swapped = trained(sparse())
        assert type(other.config) is type(one.config) is not type(swapped.config)
        assert other(IDS).logits.isfinite().all()


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def shallow() -> Any:
    """One layer: compiling takes long."""
    return trained(apply_nsa(build(KINDS["Llama"], num_hidden_layers=1), ATTENTION))


class TestCompile:
    def test_forward_with_the_default_cache(self, shallow: Any) -> None:
        compiled = torch.compile(shallow, backend="eager")
        with torch.no_grad():
            assert distance(compiled(IDS).logits, shallow(IDS).logits) < 1e-5

    def test_a_training_step_is_one_graph(self, shallow: Any) -> None:
        expected = gradients(shallow, use_cache=False)
        shallow.forward = torch.compile(shallow.forward, backend="eager", fullgraph=True)
        assert_same(gradients(shallow, use_cache=False), expected)

    def test_documents_by_their_ends_are_one_graph(self, shallow: Any) -> None:
        ends = torch.tensor([0, 12, 30], dtype=torch.int32)
        inputs = {"cu_seq_lens_q": ends, "use_cache": False}
        with torch.no_grad():
            expected = shallow(IDS[:1], **inputs).logits
            forward = torch.compile(shallow.forward, backend="eager", fullgraph=True)
            assert distance(forward(IDS[:1], **inputs).logits, expected) < 1e-5

    @pytest.mark.parametrize("implementation", [None, "static"])
    def test_generate(self, shallow: Any, implementation: str | None) -> None:
        wanted = {"max_new_tokens": 3, "do_sample": False, "cache_implementation": implementation}
        expected = shallow.generate(IDS, **wanted)
        shallow.forward = torch.compile(shallow.forward, backend="eager")
        assert torch.equal(shallow.generate(IDS, **wanted), expected)


class TestStaticCache:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["Llama", "Gemma3", "Mistral"])
    def test_generate_with_padding(self, kind: str) -> None:
        model, mask, ids = trained(sparse(kind)), torch.ones_like(IDS), IDS.clone()
        ids[1, :9] = mask[1, :9] = 0
        wanted = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        static = model.generate(ids, cache_implementation="static", **wanted)
        assert torch.equal(static, model.generate(ids, **wanted))

    @torch.no_grad()
    def test_a_window_of_layers_that_all_slide_is_no_bound(self) -> None:
        """Transformers makes room for the window alone; NSA layers keep every token."""
        model = trained(apply_nsa(build(KINDS["Mistral"], sliding_window=16), ATTENTION))
        wanted = {"max_new_tokens": 6, "do_sample": False}
        static = model.generate(IDS, cache_implementation="static", **wanted)
        assert torch.equal(static, model.generate(IDS, **wanted))

    def test_it_never_grows(self, model: Any) -> None:
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(IDS, cache=cache)
            address = cache.layers[0].store.k.data_ptr()
            model(IDS[:, :2], cache=cache)
            assert cache.layers[0].store.k.data_ptr() == address
            with pytest.raises(InvalidInputError, match="has room for 32 tokens; got 33"):
                model(IDS[:, :1], cache=cache)


class TestAssisted:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
    @pytest.mark.parametrize("branch_kv", ["shared", "separate"])
    def test_an_assistant_model_changes_no_token(self, kind: str, branch_kv: str) -> None:
        """Whether its drafts are right now and then, as a Llama's dense model's, or never."""
        model = trained(sparse(kind, branch_kv=branch_kv))
        wanted = {"max_new_tokens": 24, "do_sample": False}
        expected = model.generate(IDS[:1], **wanted)
        for assistant in (dense("Llama"), sparse("Llama", topk=3)):
            assistant.generation_config.num_assistant_tokens = 7
            generated = model.generate(IDS[:1], assistant_model=assistant, **wanted)
            assert torch.equal(generated, expected)

    @torch.no_grad()
    @pytest.mark.parametrize("count", [1, 3, 11])
    def test_a_cropped_cache_is_that_of_the_tokens_left(self, model: Any, count: int) -> None:
        cache = DynamicCache()
        model(IDS[:, :18], cache=cache)
        model(IDS[:, 18:], cache=cache)
        left = 30 - count
        cache.crop(torch.tensor(-count))
        cache.layers[0].crop(left)  # what is left already
        assert cache.get_seq_length() == left
        more = tokens(2, 9, seed=5)
        logits = model(more, cache=cache).logits
        whole = model(torch.cat([IDS[:, :left], more], 1), use_cache=False).logits[:, left:]
        assert distance(logits, whole) < 1e-5

    @torch.no_grad()
    def test_what_cannot_be_cropped(self, model: Any) -> None:
        cache, mask = DynamicCache(), torch.ones_like(IDS)
        model(IDS[:, :18], cache=cache)
        for at in range(18, 30):
            model(IDS[:, at : at + 1], cache=cache)
        cache.crop(-1)
        with pytest.raises(InvalidInputError, match="can forget no more than the last pass"):
            cache.crop(-9)
        mask[1, 3] = 0
        padded = DynamicCache()
        model(IDS, cache=padded, attention_mask=mask)
        with pytest.raises(InvalidInputError, match="cropped while it holds padding"):
            padded.crop(-2)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_gradient_checkpointing_of_both_kinds(kind: str, reentrant: bool) -> None:
    model = trained(sparse(kind)).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(gradients(model), expected)


def test_two_models_interleaved_and_threads(model: Any) -> None:
    """No call leaves anything on a module that another call could take for its own."""
    from concurrent.futures import ThreadPoolExecutor

    masks = [torch.ones_like(IDS) for _ in range(4)]
    for row, mask in enumerate(masks):
        mask[0, : 3 * row] = 0
    with torch.no_grad():
        expected = [model(IDS, attention_mask=mask).logits for mask in masks]

        def call(index: int) -> Tensor:
            with torch.no_grad():
                return model(IDS, attention_mask=masks[index % 4]).logits

        with ThreadPoolExecutor(4) as pool:
            for index, logits in enumerate(pool.map(call, range(12))):
                assert torch.equal(logits, expected[index % 4])


def test_an_accelerate_device_map_on_the_cpu(tmp_path: Any, model: Any) -> None:
    pytest.importorskip("accelerate")
    model.save_pretrained(tmp_path)
    places = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    places |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    mapped = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, device_map=places, offload_folder=tmp_path / "offloaded"
    )
    with torch.no_grad():
        assert distance(mapped(IDS).logits, model(IDS).logits) < 1e-5
        wanted = {"max_new_tokens": 4, "do_sample": False}
        assert torch.equal(mapped.generate(IDS, **wanted), model.generate(IDS, **wanted))


@torch.no_grad()
def test_bfloat16_and_casts_keep_rope_exact() -> None:
    """Rope's tables are made from the config: no cast of the model rounds its frequencies."""
    model = as_dense(build(KINDS["Llama"]))
    exact = model(IDS).logits
    there_and_back = model.to(torch.bfloat16).float()
    cast = as_dense(build(KINDS["Llama"]).to(torch.bfloat16).float())
    assert distance(there_and_back(IDS).logits, cast(IDS).logits) < 1e-5
    assert distance(cast(IDS).logits, exact) < 0.1
