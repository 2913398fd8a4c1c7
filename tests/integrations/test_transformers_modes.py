"""A swapped model in the modes of PyTorch and Transformers: the same results in each."""

from __future__ import annotations

import contextlib
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


def attributes(model: Any) -> dict[tuple[str, str], Any]:
    """The attributes of every module of a model; dictionaries as copies."""
    return {
        (name, attribute): dict(value) if isinstance(value, dict) else value
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
    }


def _with_padding(model: Any) -> dict[str, Tensor]:
    mask = torch.ones_like(IDS)
    mask[0, :7] = 0
    return {"attention_mask": mask}


def _generated(model: Any, **wanted: Any) -> None:
    model.generate(IDS[:1], max_new_tokens=4, do_sample=False, **wanted)


def _refused(model: Any) -> None:
    with contextlib.suppress(InvalidInputError):
        model(IDS, attention_mask=torch.full_like(IDS, 2), use_cache=False)


CALLS: dict[str, Any] = {
    "forward": lambda m: m(IDS),
    "padded": lambda m: m(IDS, **_with_padding(m)),
    "packed": lambda m: m(IDS, position_ids=torch.arange(30)[None] % 12, use_cache=False),
    "refused": lambda m: _refused(m),
    "training": lambda m: m.train()(IDS, labels=IDS).loss.backward(),
    "inference mode": torch.inference_mode()(lambda m: m(IDS)),
    "autocast": torch.autocast("cpu", torch.bfloat16)(lambda m: m(IDS)),
    "generate": _generated,
    "static": lambda m: _generated(m, cache_implementation="static"),
    "beams": lambda m: _generated(m, num_beams=2),
    "chunks": lambda m: _generated(m, prefill_chunk_size=8),
    "drafts": lambda m: _generated(m, prompt_lookup_num_tokens=4),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_no_call_leaves_anything_on_a_module(kind: str, name: str) -> None:
    """Except what Transformers also leaves on a dense model."""
    one = build(KINDS[kind])
    models = (one, trained(apply_nsa(copy.deepcopy(one), ATTENTION)))
    left = []
    for model in models:
        model.train(name == "training")
        before = attributes(model)
        CALLS[name](model)
        after = attributes(model)
        changed = {at for at, value in after.items() if at not in before or before[at] is not value}
        changed -= {at for at in changed if at in before and _same(before[at], after[at])}
        left.append(changed | before.keys() - after.keys())
    assert left[0] == left[1]


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(one[key] is other[key] for key in one)
    return False


def pickled(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.fixture
def shallow() -> Any:
    """One layer, because compiling is slow; and a compiler that has forgotten other tests."""
    torch._dynamo.reset()
    return trained(apply_nsa(build(KINDS["Llama"], num_hidden_layers=1), ATTENTION))


class TestCompile:
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

    def test_generate_compiles_one_step_for_static_caches(self, shallow: Any) -> None:
        """As Transformers does by default on a GPU: one graph for all steps of all calls."""
        (run, graphs), mask, ids = counting(), torch.ones_like(IDS), IDS.clone()
        ids[1, :9] = mask[1, :9] = 0
        config = transformers.CompileConfig(backend=run, fullgraph=True, mode=None)  # type: ignore[arg-type]
        config._compile_all_devices = True  # type: ignore[assignment]
        wanted = {"attention_mask": mask, "max_new_tokens": 8, "do_sample": False}
        expected = shallow.generate(ids, **wanted)
        for prompt in (ids, ids.flip(0)):
            wanted["attention_mask"] = (prompt != 0).long()
            static = {"cache_implementation": "static", "compile_config": config}
            generated = shallow.generate(prompt, **static, **wanted)
            assert torch.equal(generated, expected if prompt is ids else expected.flip(0))
        assert len(graphs) == 1

    @pytest.mark.gpu
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @torch.no_grad()
    def test_steps_in_cuda_graphs(self, dtype: torch.dtype) -> None:
        """The tensors that a step changes keep their addresses: nothing skips CUDA graphs."""
        torch._dynamo.reset()
        sizes = {"num_hidden_layers": 2, "hidden_size": 256, "head_dim": 64}
        # Larger weights put all of a head's probability on one window: scores that rounding orders.
        one = build(KINDS["Llama"], **sizes, initializer_range=0.05)
        model = trained(apply_nsa(one, {"topk": 4, "window_size": 64})).to("cuda", dtype)
        ids, mask = tokens(2, 340).cuda(), torch.ones(2, 340, dtype=torch.long, device="cuda")
        mask[1, :70] = 0
        cache = StaticCache(config=model.config, max_cache_len=400)
        model(ids[:, :300], cache=cache, attention_mask=mask[:, :300])
        step, logits = torch.compile(model, mode="reduce-overhead", fullgraph=True), []
        for end in range(301, 341):
            wide = torch.nn.functional.pad(mask[:, :end], (0, 400 - end))
            out = step(ids[:, end - 1 : end], cache=cache, attention_mask=wide)
            logits.append(out.logits.float().clone())
        whole = model(ids, attention_mask=mask, use_cache=False).logits[:, 300:].float()
        bound = 1e-3 if dtype == torch.float32 else 3e-2
        assert distance(torch.cat(logits, 1), whole) < bound
        assert torch._dynamo.utils.counters["inductor"]["cudagraph_skips"] == 0

    def test_models_whose_sliding_layers_stay_dense(self) -> None:
        """Gemma 3: a training step is one graph, and compiled steps generate the same text."""
        torch._dynamo.reset()
        model, ids, mask = trained(sparse("Gemma3")), IDS.clone(), torch.ones_like(IDS)
        ids[1, :9] = mask[1, :9] = 0
        expected, forward = gradients(model, use_cache=False), model.forward
        model.forward = torch.compile(forward, backend="eager", fullgraph=True)
        assert_same(gradients(model, use_cache=False), expected)
        model.forward = forward
        wanted = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        text, (run, graphs) = model.generate(ids, **wanted), counting()
        config = transformers.CompileConfig(backend=run, fullgraph=True, mode=None)  # type: ignore[arg-type]
        config._compile_all_devices = True  # type: ignore[assignment]
        static = {"cache_implementation": "static", "compile_config": config}
        assert torch.equal(model.generate(ids, **static, **wanted), text)
        # Transformers counts a sliding layer's tokens on the host: one for a number, one for any.
        assert 1 <= len(graphs) <= 2

    @torch.no_grad()
    def test_steps_with_a_growing_cache_share_a_graph(self, shallow: Any) -> None:
        (run, graphs), ids = counting(), tokens(2, 40)
        whole = shallow(ids, use_cache=False).logits
        compiled, cache = torch.compile(shallow, backend=run), DynamicCache()
        shallow(ids[:, :30], cache=cache)
        for at in range(30, 40):
            logits = compiled(ids[:, at : at + 1], cache=cache).logits
            assert distance(logits[:, 0], whole[:, at]) < 1e-5
        assert len(graphs) <= 2  # one for the first length, one for any

    def test_prompts_of_any_length_share_graphs(self, shallow: Any) -> None:
        """Also their decoding steps, with the model's own cache."""
        (run, graphs), counts = counting(), []
        wanted = {"max_new_tokens": 2, "do_sample": False}
        prompts = [tokens(2, length) for length in (20, 30, 37)]
        expected = [shallow.generate(ids, **wanted) for ids in prompts]
        shallow.forward = torch.compile(shallow.forward, backend=run)
        for ids, text in zip(prompts, expected, strict=True):
            assert torch.equal(shallow.generate(ids, **wanted), text)
            counts.append(len(graphs))
        assert counts[1] == counts[2]  # those of the first length, and of any other


def counting() -> tuple[Any, list[Any]]:
    """A backend that runs graphs unchanged, and the list of those it saw."""
    graphs: list[Any] = []

    def run(module: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(module)
        return module.forward

    return run, graphs


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
        """Transformers makes room for the window only; NSA layers keep every token."""
        model = trained(apply_nsa(build(KINDS["Mistral"], sliding_window=16), ATTENTION))
        wanted = {"max_new_tokens": 6, "do_sample": False}
        static = model.generate(IDS, cache_implementation="static", **wanted)
        assert torch.equal(static, model.generate(IDS, **wanted))

    @torch.no_grad()
    def test_masks_of_layers_that_all_slide(self) -> None:
        """`generate` prepares a mask for each kind of layer, here for one that isn't full."""
        layers = ["sliding_attention"] * 2
        window = {"layer_types": layers, "sliding_window": 16, "use_sliding_window": True}
        model = trained(apply_nsa(build(KINDS["Qwen2"], **window), ATTENTION))
        mask, ids = torch.ones_like(IDS), IDS.clone()
        ids[1, :9] = mask[1, :9] = 0
        wanted = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False}
        static = model.generate(ids, cache_implementation="static", **wanted)
        assert torch.equal(static, model.generate(ids, **wanted))
        alone = model.generate(ids[1:, 9:], max_new_tokens=6, do_sample=False)
        assert torch.equal(static[1:, -6:], alone[:, -6:])
        with pytest.raises(InvalidInputError, match="must have one for layers of each kind: slid"):
            model(ids, attention_mask={"full_attention": mask})

    @torch.no_grad()
    def test_masks_by_hand(self, model: Any) -> None:
        """As wide as the tokens so far or as the cache; and steps without a mask."""
        ids, mask = tokens(2, 30), torch.ones(2, 30, dtype=torch.long)
        mask[0, :7] = mask[1, 21] = 0
        expected = model(ids, attention_mask=mask, use_cache=False).logits
        wide = torch.nn.functional.pad(mask, (0, 18))
        for width in (None, 48):
            cache = StaticCache(config=model.config, max_cache_len=48)
            for start, end in ((0, 20), (20, 21), (21, 22), (22, 26), (26, 27)):
                given = (mask if width is None else wide * (torch.arange(48) < end))[
                    :, : width or end
                ]
                logits = model(ids[:, start:end], cache=cache, attention_mask=given).logits
                kept = mask[:, start:end] == 1
                assert distance(logits[kept], expected[:, start:end][kept]) < 1e-5
            with pytest.raises(InvalidInputError, match="must be given when the cache holds"):
                model(ids[:, 27:28], cache=cache)
            with pytest.raises(InvalidInputError, match="must have no ones beyond the tokens"):
                model(ids[:, 27:29], cache=cache, attention_mask=torch.ones(2, 48))
            with pytest.raises(InvalidInputError, match="must not change for tokens that the"):
                model(ids[:, 27:28], cache=cache, attention_mask=torch.ones(2, 48))
            with pytest.raises(InvalidInputError, match=r"no ones beyond .* got a width of 27"):
                model(ids[:, 27:28], cache=cache, attention_mask=mask[:, :27])

    def test_it_never_grows(self, model: Any) -> None:
        cache = StaticCache(config=model.config, max_cache_len=32)
        with torch.no_grad():
            model(IDS, cache=cache)
            address = cache.layers[0].store.k.data_ptr()
            model(IDS[:, :2], cache=cache)
            assert cache.layers[0].store.k.data_ptr() == address
            for new in (1, 2):
                rule = f"has room for 32 tokens; got {32 + new}"
                with pytest.raises(InvalidInputError, match=rule):
                    model(IDS[:, :new], cache=cache)


class TestSecondTurns:
    @torch.no_grad()
    @pytest.mark.parametrize("implementation", [None, "static"])
    def test_generate_continues_from_a_returned_cache(
        self, model: Any, implementation: str | None
    ) -> None:
        """With padding; the prompt is the whole text, or its new tokens only."""
        mask, ids = torch.ones_like(IDS), IDS.clone()
        ids[1, :9] = mask[1, :9] = 0
        wanted = {"max_new_tokens": 5, "do_sample": False}
        room = {"cache_implementation": implementation, "max_cache_len": 80}
        first = model.generate(
            ids, attention_mask=mask, return_dict_in_generate=True, **room, **wanted
        )
        text = torch.cat([first.sequences, tokens(2, 7, seed=9)], 1)
        mask = torch.nn.functional.pad(mask, (0, 12), value=1)
        expected = model.generate(text, attention_mask=mask, **wanted)[:, 42:]
        for prompt in (text, text[:, 34:]):  # the cache lacks the last generated token
            given = {"attention_mask": mask, CACHE: copy.deepcopy(first[1])}
            second = model.generate(prompt, **given, **wanted)
            assert torch.equal(second[:, -5:], expected)

    @torch.no_grad()
    @pytest.mark.parametrize("index", [1, -1])
    @pytest.mark.parametrize("static", [False, True])
    def test_rows_taken_from_a_cache(self, model: Any, static: bool, index: int) -> None:
        cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
        model(IDS[:, :20], cache=cache)
        cache.batch_select_indices(torch.tensor([index]))
        cache = pickled(cache)
        logits = [model(IDS[1:, a:b], cache=cache).logits for a, b in ((20, 21), (21, 30))]
        whole = model(IDS[1:], use_cache=False).logits[:, 20:]
        assert distance(torch.cat(logits, 1), whole) < 1e-5

    @torch.no_grad()
    def test_a_static_cache_is_used_again(self, model: Any) -> None:
        cache = StaticCache(config=model.config, max_cache_len=64)
        model(tokens(2, 50), cache=cache)
        cache.reset()
        assert distance(model(IDS, cache=cache).logits, model(IDS).logits) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_another_attention_implementation_is_that_of_sliding_layers(kind: str) -> None:
    model, mask = trained(sparse(kind)), torch.ones_like(IDS)
    mask[1, :5] = 0
    expected = model(IDS, attention_mask=mask).logits
    for name in ("eager", "sdpa"):
        model.set_attn_implementation(name)
        logits = model(IDS, attention_mask=mask).logits
        assert distance(logits[mask == 1], expected[mask == 1]) < 1e-5
        with pytest.raises(InvalidInputError, match=r"attention_mask: must be \[batch, tokens\]"):
            model.generate(IDS, max_new_tokens=2, cache_implementation="static")


class TestAssisted:
    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
    @pytest.mark.parametrize("branch_kv", ["shared", "separate"])
    def test_an_assistant_model_changes_no_token(self, kind: str, branch_kv: str) -> None:
        """The dense Llama's drafts are sometimes right; the other one's never."""
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
        cache.layers[0].crop(left)  # has no effect: as many are left
        assert cache.get_seq_length() == left
        more = tokens(2, 9, seed=5)
        logits = model(more, cache=cache).logits
        whole = model(torch.cat([IDS[:, :left], more], 1), use_cache=False).logits[:, left:]
        assert distance(logits, whole) < 1e-5

    @torch.no_grad()
    def test_what_cannot_be_cropped(self, model: Any) -> None:
        cache = DynamicCache()
        model(tokens(2, 150), cache=cache)
        with pytest.raises(InvalidInputError, match=r"drop its last 128 tokens.*crop\(-129\)"):
            cache.crop(-129)
        cache.crop(-128)
        with pytest.raises(InvalidInputError, match="drop its last 128 tokens"):
            cache.crop(-10)  # no earlier tokens are kept
        cache.crop(-22)
        assert cache.get_seq_length() == 0
        whole = model(IDS, use_cache=False).logits
        assert distance(model(IDS, cache=cache).logits, whole) < 1e-5

    @torch.no_grad()
    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("branch_kv", ["shared", "separate"])
    def test_a_padded_cache_is_cropped(self, static: bool, branch_kv: str) -> None:
        """Also after single steps, as in an assistant model, and across a row's pause."""
        model = trained(sparse(branch_kv=branch_kv))
        ids, mask = tokens(2, 30, seed=7), torch.ones_like(IDS)
        mask[0, :7] = mask[1, 20:23] = mask[1, 26] = 0
        cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
        model(ids[:, :18], cache=cache, attention_mask=mask[:, :18])
        model(ids[:, 18:25], cache=cache, attention_mask=mask[:, :25])
        for end in range(26, 31):
            model(ids[:, end - 1 : end], cache=cache, attention_mask=mask[:, :end])
        for left in (27, 21, 16):  # one after another
            cache.crop(left - int(cache.get_seq_length()))
            held, new = copy.deepcopy(cache), tokens(2, 9, seed=left)
            more = torch.cat([mask[:, :left], torch.ones_like(new)], 1)
            logits = model(new, cache=held, attention_mask=more).logits
            for row in range(2):
                kept = torch.cat([ids[row, :left][mask[row, :left] == 1], new[row]])
                whole = model(kept[None], use_cache=False).logits[0, -9:]
                assert distance(logits[row], whole) < 1e-5

    @torch.no_grad()
    @pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
    def test_a_padded_prompt(self, kind: str) -> None:
        model, mask = trained(sparse(kind)), torch.ones_like(IDS[:1])
        mask[0, :7] = 0
        wanted = {"attention_mask": mask, "max_new_tokens": 24, "do_sample": False}
        expected = model.generate(IDS[:1], **wanted)
        for assistant in (dense("Llama"), sparse("Llama", topk=3)):
            assistant.generation_config.num_assistant_tokens = 7
            generated = model.generate(IDS[:1], assistant_model=assistant, **wanted)
            assert torch.equal(generated, expected)
        assert torch.equal(model.generate(IDS[:1], prompt_lookup_num_tokens=5, **wanted), expected)


class TestFailedCalls:
    """A call that fails in its second layer, as when memory runs out."""

    @staticmethod
    def fail(model: Any, monkeypatch: Any, *args: Any, **kwargs: Any) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(model.model.layers[1].self_attn.o_proj, "forward", lambda x: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                model(*args, **kwargs)

    @torch.no_grad()
    @pytest.mark.parametrize("static", [False, True])
    def test_a_step_may_be_repeated_with_another_token(
        self, model: Any, monkeypatch: Any, static: bool
    ) -> None:
        cache = StaticCache(config=model.config, max_cache_len=64) if static else DynamicCache()
        model(IDS[:, :20], cache=cache)
        self.fail(model, monkeypatch, IDS[:, :1], cache=cache)
        logits = [model(IDS[:, at : at + 1], cache=cache).logits for at in range(20, 30)]
        whole = model(IDS, use_cache=False).logits[:, 20:]
        assert distance(torch.cat(logits, 1), whole) < 1e-5

    @torch.no_grad()
    def test_a_pass_leaves_a_cache_that_is_refused(self, model: Any, monkeypatch: Any) -> None:
        """It overwrote keys before rope that a shorter pass would need."""
        cache = DynamicCache()
        model(IDS[:, :20], cache=cache)
        self.fail(model, monkeypatch, IDS[:, 20:], cache=cache)
        with pytest.raises(InvalidInputError, match="must not be half written by a call that"):
            model(IDS[:, 20:], cache=cache)
        cache.reset()
        assert distance(model(IDS, cache=cache).logits, model(IDS).logits) < 1e-5

    @torch.no_grad()
    def test_fewer_layers_leave_the_others_as_they_were(self, model: Any) -> None:
        """As an assistant that exits early."""
        cache = DynamicCache()
        model.config.num_hidden_layers = 1
        model(IDS[:, :20], cache=cache)
        model(IDS[:, 20:21], cache=cache)
        model.config.num_hidden_layers = 2
        with pytest.raises(InvalidInputError, match="must hold as many tokens in every layer"):
            model(IDS[:, 21:], cache=cache)

    @torch.no_grad()
    def test_the_first_pass_may_be_repeated(self, model: Any, monkeypatch: Any) -> None:
        cache = DynamicCache()
        self.fail(model, monkeypatch, tokens(3, 50), cache=cache)
        assert distance(model(IDS, cache=cache).logits, model(IDS).logits) < 1e-5

    @torch.no_grad()
    def test_a_cache_cropped_to_nothing_takes_other_rows(self, model: Any) -> None:
        cache = DynamicCache()
        model(tokens(1, 50), cache=cache)
        cache.crop(-50)
        assert distance(model(IDS, cache=cache).logits, model(IDS).logits) < 1e-5


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("kind", ["Llama", "Gemma3"])
def test_gradient_checkpointing_of_both_kinds(kind: str, reentrant: bool) -> None:
    model = trained(sparse(kind)).train()
    expected = gradients(model)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    assert_same(gradients(model), expected)


def test_two_models_interleaved_and_threads(model: Any) -> None:
    """Concurrent calls don't share state."""
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


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_an_offloaded_dense_model_is_refused(tmp_path: Any, place: str) -> None:
    """Its weights are on meta between calls, and so would be those of NSA, without data."""
    accelerate = pytest.importorskip("accelerate")
    one = dense()
    if place == "disk":
        accelerate.disk_offload(one, tmp_path, execution_device="cpu")
    else:
        accelerate.cpu_offload(one, execution_device="cpu")
    with pytest.raises(InvalidInputError, match=r"layers\.0\.self_attn.*offloaded; swap.*dispatch"):
        apply_nsa(one)
    assert not hasattr(one.config, "nsa")


@torch.no_grad()
def test_swap_then_dispatch(tmp_path: Any, model: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    expected = model(IDS).logits
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert distance(model(IDS).logits, expected) < 1e-5


def test_a_model_on_meta_is_swapped() -> None:
    with torch.device("meta"):
        one = build(KINDS["Llama"])
    assert all(p.is_meta for p in apply_nsa(one).parameters())


@torch.no_grad()
def test_bfloat16_and_casts_keep_rope_exact() -> None:
    """Rope tables come from the config: casting the model doesn't round its frequencies."""
    model = as_dense(build(KINDS["Llama"]))
    exact = model(IDS).logits
    there_and_back = model.to(torch.bfloat16).float()
    cast = as_dense(build(KINDS["Llama"]).to(torch.bfloat16).float())
    assert distance(there_and_back(IDS).logits, cast(IDS).logits) < 1e-5
    assert distance(cast(IDS).logits, exact) < 0.1
