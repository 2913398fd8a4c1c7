"""Attention and a training step on several GPUs beside one: time, peak memory, share of exchange.

    torchrun --nproc-per-node 2 benchmarks/distributed.py --out distributed.json
    torchrun --nproc-per-node 2 benchmarks/distributed.py --tiny --out distributed.json   # on a CPU

64 query heads over 4 of 128, one sequence, bfloat16; the step is that of the example's larger
model. Every rank runs each case alone, then sequences are shared, then heads. The longest step
runs with shared sequences only: one GPU need not hold it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.nn.parallel import DistributedDataParallel

from nsagen.bench.results import provenance
from nsagen.distributed import context_parallel, naming_lost_ranks, tensor_parallel
from nsagen.distributed.gathering import Gathering
from nsagen.model import NativeSparseAttention, RopeConfig, ToyNSALlama, ToyNSALlamaConfig

SPLITS = ("alone", "context", "tensor")

SPARSITY: dict[str, Any] = {
    **{"compress_type": "avgpool", "kernel_size": 32, "kernel_stride": 16, "block_size": 64},
    **{"topk": 16, "init_blocks": 1, "local_blocks": 2, "window_size": 512},
}


@dataclass(frozen=True)
class Sizes:
    """What to measure.

    Attributes:
        tokens: of the sequences that are run in each way.
        longest: of the step that ranks only run together.
        heads, kv_heads, head_dim, hidden_size: of the attention.
        model: sizes of the step's model.
        repeats: measured calls; a third as many run before, unmeasured.
    """

    tokens: tuple[int, ...]
    longest: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    model: dict[str, Any]
    sparsity: dict[str, Any]
    dtype: torch.dtype
    repeats: int


USUAL = Sizes(
    tokens=(16384, 131072),
    longest=524288,
    heads=64,
    kv_heads=4,
    head_dim=128,
    hidden_size=4096,
    model={
        **{"vocab_size": 256, "hidden_size": 512, "intermediate_size": 1536},
        **{"num_hidden_layers": 8, "num_attention_heads": 16, "num_key_value_heads": 2},
        **{"head_dim": 64, "rope_scaling": None, "max_position_embeddings": 524288},
    },
    sparsity=SPARSITY,
    dtype=torch.bfloat16,
    repeats=9,
)
TINY = Sizes(
    tokens=(96,),
    longest=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden_size=32,
    model={
        **{"vocab_size": 32, "hidden_size": 32, "intermediate_size": 48},
        **{"num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"head_dim": 16, "rope_scaling": None, "max_position_embeddings": 128},
    },
    sparsity={
        **SPARSITY,
        **{"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "topk": 4, "window_size": 12},
    },
    dtype=torch.float32,
    repeats=1,
)


class Meter:
    """Times and memory of this rank's device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self.device, self.repeats = device, repeats

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median of some calls, which all ranks begin together."""
        times = []
        for index in range(self.repeats + -(-self.repeats // 3)):
            dist.barrier()
            self.wait()
            start = time.perf_counter()
            call()
            self.wait()
            if index >= -(-self.repeats // 3):
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times)

    def peak_bytes(self, call: Callable[[], object]) -> int | None:
        """The most memory that a call takes; None on a CPU, which does not count it."""
        if self.device.type != "cuda":
            call()
            return None
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        call()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device)

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def measure(
    sizes: Sizes,
    device: torch.device,
    keep: Callable[[list[dict[str, Any]]], None] | None = None,
) -> list[dict[str, Any]]:
    """The rows of every case; all ranks of the default group call it.

    Args:
        keep: takes the rows so far after each case.
    """
    mesh, meter = (
        init_device_mesh(device.type, (dist.get_world_size(),)),
        Meter(device, sizes.repeats),
    )
    rows: list[dict[str, Any]] = []
    for tokens in sizes.tokens:
        for what, run in (("attention", attention), ("training step", step)):
            alone: dict[str, Any] = {}
            for split in SPLITS:
                row = {"what": what, "tokens": tokens, "split": split}
                row |= run(sizes, tokens, split, mesh, meter)
                alone = alone or row
                row["of_alone"] = row["ms"] / alone["ms"]
                if row["peak_bytes"] is not None:
                    row["peak_of_alone"] = row["peak_bytes"] / alone["peak_bytes"]
                rows.append(row)
                if keep:
                    keep(rows)
    row = {"what": "training step", "tokens": sizes.longest, "split": "context"}
    rows.append(row | step(sizes, sizes.longest, "context", mesh, meter))
    return rows


def attention(
    sizes: Sizes, tokens: int, split: str, mesh: DeviceMesh, meter: Meter
) -> dict[str, Any]:
    """Forward and backward pass of one attention layer."""
    random = torch.Generator().manual_seed(0)
    module: nn.Module = NativeSparseAttention(
        hidden_size=sizes.hidden_size,
        num_q_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope_config=RopeConfig(max(tokens, 16), sizes.head_dim, rope_scaling=None),
        generator=random,
        **sizes.sparsity,
    ).to(meter.device, sizes.dtype)
    x = torch.randn(tokens, sizes.hidden_size, generator=random).to(meter.device, sizes.dtype)
    x, layout = spread(module, x, tokens, split, mesh, meter.device)
    x.requires_grad_()
    gradient = torch.randn_like(x)

    def both() -> None:
        module(x, layout).backward(gradient)

    with torch.no_grad():
        forward = meter.milliseconds(lambda: module(x, layout))
    return {
        "forward_ms": forward,
        "ms": meter.milliseconds(both),
        "peak_bytes": meter.peak_bytes(both),
        **exchange(layout, 1, sizes.kv_heads, sizes.head_dim, sizes.dtype, split, meter),
    }


def step(sizes: Sizes, tokens: int, split: str, mesh: DeviceMesh, meter: Meter) -> dict[str, Any]:
    """One training step of the example's model, with bfloat16 products by autocast."""
    config = ToyNSALlamaConfig(**{**sizes.model, **sizes.sparsity})
    model: nn.Module = ToyNSALlama(config, generator=torch.Generator().manual_seed(0))
    model = model.to(meter.device)
    ids = torch.randint(config.vocab_size, (tokens,), generator=torch.Generator().manual_seed(1))
    ids, layout = spread(model, ids.to(meter.device), tokens, split, mesh, meter.device)
    called = DistributedDataParallel(model) if split == "context" else model
    optimizer = torch.optim.AdamW(model.parameters(), foreach=False)

    def run() -> None:
        with torch.autocast(meter.device.type, torch.bfloat16, meter.device.type == "cuda"):
            logits = called(ids, layout)
        F.cross_entropy(logits, ids).backward()
        optimizer.step()
        optimizer.zero_grad()

    heads, dim = config.num_key_value_heads, config.head_dim
    dtype = torch.bfloat16 if meter.device.type == "cuda" else torch.float32
    return {
        "ms": meter.milliseconds(run),
        "peak_bytes": meter.peak_bytes(run),
        **exchange(layout, config.num_hidden_layers, heads, dim, dtype, split, meter),
    }


