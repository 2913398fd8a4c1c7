"""What the parts of family.py share: layers and sizes, a run with its rows, tensors."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.codegen.template import kernel_name, render, space_for
from nsagen.core.importing import import_file
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload

SM90 = KNOWN_TARGETS["cuda:90"]


@dataclass(frozen=True)
class Layer:
    """A member's attention: `heads` query heads over `kv_heads` of `dim`, blocks of `block`."""

    heads: int
    kv_heads: int
    dim: int
    block: int
    topk: int
    init: int
    local: int
    hidden: int

    @property
    def blocks(self) -> dict[str, int]:
        forced = {"init_blocks": self.init, "local_blocks": self.local}
        return {"block_size": self.block, "topk": self.topk, **forced}


@dataclass(frozen=True)
class Sizes:
    """What a run measures, and where."""

    device: str = "cuda"
    dtype: torch.dtype = torch.bfloat16
    m3: Layer = Layer(64, 4, 128, 128, 16, 0, 1, 6144)
    minicpm: Layer = Layer(32, 2, 128, 64, 96, 1, 33, 4096)
    moba: tuple[Layer, ...] = (
        Layer(8, 8, 128, 512, 3, 0, 1, 1024),
        Layer(8, 8, 128, 4096, 12, 0, 1, 1024),
    )
    window: tuple[int, int] = (32, 16)
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 32)


FULL = Sizes()
TINY = Sizes(
    device="cpu",
    dtype=torch.float32,
    m3=Layer(4, 2, 16, 16, 4, 0, 1, 32),
    minicpm=Layer(4, 2, 16, 8, 6, 1, 3, 32),
    moba=(Layer(2, 2, 16, 32, 3, 0, 1, 32),),
    window=(4, 2),
    lengths=(64, 128),
    batches=(1, 2),
)
WARM = replace(FULL, lengths=(8192,))

INDEX = {"kernel_size": 1, "kernel_stride": 1}
INDEX |= {"score_norm": "none", "score_heads": "each", "score_pool": "max"}


@dataclass
class Run:
    """One run's sizes and what it found.

    Attributes:
        times: whether to time; else each call is made once, so that its kernels are compiled.
        folder: where kernels' files lie.
        end: when to begin nothing more, by time.monotonic.
        each: called after each row.
    """

    sizes: Sizes
    folder: Path
    times: bool = True
    end: float = math.inf
    each: Callable[[], None] = lambda: None
    rows: list[dict[str, Any]] = field(default_factory=list)
    wrong: dict[str, float] = field(default_factory=dict)
    skipped: list[str] = field(default_factory=list)

    def time(
        self, what: str, how: str, tokens: int, call: Callable[[], object], **more: Any
    ) -> None:
        """Add a row: the median of a call's milliseconds, L2 cleared before each."""
        name = f"{what}, {how}, {tokens} {more or ''}"
        if time.monotonic() > self.end:
            self.skipped.append(name)
            return
        call()
        if not self.times:
            return
        ms = milliseconds(call, self.sizes.device)
        self.rows.append({"what": what, "how": how, "tokens": tokens, **more, "ms": ms})
        print(f"{name}: {ms:.3f} ms", flush=True)
        self.each()

    def agree(self, name: str, found: Tensor, expected: Tensor, limit: float | None = None) -> None:
        """Compare two results; NaN agrees with nothing."""
        error = relative_error(found, expected)
        if not error <= (THRESHOLDS[found.dtype] if limit is None else limit):
            self.wrong[name] = error

    def kernel(self, w: Workload, algorithm: str, **knobs: Any) -> Callable[..., None]:
        """The `launch` of an algorithm's default schedule with some knobs changed."""
        default = dict(space_for(w, algorithm).default_schedule(w, SM90).knobs)
        schedule = Schedule.of(algorithm, {**default, **knobs})
        path = self.folder / f"{kernel_name(w, schedule)}.py"
        if not path.exists():
            path.write_text(render(w, schedule, header=f"# {w}: {schedule}"))
        return import_file(path).launch


def milliseconds(call: Callable[[], object], device: str) -> float:
    """The median of some calls: as many as take 0.15 s, three at least."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - start)
    flush = torch.empty(1 << 28, dtype=torch.uint8, device=device)

    def timed(calls: int) -> float:  # the host runs ahead: its time counts only where it is longer
        pairs = []
        for _ in range(calls):
            flush.zero_()
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return statistics.median([start.elapsed_time(end) for start, end in pairs])

    return timed(min(50, max(3, int(150 / timed(1)))))


def graphed(call: Callable[[], object], device: str) -> Callable[[], object]:
    """A replayed CUDA graph: decoding without the host's time."""
    if device == "cpu":
        return call
    from nsagen.bench.measure import graphed as capture

    return capture(call)


def normal(s: Sizes, *shape: int, grad: bool = False) -> Tensor:
    return torch.randn(shape, device=s.device, dtype=s.dtype, requires_grad=grad)


def offsets(s: Sizes, *lengths: int) -> Tensor:
    ends = torch.tensor((0, *lengths)).cumsum(0)
    return ends.to(s.device, torch.int32)


def gradients(call: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The backward pass of a call, made once."""
    o = call()
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def attention_workload(layer: Layer, op: str, pass_: str, **params: int) -> Workload:
    sizes = {"head_dim": layer.dim, "v_head_dim": layer.dim}
    sizes["gqa_ratio"] = layer.heads // layer.kv_heads
    return Workload.of(op, pass_, dtype="bfloat16", **sizes, **params)
