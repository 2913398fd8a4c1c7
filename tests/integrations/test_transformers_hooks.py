"""NSA computes what its base model's forward receives, after all hooks; layers refuse other things.

Hooks are added after the swap unless a test says otherwise: they run where a hook of the swap's own
could not see what they change.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from torch import Tensor  # noqa: E402
from transformers import DynamicCache, LlamaForCausalLM, StaticCache  # noqa: E402
from transformers.models.llama.modeling_llama import LlamaModel  # noqa: E402

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.transformers import apply_nsa  # noqa: E402
from nsagen.integrations.transformers_rope import RopeSource  # noqa: E402
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

pytestmark = pytest.mark.usefixtures("_without_gradients")
IDS = tokens(2, 30)
MASK = torch.ones_like(IDS)
MASK[0, :7] = 0
RESTARTS = torch.cat([torch.arange(12), torch.arange(18)])[None]


@pytest.fixture
def _without_gradients() -> Any:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model() -> Any:
    return trained(sparse())


def with_hook(module: Any, hook: Callable[..., dict[str, Any]]) -> None:
    """A pre-hook that replaces keywords by those that `hook` makes of them."""
    module.register_forward_pre_hook(
        lambda _, args, kwargs: (args, {**kwargs, **hook(kwargs)}), with_kwargs=True
    )


def real(logits: Tensor) -> Tensor:
    return logits[MASK == 1]


class TestBaseModel:
    @pytest.mark.parametrize("use_cache", [False, True])
    @pytest.mark.parametrize("kind", KINDS)
    def test_a_mask_that_a_hook_brings(self, kind: str, use_cache: bool) -> None:
        model = trained(sparse(kind))
        expected = model(IDS, attention_mask=MASK, use_cache=use_cache).logits
        assert distance(real(model(IDS, use_cache=use_cache).logits), real(expected)) > 0.01
        with_hook(model.model, lambda _: {"attention_mask": MASK})
        assert distance(real(model(IDS, use_cache=use_cache).logits), real(expected)) < 1e-6

    def test_positions_that_a_hook_brings(self, model: Any) -> None:
        hooked = copy.deepcopy(model)
        with_hook(hooked.model, lambda _: {"position_ids": RESTARTS})
        expected = model(IDS, position_ids=RESTARTS, use_cache=False).logits
        assert distance(hooked(IDS, use_cache=False).logits, expected) < 1e-6

    def test_an_input_that_a_hook_passes_by_position(self, model: Any) -> None:
        hooked = copy.deepcopy(model)

        def by_position(_: Any, args: Any, kwargs: Any) -> Any:
            others = {"input_ids", "attention_mask"}
            rest = {name: value for name, value in kwargs.items() if name not in others}
            return (kwargs["input_ids"], MASK), rest

        hooked.model.register_forward_pre_hook(by_position, with_kwargs=True)
        expected = model(IDS, attention_mask=MASK).logits
        assert distance(real(hooked(IDS).logits), real(expected)) < 1e-6

    def test_what_a_hook_brings_is_checked_before_any_layer(self, model: Any) -> None:
        hooked = copy.deepcopy(model)
        with_hook(hooked.model, lambda _: {"is_causal": False})
        hooked.model.layers[0].register_forward_pre_hook(lambda *_: pytest.fail("too late"))
        with pytest.raises(InvalidInputError, match="is_causal: must not be False"):
            hooked(IDS)

    def test_forward_may_be_called_without_hooks(self, model: Any) -> None:
        assert distance(model.forward(IDS).logits, model(IDS).logits) < 1e-6
        hidden = model.model.forward(IDS).last_hidden_state
        assert distance(model.lm_head(hidden), model(IDS).logits) < 1e-6

    @pytest.mark.parametrize("before", [True, False])
    def test_a_hook_of_accelerate(self, model: Any, before: bool) -> None:
        """Its hooks replace the forward of the instance."""
        hooks = pytest.importorskip("accelerate.hooks")

        class Masks(hooks.ModelHook):
            def pre_forward(self, module: Any, *args: Any, **kwargs: Any) -> Any:
                return args, {**kwargs, "attention_mask": MASK}

        hooked = dense() if before else copy.deepcopy(model)
        hooks.add_hook_to_module(hooked.model, Masks())
        attention = hooked.model.layers[0].self_attn
        hooks.add_hook_to_module(attention, hooks.AlignDevicesHook("cpu"))
        hooked = trained(apply_nsa(hooked, ATTENTION)) if before else hooked
        expected = model(IDS, attention_mask=MASK).logits
        assert distance(real(hooked(IDS).logits), real(expected)) < 1e-6

    def test_a_forward_of_the_instance_from_before_the_swap(self, model: Any) -> None:
        swapped = dense()
        old = swapped.model.forward
        swapped.model.forward = lambda *args, **kwargs: old(*args, **kwargs)
        swapped = trained(apply_nsa(swapped, ATTENTION))
        assert distance(swapped(IDS).logits, model(IDS).logits) < 1e-6


class OwnBase(LlamaModel):
    pass


class OwnHead(LlamaForCausalLM):
    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.model = OwnBase(config)
        self.post_init()


@pytest.mark.parametrize(
    "copied",
    [lambda m: m, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))],
    ids=["itself", "deep copy", "pickled"],
)
def test_a_base_model_of_a_users_own_class(model: Any, copied: Callable[[Any], Any]) -> None:
    own = OwnHead(dense().config).eval()
    own.load_state_dict(dense().state_dict())
    own = copied(trained(apply_nsa(own, ATTENTION)))
    assert isinstance(own, OwnHead)
    assert isinstance(own.model, OwnBase)
    assert len(own(IDS, output_hidden_states=True).hidden_states) == 3
    with_hook(own.model, lambda _: {"attention_mask": MASK})
    assert distance(real(own(IDS).logits), real(model(IDS, attention_mask=MASK).logits)) < 1e-6


def scaled(x: Any) -> Any:
    return (x[0] * 0.5, *x[1:]) if isinstance(x, tuple) else x * 0.5


DENSE_HOOKS: dict[str, Callable[[Any], Any]] = {
    "a layer's input": lambda m: m.layers[1].register_forward_pre_hook(lambda _, a: scaled(a)),
    "a layer's output": lambda m: m.layers[0].register_forward_hook(lambda _, a, o: scaled(o)),
    "attention's input": lambda m: with_hook(
        m.layers[1].self_attn, lambda k: {"hidden_states": k["hidden_states"] * 1.5}
    ),
    "attention's output": lambda m: m.layers[1].self_attn.register_forward_hook(
        lambda _, a, o: scaled(o)
    ),
    "queries": lambda m: m.layers[0].self_attn.q_proj.register_forward_hook(
        lambda _, a, o: scaled(o)
    ),
}


@pytest.mark.parametrize("name", DENSE_HOOKS)
def test_hooks_that_change_hidden_states_act_as_in_the_dense_model(name: str) -> None:
    plain = dense()
    swapped = as_dense(plain)
    before = plain(IDS).logits
    for one in (plain, swapped):
        DENSE_HOOKS[name](one.model)
    assert distance(plain(IDS).logits, before) > 1e-3
    assert distance(swapped(IDS).logits, plain(IDS).logits) < 1e-5


CHANGES: dict[str, tuple[str, Callable[[Any], dict[str, Any]]]] = {
    "a mask": ("attention_mask", lambda _: {"attention_mask": MASK}),
    "no mask": ("attention_mask", lambda _: {"attention_mask": None}),
    "a prepared mask": ("attention_mask", lambda _: {"attention_mask": torch.ones(2, 1, 30, 30)}),
    "rope": (
        "position_embeddings",
        lambda k: {"position_embeddings": tuple(2 * x for x in k["position_embeddings"])},
    ),
    "no rope": ("position_embeddings", lambda _: {"position_embeddings": None}),
    "another cache": ("cache", lambda _: {CACHE: DynamicCache()}),
    "fewer tokens": ("hidden_states", lambda k: {"hidden_states": k["hidden_states"][:, :9]}),
}


@pytest.mark.parametrize("use_cache", [False, True])
@pytest.mark.parametrize("name", CHANGES)
def test_a_layer_refuses_inputs_that_a_hook_replaced(
    model: Any, name: str, use_cache: bool
) -> None:
    """NSA reads them once, from the base model's inputs."""
    what, change = CHANGES[name]
    attention, hooked = [], copy.deepcopy(model)
    layer = hooked.model.layers[1].self_attn
    with_hook(layer, change)
    layer.q_proj.register_forward_pre_hook(lambda *_: attention.append(1))
    with pytest.raises(InvalidInputError, match=f"{what} of a layer: must"):
        hooked(IDS, attention_mask=MASK, use_cache=use_cache)
    assert not attention


