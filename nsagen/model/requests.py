"""What generation accepts: checks of a request that come before any work."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.model.checks import require
from nsagen.model.configs import InferenceConfig


def check_inference(where: str, model: Any) -> InferenceConfig:
    """Check that the model can generate at all; returns its limits.

    Raises:
        InvalidInputError: no InferenceConfig, or weights that no kernel takes.
    """
    limits = model.inference_config
    name = type(model).__name__
    require(
        limits is not None,
        where,
        "the model needs an InferenceConfig, which sizes its cache",
        "None",
        f"build it with {name}(config, InferenceConfig(...))",
    )
    assert limits is not None
    weight = next(model.parameters())
    require(
        weight.device.type != "cuda" or weight.dtype in (torch.bfloat16, torch.float16),
        where,
        "weights on a GPU must be bfloat16 or float16",
        str(weight.dtype),
        "call model.to(torch.bfloat16), or model.cpu() to run in float32",
    )
    return limits


def check_length(where: str, limits: InferenceConfig, length: int, max_new_tokens: int) -> int:
    """Check a prompt's length and the number of new tokens; returns that number.

    Raises:
        InvalidInputError: names `where` and the limit.
    """
    require(
        isinstance(max_new_tokens, int) and max_new_tokens >= -1,
        where,
        "max_new_tokens must be -1 or at least 0",
        repr(max_new_tokens),
        f"-1 stands for InferenceConfig.max_new_tokens={limits.max_new_tokens}",
    )
    steps = limits.max_new_tokens if max_new_tokens == -1 else max_new_tokens
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
    if limits.paged:
        needed = -(-(length + steps) // limits.page_size)
        require(
            needed <= limits.total_pages,
            where,
            f"a sequence must fit into InferenceConfig.num_pages={limits.total_pages} pages "
            f"of {limits.page_size} tokens",
            f"{length} + {steps} tokens, which need {needed}",
            "shorten the prompt, lower max_new_tokens or raise num_pages",
        )
    return steps


def check_tokens(where: str, input_ids: Tensor, weight: Tensor, vocab_size: int) -> None:
    """Check that tokens are where the weights are, and in the vocabulary.

    Raises:
        InvalidInputError: names both devices, or the values' range.
    """
    require(
        input_ids.device == weight.device,
        where,
        "input_ids must be where the weights are",
        f"{input_ids.device} and {weight.device}",
        "move one of them",
    )
    if input_ids.shape[0] == 0:
        return
    low, high = torch.stack(input_ids.aminmax()).tolist()
    require(
        low >= 0 and high < vocab_size,
        where,
        f"input_ids must be from 0 to vocab_size-1={vocab_size - 1}",
        f"values from {low} to {high}",
        "check that the tokenizer belongs to the model",
    )
