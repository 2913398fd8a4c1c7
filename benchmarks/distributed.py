"""Attention and the example's training step on several GPUs beside one.

    torchrun --nproc-per-node 2 -m benchmarks.distributed --out distributed.json
    torchrun --nproc-per-node 2 -m benchmarks.distributed --tiny --out distributed.json   # on a CPU

Time, how long the host takes to start the work, peak memory, share of exchange, what a step does
around its passes, and what `nsagen plan` predicts. The attention layer has 64
query heads over 4 of 128 in bfloat16; the step is that of the example's larger model; one sequence.
Each rank runs a case alone, then the ranks share its sequence, then its heads; the longest step
only with a shared sequence. `--what` chooses; "graph" is the step with its gradients in a CUDA
graph. Kernels are compiled first, by processes of their own. What says most comes first, and each
row is written at once, so the file is whole whenever the time is up. An error in a row is one, and
a row that does not end is written as that, and ends the run.
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh

from benchmarks.distributed_cases import SPLITS, TINY, USUAL, WHAT, Case, Sizes
from benchmarks.distributed_meter import LONG_MS, Meter, Row, watched
from benchmarks.distributed_plan import predicted, share_of_roofline
from benchmarks.precompile import compiling
from examples.training.data import Split
from examples.training.loop import Trainer
from examples.training.parallel import World, clip_gradients
from nsagen.bench.results import provenance
from nsagen.core.files import replace_file
from nsagen.distributed import Shard, context_parallel, naming_lost_ranks, tensor_parallel
from nsagen.distributed.gathering import Gathering
from nsagen.estimate.model import GPUS, Gpu
from nsagen.model import NativeSparseAttention, RopeConfig, ToyNSALlamaConfig


def measure(
    sizes: Sizes,
    meter: Meter,
    gpu: Gpu | None = None,
    keep: Callable[[list[Row]], object] = lambda rows: None,
    what: Sequence[str] = WHAT,
) -> list[Row]:
    """The rows of every case for which there is time; all ranks of the default group call it.

    Args:
        gpu: whose estimate of several GPUs goes beside what they took.
        keep: takes the rows so far after each case.
        what: kinds of cases.
    """
    worlds, ranks = worlds_of(meter.device), dist.get_world_size()
    rows: list[Row] = []
    alone: dict[tuple[str, bool], dict[int, Row]] = defaultdict(dict)
    for case in sizes.cases(what):
        if meter.is_over():
            break
        row: Row = {**case._asdict(), "elapsed_s": round(meter.elapsed, 1)}
        rows.append(row)
        with watched(meter.row_seconds, rows, keep):
            try:
                row |= RUNS[case.what](sizes, case, worlds[case.split], meter)
            except Exception as error:  # the next case may have none
                row["error"] = f"{type(error).__name__}: {error}"
        if "error" in row:
            keep(rows)
            continue
        of_one = alone[case.what, case.graph]
        if case.split == "alone":
            of_one[case.tokens] = row
        elif gpu and of_one:
            shares = [(n, share_of_roofline(sizes, gpu, r)) for n, r in sorted(of_one.items())]
            row["predicted_ms"] = predicted(sizes, gpu, case, ranks, tuple(shares))
            row["of_predicted"] = row["ms"] / row["predicted_ms"]
        if one := of_one.get(case.tokens):
            row["of_alone"] = row["ms"] / one["ms"]
            if row["peak_bytes"]:
                row["peak_of_alone"] = row["peak_bytes"] / one["peak_bytes"]
        if "exchange_ms" in row:
            row["exchange_share"] = row["exchange_ms"] / row["ms"]
        keep(rows)
        gc.collect()  # the case's model
        if meter.device.type == "cuda":
            torch.cuda.empty_cache()
    return rows


def worlds_of(device: torch.device) -> dict[str, World]:
    """The example's worlds: this process by itself, and all as they share sequences or heads."""
    size, rank, names = dist.get_world_size(), dist.get_rank(), ("dp", "cp", "tp")
    context, tensor = (
        init_device_mesh(device.type, shape, mesh_dim_names=names)
        for shape in ((1, size, 1), (1, 1, size))
    )
    return {
        "alone": World(0, 1, device),
        "context": World(rank, size, device, 1, size, context),
        "tensor": World(rank, size, device, size, 1, tensor),
    }


