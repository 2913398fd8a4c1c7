"""config.json of a Llama checkpoint, to and from the toy models' configurations."""

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
"""The settings that NSA adds to a Llama: config.json has them below `nsa`."""

NSA_TYPE = "nsagen_toy_llama"
"""The model_type of a `ToyNSALlama`'s folder; before this type existed, it was "llama"."""

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
        InvalidInputError: the file is missing, or is not a JSON object.
    """
    path = folder / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InvalidInputError(
            f"{path}: a checkpoint needs a readable config.json; got {error}; "
            "give the folder that save_pretrained or a download wrote"
        ) from None
    kind = type(content).__name__
    require(isinstance(content, dict), str(path), "must be a JSON object", f"a {kind}", "fix it")
    return content


def dense_config(raw: Mapping[str, Any], folder: Path) -> ToyLlamaConfig:
    """The structure that a Llama's config.json describes.

    Raises:
        InvalidInputError: not a Llama, or it has what ToyLlama lacks: biases, another activation.
    """
    where = f"{folder}/config.json"
    kind = raw.get("model_type")
    door = "nsagen.integrations.transformers"
    require(
        kind in ("llama", NSA_TYPE),
        where,
        "model_type must be llama",
        repr(kind),
        f"load it with {door}.load_nsa"
        if str(kind).startswith("nsagen_")
        else f"for a Mistral or Qwen3, load it with Transformers and call {door}.apply_nsa",
    )
    quantization = raw.get("quantization_config")
    require(
        quantization is None,
        where,
        "weights must be floating-point numbers as they are, without quantization_config",
        str(quantization),
        "give the folder of the model before it was quantized",
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
    for name in ("num_attention_heads", "hidden_size"):
        value = raw[name]
        usable = type(value) is int and value > 0
        require(usable, where, f"{name} must be a positive integer", repr(value), "correct it")
    heads = raw["num_attention_heads"]
    theta, scaling = _checked_rope(raw, where)
    return ToyLlamaConfig(
        **{name: raw[name] for name in _SAME_NAME},
        num_key_value_heads=_given(raw, "num_key_value_heads", heads),
        head_dim=_given(raw, "head_dim", raw["hidden_size"] // heads),
        rope_theta=theta,
        rope_scaling=scaling,
        rms_norm_eps=raw.get("rms_norm_eps", 1e-6),
        initializer_range=raw.get("initializer_range", 0.02),
    )


def _given(raw: Mapping[str, Any], name: str, otherwise: Any) -> Any:
    """What config.json says; a key that is absent or null stands for `otherwise`, 0 does not."""
    value = raw.get(name)
    return otherwise if value is None else value


def is_tied(raw: Mapping[str, Any], folder: Path) -> bool:
    """Whether embedding and head share their weights.

    Raises:
        InvalidInputError: the switch is neither true, false nor null.
    """
    value = raw.get("tie_word_embeddings")
    rule = "tie_word_embeddings must be true or false"
    fits = value is None or isinstance(value, bool)
    require(fits, f"{folder}/config.json", rule, repr(value), "correct it")
    return value is True


def nsa_config(
    raw: Mapping[str, Any], folder: Path, overrides: Mapping[str, Any]
) -> ToyNSALlamaConfig:
    """`dense_config` with the folder's own NSA settings, then the overrides.

    Raises:
        InvalidInputError: as `dense_config`; or a setting that NSA doesn't have.
    """
    dense = dense_config(raw, folder)
    stored = raw.get("nsa") or {}
    kind = type(stored).__name__
    where = f"{folder}/config.json: nsa"
    require(isinstance(stored, Mapping), where, "must be a JSON object", f"a {kind}", "fix it")
    unknown = sorted({*stored, *overrides} - set(SPARSITY))
    require(
        not unknown,
        where,
        f"the settings of NSA are {', '.join(SPARSITY)}",
        ", ".join(unknown),
        "correct the name",
    )
    return ToyNSALlamaConfig(**asdict(dense), **{**stored, **overrides})


def rope_settings(raw: Mapping[str, Any]) -> tuple[float, dict[str, Any] | None]:
    """rope_theta and rope_scaling, as Transformers 4 (two keys) or 5 (rope_parameters) has them.

    If both exist, it returns what Transformers 5 uses: rope_scaling before rope_parameters, and the
    theta inside it before the one beside it.
    """
    parameters = dict(raw.get("rope_scaling") or raw.get("rope_parameters") or {})
    theta = parameters.pop("rope_theta", None) or raw.get("rope_theta") or 10000.0
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    return float(theta), None if kind == "default" else parameters


def _checked_rope(raw: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """`rope_settings` of a model whose rope turns whole heads, equally in all layers."""
    given = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    advice = "such a model cannot be loaded"
    require(
        isinstance(given, Mapping) and not any(isinstance(v, Mapping) for v in given.values()),
        where,
        "rope_parameters must be a JSON object of numbers, the same for all layers",
        str(given),
        advice,
    )
    share = given.get("partial_rotary_factor", raw.get("partial_rotary_factor", 1.0))
    require(
        share in (None, 1),
        where,
        "rope must turn whole heads",
        f"partial_rotary_factor={share}",
        advice,
    )
    other = raw.get("rope_parameters") or given
    thetas = [d.get("rope_theta") for d in (given, other, raw) if isinstance(d, Mapping)]
    for theta in thetas:
        usable = theta is None or (isinstance(theta, int | float) and theta > 0)
        require(usable, where, "rope_theta must be a positive number", repr(theta), "correct it")
    require(
        _bare_rope(given) == _bare_rope(other) and len({*thetas} - {None}) <= 1,
        where,
        "rope_theta, rope_scaling and rope_parameters must say the same",
        ", ".join(f"{k}={raw[k]}" for k in raw if k.startswith("rope_")),
        "keep rope_parameters alone, with rope_theta in it, or the other two",
    )
    theta, scaling = rope_settings(raw)
    return theta, scaling and {k: v for k, v in scaling.items() if k != "partial_rotary_factor"}


def _bare_rope(given: Any) -> Any:
    """Rope settings without the theta, and with one name for the type."""
    if not isinstance(given, Mapping):
        return given
    kind = given.get("rope_type", given.get("type", "default"))
    rest = {k: v for k, v in given.items() if k not in ("rope_theta", "rope_type", "type")}
    return {**rest, "rope_type": kind}


WEIGHTS = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""Dtypes that weights may have, by their names in safetensors files."""


