"""Llama checkpoint folders (config.json and safetensors) to and from the toy models.

Needs safetensors only, not Transformers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from nsagen.model.checkpoint_config import (
    config_dtype,
    config_json,
    read_config,
)
from nsagen.model.checks import require
from nsagen.model.configs import InferenceConfig, ToyLlamaConfig
from nsagen.model.safetensors_files import (
    read_tensors,
    replace_json,
    tensor_names,
    write_tensors,
)

if TYPE_CHECKING:
    from typing import Self

_NEW = ("gate.", "compress_", "intra_block_pe", "k_proj_", "v_proj_")
"""How the names of the parameters begin that NSA adds to a layer's attention."""


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
        """A model of the structure that a folder's config.json describes, its weights not set.

        Args:
            raw: what config.json holds.
            folder: where it is, for error texts.
            settings: what `from_pretrained` was given beside its named arguments.
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
        """A model with the weights of a Llama checkpoint folder, held once while they load.

        Args:
            folder: holds config.json and model.safetensors, or several files and their index.
            inference_config: limits of `generate`.
            dtype: of the weights; by default what config.json says, else bfloat16.
            device: where to put them.
            more: a ToyNSALlama also takes `dispatcher` and any setting of its attention, such as
                `topk`; from a dense checkpoint its new parameters start as
                `nsagen.model.initial` says.

        Raises:
            InvalidInputError: a file is missing or does not fit; the text names it.
        """
        folder = Path(folder)
        raw, stored = read_config(folder), tensor_names(folder)
        with torch.device("meta"):
            model = cls.from_config(raw, folder, inference_config, more)
        model.to(dtype or config_dtype(raw)).to_empty(device=device)
        if raw.get("tie_word_embeddings", False) and "lm_head.weight" not in stored:
            model.lm_head.weight = model.model.embed_tokens.weight
        from_dense = not any(map(_is_new, stored))
        optional = {name for name, _ in model.named_parameters() if from_dense and _is_new(name)}
        _fill(model, folder, stored, optional)
        if from_dense:
            model.start_from_dense()
        return model

    def save_pretrained(
        self, folder: str | PathLike[str], max_shard_bytes: int = 5 * 10**9
    ) -> None:
        """Write config.json and the weights into a folder, which is made if need be.

        Args:
            folder: a ToyLlama's can be read by Transformers as a LlamaForCausalLM.
            max_shard_bytes: largest file; more weights go to several files and an index.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        tensors = dict(self.state_dict())
        tied = self.lm_head.weight is self.model.embed_tokens.weight
        if tied:
            del tensors["lm_head.weight"]
        write_tensors(folder, tensors, max_shard_bytes)
        content = config_json(self.config, tied, self.lm_head.weight.dtype)
        replace_json(folder / "config.json", content)


def _is_new(name: str) -> bool:
    return name.rpartition("self_attn.")[2].startswith(_NEW) and "self_attn." in name


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