def attention(sizes: Sizes, case: Case, world: World, meter: Meter) -> Row:
    """Forward and backward pass of one attention layer."""
    module: nn.Module = NativeSparseAttention(
        hidden_size=sizes.hidden_size,
        num_q_heads=sizes.heads,
        num_kv_heads=sizes.kv_heads,
        head_dim=sizes.head_dim,
        rope_config=RopeConfig(max(case.tokens, 16), sizes.head_dim, rope_scaling=None),
        generator=torch.Generator().manual_seed(0),
        **sizes.sparsity,
    ).to(meter.device, sizes.dtype)
    random = torch.Generator(meter.device).manual_seed(0)
    shape = (case.tokens, sizes.hidden_size)
    x = torch.randn(shape, generator=random, device=meter.device, dtype=sizes.dtype)
    layout: Any = ends_of(case, meter.device)
    if case.split == "tensor":
        tensor_parallel(module, world.dimension("tp"))
    elif case.split == "context":
        layout = context_parallel(module, world.dimension("cp")).shard(layout)
        x = layout.take(x)
    x.requires_grad_()
    gradient = torch.randn_like(x)

    def forward() -> Tensor:
        y = module(x, layout)
        y[:1].clone()  # waits: a sum over ranks that nothing reads would keep its memory
        return y

    def both() -> None:
        x.grad = None
        forward().backward(gradient)

    with torch.no_grad():
        forward_ms = meter.milliseconds(forward)
    row: Row = {"forward_ms": forward_ms, "ms": meter.milliseconds(both)}
    row |= {"peak_bytes": meter.peak_bytes(), "host_ms": meter.host_milliseconds(both)}
    if case.split == "alone":
        return row
    if case.split == "context":
        call = context_exchange(layout, sizes.layer(case.tokens), sizes.dtype)
    else:
        call = sums_of(gradient, 2)
    row |= {"exchange_ms": meter.milliseconds(call)}
    return row | {"exchange_host_ms": meter.host_milliseconds(call), **meter.moving(both)}