def test_a_layer_refuses_no_cache_in_place_of_one(model: Any) -> None:
    hooked = copy.deepcopy(model)
    with_hook(hooked.model.layers[1].self_attn, lambda _: {CACHE: None})
    with pytest.raises(InvalidInputError, match="cache of a layer: must"):
        hooked(IDS)


@pytest.mark.parametrize("how", ["hook", "replaced"])
def test_another_rope_is_refused(model: Any, how: str) -> None:
    changed = copy.deepcopy(model)
    if how == "hook":
        changed.model.rotary_emb.register_forward_hook(lambda _, a, o: tuple(2 * x for x in o))
    else:
        changed.model.rotary_emb = dense().model.rotary_emb
    with pytest.raises(InvalidInputError, match="position_embeddings of a layer: must"):
        changed(IDS)


ROPES: dict[str, dict[str, Any]] = {
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 16},
    "dynamic": {"factor": 4.0},
    "longrope": {
        "factor": 4.0,
        "short_factor": [1.1] * 8,
        "long_factor": [3.0] * 8,
        "original_max_position_embeddings": 16,
    },
}


def with_rope(name: str) -> tuple[Any, str]:
    """A swapped model, and what the names of its frequencies begin with."""
    if name not in ROPES:
        return sparse(name), "full_attention_" if name == "Gemma3" else ""
    rope = {"rope_type": name, "rope_theta": 1e4, **ROPES[name]}
    model = build(KINDS["Llama"], rope_parameters=rope, max_position_embeddings=16)
    return apply_nsa(model, ATTENTION), ""


