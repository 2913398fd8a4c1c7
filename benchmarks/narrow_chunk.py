"""A chunk of a prompt behind caches of bfloat16, float8 and int8: memory and time of a layer.

    python benchmarks/narrow_chunk.py --out "$OUT"

One layer of the guide's sizes, 4096 new tokens of one sequence behind a context in pages. "read" is
what gathers keys, values and their compressed ones for the kernels of a chunk; "layer" is the
attention module's whole pass. Memory is the peak of each above what was allocated before. Writes
narrow_chunk.json after each size.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from nsagen.bench.measure import milliseconds
from nsagen.bench.results import check_free, write_results
from nsagen.model import InferenceConfig, NSACache, ToyNSALlama, ToyNSALlamaConfig
from nsagen.model.prefill import Piece, PrefillRows

CONTEXTS, CHUNK = (4096, 32768, 131072), 4096
DTYPES = (None, "float8_e4m3fn", "int8")


def peak_mib(call: Callable[[], object]) -> float:
    """The most memory that a call takes, with what it returns."""
    call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    result = call()
    torch.cuda.synchronize()
    del result
    return (torch.cuda.max_memory_allocated() - before) / 2**20


@torch.no_grad()
def row_of(context: int, cache_dtype: str | None, chunk: int, sizes: dict[str, Any]) -> dict:
    limits = InferenceConfig(1, context + chunk, chunk, paged=True, cache_dtype=cache_dtype)
    config = ToyNSALlamaConfig(
        num_hidden_layers=1, vocab_size=256, max_position_embeddings=context + chunk, **sizes
    )
    with torch.device("cuda"):
        model = ToyNSALlama(config, limits, generator=torch.Generator("cuda").manual_seed(0))
    model = model.to(torch.bfloat16)
    cache = model.new_cache()
    assert isinstance(cache, NSACache)
    cache.reserve(0, context + chunk)
    attention, layer = model.model.layers[0].self_attn, cache[0]
    x = torch.randn(chunk, config.hidden_size, device="cuda", dtype=torch.bfloat16)
    for start in range(0, context, chunk):
        rows = PrefillRows.of([Piece(0, start, chunk)], cache)
        attention(x, rows.cu_seqlens, rows, layer)
    rows = PrefillRows.of([Piece(0, context, chunk)], cache)
    tokens, windows = rows.context, rows.windows
    assert tokens is not None
    assert windows is not None
    assert windows.context is not None
    of_windows = windows.context

    def read() -> object:
        return layer.seen(tokens, ("k", "v")), layer.seen(of_windows, ("ck", "cv"))

    def whole() -> object:
        return attention(x, rows.cu_seqlens, rows, layer)

    return {
        "context": context,
        "chunk": chunk,
        "cache": cache_dtype or "bfloat16",
        "cache_mib": cache.nbytes / 2**20,
        "read_ms": milliseconds(read),
        "read_mib": peak_mib(read),
        "layer_ms": milliseconds(whole),
        "layer_mib": peak_mib(whole),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    check_free("narrow_chunk", options.out)
    rows: list[dict] = []
    for context in CONTEXTS:
        for cache_dtype in DTYPES:
            rows.append(row_of(context, cache_dtype, CHUNK, {}))
            write_results("narrow_chunk", rows, options.out)
            print(
                "  ".join(
                    f"{n} {v:.3f}" if isinstance(v, float) else f"{v}" for n, v in rows[-1].items()
                ),
                flush=True,
            )


if __name__ == "__main__":
    main()