@dataclass
class RandomTokens:
    """A task of random bytes."""

    seq_len: int
    name: str = "random"

    def batch(self, split: Split, index: int, rows: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator().manual_seed(index)
        ids = torch.randint(256, (rows, self.seq_len), generator=random)
        return ids, ids.roll(-1, 1)

    def describe(self) -> dict[str, object]:
        return {}


def step(sizes: Sizes, case: Case, world: World, meter: Meter) -> Row:
    """A training step of the example: forward and backward pass, clipping and AdamW."""
    trainer = trainer_of(sizes, case.tokens, world, case.graph)
    config, losses = trainer.config, list[Tensor]()

    def run() -> None:
        losses.append(trainer.step(0))

    row: Row = {"recompute": config.activation_checkpointing, "ms": meter.milliseconds(run)}
    # A graph holds memory of its own.
    row |= {"peak_bytes": None if case.graph else meter.peak_bytes(), "loss": float(losses[0])}
    if row["ms"] <= LONG_MS:
        row["host_ms"] = meter.host_milliseconds(run)
        row["around_ms"] = meter.milliseconds(around_passes(trainer))
        trainer.optimizer.zero_grad()
    if case.split == "alone" or case.graph:
        return row
    dtype = torch.bfloat16 if config.amp else torch.float32
    if case.split == "context":
        assert trainer.context is not None
        shard = trainer.context.shard(ends_of(case, meter.device))
        call = context_exchange(shard, config.nsa_config(), dtype, 2 + row["recompute"])
    else:
        x = torch.zeros(case.tokens, config.hidden_size, dtype=dtype, device=meter.device)
        call = sums_of(x, 4 * config.layers)
    row["exchange_ms"] = meter.milliseconds(call)
    row["exchange_host_ms"] = meter.host_milliseconds(call)
    return row if row["ms"] > LONG_MS else row | meter.moving(run)


def around_passes(trainer: Trainer) -> Callable[[], None]:
    """What a step does but for its passes: the batch, clipping and the update."""
    parameters = [p for p in trainer.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)

    def call() -> None:
        trainer._parts("train", 0)  # pyright: ignore[reportPrivateUsage]
        clip_gradients(parameters, trainer.config.clip_norm)
        trainer.optimizer.step()

    return call


def trainer_of(sizes: Sizes, tokens: int, world: World, graph: bool = False) -> Trainer:
    task = RandomTokens(tokens)
    return Trainer("nsa", sizes.training(tokens), task, None, world, graph=graph)


RUNS = {"attention": attention, "training step": step}


def ends_of(case: Case, device: torch.device) -> Tensor:
    return torch.tensor([0, case.tokens], dtype=torch.int32, device=device)


def context_exchange(
    shard: Shard, config: ToyNSALlamaConfig, dtype: torch.dtype, passes: int = 2
) -> Callable[[], None]:
    """The gathers of keys, values and windows in each pass over the layers, and the sums of their
    gradients, with nothing beside them."""
    heads, dim, device = config.num_key_value_heads, config.head_dim, shard.positions.device
    windows = shard.windows_for(config.kernel_size, config.kernel_stride).places
    both = [
        (Gathering(of), torch.zeros(of.most, heads, dim, dtype=dtype, device=device))
        for of in (windows, shard.tokens)
    ]

    def call() -> None:
        for _ in range(config.num_hidden_layers):
            for gathering, rows in both:
                for _ in range(passes):
                    gathering.start(gathering.join(rows, rows))
                    seen = gathering.wait()
                gathering.sum_gradients(seen, (True, True))
                gathering.wait_for_sums()

    return call


def sums_of(x: Tensor, count: int) -> Callable[[], None]:
    """Sums of hidden states over all ranks, as often as they are in all passes."""

    def call() -> None:
        for _ in range(count):
            dist.all_reduce(x)

    return call


def compile_first(what: Sequence[str]) -> None:
    """Fill Triton's cache on disk: some processes for each kind of case call it once, by
    themselves; each compiles its share of the kernels and launches none."""
    kinds = dict.fromkeys((case.what, case.split) for case in USUAL.cases(what))
    gpus = torch.cuda.device_count()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))
    shares = max(1, 6 * gpus // len(kinds))  # each has up to 40 GB
    command = [sys.executable, "-m", "benchmarks.distributed", "--out", os.devnull, "--compile"]
    jobs = itertools.product(kinds, range(shares))
    running = [
        subprocess.Popen(
            [*command, os.environ["WORLD_SIZE"], *kind, str(share), str(shares)],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": visible.split(",")[index % gpus]},
        )
        for index, (kind, share) in enumerate(jobs)
    ]
    for one in running:  # what fails is said there, and compiled when it is first called
        one.wait()


def run_alone(sizes: Sizes, device: torch.device, count: int, what: str, split: str) -> None:
    """Call a case's kernels once, as one of `count` ranks does, in a group of this process."""
    worlds = worlds_of(device)
    if split == "tensor":  # a rank's heads
        query, own = sizes.step.query_heads // count, sizes.step.kv_heads // count
        heads = {"heads": sizes.heads // count, "kv_heads": sizes.kv_heads // count}
        training = replace(sizes.step, query_heads=query, kv_heads=own)
        sizes, split = replace(sizes, **heads, step=training), "alone"
    for tokens in sizes.tokens:
        if what == "attention":
            attention(sizes, Case(what, tokens, split), worlds[split], Meter(device, 1))
            continue
        trainer = trainer_of(sizes, tokens, worlds["alone"])
        if split == "context":
            trainer.context = context_parallel(trainer.plain, worlds[split].dimension("cp"))
        trainer.step(0)


def kind_or_row(text: str) -> str:
    """An entry of --what."""
    kind, *row = text.split("/")
    named = kind in ("attention", "step", "graph") and len(row) == 2
    if text in WHAT or (named and row[0].isdecimal() and row[1] in SPLITS):
        return text
    rule = f"{', '.join(WHAT)}, or kind/tokens/{'|'.join(SPLITS)}"
    raise argparse.ArgumentTypeError(f"must be {rule}; got {text!r}")


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after these")
    late = "end the run if a row takes longer"
    parser.add_argument("--row-seconds", type=float, default=math.inf, help=late)
    several = f'{", ".join(WHAT)}, or single rows like "step/16384/context"; default: all'
    parser.add_argument("--what", type=kind_or_row, nargs="+", default=WHAT, help=several)
    parser.add_argument("--compiled", action="store_true", help="kernels are in Triton's cache")
    parser.add_argument("--compile", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    gpus = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if gpus else torch.device("cpu")
    if options.compile:
        device = torch.device("cuda", 0)
    if gpus:
        torch.cuda.set_device(device)
    backend = "nccl" if gpus else "gloo"
    if options.compile:
        meeting = f"file://{tempfile.mkdtemp()}/meeting"
        dist.init_process_group(backend, meeting, rank=0, world_size=1)
        count, what, split, *share = options.compile
        with compiling(*map(int, share)):
            run_alone(USUAL, device, int(count), what, split)
        dist.destroy_process_group()
        return 0
    if gpus and not (options.tiny or options.compiled) and device.index == 0:
        compile_first(options.what)
    bound: dict[str, Any] = {"device_id": device} if gpus else {}
    dist.init_process_group(backend, **bound)
    about: dict[str, Any] = provenance() if gpus else {"device": "cpu"}
    about |= {"ranks": dist.get_world_size(), "ready_s": round(time.perf_counter() - began, 1)}
    sizes = TINY if options.tiny else USUAL
    meter = Meter(device, sizes.calls, options.seconds, options.row_seconds, began)
    gpu = next((one for one in GPUS.values() if one.name in about["device"].lower()), None)

    def keep(rows: list[Row]) -> None:
        if dist.get_rank() == 0:
            content = {"provenance": about, "rows": rows}
            replace_file(options.out, json.dumps(content, indent=1) + "\n")
            print(f"{meter.elapsed:6.1f} s", rows[-1], flush=True)

    with naming_lost_ranks():
        measure(sizes, meter, gpu, keep, options.what)
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
