"""Configs and models with NSA, as Transformers' Auto classes know them.

A swapped model has a config of its own, `Nsagen<model>Config` with the model_type
`nsagen_<model>`: the Auto classes of a Transformers without nsagen refuse its folder. The classes
are made from `MODELS`: each is the dense class with its attention replaced.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import GenerationMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from nsagen.integrations.transformers_attention import TransformersNSA
from nsagen.integrations.transformers_layout import refuse_unless
from nsagen.integrations.transformers_models import HEADS, MODELS, Facts
from nsagen.integrations.transformers_swap import sparsity_of, swap, swapped_modules
from nsagen.model.checks import require

PREFIX = "Nsagen"


class SwappedModel:
    """What a swapped model's class adds to the dense one."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # pyright: ignore
        settings = getattr(config, "nsa", None)
        require(
            settings is not None,
            type(self).__name__,
            "its config must have nsa, the settings of the attention",
            "none",
            "call apply_nsa on a dense model instead",
        )
        if not swapped_modules(self):  # type: ignore[arg-type]
            swap(self, sparsity_of(settings))  # type: ignore[arg-type]

    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, TransformersNSA):
            module.start()
        elif not getattr(module, "is_part_of_nsa", False):
            super()._init_weights(module)  # type: ignore[misc]

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
        return (model, info) if output_loading_info else model


def _checked(prepare: Callable[..., Any]) -> Callable[..., Any]:
    """`prepare_inputs_for_generation`, refusing prompts that end with padding: `generate` reads the
    next token from the last column."""

    @functools.wraps(prepare)  # generate reads its parameters
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        mask, new = kwargs.get("attention_mask"), kwargs.get("next_sequence_length")
        if new != 1 and isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[1]:
            ends_early = mask.any(1) & (mask[:, -1] == 0)
            advice = "pad on the left: tokenizer.padding_side = 'left'"
            rule = "a prompt must end with a token"
            refuse_unless(~ends_early.any(), "generate", rule, "padding on the right", advice)
        return prepare(self, *args, **kwargs)

    return checked


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


def become_swapped(model: PreTrainedModel) -> None:
    """Change a model's class to the swapped one; a class of the user's own stays."""
    kind = _models.get(type(model))
    if kind is not None:
        model.__class__ = kind
        # Transformers registers what to record (hidden states) when it makes an instance.
        PreTrainedModel.__init__(kind.__new__(kind), model.config)
    model.name_or_path = ""


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
        __doc__=f"A {facts.name}'s config with `nsa`, the settings of its attention.",
        __annotations__={"nsa": dict | None},
        nsa=None,
        model_type=f"nsagen_{facts.module}",
        # A rank would have some of the heads, but the gates and compression of all.
        base_model_tp_plan={n: how for n, how in plan.items() if "self_attn" not in n},
    )


def _make_models(facts: Facts, config: type) -> None:
    for auto, suffixes in HEADS.items():
        dense = next((k for k in map(facts.kind, suffixes) if k is not None), None)
        if dense is None:
            continue
        name = f"{PREFIX}{dense.__name__}"
        content: dict[str, Any] = {"config_class": config}
        if issubclass(dense, GenerationMixin):
            prepare = "prepare_inputs_for_generation"
            content[prepare] = _checked(getattr(dense, prepare))
        made = _made(name, dense, SwappedModel, **content)
        made.__annotations__ = {"config": config}
        _models[dense] = made
        getattr(transformers, auto).register(config, made)


_configs: dict[type, type] = {}
_models: dict[type, Any] = {}
for _facts in MODELS:
    _config = _make_config(_facts)
    _configs[_facts.config_class] = _config
    transformers.AutoConfig.register(_config.model_type, _config)  # type: ignore[attr-defined]
    _make_models(_facts, _config)
