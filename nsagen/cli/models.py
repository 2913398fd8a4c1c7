"""The model that a command runs: a checkpoint's, or a small one with random weights."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from nsagen.core.errors import InvalidInputError
from nsagen.core.paths import specs_dir

if TYPE_CHECKING:
    import torch

    from nsagen.model import InferenceConfig, ToyLlama, ToyLlamaConfig, ToyNSALlama

_log = logging.getLogger("nsagen.generate")


RANDOM_LENGTH = 1 << 20
"""Most tokens of a prompt and its continuation without a checkpoint, whose positions bound it."""

_LENGTH = {"generate": "--max-new-tokens", "serve": "--max-length"}


def check_attention(command: str, attention: str | None, kernels: str | None) -> None:
    """Refuse what --attention does not know, and kernels of dense attention."""
    if attention not in (None, "nsa", "dense"):
        raise InvalidInputError(
            f"{command}: --attention must be nsa or dense; got {attention!r}; choose one"
        )
    if kernels is not None and attention == "dense":
        refuse_kernels(command, kernels)


def refuse_kernels(command: str, kernels: str) -> NoReturn:
    raise InvalidInputError(
        f"{command}: --kernels is for native sparse attention; got {kernels!r} with dense "
        "attention; leave it out, or add --attention nsa"
    )


def device_of(command: str, name: str | None) -> torch.device:
    """The device that an option names; a GPU if present by default.

    Raises:
        InvalidInputError: names the command, and what there is.
    """
    import torch

    from nsagen.core.paths import prepare_compiler_cache

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise InvalidInputError(
            f"{command}: --device must be cuda or cpu; got {name!r}; choose one"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            f"{command}: --device cuda needs a GPU that PyTorch sees; it sees none; "
            "run nsagen doctor, or leave --device out"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidInputError(
            f"{command}: --device must be one of {torch.cuda.device_count()} GPUs, counted from 0; "
            f"got {name!r}; choose one"
        )
    if device.type == "cuda":
        prepare_compiler_cache(command, will_write=False)
    return device


def random_model(
    command: str,
    limits: InferenceConfig,
    seed: int,
    device: torch.device,
    attention: str | None,
    kernels: str | None,
) -> ToyLlama | ToyNSALlama:
    """Two small layers with random weights and the attention of specs/tiny.yaml, for characters."""
    import torch

    from nsagen.serve.text import CHARACTERS
    from nsagen.spec import load_spec

    if limits.max_length > RANDOM_LENGTH:
        raise InvalidInputError(
            f"{command}: without --model, prompt and new tokens together must be at most "
            f"{RANDOM_LENGTH}; got {limits.max_length}; lower {_LENGTH[command]}"
        )
    tiny = load_spec(specs_dir() / "tiny.yaml")  # nsagen's, not a project's own of this name
    shape = next(s for s in tiny.shapes if s.gqa_ratio == 2)
    model: dict[str, Any] = {
        "vocab_size": len(CHARACTERS),
        "max_position_embeddings": max(2048, limits.max_length),
        "hidden_size": 4 * shape.head_dim,
        "intermediate_size": 8 * shape.head_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": shape.head_dim,
        "initializer_range": 0.2,
    }
    names = ("compress_type", "kernel_size", "kernel_stride", "block_size", "topk", "window_size")
    sparse = {name: getattr(shape, name) for name in names}
    generator = torch.Generator().manual_seed(seed)
    made = _with_random_weights(model, sparse, limits, generator, attention, kernels)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    if device.type == "cuda" and limits.cache_dtype is not None:
        dtype = torch.bfloat16  # whose range such a cache needs
    _log.info(
        "no --model: a model of 2 layers with random weights and %s continues the prompt "
        "letter by letter; the text means nothing. It runs %s.",
        "dense attention" if attention == "dense" else "the attention of specs/tiny.yaml",
        _how(device, dtype),
    )
    return made.to(device, dtype).requires_grad_(False)


def guide_model(
    limits: InferenceConfig,
    seed: int,
    device: torch.device,
    attention: str | None,
    kernels: str | None,
) -> ToyLlama | ToyNSALlama:
    """The sizes of the guide's example, 8 layers of Llama 3.1 8B's width, with random weights."""
    import torch

    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    generator = torch.Generator(device).manual_seed(seed)
    with device:
        made = _with_random_weights({}, {}, limits, generator, attention, kernels)
    _log.info("random weights in the sizes of the guide's example: %s", _how(device, dtype))
    return made.to(device, dtype).requires_grad_(False)


def _with_random_weights(
    model: dict[str, Any],
    sparse: dict[str, Any],
    limits: InferenceConfig,
    generator: torch.Generator,
    attention: str | None,
    kernels: str | None,
) -> ToyLlama | ToyNSALlama:
    """A model with these values of its config, and of its attention unless that is dense."""
    from nsagen.model import ToyLlama, ToyLlamaConfig, ToyNSALlama
    from nsagen.model.configs import ToyNSALlamaConfig

    if attention == "dense":
        return ToyLlama(ToyLlamaConfig(**model), limits, generator=generator)
    config = ToyNSALlamaConfig(**model, **sparse)
    return ToyNSALlama(config, limits, _dispatcher(kernels), generator=generator)


def transformers_model(config: ToyLlamaConfig, dtype: torch.dtype, device: torch.device) -> Any:
    """Transformers' dense Llama of the same sizes with SDPA, and random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    names = ("vocab_size", "max_position_embeddings", "hidden_size", "intermediate_size")
    names += ("num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")
    with device:
        made: Any = LlamaForCausalLM(
            LlamaConfig(
                **{name: getattr(config, name) for name in names},
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                bos_token_id=None,
                eos_token_id=None,
            )
        )
    return made.to(device, dtype).eval().requires_grad_(False)


