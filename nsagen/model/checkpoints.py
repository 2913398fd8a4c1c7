"""Llama checkpoint folders (config.json and safetensors), to and from the toy models.

Needs safetensors only, not Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsagen.model.checkpoint_config import (
    WEIGHTS,
    checked_dtype,
    config_dtype,
    config_json,
    is_tied,
    read_config,
)
from nsagen.model.checks import checked_device, require
from nsagen.model.configs import InferenceConfig, ToyLlamaConfig
from nsagen.model.safetensors_files import (
    read_tensors,
    stored_dtype,
    tensor_names,
    write_checkpoint,
)

if TYPE_CHECKING:
    from typing import Self

_EMBEDDING = "model.embed_tokens.weight"

_SCALES = ("scale", "scale_inv", "scales", "qweight", "qzeros", "g_idx", "SCB", "absmax")
"""Endings of the names of the tensors that accompany a quantized weight."""

_NO_SHAPE = ("dispatcher", "kernel_stride", "block_size", "topk", "init_blocks", "local_blocks")
"""Settings that may be loaded with any value: no parameter's shape depends on them."""

_NEW = ("gate.", "compress_", "intra_block_pe", "k_proj_", "v_proj_")
"""Beginnings of the names of the parameters that NSA adds to a layer's attention."""


class Pretrained(nn.Module):
    """A model that reads and writes Llama checkpoint folders, sharded or not."""

    config: ToyLlamaConfig
    model: Any
    lm_head: nn.Linear

    @classmethod
    def from_config(
        cls,
        raw: Mapping[str, Any],
        folder: Path,
        inference_config: InferenceConfig | None,
        settings: Mapping[str, Any],
    ) -> Self:
        """A model with the structure that a folder's config.json describes, without its weights.

        Args:
            raw: the content of config.json.
            folder: where it is, for error texts.
            settings: what `from_pretrained` was given besides its named arguments.
        """
        raise NotImplementedError

    def start_from_dense(self) -> None:
        """Set what a dense checkpoint has no weights for; a dense model lacks nothing."""

    @classmethod
    def from_pretrained(
        cls,
        folder: str | PathLike[str],
        inference_config: InferenceConfig | None = None,
        *,
        dtype: torch.dtype | None = None,
        device: torch.device | str = "cpu",
        **more: Any,
    ) -> Self:
        """A model with the weights of a Llama checkpoint folder; loading holds them only once.

        Args:
            folder: holds config.json and model.safetensors, or several files and their index.
            inference_config: limits of `generate`.
            dtype: of the weights; by default what config.json says, or else the file's.
            device: where to put them.
            more: a ToyNSALlama also takes `dispatcher` and any setting of its attention, such as
                `topk`; from a dense checkpoint its new parameters start as
                `nsagen.model.initial` says.

        Raises:
            InvalidInputError: a file is missing or does not fit; the text names it.
        """
        device = checked_device("from_pretrained", device)
        require(
            device.type != "meta",
            "from_pretrained",
            "device must be one that keeps the weights",
            "'meta'",
            "build the model of its config to have it without weights",
        )
        folder = _folder("from_pretrained", folder)
        raw, stored = read_config(folder), tensor_names(folder)
        require(
            not (folder / "adapter_config.json").is_file(),
            str(folder),
            "the weights must be whole",
            "an adapter beside them (adapter_config.json)",
            "merge it and save the model anew, or move the file elsewhere",
        )
        _check_stored(folder, stored)
        if dtype is None:
            kinds = [stored_dtype(path, name) for name, path in sorted(stored.items())[:1]]
            dtype = config_dtype(raw, *(WEIGHTS[kind] for kind in kinds))
        with torch.device("meta"):
            model = cls.from_config(raw, folder, inference_config, more)
        model.to(checked_dtype("from_pretrained", dtype)).to_empty(device=device)
        tied = is_tied(raw, folder)
        if tied and "lm_head.weight" not in stored:
            model.lm_head.weight = model.model.embed_tokens.weight
        elif tied and _EMBEDDING not in stored:
            model.model.embed_tokens.weight = model.lm_head.weight
        from_dense = "nsa" not in raw and not any(map(_is_new, stored))
        optional = {name for name, _ in model.named_parameters() if from_dense and _is_new(name)}
        _fill(model, folder, stored, optional, _changed(raw, more))
        if tied and torch.equal(model.lm_head.weight, model.model.embed_tokens.weight):
            model.lm_head.weight = model.model.embed_tokens.weight
        if from_dense:
            model.start_from_dense()
        return model

    def save_pretrained(
        self, folder: str | PathLike[str], max_shard_bytes: int = 5 * 10**9
    ) -> None:
        """Write config.json and the weights into a folder, which is made if needed.

        An earlier checkpoint that nsagen wrote there is replaced.

        Args:
            folder: a ToyLlama's can be read by Transformers as a LlamaForCausalLM.
            max_shard_bytes: largest file; more weights go to several files with an index.

        Raises:
            InvalidInputError: the folder holds a checkpoint that nsagen did not write, or the
                model has weights that `from_pretrained` could not read; nothing was changed.
        """
        folder, tensors = _folder("save_pretrained", folder), dict(self.state_dict())
        self._check_saved(tensors)
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        if tied:
            del tensors["lm_head.weight"]
        content = config_json(self.config, tied, self.lm_head.weight.dtype)
        write_checkpoint(folder, tensors, content, max_shard_bytes)

    def _check_saved(self, tensors: Mapping[str, Tensor]) -> None:
        """Refuse what `from_pretrained` could not read back."""
        kind: Any = next(k for k in type(self).__mro__ if k.__module__.startswith("nsagen."))
        with torch.device("meta"):
            wanted = kind(self.config).state_dict()
        others = sorted(wanted.keys() ^ tensors.keys())
        advice = "take adapters and quantized layers out of the model, or merge them, first"
        rule = "the parameters must be those of the model's config"
        require(not others, "save_pretrained", rule, _shown(others), advice)
        bad = [f"{name} {fault}" for name, t in tensors.items() if (fault := _unsaved(t))]
        kinds = "weights must be in memory, in bfloat16, float16, float32 or float64"
        require(not bad, "save_pretrained", kinds, _shown(bad), advice)
        bad = [
            f"{name} with shape {list(t.shape)} instead of {list(wanted[name].shape)}"
            for name, t in tensors.items()
            if t.shape != wanted[name].shape
        ]
        sizes = "give the model a config of these sizes: dataclasses.replace(model.config, ...)"
        require(not bad, "save_pretrained", rule, _shown(bad), sizes)


