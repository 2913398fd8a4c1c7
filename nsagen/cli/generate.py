"""`nsagen generate`: text in, text out, as it comes."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsagen.cli.options import (
    Attention,
    CacheDType,
    Device,
    Drafts,
    Json,
    Kernels,
    check_cache_dtype,
    in_words_of,
)
from nsagen.core.errors import InvalidInputError

if TYPE_CHECKING:
    from nsagen.model import SamplingConfig

EXAMPLE = 'Example: nsagen generate --model ./Llama-3.2-1B --prompt "Sparse attention is"'
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
    attention: Attention = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to generate.")] = 64,
    temperature: Annotated[
        float, typer.Option(min=0.0, help="0 takes the most likely token; above 0 samples.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(help="Seed for sampling and for random weights.")] = 0,
    device: Device = None,
    kernels: Kernels = None,
    drafts: Drafts = False,
    cache_dtype: CacheDType = None,
    as_json: Json = False,
) -> None:
    """Continue a text with a checkpoint or, without one, with a tiny random model."""
    from nsagen.cli.models import check_attention, checkpoint_model, device_of, random_model
    from nsagen.serve.text import characters, checkpoint_tokenizer

    check_attention("generate", attention, kernels)
    check_cache_dtype("generate", cache_dtype, attention)
    from nsagen.model import InferenceConfig, SamplingConfig

    sampling = SamplingConfig(temperature, seed=seed)
    text = _prompt(prompt, model)
    tokenizer = characters() if model is None else checkpoint_tokenizer(model)
    ids = tokenizer.encode(text)
    if not ids:
        raise InvalidInputError("generate: the prompt must have a token; got none; write some text")
    where = device_of("generate", device)
    limits = InferenceConfig(1, len(ids) + max_new_tokens, cache_dtype=cache_dtype)
    with in_words_of("generate", max_length="the prompt with --max-new-tokens"):
        if model is None:
            made = random_model("generate", limits, seed, where, attention, kernels)
        else:
            made = checkpoint_model("generate", model, limits, where, attention, kernels)
    start = time.perf_counter()
    new: list[int] = []
    stream = tokenizer.stream()
    for token in _tokens(made, ids, max_new_tokens, tokenizer.stop, sampling, drafts):
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


def _tokens(
    model: Any,
    ids: list[int],
    count: int,
    stops: frozenset[int],
    sampling: SamplingConfig,
    drafts: bool,
) -> Iterator[int]:
    """New tokens, each as soon as it is known."""
    from nsagen.model import ContinuousBatch, PromptLookup

    batch, drafter = ContinuousBatch(model), PromptLookup if drafts else None
    batch.add(ids, max_new_tokens=count, stop_tokens=stops, sampling=sampling, drafter=drafter)
    for new in batch.run():
        if new.error is not None:
            raise new.error
        yield new.token
