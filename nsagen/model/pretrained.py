"""`from_pretrained` and `save_pretrained` of the toy models."""

from __future__ import annotations

from os import PathLike
from typing import TYPE_CHECKING, Any

import torch

from nsagen.model.configs import InferenceConfig

if TYPE_CHECKING:
    from typing import Self

    from nsagen.model.toy_llama import ToyLlama
    from nsagen.model.toy_nsa_llama import ToyNSALlama


class Pretrained:
    """Reads and writes Llama checkpoint folders: config.json and safetensors, sharded or not."""

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
        """A model with the weights of a Llama checkpoint folder.

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
        from nsagen.model.checkpoints import load

        dispatcher = more.pop("dispatcher", None)
        return load(  # type: ignore[return-value, type-var]
            cls,  # type: ignore[arg-type]
            folder,  # type: ignore[arg-type]
            inference_config,
            dtype=dtype,
            device=device,
            dispatcher=dispatcher,
            sparsity=more,
        )

    def save_pretrained(
        self: ToyLlama | ToyNSALlama,  # type: ignore[misc]
        folder: str | PathLike[str],
        max_shard_bytes: int = 5 * 10**9,
    ) -> None:
        """Write config.json and the weights into a folder, which is made if need be.

        Args:
            folder: a ToyLlama's can be read by Transformers as a LlamaForCausalLM.
            max_shard_bytes: largest file; more weights go to several files and an index.
        """
        from nsagen.model.checkpoints import save

        save(self, folder, max_shard_bytes)  # type: ignore[arg-type]