def checkpoint_model(
    command: str,
    folder: Path,
    limits: InferenceConfig,
    device: torch.device,
    attention: str | None,
    kernels: str | None,
) -> ToyLlama | ToyNSALlama:
    """A checkpoint's model: float32 on a CPU, else float16 if its config says so, or bfloat16."""
    import torch

    from nsagen.model import ToyLlama, ToyNSALlama
    from nsagen.model.checkpoint_config import config_dtype, read_config

    raw = read_config(folder)
    sparse = attention == "nsa" or (attention is None and "nsa" in raw)
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.float16 if config_dtype(raw) is torch.float16 else torch.bfloat16
    common = {"dtype": dtype, "device": device}
    _log.info(
        "%s with %s attention, %s",
        folder,
        "native sparse" if sparse else "dense",
        _how(device, dtype),
    )
    if sparse and "nsa" not in raw:
        _log.warning(
            "the checkpoint was trained with dense attention, and NSA starts untrained: "
            "expect worse text beyond a short prompt"
        )
    if not sparse:
        if kernels is not None:
            refuse_kernels(command, kernels)
        for option, given in (("--pages", limits.paged), ("--cache-dtype", limits.cache_dtype)):
            if given:
                raise InvalidInputError(
                    f"{command}: {option} is for Native Sparse Attention; got it with {folder}, "
                    "which is dense; leave it out, or add --attention nsa"
                )
        return ToyLlama.from_pretrained(folder, limits, **common).requires_grad_(False)
    block = (raw.get("nsa") or {}).get("block_size", limits.page_size)
    if limits.paged and isinstance(block, int) and block > 0 and limits.page_size % block:
        limits = replace(limits, page_size=block)
    dispatcher = _dispatcher(kernels)
    made = ToyNSALlama.from_pretrained(folder, limits, dispatcher=dispatcher, **common)
    return made.requires_grad_(False)


def _how(device: torch.device, dtype: torch.dtype) -> str:
    from nsagen.runtime.device import interpreting

    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"on a GPU in {name}"
    return f"on the CPU in {name}, in {'the interpreter' if interpreting() else 'plain PyTorch'}"


def _dispatcher(name: str | None) -> Any:
    import nsagen

    return None if name is None else nsagen.load(name)
