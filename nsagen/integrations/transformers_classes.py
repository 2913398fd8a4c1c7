"""Configs and models with NSA, as Transformers' Auto classes know them.

A swapped model has a config of its own, `Nsagen<model>Config` with the model_type
`nsagen_<model>`: the Auto classes of a Transformers without nsagen refuse its folder. The classes
are made from `MODELS`: each is the dense class with its attention replaced.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from types import MethodType
from typing import Any, cast

import transformers
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from nsagen.integrations.transformers_attention import TransformersNSA
from nsagen.integrations.transformers_given import check_one_cache, check_settings
from nsagen.integrations.transformers_inputs import laid_out
from nsagen.integrations.transformers_layout import refuse_unless
from nsagen.integrations.transformers_models import HEADS, MODELS, Facts, facts_of
from nsagen.integrations.transformers_swap import sparsity_of, swap, swapped_modules
from nsagen.model.checks import require
from nsagen.model.sparsity import stored_settings

PREFIX = "Nsagen"


class Whole:
    """What opens a folder with NSA's weights: no more and no less than its settings ask for."""

    @classmethod
    def from_pretrained(cls, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = super().from_pretrained(  # type: ignore[misc]
            *args, output_loading_info=True, **kwargs
        )
        names = [f"{kind}: {name}" for kind, names in info.items() for name in names]
        strange = sorted(str(name) for name in names if ".self_attn." in str(name))
        require(
            not strange,
            f"{cls.__name__}.from_pretrained",
            "the folder must have the attention's weights, no more and no less",
            ", ".join(strange[:5]),
            "save the swapped model again",
        )
        if getattr(model, "tp_size", None):
            from nsagen.distributed.tensor_parallel import spread_heads

            spread_heads(model)
        return (model, info) if output_loading_info else model


class SwappedModel(Whole):
    """What a swapped model's class adds to the dense one."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # pyright: ignore
        settings = getattr(config, "nsa", None)
        require(
            isinstance(settings, Mapping),
            type(self).__name__,
            "its config must have nsa, a mapping of the settings of the attention",
            "none" if settings is None else repr(settings),
            "call apply_nsa on a dense model instead",
        )
        if not swapped_modules(self):  # type: ignore[arg-type]
            sparsity = sparsity_of(settings)
            config.nsa = stored_settings(sparsity)
            for base in swap(self, sparsity):  # type: ignore[arg-type]
                become_swapped(base)

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TransformersNSA):
            module.start()
        elif not getattr(module, "is_part_of_nsa", False):
            super()._init_weights(module)  # type: ignore[misc]


class SwappedConfig:
    """What a swapped model's config adds to the dense one."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """`nsa` among the kwargs changes the settings that it names; the others stay."""
        given = kwargs.get("nsa")
        if isinstance(given, Mapping):
            kwargs["nsa"] = {**(config_dict.get("nsa") or {}), **given}
        return super().from_dict(config_dict, **kwargs)  # type: ignore[misc]


def _checked(prefill: Callable[..., Any]) -> Callable[..., Any]:
    """The first pass of `generate`, refusing prompts that end with padding: the next token is read
    from the last column."""

    @functools.wraps(prefill)
    def checked(
        self: Any, ids: Any, config: Any, model_kwargs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        mask = model_kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1]:
            ends_early = mask.any(1) & (mask[:, -1] == 0)
            advice = "pad on the left: tokenizer.padding_side = 'left'"
            rule = "a prompt must end with a token"
            refuse_unless(~ends_early.any(), "generate", rule, "padding on the right", advice)
        return prefill(self, ids, config, model_kwargs, *args, **kwargs)

    return checked


def _with_one_cache(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A head's forward, refusing two caches: Transformers would drop one of them."""
    names = list(inspect.signature(forward).parameters)[1:]

    @functools.wraps(forward)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        check_one_cache(dict(zip(names, args, strict=False)) | kwargs)
        return forward(self, *args, **kwargs)

    return checked


def _text_part(config: Any) -> str | None:
    """The name of the text model's config in that of a model that also takes images."""
    names = getattr(config, "sub_configs", ())
    return next((name for name in names if type(getattr(config, name, None)) in _configs), None)


def text_model_of(model: PreTrainedModel) -> PreTrainedModel | None:
    """The dense text model within a model that also takes images; None for other models."""
    name = _text_part(model.config)
    if name is None:
        return None
    kind = type(getattr(model.config, name))
    parts = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    return next((part for part in parts if type(part.config) is kind), None)


def become_whole(model: PreTrainedModel, text: PreTrainedModel) -> None:
    """Let the config of a model that also takes images say that its text model has NSA."""
    old = model.config
    made = copy.deepcopy(old)
    made.__class__ = _wholes.get(type(old), type(old))
    setattr(made, _text_part(old) or "text_config", text.config)
    for module in model.modules():
        if getattr(module, "config", None) is old:
            cast(Any, module).config = made
    become_swapped(model)


def check_config(config: PreTrainedConfig) -> None:
    """Check that a dense model's config has a swapped counterpart.

    Raises:
        InvalidInputError: it has none, as for models that also take images.
    """
    known = ", ".join(kind.__name__ for kind in _configs)
    advice = "swap its text model alone, or use NativeSparseAttention in your own code"
    came = type(config).__name__
    require(type(config) in _configs, "apply_nsa", f"the config must be a {known}", came, advice)


def swapped_config(config: PreTrainedConfig, settings: dict[str, Any]) -> Any:
    """A copy of a dense model's config, with the settings and the type of the swapped one."""
    made = copy.deepcopy(config)
    made.__class__ = _configs[type(config)]
    made.nsa = settings
    made._name_or_path = ""  # else adapters would name the dense folder as their base
    return made


def become_swapped(model: Any) -> None:
    """Change a model's class to the swapped one; a class of the user's own stays. A base model's
    forward must lay out its inputs."""
    kind: Any = _models.get(type(model))
    is_base = "nsa_inputs" in vars(model) and not issubclass(type(model), LaidOut)
    if kind is None and is_base:
        kind = _laid_out_class(type(model))
    if is_base:
        _lay_out_instance(model)
    if kind is not None:
        model.__class__ = kind
        if isinstance(model, PreTrainedModel):
            # Transformers registers what to record (hidden states) when it makes an instance.
            PreTrainedModel.__init__(kind.__new__(kind), model.config)
    if isinstance(model, PreTrainedModel):
        model.name_or_path = ""


class LaidOut:
    """A base model whose forward begins with the layout of its inputs."""


class _Own(LaidOut):
    """A base model of a class of the user's own."""

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _new_own, (type(self).__bases__[1],), self.__getstate__()


def _new_own(kind: type) -> Any:
    made: Any = _laid_out_class(kind)
    return made.__new__(made)


@functools.cache
def _laid_out_class(kind: Any) -> type:
    names = ("__module__", "__qualname__", "__doc__")
    content = {name: getattr(kind, name) for name in names}
    return type(kind.__name__, (_Own, kind), {**content, "forward": laid_out(kind.forward)})


def _lay_out_instance(model: Any) -> None:
    """A forward of the instance's own, such as accelerate's hooks have, hides that of the class."""
    name = "_old_forward" if "_old_forward" in vars(model) else "forward"
    own = vars(model).get(name)
    if own is not None:
        function = getattr(own, "__func__", None) or (
            lambda _, *args, **kwargs: own(*args, **kwargs)
        )
        vars(model)[name] = MethodType(laid_out(function), model)


def _made(name: str, base: type, *bases: type, **content: Any) -> type:
    """A class in this module's namespace, where pickle finds it."""
    made = type(name, (*bases, base), {"__module__": __name__, "__qualname__": name, **content})
    globals()[name] = made
    return made


def _make_config(facts: Facts) -> type:
    dense = facts.config_class
    plan = getattr(dense, "base_model_tp_plan", None) or {}
    return _made(
        f"{PREFIX}{facts.name}Config",
        dense,
        SwappedConfig,
        __doc__=f"A {facts.name}'s config with `nsa`, the settings of its attention.",
        __annotations__={"nsa": dict | None},
        nsa=None,
        model_type=f"nsagen_{facts.module}",
        # `spread_heads` spreads attention, with its gates and compression.
        base_model_tp_plan={n: how for n, how in plan.items() if "self_attn" not in n},
    )


def _make_models(facts: Facts, config: type) -> None:
    for auto, suffixes in HEADS.items():
        dense = next((k for k in map(facts.kind, suffixes) if k is not None), None)
        if dense is None:
            continue
        name = f"{PREFIX}{dense.__name__}"
        content: dict[str, Any] = {"config_class": config}
        bases: list[type] = [SwappedModel]
        if auto == "AutoModel":
            content["forward"] = laid_out(dense.forward)
            bases.append(LaidOut)
        else:
            content["forward"] = _with_one_cache(dense.forward)
        if issubclass(dense, GenerationMixin):
            content["_prefill"] = _checked(getattr(dense, "_prefill"))  # noqa: B009
        made = _made(name, dense, *bases, **content)
        made.__annotations__ = {"config": config}
        _models[dense] = made
        getattr(transformers, auto).register(config, made)


def _make_whole(facts: Facts, text: type) -> None:
    """The classes of a model that also takes images and whose config has a text model's of a fixed
    class: with the dense model's types, a Transformers without nsagen would read it as dense."""
    dense = facts.kind("ForConditionalGeneration")
    if dense is None:
        return

    def __post_init__(self: Any, **kwargs: Any) -> None:
        if isinstance(self.text_config, dict):
            self.text_config = text(**self.text_config)
        super(config, self).__post_init__(**kwargs)

    old = dense.config_class
    config: Any = _made(
        f"{PREFIX}{facts.name}ImagesConfig",
        old,
        SwappedConfig,
        __doc__=f"A config of a {facts.name} with images, whose text model has NSA.",
        model_type=f"nsagen_{facts.module}_images",
        __post_init__=__post_init__,
    )
    _wholes[old] = config
    content = {"config_class": config, "forward": _with_one_cache(dense.forward)}
    content["_prefill"] = _checked(getattr(dense, "_prefill"))  # noqa: B009
    _models[dense] = made = _made(f"{PREFIX}{dense.__name__}", dense, Whole, **content)
    made.__annotations__ = {"config": config}
    transformers.AutoConfig.register(config.model_type, config)  # type: ignore[attr-defined]
    for auto in ("ImageTextToText", "CausalLM", "MultimodalLM"):
        if (kind := getattr(transformers, f"AutoModelFor{auto}", None)) is not None:
            kind.register(config, made)


def _refusing_settings(init: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel.__init__`, refusing a dense model's config with NSA's settings: the model
    would be dense, without the weights of NSA."""

    @functools.wraps(init)
    def checked(self: Any, config: Any, *args: Any, **kwargs: Any) -> None:
        kept = getattr(config, "nsa", None) if type(config) in _configs else None
        require(
            kept is None,
            type(self).__name__,
            "must have no nsa, the settings of a swapped model, in its config",
            repr(kept),
            "open the folder with load_nsa, or with AutoModelForCausalLM if its config has the "
            f"model_type nsagen_{type(config).model_type}",
        )
        init(self, config, *args, **kwargs)

    checked.nsagen = True  # type: ignore[attr-defined]
    return checked


def _refusing_parts(save: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel.save_pretrained`, refusing what would be read as another model: settings
    changed in the config, and a swapped part (of a model of texts and images) whose config calls it
    dense."""

    @functools.wraps(save)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module in self.modules():
            if (inputs := vars(module).get("nsa_inputs")) is not None:
                check_settings(module, inputs.stored)
        config: Any = self.config
        kinds = getattr(config, "sub_configs", {})
        parts = {name: getattr(config, name, None) for name in kinds}
        kept = [name for name, one in parts.items() if isinstance(one, SwappedConfig)]
        # Transformers without nsagen would read a part of a fixed class as dense.
        told = any(kinds[name] is transformers.AutoConfig for name in kept)
        known = told or isinstance(config, SwappedConfig)
        swapped = [
            name
            for name, module in self.named_modules()
            if isinstance(getattr(module, "config", None), SwappedConfig)
        ]
        if swapped and not known:
            own = _text_part(config) or "text_config"
            advice = f"set model.config.{own} = model.{swapped[0]}.config, and save again"
            if kept or kinds.get(own) is not transformers.AutoConfig:
                advice = "call apply_nsa on the whole dense model, not on its text model"
            require(
                False,
                f"{type(self).__name__}.save_pretrained",
                f"its config must say that {swapped[0]} has NSA, or it would be read as dense",
                f"a {type(config).__name__} that does not",
                advice,
            )
        return save(self, *args, **kwargs)

    checked.nsagen = True  # type: ignore[attr-defined]
    return checked


reading_old_folder: ContextVar[bool] = ContextVar("reading_old_folder", default=False)
"""Whether `load_nsa` opens a folder from before swapped models had types: first as a dense one."""


def _refusing_weights(load: Callable[..., Any]) -> Callable[..., Any]:
    """`PreTrainedModel.from_pretrained`, refusing to drop NSA's weights, as a dense model's config
    asks for if it is passed with the folder of a swapped one."""

    @functools.wraps(load)
    def checked(cls: Any, *args: Any, output_loading_info: bool = False, **kwargs: Any) -> Any:
        model, info = load(cls, *args, output_loading_info=True, **kwargs)
        dropped = sorted(n for n in map(str, info["unexpected_keys"]) if ".self_attn.gate." in n)
        is_dense = bool(dropped) and any(facts_of(module) is not None for module in model.modules())
        require(
            not is_dense or reading_old_folder.get(),
            f"{cls.__name__}.from_pretrained",
            "a swapped model's weights must not be dropped",
            f"a {type(model.config).__name__}, and {', '.join(dropped[:3])} in the folder",
            "leave out config, and open the folder with AutoModelForCausalLM or load_nsa",
        )
        return (model, info) if output_loading_info else model

    checked.nsagen = True  # type: ignore[attr-defined]
    return checked


if not hasattr(PreTrainedModel.from_pretrained, "nsagen"):
    _loading: Any = _refusing_weights(PreTrainedModel.from_pretrained.__func__)
    PreTrainedModel.from_pretrained = classmethod(_loading)  # type: ignore[method-assign]
if not hasattr(PreTrainedModel.save_pretrained, "nsagen"):
    PreTrainedModel.save_pretrained = _refusing_parts(PreTrainedModel.save_pretrained)  # type: ignore[method-assign]
if not hasattr(PreTrainedModel.__init__, "nsagen"):
    PreTrainedModel.__init__ = _refusing_settings(PreTrainedModel.__init__)  # type: ignore[method-assign]
_configs: dict[type, type] = {}
_models: dict[type, Any] = {}
_wholes: dict[type, type] = {}
for _facts in MODELS:
    _config = _make_config(_facts)
    _configs[_facts.config_class] = _config
    transformers.AutoConfig.register(_config.model_type, _config)  # type: ignore[attr-defined]
    _make_models(_facts, _config)
    _make_whole(_facts, _config)
