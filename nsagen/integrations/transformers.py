"""Native Sparse Attention in models of Hugging Face Transformers.

    from transformers import AutoModelForCausalLM
    from nsagen.integrations.transformers import apply_nsa

    model = apply_nsa(AutoModelForCausalLM.from_pretrained(folder), attention={"topk": 16})
    model.generate(**inputs)
    model.save_pretrained(swapped)  # AutoModelForCausalLM reads it once this module is imported

Importing it also registers `attn_implementation="nsagen"`, for MiniMax-M3 and, in any dense model,
for the forms of `nsagen.model.forms`.

`ToyLlama.from_pretrained` and `ToyNSALlama.from_pretrained` read Llama checkpoints without
Transformers; see `nsagen.model.checkpoints`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar

import torch

try:
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.configuration_utils import PreTrainedConfig
    from transformers.modeling_utils import PreTrainedModel
    from transformers.utils.hub import cached_file
except ImportError as error:
    raise ImportError(
        "nsagen.integrations.transformers: Transformers 5 must be installed; "
        f"got {error}; run: pip install 'nsagen[transformers]'"
    ) from error

from nsagen.integrations import attention_interface, minicpm, paged_attention
from nsagen.integrations.transformers_classes import (
    become_swapped,
    become_whole,
    check_config,
    reading_old_folder,
    swapped_config,
    text_model_of,
)
from nsagen.integrations.transformers_given import cache_dtype_of
from nsagen.integrations.transformers_swap import (
    offloaded_attention,
    sparsity_of,
    swap,
    swapped_modules,
)
from nsagen.model.checks import require
from nsagen.model.initial import INITIAL_GATES, Gates
from nsagen.model.safetensors_files import read_tensors, tensor_names
from nsagen.model.sparsity import stored_settings

__all__ = ["INITIAL_GATES", "apply_nsa", "load_nsa"]

Model = TypeVar("Model", bound=PreTrainedModel)

attention_interface.register()
paged_attention.register()
if find_spec("transformers.models.minimax_m3_vl") is not None:  # younger than Transformers 5.0
    from nsagen.integrations import minimax_m3

    minimax_m3.register()
minicpm.register()


def apply_nsa(
    model: Model,
    attention: Mapping[str, Any] | Any = None,
    *,
    dispatcher: Any = None,
    gates: Gates = INITIAL_GATES,
    cache_dtype: str | None = None,
) -> Model:
    """Replace the attention modules of a model by NSA, in place.

    The models are those of `nsagen.integrations.transformers_models.MODELS`, with any head or
    none. The projections and norms stay the model's own; branches with their own keys and values
    start with copies of them. The gates start as the constants `gates`, compression as the mean (an
    "mlp" near it) and the position embedding at 0. With the default gates, the model starts close
    to the dense one: nearly equal while a token sees at most min(window_size, topk * block_size)
    tokens; beyond that, it depends on how much of the attention the selected blocks hold.
    `docs/transformers.md` has measured distances.

    If some layers attend within a sliding window and others to everything (Gemma 3), the sliding
    ones stay dense. If all layers slide (the first Mistral), all are replaced, and see more. In a
    model that also takes images, the text model is swapped.

    Args:
        model: with any head, or none.
        attention: settings of NSA, those of `nsagen.model.sparsity.Sparsity`: a mapping, or an
            object with them as attributes, such as a `ToyNSALlamaConfig` or an `AttentionShape`
            of a spec. Omitted settings have their defaults.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.
        gates: initial shares of the compressed, selected and sliding branch.
        cache_dtype: "float8_e4m3fn" or "int8": caches keep keys, values and compressed ones in one
            byte an element, as `InferenceConfig`'s. It is kept in `config.nsagen`, and may be
            changed there between caches; None for the model's dtype.

    Returns:
        The model, with the class and config of a swapped one. `save_pretrained` saves its settings
        in `config.nsa`, and `AutoModelForCausalLM` reads it back.

    Raises:
        InvalidInputError: an unsupported model, rope, setting or cache_dtype; the model already has
            NSA or adapters, or its attention is offloaded.
    """
    require(
        isinstance(model, PreTrainedModel),
        "apply_nsa",
        "the model must be a PreTrainedModel",
        type(model).__name__,
        "swap the model first, then wrap or compile it",
    )
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    require(
        not adapted,
        "apply_nsa",
        "the model must have no adapters: they would be saved for the dense model",
        ", ".join(adapted[:3]),
        "swap the model first, or call merge_and_unload",
    )
    require(
        not swapped_modules(model),
        "apply_nsa",
        "a model may be swapped once",
        "one that has NSA already",
        "load it anew",
    )
    offloaded = offloaded_attention(model)
    require(
        not offloaded,
        "apply_nsa",
        "attention must have its weights in memory: new parameters start beside them",
        f"{', '.join(offloaded[:3])} on meta, with weights that accelerate offloaded",
        "swap the model first, then dispatch it; or save the swapped model and load that with a "
        "device_map",
    )
    text = text_model_of(model)
    if text is not None:
        more: dict[str, Any] = {"gates": gates, "cache_dtype": cache_dtype}
        become_whole(model, apply_nsa(text, attention, dispatcher=dispatcher, **more))
        return model
    sparsity = sparsity_of(attention)
    check_config(model.config)
    narrow = None if cache_dtype is None else {"cache_dtype": cache_dtype}
    cache_dtype_of(SimpleNamespace(nsagen=narrow), sparsity)
    bases = swap(model, sparsity, dispatcher, gates)
    old = model.config
    config = swapped_config(old, stored_settings(sparsity))
    if narrow is not None:
        config.nsagen = narrow
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
        if isinstance(module, PreTrainedModel) or module in bases:
            become_swapped(module)
    return model


_WHERE = ("subfolder", "revision", "cache_dir", "token", "local_files_only", "force_download")
"""The arguments of `from_pretrained` that say where a file is."""


def load_nsa(folder: str | Path, *, dispatcher: Any = None, **kwargs: Any) -> PreTrainedModel:
    """Load a swapped causal language model that `save_pretrained` wrote.

    It also reads folders from before swapped models had a model_type, which look like a dense
    model's with a key `nsa`. Saving such a model converts it.

    Args:
        folder: with config.json and safetensors, or a model's name on the hub.
        dispatcher: as in `apply_nsa`.
        kwargs: for `AutoModelForCausalLM.from_pretrained`, such as dtype.

    Raises:
        InvalidInputError: config.json has no `nsa`, or the weights do not match it.
    """
    where = {name: kwargs[name] for name in _WHERE if name in kwargs}
    config = kwargs.pop("config", None)
    if not isinstance(config, PreTrainedConfig):
        config = AutoConfig.from_pretrained(folder if config is None else config, **where)
    settings = getattr(config, "nsa", None)
    require(
        settings is not None,
        f"{folder}/config.json",
        "must have nsa, the settings of the attention",
        "none",
        "call apply_nsa on the dense model instead",
    )
    is_old = not config.model_type.startswith("nsagen_")
    if is_old:
        config = copy.deepcopy(config)
        delattr(config, "nsa")
    token = reading_old_folder.set(is_old)
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, config=config, **kwargs)
    finally:
        reading_old_folder.reset(token)
    if not is_old:
        for module in swapped_modules(model):
            module.dispatcher = dispatcher
        return model
    apply_nsa(model, settings, dispatcher=dispatcher)
    found = cached_file(folder, "config.json", **where)
    _read_old_names(model, Path(str(found)).parent)
    return model


def _read_old_names(model: PreTrainedModel, folder: Path) -> None:
    """Read NSA's parameters; those of compression had shorter names before they were modules."""
    parameters = {
        f"{name}.{own}": parameter
        for name, module in model.named_modules()
        if module in swapped_modules(model)
        for own, parameter in module.named_parameters()
    }
    stored = tensor_names(folder)
    names = {name if name in stored else name.removesuffix(".weight"): name for name in parameters}
    missing = sorted(old for old in names if old not in stored)
    require(
        not missing, str(folder), "must have NSA's weights", f"no {missing[:3]}", "save it anew"
    )
    with torch.no_grad():
        for path in sorted(set(stored.values())):
            here = [name for name in names if stored.get(name) == path]
            for name, tensor in read_tensors(path, here):
                parameters[names[name]].copy_(tensor)
