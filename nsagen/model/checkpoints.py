"""Llama checkpoint folders (config.json and safetensors) to and from the toy models.

Needs safetensors only, not Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from nsagen.model.checkpoint_config import (
    config_dtype,
    config_json,
    dense_config,
    nsa_config,
    read_config,
)
from nsagen.model.checks import require
from nsagen.model.configs import InferenceConfig
from nsagen.model.initial import start_from_dense
from nsagen.model.safetensors_files import (
    read_tensors,
    replace_json,
    tensor_names,
    write_tensors,
)
from nsagen.model.toy_llama import ToyLlama
from nsagen.model.toy_nsa_llama import ToyNSALlama

_NEW = ("gate.", "compress_", "intra_block_pe", "k_proj_", "v_proj_")
"""How the names of the parameters begin that NSA adds to a layer's attention."""

Model = TypeVar("Model", ToyLlama, ToyNSALlama)


def load(
    kind: type[Model],
    folder: str | Path,
    inference_config: InferenceConfig | None = None,
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    dispatcher: Any = None,
    sparsity: Mapping[str, Any] | None = None,
) -> Model:
    """A model with a folder's weights, held once in memory while they load.

    Args:
        kind: ToyLlama or ToyNSALlama.
        inference_config: limits of `generate`.
        dtype: of the weights; by default what config.json says, else bfloat16.
        dispatcher: generated kernels, for a ToyNSALlama.
        sparsity: settings of a ToyNSALlama's attention that override the folder's, or for a
            dense checkpoint the defaults.

    Raises:
        InvalidInputError: a file is missing or not what it should be; the text names it.
    """
    folder = Path(folder)
    raw, stored = read_config(folder), tensor_names(folder)
    with torch.device("meta"):
        model = _bare(kind, raw, folder, inference_config, dispatcher, sparsity or {})
    model.to(dtype or config_dtype(raw)).to_empty(device=device)
    if raw.get("tie_word_embeddings", False) and "lm_head.weight" not in stored:
        model.lm_head.weight = model.model.embed_tokens.weight
    from_dense = isinstance(model, ToyNSALlama) and not any(map(_is_new, stored))
    optional = {name for name, _ in model.named_parameters() if from_dense and _is_new(name)}
    _fill(model, folder, stored, optional)
    if from_dense:
        for layer in model.model.layers:
            start_from_dense(layer.self_attn, model.config.initializer_range)
    return model


def _is_new(name: str) -> bool:
    return name.rpartition("self_attn.")[2].startswith(_NEW) and "self_attn." in name


def _bare(
    kind: type[Model],
    raw: Mapping[str, Any],
    folder: Path,
    inference_config: InferenceConfig | None,
    dispatcher: Any,
    sparsity: Mapping[str, Any],
) -> Model:
    """A model of the folder's structure, its weights not set."""
    if issubclass(kind, ToyNSALlama):
        return kind(nsa_config(raw, folder, sparsity), inference_config, dispatcher)
    given = [*sparsity, *(["dispatcher"] if dispatcher is not None else [])]
    require(
        not given,
        "ToyLlama.from_pretrained",
        "dense attention has no settings",
        ", ".join(given),
        "take them out, or load a ToyNSALlama",
    )
    return kind(dense_config(raw, folder), inference_config)


def save(
    model: ToyLlama | ToyNSALlama, folder: str | Path, max_shard_bytes: int = 5 * 10**9
) -> None:
    """Write config.json and the weights, in several files if they pass `max_shard_bytes`.

    A `ToyLlama`'s folder is one that Transformers reads as a `LlamaForCausalLM`.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = dict(model.state_dict())
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    if tied:
        del tensors["lm_head.weight"]
    write_tensors(folder, tensors, max_shard_bytes)
    content = config_json(model.config, tied, model.lm_head.weight.dtype)
    replace_json(folder / "config.json", content)


def _fill(model: nn.Module, folder: Path, stored: Mapping[str, Path], optional: set[str]) -> None:
    """Copy every stored tensor into its parameter; all but the optional must be there."""
    wanted = dict(model.named_parameters())
    # Old checkpoints store this buffer, which follows from the config.
    given = {name for name in stored if not name.endswith("rotary_emb.inv_freq")}
    missing, unexpected = sorted(wanted.keys() - given - optional), sorted(given - wanted.keys())
    advice = "check that the folder's weights belong to its config.json"
    if any(name.endswith(("gate.bias", "gate.down_proj.bias")) for name in unexpected):
        advice = "load it with nsagen.integrations.transformers.load_nsa"
    elif any(map(_is_new, unexpected)):
        advice = "load it with ToyNSALlama.from_pretrained"
    shown = [f"no {name}" for name in missing] + [f"an unknown {name}" for name in unexpected]
    require(
        not shown,
        str(folder),
        "the weights must be those of the model",
        ", ".join(shown[:5]) + (f" and {len(shown) - 5} more" if len(shown) > 5 else ""),
        advice,
    )
    with torch.no_grad():
        for name, tensor in _tensors(folder, stored, given):
            require(
                tensor.shape == wanted[name].shape,
                f"{folder}: {name}",
                f"must have shape {list(wanted[name].shape)}",
                str(list(tensor.shape)),
                advice,
            )
            wanted[name].copy_(tensor)


def _tensors(
    folder: Path, stored: Mapping[str, Path], names: set[str]
) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(set(stored.values())):
        yield from read_tensors(path, sorted(n for n in names if stored[n] == path))
