"""Attention and the example's training step on several GPUs beside one.

    torchrun --nproc-per-node 2 -m benchmarks.distributed --out distributed.json
    torchrun --nproc-per-node 2 -m benchmarks.distributed --tiny --out distributed.json   # on a CPU

Time, peak memory, share of exchange, and what `nsagen plan` predicts. The attention layer has 64
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
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.profiler import ProfilerActivity, profile

from examples.training.config import PRESETS, TrainConfig
from examples.training.data import Split
from examples.training.loop import Trainer
from examples.training.parallel import World
from nsagen.bench.results import provenance
from nsagen.core.files import replace_file
from nsagen.distributed import Shard, context_parallel, naming_lost_ranks, tensor_parallel
from nsagen.distributed.gathering import Gathering
from nsagen.estimate.efficiency import Efficiency, Points
from nsagen.estimate.model import GPUS, Gpu
from nsagen.estimate.model import Split as Ranks
from nsagen.estimate.training import AROUND_SECONDS, Step, step_of
from nsagen.model import NativeSparseAttention, RopeConfig, ToyNSALlamaConfig

Row = dict[str, Any]
Spans = list[tuple[float, float]]

SPLITS = ("alone", "context", "tensor")
LONG_MS = 2000
"""A call that takes longer is measured once."""


WHAT = ("attention", "step", "longest", "graph")


class Case(NamedTuple):
    """One row: "attention" or "training step", its tokens, what the ranks share, and whether the
    step's gradients are a CUDA graph."""

    what: str
    tokens: int
    split: str
    graph: bool = False


@dataclass(frozen=True)
class Sizes:
    """What to measure.

    Attributes:
        tokens: of the sequences that are run in each way, most interesting first.
        longest: of the step that ranks only run together, which recomputes its activations.
        heads, kv_heads, head_dim, hidden_size, sparsity: of the attention layer.
        step: the training step's configuration, but for its tokens.
        calls: measured calls of a case at most; as few as take a second, but three.
    """

    tokens: tuple[int, ...]
    longest: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    sparsity: dict[str, Any]
    step: TrainConfig
    dtype: torch.dtype
    calls: int

    def cases(self, what: Sequence[str] = WHAT) -> list[Case]:
        """By worth: the attention layer, then the step; and heads last."""
        step = "training step"
        kinds = {"attention": ("attention", False), "step": (step, False), "graph": (step, True)}
        cases = [
            Case(kinds[kind][0], n, split, kinds[kind][1])
            for kind in kinds
            if kind in what
            for splits in (SPLITS[:2], SPLITS[2:])
            for n in self.tokens
            for split in splits
        ]
        return [*cases, Case(step, self.longest, "context")] if "longest" in what else cases

    def layer(self, tokens: int) -> ToyNSALlamaConfig:
        """A model that is the attention layer and next to nothing else, for the estimate."""
        return ToyNSALlamaConfig(
            **{**self.sparsity, "vocab_size": 1, "intermediate_size": 1, "num_hidden_layers": 1},
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_scaling=None,
            max_position_embeddings=tokens,
        )

    def training(self, tokens: int) -> TrainConfig:
        recompute = tokens == self.longest
        return replace(
            self.step, seq_len=tokens, batch_tokens=tokens, activation_checkpointing=recompute
        )

    def model(self, case: Case) -> ToyNSALlamaConfig:
        """What the estimate takes for a case."""
        if case.what == "attention":
            return self.layer(case.tokens)
        return self.training(case.tokens).nsa_config()