@pytest.mark.parametrize("name", ["Llama", "Gemma3", "Phi3", *ROPES])
def test_frequencies_written_into_the_rope_are_refused(name: str) -> None:
    """The dense model would use them; NSA has tables of its own, from the config."""
    model, prefix = with_rope(name)
    rope, frequencies = model.model.rotary_emb, f"{prefix}inv_freq"
    before = getattr(rope, frequencies).clone()

    def scaled(by: float) -> None:
        getattr(rope, frequencies).mul_(by)

    changes = {
        "written": lambda: scaled(0.5),
        "a little": lambda: scaled(1.001),
        "assigned": lambda: setattr(rope, frequencies, before * 0.5),
        "of another size": lambda: setattr(rope, frequencies, before[:2]),
        "factor": lambda: setattr(rope, f"{prefix}attention_scaling", 1.5),
    }
    for change in changes.values():
        model(IDS[:, :12])  # short again, where the rule depends on the length
        change()
        for call in (model, model.generate):
            with pytest.raises(InvalidInputError, match="rotary_emb: must have the frequencies"):
                call(IDS[:, :12])
        setattr(rope, frequencies, before.clone())


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("name", ["Llama", "Gemma3", *ROPES])
@torch.no_grad()
def test_frequencies_written_between_a_prompt_and_its_next_token(name: str, static: bool) -> None:
    model, prefix = with_rope(name)
    rope, frequencies = model.model.rotary_emb, f"{prefix}inv_freq"
    for change in ("written", "assigned", "factor"):
        cache = StaticCache(config=model.config, max_cache_len=40) if static else DynamicCache()
        model(IDS[:, :12], **{CACHE: cache})
        model(IDS[:, 12:13], **{CACHE: cache})
        old, factor = getattr(rope, frequencies), getattr(rope, f"{prefix}attention_scaling")
        kept = old.clone()
        if change == "written":
            getattr(rope, frequencies).mul_(0.5)
        elif change == "assigned":
            setattr(rope, frequencies, getattr(rope, frequencies) * 0.5)
        else:
            setattr(rope, f"{prefix}attention_scaling", 1.5)
        with pytest.raises(InvalidInputError, match="rotary_emb: must have the frequencies"):
            model(IDS[:, 13:14], **{CACHE: cache})
        setattr(rope, frequencies, old.copy_(kept))  # the tensor may have a second name
        setattr(rope, f"{prefix}attention_scaling", factor)
        model(IDS[:, 13:14], **{CACHE: cache})  # nothing was written to the cache


