"""config.json of a Llama checkpoint: to the toy models' configurations and back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from nsagen.core.errors import InvalidInputError
from nsagen.model.checks import require
from nsagen.model.configs import ToyLlamaConfig, ToyNSALlamaConfig
from nsagen.model.sparsity import SETTINGS, stored_settings

SPARSITY = (*SETTINGS, "v_head_dim")
"""The settings that NSA adds to a Llama: in config.json they lie below `nsa`."""

_SAME_NAME = (
    "vocab_size",
    "max_position_embeddings",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's config.json.

    Raises:
        InvalidInputError: no such file, or it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InvalidInputError(
            f"{path}: a checkpoint needs a readable config.json; got {error}; "
            "give the folder that save_pretrained or a download wrote"
        ) from None
    require(isinstance(content, dict), str(path), "must be a JSON object", "a list", "mend it")
    return content


def dense_config(raw: Mapping[str, Any], folder: Path) -> ToyLlamaConfig:
    """The structure that a Llama's config.json describes.

    Raises:
        InvalidInputError: it is no Llama, or has what ToyLlama lacks: biases, another activation.
    """
    where = f"{folder}/config.json"
    require(
        raw.get("model_type") == "llama",
        where,
        "model_type must be llama",
        repr(raw.get("model_type")),
        "for a Mistral or Qwen3, load it with Transformers and call "
        "nsagen.integrations.transformers.apply_nsa",
    )
    plain = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
    for name, needed in plain.items():
        value = raw.get(name, needed)
        advice = "load it with Transformers and call nsagen.integrations.transformers.apply_nsa"
        require(value == needed, where, f"{name} must be {needed!r}", repr(value), advice)
    missing = [name for name in _SAME_NAME if name not in raw]
    require(
        not missing, where, f"must have {', '.join(_SAME_NAME)}", f"no {missing}", "add the missing"
    )
    heads = raw["num_attention_heads"]
    theta, scaling = rope_settings(raw)
    return ToyLlamaConfig(
        **{name: raw[name] for name in _SAME_NAME},
        num_key_value_heads=raw.get("num_key_value_heads") or heads,
        head_dim=raw.get("head_dim") or raw["hidden_size"] // heads,
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        initializer_range=raw.get("initializer_range", 0.02),
    )


def nsa_config(
    raw: Mapping[str, Any], folder: Path, overrides: Mapping[str, Any]
) -> ToyNSALlamaConfig:
    """`dense_config` with the folder's own NSA settings, then the overrides.

    Raises:
        InvalidInputError: as `dense_config`; a setting that NSA doesn't have.
    """
    dense = dense_config(raw, folder)
    stored = raw.get("nsa") or {}
    unknown = sorted({*stored, *overrides} - set(SPARSITY))
    require(
        not unknown,
        f"{folder}/config.json: nsa",
        f"the settings of NSA are {', '.join(SPARSITY)}",
        ", ".join(unknown),
        "correct the name",
    )
    return ToyNSALlamaConfig(**asdict(dense), **{**stored, **overrides})


def rope_settings(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, as Transformers 4 (two keys) or 5 (rope_parameters) has them."""
    parameters = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return float(theta), None if kind == "default" else parameters


def config_dtype(raw: Mapping[str, Any]) -> torch.dtype:
    """The dtype that config.json names, else bfloat16."""
    name = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16").removeprefix("torch.")
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise InvalidInputError(
            f"config.json: dtype must be a floating-point dtype of PyTorch; got {name!r}; "
            "pass dtype=torch.bfloat16"
        )
    return dtype


def config_json(model_config: ToyLlamaConfig, tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    """What config.json says of a model; `tied`: embedding and head share their weights."""
    config = asdict(model_config)
    scaling = dict(config.pop("rope_scaling") or {"rope_type": "default"})
    theta = config.pop("rope_theta")
    nsa: dict[str, Any] = {}
    if isinstance(model_config, ToyNSALlamaConfig):
        nsa = stored_settings(model_config)
        if model_config.v_head_dim is not None:
            nsa["v_head_dim"] = model_config.v_head_dim
    config = {name: value for name, value in config.items() if name not in SPARSITY}
    content: dict[str, Any] = {
        "architectures": ["ToyNSALlama" if nsa else "LlamaForCausalLM"],
        "model_type": "llama",
        **config,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "rope_theta": theta,  # Transformers 4 reads these two, 5 the third
        "rope_scaling": None if scaling.get("rope_type") == "default" else scaling,
        "rope_parameters": {"rope_theta": theta, **scaling},
        "tie_word_embeddings": tied,
        "dtype": str(dtype).removeprefix("torch."),
    }
    if nsa:
        content["nsa"] = nsa
    return content
