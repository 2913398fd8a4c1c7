"""Native Sparse Attention in models of Hugging Face Transformers.

    from transformers import AutoModelForCausalLM
    from nsagen.integrations.transformers import apply_nsa

    model = apply_nsa(AutoModelForCausalLM.from_pretrained(folder), attention={"topk": 16})
    model.generate(**inputs)

`ToyLlama.from_pretrained` and `ToyNSALlama.from_pretrained` read Llama checkpoints without
Transformers; see `nsagen.model.checkpoints`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

try:
    from transformers import AutoModelForCausalLM
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface, PreTrainedModel
    from transformers.models.llama.modeling_llama import LlamaAttention
    from transformers.models.mistral.modeling_mistral import MistralAttention
    from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention
except ImportError as error:
    raise ImportError(
        "nsagen.integrations.transformers: Transformers 5 must be installed; "
        f"got {error}; run: pip install 'nsagen[transformers]'"
    ) from error

from nsagen.core.errors import InvalidInputError
from nsagen.integrations.transformers_attention import TransformersNSA
from nsagen.integrations.transformers_layout import Layouts
from nsagen.model.checkpoint_config import rope_settings
from nsagen.model.checks import require
from nsagen.model.initial import INITIAL_GATES, Gates
from nsagen.model.rope import RopeConfig, RotaryEmbedding
from nsagen.model.safetensors_files import read_tensors, tensor_names
from nsagen.model.sparsity import SETTINGS, Sparsity, settings_of, stored_settings

__all__ = ["INITIAL_GATES", "apply_nsa", "load_nsa"]

_ATTENTION = (LlamaAttention, MistralAttention, Qwen3Attention)
_IMPLEMENTATION = "nsa"

Model = TypeVar("Model", bound=PreTrainedModel)


def apply_nsa(
    model: Model,
    attention: Mapping[str, Any] | Any = None,
    *,
    dispatcher: Any = None,
    gates: Gates = INITIAL_GATES,
) -> Model:
    """Replace every attention module of a Llama, Mistral or Qwen3 model by NSA, in place.

    The projections and norms stay the model's own; branches with their own keys and values start
    with copies of them. The gates start as the constants `gates`, compression as the mean (an
    "mlp" near it) and the position embedding at 0, so that, with the default gates,
    the model starts close to the dense one: all but the same where a token sees at most
    min(window_size, topk * block_size) tokens, and beyond that as close as the selected blocks
    hold the mass of the attention. `docs/transformers.md` has measured distances.

    A sliding window of the model's own (Mistral, Qwen3) no longer applies.

    Args:
        model: with any head, or none.
        attention: settings of NSA, those of `nsagen.model.sparsity.Sparsity`: a mapping, or an
            object with them as attributes, such as a `ToyNSALlamaConfig` or an `AttentionShape`
            of a spec. What is left out has its default.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.
        gates: initial shares of the compressed, selected and sliding branch.

    Returns:
        The model. `save_pretrained` saves it with its settings, in `config.nsa`; `load_nsa`
        reads it back.

    Raises:
        InvalidInputError: another kind of model, rope or setting; NSA is there already.
    """
    require(
        not any(isinstance(module, TransformersNSA) for module in model.modules()),
        "apply_nsa",
        "a model may be swapped once",
        "one that has NSA already",
        "load it anew",
    )
    places = [
        (parent, name, child)
        for parent in model.modules()
        for name, child in parent.named_children()
        if type(child) in _ATTENTION
    ]
    known = ", ".join(kind.__name__.removesuffix("Attention") for kind in _ATTENTION)
    require(
        bool(places),
        "apply_nsa",
        f"the model must be a {known}",
        type(model).__name__,
        "use NativeSparseAttention in your own code; see docs/integrate.md",
    )
    sparsity = _sparsity(attention)
    rope = _rope(model, places[0][2])
    layouts = Layouts()
    for parent, name, child in places:
        swapped = TransformersNSA(child, sparsity, rope, layouts, dispatcher, gates)
        setattr(parent, name, swapped.train(child.training))
    AttentionMaskInterface.register(_IMPLEMENTATION, _padding_mask)
    AttentionInterface.register(_IMPLEMENTATION, _never_called)
    model.set_attn_implementation(_IMPLEMENTATION)
    model.config.nsa = stored_settings(sparsity)
    return model


def load_nsa(folder: str | Path, *, dispatcher: Any = None, **kwargs: Any) -> PreTrainedModel:
    """A model that `apply_nsa` made and `save_pretrained` wrote.

    Args:
        folder: with config.json and safetensors.
        dispatcher: as in `apply_nsa`.
        kwargs: for `AutoModelForCausalLM.from_pretrained`, such as dtype.

    Raises:
        InvalidInputError: the folder's config.json has no `nsa`.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    settings = getattr(model.config, "nsa", None)
    require(
        settings is not None,
        f"{folder}/config.json",
        "must have nsa, the settings of the attention",
        "none",
        "call apply_nsa on the dense model instead",
    )
    apply_nsa(model, settings, dispatcher=dispatcher)
    swapped = {n: m for n, m in model.named_modules() if isinstance(m, TransformersNSA)}
    parameters = {
        f"{name}.{own}": parameter
        for name, module in swapped.items()
        for own, parameter in module.named_parameters()
    }
    stored = tensor_names(Path(folder))
    with torch.no_grad():
        for path in sorted(set(stored.values())):
            names = [n for n in parameters if stored.get(n) == path]
            for name, tensor in read_tensors(path, names):
                parameters[name].copy_(tensor)
    return model


def _sparsity(attention: Any) -> Sparsity:
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


def _rope(model: PreTrainedModel, attention: Any) -> RotaryEmbedding:
    """Tables for all layers, on their device."""
    config: Any = attention.config
    raw = {
        "rope_theta": getattr(config, "rope_theta", None),
        "rope_parameters": getattr(config, "rope_parameters", None),
        "rope_scaling": getattr(config, "rope_scaling", None),
    }
    theta, scaling = rope_settings(raw)
    partial = (scaling or raw["rope_parameters"] or {}).get("partial_rotary_factor", 1.0)
    require(
        partial == 1.0,
        "apply_nsa",
        "rope must turn whole heads",
        f"partial_rotary_factor={partial}",
        "such a model cannot be swapped yet",
    )
    rope_config = RopeConfig(config.max_position_embeddings, attention.head_dim, theta, scaling)
    return RotaryEmbedding(rope_config).to(model.device)


def _padding_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
    """What layers get as their mask: the caller's own, [batch, tokens]; nothing N by N."""
    return attention_mask


def _never_called(*args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    raise InvalidInputError(
        "apply_nsa: every attention module must be swapped; one of another kind was called"
    )