@torch.no_grad()
def test_a_step_does_not_compare_frequencies_again(
    model: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would launch a dozen kernels."""
    cache, compare = DynamicCache(), RopeSource.is_that_of
    model(IDS[:, :12], **{CACHE: cache})
    calls: list[Any] = []
    monkeypatch.setattr(RopeSource, "is_that_of", lambda *a: calls.append(a) or compare(*a))
    model(IDS[:, 12:13], **{CACHE: cache})
    assert not calls
    copied = copy.deepcopy(cache)  # another tensor: compared once
    for at in (13, 14):
        model(IDS[:, at : at + 1], **{CACHE: copied})
    assert len(calls) == 1


@pytest.mark.parametrize("name", ["yarn", "dynamic"])
@torch.no_grad()
def test_frequencies_are_compared_in_compiled_calls_too(name: str) -> None:
    torch._dynamo.reset()
    model, _ = with_rope(name)
    model.model.layers, model.config.num_hidden_layers = model.model.layers[:1], 1
    compiled = torch.compile(model, backend="eager")
    compiled(IDS[:, :12], use_cache=False)
    model.model.rotary_emb.inv_freq.mul_(0.5)
    with pytest.raises((InvalidInputError, RuntimeError), match="rotary_emb: must have the freq"):
        compiled(IDS[:, :12], use_cache=False)


@pytest.mark.parametrize("name", ["Llama", "Gemma3", *ROPES])
@torch.no_grad()
def test_frequencies_that_a_cast_rounds_are_the_models_own(name: str) -> None:
    model, _ = with_rope(name)
    for cast in ("bfloat16", "float", "half", "float", "double", "float"):
        model = getattr(model, cast)()
        for length in (12, 30, 12):
            model(IDS[:, :length])


def test_settings_changed_in_the_config_are_refused(model: Any, tmp_path: Path) -> None:
    """The layers have theirs since the model was built: neither run nor saved with others."""
    changed = copy.deepcopy(model)
    changed.config.nsa["topk"] = 3
    with pytest.raises(InvalidInputError, match=r"config\.nsa: must be .* got topk=3"):
        changed(IDS)
    with pytest.raises(InvalidInputError, match=r"config\.nsa: must be .* got topk=3"):
        changed.save_pretrained(tmp_path / "changed")
    assert not (tmp_path / "changed").exists()


@pytest.mark.parametrize("where", ["layer", "last layer's mlp", "norm"])
def test_a_step_that_failed_anywhere_in_the_base_model_may_be_repeated(
    model: Any, where: str
) -> None:
    base = model.model
    module = {"layer": base.layers[1], "norm": base.norm}.get(where, base.layers[1].mlp)
    cache = DynamicCache()
    model(IDS[:, :20], **{CACHE: cache})

    def fail(*_: Any) -> None:
        raise RuntimeError("no memory")

    hook = module.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        model(IDS[:, 20:21], **{CACHE: cache})
    hook.remove()
    expected = model(IDS).logits[:, 20:]
    logits = [model(IDS[:, n : n + 1], **{CACHE: cache}).logits for n in range(20, 30)]
    assert distance(torch.cat(logits, 1), expected) < 1e-5
