"""Greedy generation with a cache: prefill the prompts packed, then decode token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Generic, TypeVar

import torch
from torch import Tensor, nn

from nsagen.model.checks import require
from nsagen.model.configs import InferenceConfig, ToyLlamaConfig
from nsagen.model.packing import check_packed, host_lengths

if TYPE_CHECKING:
    from nsagen.model.cache import KVCache, NSACache

    Cache = TypeVar("Cache", KVCache, NSACache)
else:
    Cache = TypeVar("Cache")


class Generation(nn.Module, Generic[Cache]):
    """Gives a model `generate`. The model brings `new_cache`, `prefill` and `decode`."""

    config: ToyLlamaConfig
    inference_config: InferenceConfig | None
    _cache: Cache | None = None

    def new_cache(self) -> Cache:
        """Allocate a cache as large as `inference_config` says, where the weights are."""
        raise NotImplementedError

    def prefill(
        self, input_ids: Tensor, cu_seqlens: Tensor, lengths: Sequence[int], cache: Cache
    ) -> Tensor:
        """Run packed prompts and fill the cache; logits [batch, vocab] of the last tokens."""
        raise NotImplementedError

    def decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: Cache) -> Tensor:
        """Run one new token of each sequence: logits [R, vocab]."""
        raise NotImplementedError

    def _weight(self) -> Tensor:
        return next(self.parameters())

    def _own_cache(self) -> Cache:
        """The cache kept between calls, allocated anew when the weights have moved."""
        weight = self._weight()
        wanted = (weight.device, weight.dtype, self.inference_config)
        kept = self._cache
        if kept is not None and (kept.device, kept.dtype, kept.limits) == wanted:
            return kept
        kept = self._cache = None  # frees the old one before the new one is allocated
        self._cache = made = self.new_cache()
        return made

    @torch.no_grad()
    def generate(self, input_ids: Tensor, cu_seqlens: Tensor, max_new_tokens: int = -1) -> Tensor:
        """Continue each prompt of a packed batch with its most likely tokens.

        All limits are checked before any work. Only the prompts' lengths are read back from
        the device: the steps themselves never wait for it.

        Args:
            input_ids: int64 [N], the prompts concatenated, none of them empty.
            cu_seqlens: int32 [batch+1], where each prompt starts; the last entry is N.
            max_new_tokens: tokens to make for each; -1 for `inference_config.max_new_tokens`.

        Returns:
            int64 [batch, max_new_tokens].

        Raises:
            InvalidInputError: names the sequence and the limit that it breaks.
        """
        cu_seqlens = check_packed("generate", input_ids, cu_seqlens, input_ids.shape[0])
        lengths = host_lengths("generate", cu_seqlens, input_ids.shape[0], input_ids.shape[0])
        steps = self._check_limits(lengths, max_new_tokens)
        self._check_tokens(input_ids)
        output = torch.empty(len(lengths), steps, dtype=torch.int64, device=input_ids.device)
        if output.numel() == 0:
            return output
        cache = self._own_cache()
        tokens = self.prefill(input_ids, cu_seqlens, lengths, cache).argmax(-1)
        output[:, 0] = tokens
        positions = cu_seqlens.diff()
        slots = torch.arange(len(lengths), dtype=torch.int32, device=input_ids.device)
        for step in range(1, steps):
            tokens = self.decode(tokens, positions, slots, cache).argmax(-1)
            output[:, step] = tokens
            positions += 1
        return output

    def _check_limits(self, lengths: Sequence[int], max_new_tokens: int) -> int:
        """Check everything about a call that can be too large; returns the number of steps."""
        limits = self.inference_config
        name = type(self).__name__
        require(
            limits is not None,
            "generate",
            "the model needs an InferenceConfig, which sizes its cache",
            "None",
            f"build it with {name}(config, InferenceConfig(...))",
        )
        assert limits is not None
        require(
            isinstance(max_new_tokens, int) and max_new_tokens >= -1,
            "generate",
            "max_new_tokens must be -1 or at least 0",
            repr(max_new_tokens),
            f"-1 stands for InferenceConfig.max_new_tokens={limits.max_new_tokens}",
        )
        steps = limits.max_new_tokens if max_new_tokens == -1 else max_new_tokens
        require(
            len(lengths) <= limits.max_batch_size,
            "generate",
            f"a batch must have at most InferenceConfig.max_batch_size={limits.max_batch_size} "
            "sequences",
            str(len(lengths)),
            "split the batch or raise max_batch_size",
        )
        for index, length in enumerate(lengths):
            where = f"generate: sequence {index}"
            require(
                length > 0,
                where,
                "a prompt must have at least one token",
                "an empty one",
                "start it with a token such as the tokenizer's BOS, or leave the sequence out",
            )
            require(
                length + steps <= limits.max_length,
                where,
                "prompt and new tokens together must be at most "
                f"InferenceConfig.max_length={limits.max_length}",
                f"{length} + {steps} = {length + steps}",
                "shorten the prompt, lower max_new_tokens or raise max_length",
            )
        self._check_device()
        return steps

    def _check_device(self) -> None:
        weight = self._weight()
        require(
            weight.device.type != "cuda" or weight.dtype in (torch.bfloat16, torch.float16),
            "generate",
            "weights on a GPU must be bfloat16 or float16",
            str(weight.dtype),
            "call model.to(torch.bfloat16), or model.cpu() to run in float32",
        )

    def _check_tokens(self, input_ids: Tensor) -> None:
        require(
            input_ids.device == self._weight().device,
            "generate",
            "input_ids must be where the weights are",
            f"{input_ids.device} and {self._weight().device}",
            "move one of them",
        )
        if input_ids.shape[0] == 0:
            return
        low, high = torch.stack(input_ids.aminmax()).tolist()
        require(
            low >= 0 and high < self.config.vocab_size,
            "generate",
            f"input_ids must be from 0 to vocab_size-1={self.config.vocab_size - 1}",
            f"values from {low} to {high}",
            "check that the tokenizer belongs to the model",
        )


def check_inference_config(config: ToyLlamaConfig, limits: InferenceConfig | None) -> None:
    """Check that a cache is not longer than the model has positions.

    Raises:
        InvalidInputError: max_length passes max_position_embeddings.
    """
    require(
        limits is None or limits.max_length <= config.max_position_embeddings,
        "InferenceConfig",
        f"max_length must be at most max_position_embeddings={config.max_position_embeddings}",
        str(limits and limits.max_length),
        "lower max_length or raise max_position_embeddings",
    )
