"""`nsagen generate`: text in, text out, as it comes."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from nsagen.cli.options import Json
from nsagen.core.errors import InvalidInputError

if TYPE_CHECKING:
    import torch

    from nsagen.model import SamplingConfig, ToyLlama, ToyNSALlama

EXAMPLE = 'Example: nsagen generate --model ./Llama-3.2-1B --prompt "Sparse attention is"'
RANDOM_LENGTH = 1 << 20
"""Most tokens of a prompt and its continuation without a checkpoint, whose positions bound it."""

DEFAULT_PROMPT = "Native sparse attention reads"

_log = logging.getLogger("nsagen.generate")


def generate(
    model: Annotated[
        Path | None,
        typer.Option(help="A Llama checkpoint: config.json, safetensors, tokenizer.json."),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(help="Text to continue; - reads it from stdin.")
    ] = None,
    attention: Annotated[
        str | None, typer.Option(help="nsa or dense; default: the checkpoint's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token; above 0 samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling and for random weights.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cuda or cpu; default: a GPU if present.")
    ] = None,
    kernels: Annotated[
        str | None, typer.Option(help="Generated package to use on a GPU, such as llama8b.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Continue a text with a checkpoint or, without one, with a tiny random model."""
    from nsagen.cli.text import characters, checkpoint_tokenizer

    if attention not in (None, "nsa", "dense"):
        raise InvalidInputError(
            f"generate: --attention must be nsa or dense; got {attention!r}; choose one"
        )
    if kernels is not None and attention == "dense":
        _refuse_kernels(kernels)
    from nsagen.model import SamplingConfig

    sampling = SamplingConfig(temperature, seed=seed)
    text = _prompt(prompt, model)
    tokenizer = characters() if model is None else checkpoint_tokenizer(model)
    ids = tokenizer.encode(text)
    if not ids:
        raise InvalidInputError("generate: the prompt must have a token; got none; write some text")
    where = _device(device)
    length = len(ids) + max_new_tokens
    if model is None:
        made = _random_model(length, seed, where, attention, kernels)
    else:
        made = _checkpoint(model, length, where, attention, kernels)
    start = time.perf_counter()
    new: list[int] = []
    stream = tokenizer.stream()
    for token in _tokens(made, ids, max_new_tokens, tokenizer.stop, sampling):
        if token in tokenizer.stop:
            break
        new.append(token)
        if not as_json:
            print(stream.add(token), end="", flush=True)
    seconds = time.perf_counter() - start
    if as_json:
        result = {"prompt": text, "text": tokenizer.decode(new), "tokens": new}
        print(json.dumps({**result, "prompt_tokens": len(ids), "seconds": seconds}))
        return
    print(stream.end())
    rate = len(new) / seconds if seconds else 0.0
    _log.info("%d tokens after a prompt of %d, %.1f a second", len(new), len(ids), rate)


def _prompt(prompt: str | None, model: Path | None) -> str:
    if prompt == "-" or (prompt is None and model is not None and not _is_terminal(sys.stdin)):
        prompt = _read(sys.stdin)
    if prompt is None and model is not None:
        raise InvalidInputError(
            'generate: a checkpoint needs a prompt; got none; add --prompt "..."'
        )
    text = DEFAULT_PROMPT if prompt is None else prompt
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # bytes of an argument that are no text
        raise InvalidInputError(
            f"generate: the prompt must be text in UTF-8; got {text!r}; save it as UTF-8"
        ) from None
    return text


def _is_terminal(stream: Any) -> bool:
    return stream is None or stream.isatty()


def _read(stream: Any) -> str:
    try:
        text = "" if stream is None else stream.read()
        return text.removeprefix("\ufeff")  # the mark of an encoding, which some editors write
    except UnicodeDecodeError as error:
        raise InvalidInputError(
            f"generate: the prompt must be text in UTF-8; got {error}; save it as UTF-8"
        ) from None