def _unsaved(value: Any) -> str:
    """Why a value of a state dict cannot be saved; empty if it can. Modules may keep any object
    there, as quantized layers do."""
    if not isinstance(value, Tensor):
        return f"of {type(value).__name__}"
    if value.is_meta:
        return "on the meta device"
    if value.dtype not in WEIGHTS.values():
        return f"of {value.dtype}"
    return "" if value.layout is torch.strided else f"with layout {value.layout}"


def _folder(where: str, folder: Any) -> Path:
    """A folder's path; an empty one, as of a variable that is not set, is not the working folder.

    Raises:
        InvalidInputError: not a path, or an empty one.
    """
    fits = isinstance(folder, str | PathLike) and str(folder) != ""
    require(fits, where, "folder must be a path", repr(folder), 'such as "checkpoint"')
    return Path(folder)


def _is_new(name: str) -> bool:
    return name.rpartition("self_attn.")[2].startswith(_NEW) and "self_attn." in name


def _check_stored(folder: Path, stored: Mapping[str, Path]) -> None:
    """Refuse weights that cannot be used as they are: integers, or 8 bits with scales."""
    kinds = {name: stored_dtype(path, name) for name, path in stored.items()}
    found = [f"{name} of {kind}" for name, kind in kinds.items() if kind not in WEIGHTS]
    require(
        not found,
        str(folder),
        f"weights must have one of the dtypes {', '.join(WEIGHTS)}",
        _shown(sorted(found)),
        "give the folder of the model before it was quantized",
    )


def _changed(raw: Mapping[str, Any], settings: Mapping[str, Any]) -> list[str]:
    """The requested settings of an NSA folder that differ from its own."""
    stored = raw.get("nsa") or {}
    return [
        name
        for name, value in settings.items()
        if stored and name not in _NO_SHAPE and _plain(stored.get(name)) != _plain(value)
    ]


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _shown(found: Sequence[str]) -> str:
    return ", ".join(found[:5]) + (f" and {len(found) - 5} more" if len(found) > 5 else "")


def _fill(
    model: nn.Module,
    folder: Path,
    stored: Mapping[str, Path],
    optional: set[str],
    changed: Sequence[str],
) -> None:
    """Copy every stored tensor into its parameter; only the optional ones may be missing.

    Args:
        changed: settings that the caller gave and that differ from the folder's.
    """
    wanted = dict(model.named_parameters(remove_duplicate=False))  # tied ones by both names
    # Old checkpoints store this buffer, which follows from the config.
    given = {name for name in stored if not name.endswith("rotary_emb.inv_freq")}
    filled = {id(wanted[name]) for name in given & wanted.keys()} | {
        id(wanted[name]) for name in optional
    }
    missing = sorted(name for name, weight in wanted.items() if id(weight) not in filled)
    unexpected = sorted(given - wanted.keys())
    advice = _advice(missing, unexpected, changed)
    shown = [f"no {name}" for name in missing] + [f"an unknown {name}" for name in unexpected]
    require(not shown, str(folder), "the weights must be those of the model", _shown(shown), advice)
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


def _advice(missing: Sequence[str], unexpected: Sequence[str], changed: Sequence[str]) -> str:
    """What to do about a folder whose tensors do not match the model."""
    if changed:
        return f"leave out {', '.join(changed)}, with which its weights were not made"
    if any(name.endswith(_SCALES) for name in unexpected):
        return "give the folder of the model before it was quantized"
    if any(name.endswith(("gate.bias", "gate.down_proj.bias")) for name in unexpected):
        return "load it with nsagen.integrations.transformers.load_nsa"
    if any(map(_is_new, unexpected)):
        return "load it with ToyNSALlama.from_pretrained"
    if any(f"model.{name}" in missing for name in unexpected):
        return "load it with Transformers' LlamaForCausalLM, whose names these lack, and save that"
    if any(name.endswith(f".{lacking}") for name in unexpected for lacking in missing[:1]):
        return "save the model itself, not what wraps it (DataParallel, torch.compile)"
    others = [name for name in unexpected if not name.startswith("model.")]
    if others and others == unexpected and missing == ["lm_head.weight"]:
        return "give the folder of a language model: this one has another head"
    if others and others == unexpected and not missing:
        return "load it with Transformers' LlamaForCausalLM, which leaves these out, and save that"
    if missing == ["lm_head.weight"]:
        return "set tie_word_embeddings to true in its config.json if the embedding is the head"
    return "check that the folder's weights belong to its config.json"


def _tensors(
    folder: Path, stored: Mapping[str, Path], names: set[str]
) -> Iterator[tuple[str, Tensor]]:
    for path in sorted(set(stored.values())):
        yield from read_tensors(path, sorted(n for n in names if stored[n] == path))