def spread(
    module: nn.Module, x: Tensor, tokens: int, split: str, mesh: DeviceMesh, device: torch.device
) -> tuple[Tensor, Any]:
    """This rank's part of the input and its layout; spreads the module's heads for "tensor"."""
    ends = torch.tensor([0, tokens], dtype=torch.int32, device=device)
    if split == "tensor":
        tensor_parallel(module, mesh)
    if split != "context":
        return x, ends
    shard = context_parallel(module, mesh).shard(ends)
    return shard.take(x), shard


def exchange(
    layout: Any,
    layers: int,
    heads: int,
    dim: int,
    dtype: torch.dtype,
    split: str,
    meter: Meter,
) -> dict[str, Any]:
    """The time of a pass's gathers and sums of keys and values by themselves, nothing beside
    them."""
    if split != "context":
        return {}
    gathering = Gathering(layout.tokens)
    rows = torch.zeros(layout.tokens.count, heads, dim, dtype=dtype, device=meter.device)

    def gather() -> None:
        for _ in range(layers):
            for _ in range(2):  # the forward and the backward pass
                gathering.start(rows, rows)
                whole = gathering.wait()
            gathering.sum_gradients(*whole)
            gathering.sums()

    return {"exchange_ms": meter.milliseconds(gather)}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    options = parser.parse_args(arguments)
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    device = (
        torch.device(kind, dist.get_rank() % torch.cuda.device_count())
        if kind == "cuda"
        else torch.device(kind)
    )
    if kind == "cuda":
        torch.cuda.set_device(device)
    about: dict[str, Any] = {"device": "cpu", "ranks": dist.get_world_size()}
    if kind == "cuda":
        about |= provenance()

    def keep(rows: list[dict[str, Any]]) -> None:
        for row in rows:
            if "exchange_ms" in row:
                row["exchange_share"] = row["exchange_ms"] / row["ms"]
        if dist.get_rank() == 0:
            content = {"provenance": about, "rows": rows}
            options.out.write_text(json.dumps(content, indent=1) + "\n")
            print(rows[-1], flush=True)

    with naming_lost_ranks():
        keep(measure(TINY if options.tiny else USUAL, device, keep))
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