SPARSITY: dict[str, Any] = {
    **{"compress_type": "avgpool", "kernel_size": 32, "kernel_stride": 16, "block_size": 64},
    **{"topk": 16, "init_blocks": 1, "local_blocks": 2, "window_size": 512},
}
USUAL = Sizes(
    tokens=(131072, 16384),
    longest=524288,
    heads=64,
    kv_heads=4,
    head_dim=128,
    hidden_size=4096,
    sparsity=SPARSITY,
    step=PRESETS["gpu"]["text"],
    dtype=torch.bfloat16,
    calls=9,
)
TINY = Sizes(
    tokens=(64,),
    longest=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden_size=32,
    sparsity={
        **SPARSITY,
        **{"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "topk": 4, "window_size": 12},
    },
    step=replace(PRESETS["cpu"]["text"], layers=1, hidden_size=32, intermediate_size=48),
    dtype=torch.float32,
    calls=1,
)


@dataclass
class Meter:
    """Times and memory of this rank's device, and how much time is left, in all and for a row."""

    device: torch.device
    calls: int
    seconds: float = math.inf
    row_seconds: float = math.inf
    began: float = field(default_factory=time.perf_counter)

    @property
    def elapsed(self) -> float:
        return time.perf_counter() - self.began

    def is_over(self) -> bool:
        """Whether the time is up, by the first rank's clock."""
        over = torch.tensor([self.elapsed > self.seconds], dtype=torch.int32, device=self.device)
        dist.broadcast(over, 0)
        return bool(over)

    def milliseconds(self, call: Callable[[], object]) -> float:
        """The median time of some calls that all ranks begin together, on the slowest rank."""
        call()  # loads kernels, and finds its place in memory
        self.wait()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        once = self._largest(self._time(call))
        if once > LONG_MS or self.calls == 1:
            return once
        count = min(self.calls, max(3, int(1000 / once)))
        return self._largest(statistics.median(self._time(call) for _ in range(count)))

    def peak_bytes(self) -> int | None:
        """The most memory that a call took since `milliseconds` began; None on a CPU, which does
        not count it."""
        if self.device.type != "cuda":
            return None
        return int(self._largest(torch.cuda.max_memory_allocated(self.device)))

    def moving(self, call: Callable[[], object]) -> Row:
        """Milliseconds in which NCCL's kernels run during a call, waits for the other ranks among
        them; and those of them in which no other kernel runs."""
        if self.device.type != "cuda":
            call()
            return {}
        dist.barrier()
        self.wait()
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            call()
            self.wait()
        spans: list[Spans] = [[], []]
        for event in profiler.events() or ():
            if "CUDA" in str(event.device_type):
                span = event.time_range  # in microseconds
                spans["nccl" in event.name.lower()].append((span.start, span.end))
        others, exchanges = spans
        alone = covered([*others, *exchanges]) - covered(others)
        return {"nccl_ms": 1e-3 * covered(exchanges), "nccl_alone_ms": 1e-3 * alone}

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _time(self, call: Callable[[], object]) -> float:
        dist.barrier()
        self.wait()
        start = time.perf_counter()
        call()
        self.wait()
        return 1e3 * (time.perf_counter() - start)

    def _largest(self, value: float) -> float:
        over = torch.tensor([value], dtype=torch.float64, device=self.device)
        dist.all_reduce(over, dist.ReduceOp.MAX)
        return float(over)


def covered(spans: Spans) -> float:
    """The length of the union of some (start, end)."""
    total, until = 0.0, -math.inf
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


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


@contextmanager
def watched(seconds: float, rows: list[Row], keep: Callable[[list[Row]], object]) -> Iterator[None]:
    """End this process if the last row is not done in time: a rank that waits for another's
    exchange waits forever."""

    def end() -> None:
        rows[-1]["error"] = f"no end within {seconds:.0f} s"
        keep(rows)
        os._exit(1)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    if seconds < math.inf:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()


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
    row["peak_bytes"] = meter.peak_bytes()
    if case.split == "alone":
        return row
    if case.split == "context":
        call = context_exchange(layout, sizes.layer(case.tokens), sizes.dtype)
    else:
        call = sums_of(gradient, 2)
    return row | {"exchange_ms": meter.milliseconds(call), **meter.moving(both)}


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
    return row if row["ms"] > LONG_MS else row | meter.moving(run)


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


def share_of_roofline(sizes: Sizes, gpu: Gpu, alone: Row) -> float:
    """Attention's share of the roofline with which the estimate for one GPU is what one took."""
    case = Case(alone["what"], alone["tokens"], "alone", alone["graph"])
    roofline, others = (
        1e3 * estimate(sizes, gpu, case, 1, ((case.tokens, share),)).busy
        for share in (1.0, math.inf)
    )
    took = alone["ms"] - 1e3 * around(case)
    return min(1.0, (roofline - others) / max(took - others, roofline - others))


def around(case: Case) -> float:
    """Seconds of a case that are around its passes."""
    return AROUND_SECONDS if case.what != "attention" else 0.0


def predicted(sizes: Sizes, gpu: Gpu, case: Case, ranks: int, shares: Points) -> float:
    """Milliseconds of a case by the model of `nsagen plan`."""
    step = estimate(sizes, gpu, case, ranks, shares)
    passes = step.busy if case.graph else max(step.busy, step.host)
    return 1e3 * (passes + around(case))


def estimate(sizes: Sizes, gpu: Gpu, case: Case, ranks: int, shares: Points) -> Step:
    """What the model of `nsagen plan` says, with these shares at some numbers of tokens."""
    split = {
        "alone": Ranks(1, 1),
        "context": Ranks(1, 1, ranks),
        "tensor": Ranks(ranks, 1),
    }[case.split]
    efficiency = Efficiency("this run", shares, (), shares)
    recompute = case.what != "attention" and sizes.training(case.tokens).activation_checkpointing
    config = sizes.model(case)
    return step_of(config, gpu, case.tokens, 1, split, recompute, efficiency)


def compile_first() -> None:
    """Fill Triton's cache on disk: a process for each case runs it once, by itself."""
    count, gpus = int(os.environ["WORLD_SIZE"]), torch.cuda.device_count()
    command = [sys.executable, "-m", "benchmarks.distributed", "--out", os.devnull, "--compile"]
    running = [
        subprocess.Popen(
            [*command, str(count), what, split],
            env={**os.environ, "CUDA_VISIBLE_DEVICES": str(index % gpus)},
        )
        for index, (what, split) in enumerate(itertools.product(RUNS, SPLITS))
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


def main(arguments: list[str] | None = None) -> int:
    began = time.perf_counter()
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, required=True, help="file to write")
    parser.add_argument("--tiny", action="store_true", help="sizes for a CPU")
    parser.add_argument("--seconds", type=float, default=math.inf, help="start no case after these")
    late = "end the run if a row takes longer"
    parser.add_argument("--row-seconds", type=float, default=math.inf, help=late)
    parser.add_argument("--what", choices=WHAT, nargs="+", default=WHAT, help="default: all")
    parser.add_argument("--compiled", action="store_true", help="kernels are in Triton's cache")
    parser.add_argument("--compile", nargs=3, help=argparse.SUPPRESS)
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
        run_alone(USUAL, device, int(options.compile[0]), *options.compile[1:])
        dist.destroy_process_group()
        return 0
    if gpus and not (options.tiny or options.compiled) and device.index == 0:
        compile_first()
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
