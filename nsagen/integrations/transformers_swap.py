"""Replacing a model's attention modules by NSA."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function, sdpa_mask
from transformers.modeling_utils import AttentionInterface, PreTrainedModel

from nsagen.integrations.attention_mask import sees_next
from nsagen.integrations.transformers_attention import TransformersNSA
from nsagen.integrations.transformers_inputs import Inputs
from nsagen.integrations.transformers_layout import refuse, refuse_unless
from nsagen.integrations.transformers_models import MODELS, facts_of
from nsagen.integrations.transformers_rope import mark_rope, rope_source
from nsagen.model.checks import require
from nsagen.model.initial import INITIAL_GATES, Gates
from nsagen.model.sparsity import SETTINGS, Sparsity, settings_of, stored_settings

IMPLEMENTATION = "nsa"
SLIDING = "sliding_attention"


def sparsity_of(attention: Mapping[str, Any] | Any) -> Sparsity:
    """The settings with their defaults, checked."""
    if attention is None or isinstance(attention, Mapping):
        given = dict(attention or {})
    else:
        given = settings_of(attention)
    unknown = sorted(set(given) - set(SETTINGS))
    require(
        not unknown,
        "apply_nsa: attention",
        f"the settings are {', '.join(SETTINGS)}",
        ", ".join(map(str, unknown)),
        "correct the name; the head sizes are the model's own",
    )
    return Sparsity(**given)


def swapped_modules(model: nn.Module) -> list[TransformersNSA]:
    return [module for module in model.modules() if isinstance(module, TransformersNSA)]


def offloaded_attention(model: nn.Module) -> list[str]:
    """The attention modules whose weights accelerate holds elsewhere and gives to each call. A
    model on meta as a whole, made to be filled later, has none."""
    hooks = [getattr(module, "_hf_hook", None) for module in model.modules()]
    each = [one for hook in hooks for one in getattr(hook, "hooks", (hook,))]
    if not any(getattr(hook, "offload", False) for hook in each):
        return []
    return [
        name
        for name, module in model.named_modules()
        if facts_of(module) is not None and any(p.is_meta for p in module.parameters())
    ]


def swap(
    model: PreTrainedModel,
    sparsity: Sparsity,
    dispatcher: Any = None,
    gates: Gates = INITIAL_GATES,
) -> list[Any]:
    """Replace the attention of each layer, except sliding layers in models that have other ones.

    Returns:
        the base models, whose classes must then become those of `transformers_classes`.

    Raises:
        InvalidInputError: the model has no attention module of a known kind.
    """
    known = ", ".join(facts.name for facts in MODELS)
    bases = [module for module in model.modules() if _is_base(module)]
    require(
        bool(bases),
        "apply_nsa",
        f"the model must be a {known}",
        type(model).__name__,
        "use NativeSparseAttention in your own code; see docs/integrate.md",
    )
    for base in bases:
        _swap_layers(base, sparsity, dispatcher, gates)
    AttentionMaskInterface.register(IMPLEMENTATION, _mask)
    AttentionInterface.register(IMPLEMENTATION, _attention_of_sliding_layers)
    model.set_attn_implementation(IMPLEMENTATION)
    return bases


def keeps_sliding_layers(config: Any) -> bool:
    """Whether some layers attend within a window, which stay dense, and others do not."""
    kinds = set(getattr(config, "layer_types", None) or ())
    return SLIDING in kinds and len(kinds) > 1


def _is_base(module: Any) -> bool:
    """Whether a module has layers whose attention can be replaced."""
    layers = getattr(module, "layers", None)
    attention = [getattr(layer, "self_attn", None) for layer in layers or ()]
    return any(facts_of(one) is not None for one in attention)


def _swap_layers(base: Any, sparsity: Sparsity, dispatcher: Any, gates: Gates) -> None:
    config, swapped, kind, kinds = base.config, 0, None, {}
    keeps = keeps_sliding_layers(config)
    for layer in base.layers:
        dense = layer.self_attn
        facts = facts_of(dense)
        kind = getattr(dense, "layer_type", None)
        if facts is None or (keeps and kind == SLIDING):
            continue
        if not swapped:
            rope = rope_source(base.rotary_emb, kind, dense.head_dim)
        weight = getattr(dense.o_proj, "weight", None)
        dtype = base.dtype if weight is None or weight.itemsize < 2 else weight.dtype  # quantized
        module = TransformersNSA(dense, facts, sparsity, rope.turned, dispatcher, gates, dtype)
        layer.self_attn = module.train(dense.training)
        swapped += 1
        kinds |= {} if kind is None else {kind: None}
    names = tuple(inspect.signature(base.forward).parameters)
    window = config.sliding_window if keeps and swapped < len(base.layers) else None
    stored = stored_settings(sparsity)
    base.nsa_inputs = Inputs(names, sparsity, stored, rope, window, tuple(kinds))
    base.rotary_emb.register_forward_hook(mark_rope)


def _mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
    """The mask that layers get: never N by N, except for dense sliding layers.

    With a static cache it is as wide as the cache, so that compiled steps have one shape. Models
    that take images (Gemma 3) prepare masks of their own: those with functions of (query, key) are
    made as asked, for dense layers to use and NSA to refuse.

    Raises:
        InvalidInputError: a token would see the next one.
    """
    config, window = kwargs.get("config"), kwargs.get("local_size")
    if kwargs.get("use_vmap") or (window is not None and keeps_sliding_layers(config)):
        return sdpa_mask(*args, attention_mask=attention_mask, **kwargs)
    sees, tokens = kwargs.get("mask_function", causal_mask_function), kwargs["q_length"]
    if sees is not causal_mask_function and tokens > 1:
        where = (kwargs["q_offset"], kwargs.get("device"))
        ahead = sees_next(sees, kwargs["batch_size"], tokens, *where)
        rule, came = "must be causal: NSA is", "tokens that see later ones, as those of images do"
        refuse_unless(~ahead.any(), "the mask", rule, came, "use the dense model for this input")
    if attention_mask is None or window is not None:
        return attention_mask
    missing = kwargs["kv_length"] - attention_mask.shape[1]
    return nn.functional.pad(attention_mask, (0, missing)) if missing > 0 else attention_mask


def _attention_of_sliding_layers(module: Any, *args: Any, **kwargs: Any) -> Any:
    if getattr(module, "sliding_window", None) is None:
        refuse(
            "a layer",
            "must have NSA, unless it attends within a window",
            type(module).__name__,
            "call apply_nsa on the whole model",
        )
    return sdpa_attention_forward(module, *args, **kwargs)