def config_dtype(raw: Mapping[str, Any], otherwise: torch.dtype = torch.bfloat16) -> torch.dtype:
    """The dtype that config.json names, or else `otherwise`.

    Raises:
        InvalidInputError: not one of `WEIGHTS`.
    """
    name = raw.get("dtype") or raw.get("torch_dtype")
    if name is None:
        return otherwise
    dtype = getattr(torch, str(name).removeprefix("torch."), None)
    return checked_dtype("config.json", dtype, name)


def checked_dtype(where: str, dtype: Any, given: Any = None) -> torch.dtype:
    """Check that weights may have a dtype; `given` is what named it.

    Raises:
        InvalidInputError: weights cannot have it.
    """
    known = ", ".join(str(known).removeprefix("torch.") for known in WEIGHTS.values())
    require(
        isinstance(dtype, torch.dtype) and dtype in WEIGHTS.values(),
        where,
        f"dtype must be one of {known}",
        repr(dtype if given is None else given),
        "pass dtype=torch.bfloat16",
    )
    return dtype


def config_json(model_config: ToyLlamaConfig, tied: bool, dtype: torch.dtype) -> dict[str, Any]:
    """config.json's content for a model; `tied`: embedding and head share their weights."""
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
        # Transformers refuses this type: as a Llama it would load without the new weights.
        "model_type": NSA_TYPE if nsa else "llama",
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