def _device(name: str | None) -> torch.device:
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cuda", "cpu"):
        raise InvalidInputError(f"generate: --device must be cuda or cpu; got {name!r}; choose one")
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InvalidInputError(
            "generate: --device cuda needs a GPU that PyTorch sees; it sees none; "
            "run nsagen doctor, or leave --device out"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InvalidInputError(
            f"generate: --device must be one of {torch.cuda.device_count()} GPUs, counted from 0; "
            f"got {name!r}; choose one"
        )
    return device


def _random_model(
    length: int, seed: int, device: torch.device, attention: str | None, kernels: str | None
) -> ToyLlama | ToyNSALlama:
    """Two small layers with the attention of specs/tiny.yaml."""
    import torch

    from nsagen.cli.text import CHARACTERS
    from nsagen.model import InferenceConfig, ToyLlama, ToyLlamaConfig, ToyNSALlama
    from nsagen.model.configs import ToyNSALlamaConfig
    from nsagen.spec import load_spec

    if length > RANDOM_LENGTH:
        raise InvalidInputError(
            "generate: without --model, prompt and new tokens together must be at most "
            f"{RANDOM_LENGTH}; got {length}; lower --max-new-tokens"
        )
    shape = next(s for s in load_spec("tiny").shapes if s.gqa_ratio == 2)
    model: dict[str, Any] = {
        "vocab_size": len(CHARACTERS),
        "max_position_embeddings": max(2048, length),
        "hidden_size": 4 * shape.head_dim,
        "intermediate_size": 8 * shape.head_dim,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": shape.head_dim,
        "initializer_range": 0.2,
    }
    names = ("kernel_size", "kernel_stride", "block_size", "topk", "window_size")
    sparse = {name: getattr(shape, name) for name in names}
    limits = InferenceConfig(1, length)
    generator = torch.Generator().manual_seed(seed)
    if attention == "dense":
        made: Any = ToyLlama(ToyLlamaConfig(**model), limits, generator=generator)
    else:
        config = ToyNSALlamaConfig(**model, **sparse, compress_type=shape.compress_type)
        made = ToyNSALlama(config, limits, _dispatcher(kernels), generator=generator)
    dtype = torch.float16 if device.type == "cuda" else torch.float32
    _log.info(
        "no --model: a model of 2 layers with random weights and %s continues the prompt "
        "letter by letter; the text means nothing. It runs %s.",
        "dense attention" if attention == "dense" else "the attention of specs/tiny.yaml",
        _how(device, dtype),
    )
    return made.to(device, dtype).requires_grad_(False)


def _checkpoint(
    folder: Path, length: int, device: torch.device, attention: str | None, kernels: str | None
) -> ToyLlama | ToyNSALlama:
    import torch

    from nsagen.model import InferenceConfig, ToyLlama, ToyNSALlama
    from nsagen.model.checkpoint_config import config_dtype, read_config

    raw = read_config(folder)
    sparse = attention == "nsa" or (attention is None and "nsa" in raw)
    dtype = torch.float32
    if device.type == "cuda":
        dtype = torch.float16 if config_dtype(raw) is torch.float16 else torch.bfloat16
    limits = InferenceConfig(1, length)
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
            _refuse_kernels(kernels)
        return ToyLlama.from_pretrained(folder, limits, **common).requires_grad_(False)
    dispatcher = _dispatcher(kernels)
    made = ToyNSALlama.from_pretrained(folder, limits, dispatcher=dispatcher, **common)
    return made.requires_grad_(False)


def _refuse_kernels(kernels: str) -> NoReturn:
    raise InvalidInputError(
        f"generate: --kernels is for native sparse attention; got {kernels!r} with dense "
        "attention; leave it out, or add --attention nsa"
    )


def _how(device: torch.device, dtype: torch.dtype) -> str:
    from nsagen.runtime.device import interpreting

    name = str(dtype).removeprefix("torch.")
    if device.type == "cuda":
        return f"on a GPU in {name}"
    return f"on the CPU in {name}, in {'the interpreter' if interpreting() else 'plain PyTorch'}"


def _dispatcher(name: str | None) -> Any:
    import nsagen

    return None if name is None else nsagen.load(name)


def _tokens(
    model: Any, ids: list[int], count: int, stops: frozenset[int], sampling: SamplingConfig
) -> Iterator[int]:
    """New tokens, each as soon as it is known."""
    from nsagen.model import ContinuousBatch

    batch = ContinuousBatch(model)
    batch.add(ids, max_new_tokens=count, stop_tokens=stops, sampling=sampling)
    for new in batch.run():
        if new.error is not None:
            raise new.error
        yield new.token
