"""`nsagen serve`: a model behind an endpoint with OpenAI's interface."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
from nsagen.core.installed import require_extra

if TYPE_CHECKING:
    import torch

    from nsagen.model import ContinuousBatch

EXAMPLE = "Example: nsagen serve --model ./Llama-3.2-1B --max-batch-size 16 --max-length 32768"

_log = logging.getLogger("nsagen.serve")


def serve(
    model: Annotated[
        Path | None,
        typer.Option(help="A Llama checkpoint; default: a tiny model with random weights."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model in requests; default: its folder's.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any that is free.")
    ] = 8000,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Sequences that run at once.")] = 16,
    max_length: Annotated[
        int, typer.Option(min=2, help="Longest prompt and answer together, in tokens.")
    ] = 8192,
    prefill_chunk_size: Annotated[
        int, typer.Option(min=1, help="Prompt tokens of a pass, which delays running answers.")
    ] = 4096,
    pages: Annotated[
        int | None,
        typer.Option(min=1, help="Keep the cache in this many pages of 64 tokens, or of a block."),
    ] = None,
    share_prefixes: Annotated[
        bool,
        typer.Option("--share-prefixes", help="With --pages: compute a common beginning once."),
    ] = False,
    drafts: Drafts = False,
    queue: Annotated[int, typer.Option(min=1, help="Requests that may wait for a slot.")] = 256,
    attention: Attention = None,
    device: Device = None,
    kernels: Kernels = None,
    cache_dtype: CacheDType = None,
    sizes: Annotated[
        str, typer.Option(help="Without --model: tiny, or guide for those of the guide's example.")
    ] = "tiny",
    seed: Annotated[int, typer.Option(help="Seed for random weights.")] = 0,
    as_json: Json = False,
) -> None:
    """Serve a model: /v1/completions, /v1/chat/completions, /v1/models and /health."""
    require_extra("serve", "serve", "fastapi", "uvicorn")
    from nsagen.cli.models import (
        check_attention,
        checkpoint_model,
        device_of,
        guide_model,
        random_model,
    )
    from nsagen.model import InferenceConfig, PromptLookup
    from nsagen.serve.app import make_app
    from nsagen.serve.engine import Engine
    from nsagen.serve.server import bound
    from nsagen.serve.server import serve as run
    from nsagen.serve.text import characters, checkpoint_tokenizer, numbers

    check_attention("serve", attention, kernels)
    check_cache_dtype("serve", cache_dtype, attention)
    if pages is not None and attention == "dense":
        raise InvalidInputError(
            "serve: --pages is for Native Sparse Attention; got it with --attention dense; "
            "leave one out"
        )
    if share_prefixes and pages is None:
        raise InvalidInputError(
            "serve: --share-prefixes needs a cache in pages; got no --pages; add it"
        )
    if sizes not in ("tiny", "guide"):
        raise InvalidInputError(f"serve: --sizes must be tiny or guide; got {sizes!r}; choose one")
    if model is not None and sizes != "tiny":
        raise InvalidInputError("serve: got both --model and --sizes; give one at most")
    where = device_of("serve", device)
    address = bound(host, port)
    limits = InferenceConfig(
        max_batch_size=max_batch_size,
        max_length=max_length,
        prefill_chunk_size=prefill_chunk_size,
        paged=pages is not None,
        num_pages=pages,
        share_prefixes=share_prefixes,
        cache_dtype=cache_dtype,
    )
    typed = {"max_length": "--max-length", "max_batch_size": "--max-batch-size"}
    with in_words_of("serve", **typed, num_pages="--pages", cache_dtype="--cache-dtype"):
        if model is not None:
            tokenizer = checkpoint_tokenizer(model, "serve")
            made = checkpoint_model("serve", model, limits, where, attention, kernels)
        elif sizes == "guide":
            tokenizer, made = numbers(), guide_model(limits, seed, where, attention, kernels)
        else:
            tokenizer = characters()
            made = random_model("serve", limits, seed, where, attention, kernels)
        engine = Engine(made, queue, PromptLookup if drafts else None)
    called = name or (sizes if model is None else model.resolve().name)
    size = engine.batch.limits.cache_bytes(made.config, next(made.parameters()).dtype)
    _log.info("the cache takes %.2f GB", size / 1e9)
    if where.type == "cuda":
        _compile_kernels(engine.batch, drafts, where)

    def ready(url: str) -> None:
        if as_json:
            print(
                json.dumps({"url": f"{url}/v1", "model": called, "cache_bytes": size}), flush=True
            )
        else:
            print(f"{called} is served at {url}/v1; end it with Ctrl-C", flush=True)

    run(make_app(engine, tokenizer, called), engine, address, ready)
    print("nsagen: serve: ended", file=sys.stderr)
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    os._exit(0)  # nothing is left to do, and taking PyTorch apart takes seconds


def _compile_kernels(batch: ContinuousBatch, drafts: bool, device: torch.device) -> None:
    """Have the kernels of requests to come compiled side by side: one by one takes minutes."""
    from nsagen.aot.launches import compile_launches, planned_launches
    from nsagen.cli.console import progress_bar
    from nsagen.runtime.device import target_of
    from nsagen.serve.short_calls import make_short_calls

    start = time.perf_counter()
    try:
        launches = planned_launches(lambda: make_short_calls(batch, drafts))
        told = "compiling the kernels of %d files, unless they are in Triton's cache"
        _log.info(told, len(launches))
        with progress_bar("kernels") as progress:
            problems = compile_launches(launches, target_of(device), progress=progress)
    except Exception as error:  # requests can do without
        problems = [repr(error)]
    for problem in problems:
        _log.warning("serve: compiled when a request needs it: %s", problem)
    _log.info("the kernels took %.0f s", time.perf_counter() - start)
