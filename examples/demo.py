"""Generated kernels at work without a GPU: a tiny model in Triton's interpreter.

    nsagen build specs/tiny.yaml && python examples/demo.py

Prefill and greedy decoding go through the kernels of generated/tiny in float32, then once more
through the plain PyTorch reference in float64. Exits with 1 unless tokens and logits agree.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel is decorated: before any import of it
sys.path.insert(0, str(Path(__file__).parents[1]))  # generated/ lies in the repository

from itertools import accumulate

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor

from nsagen.model import InferenceConfig, ToyNSALlama, ToyNSALlamaConfig
from nsagen.runtime import Dispatcher

PROMPTS = (70, 9, 33)
NEW_TOKENS = 8
TOLERANCE = 1e-4
"""Relative error of float32 logits behind two layers; a single kernel stays below 1e-5."""

CONFIG = ToyNSALlamaConfig(
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    vocab_size=512,
    max_position_embeddings=256,
    initializer_range=0.2,
    compress_type="weightedpool",
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    topk=4,
    init_blocks=1,
    local_blocks=2,
    window_size=32,
)


def load_dispatcher() -> Dispatcher:
    try:
        from generated.tiny import dispatcher  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as error:
        raise SystemExit(f"examples/demo.py: {error}; run: nsagen build specs/tiny.yaml") from error
    return dispatcher


def build_model(dispatcher: Dispatcher, dtype: torch.dtype) -> ToyNSALlama:
    """The same weights at every call. float64 has no kernels and so runs the reference."""
    limits = InferenceConfig(max_batch_size=len(PROMPTS), max_length=max(PROMPTS) + NEW_TOKENS)
    generator = torch.Generator().manual_seed(0)
    model = ToyNSALlama(CONFIG, limits, dispatcher, generator=generator)
    return model.requires_grad_(False).to(dtype)


def run(
    model: ToyNSALlama, ids: Tensor, cu_seqlens: Tensor, on_step: Callable[[], None]
) -> tuple[Tensor, Tensor]:
    """Greedy decoding: tokens int64 [batch, new] and logits float32 [new, batch, vocab]."""
    cache = model.new_cache()
    positions = cu_seqlens.diff()
    slots = torch.arange(len(PROMPTS), dtype=torch.int32)
    logits = [model.prefill(ids, cu_seqlens, PROMPTS, cache)]
    on_step()
    for step in range(NEW_TOKENS - 1):
        logits.append(model.decode(logits[-1].argmax(-1), positions + step, slots, cache))
        on_step()
    every = torch.stack(logits)
    return every.argmax(-1).T, every


def main() -> int:
    torch.set_num_threads(1)  # tensors are small: threads would only wait for each other
    console = Console()
    dispatcher = load_dispatcher()
    ids = torch.randint(
        0, CONFIG.vocab_size, (sum(PROMPTS),), generator=torch.Generator().manual_seed(1)
    )
    cu_seqlens = torch.tensor([0, *accumulate(PROMPTS)], dtype=torch.int32)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        results = []
        for what, dtype in (
            ("kernels, interpreted", torch.float32),
            ("reference, float64", torch.float64),
        ):
            task = progress.add_task(f"{what}: prefill and decode", total=NEW_TOKENS)
            model = build_model(dispatcher, dtype)
            results.append(run(model, ids, cu_seqlens, lambda task=task: progress.advance(task)))
    (tokens, logits), (expected_tokens, expected_logits) = results
    for length, row in zip(PROMPTS, tokens.tolist(), strict=True):
        console.print(f"prompt of {length:3d} tokens -> {' '.join(map(str, row))}")
    error = ((logits - expected_logits).norm() / expected_logits.norm()).item()
    equal = int((tokens == expected_tokens).sum())
    good = equal == tokens.numel() and error <= TOLERANCE
    console.print(
        f"{'[green]agrees' if good else '[red]DIFFERS'}[/] with the reference: "
        f"{equal} of {tokens.numel()} tokens equal, "
        f"logits' relative error {error:.1e} (allowed {TOLERANCE:.0e})"
    )
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
