"""Host time and launches of one call of the whole attention: eager, compiled and as a graph.

    python benchmarks/host_time.py --out host_time.json

64 query heads over 4, head_dim 128, compression and rope included, one sequence. A call whose host
time is more than its time on the GPU is bound by the host.
"""

from __future__ import annotations

import argparse
import cProfile
import gc
import json
import pstats
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import nsagen
from nsagen import ops
from nsagen.bench.measure import graphed, host_cost, launched

SEQLENS = (256, 2048, 8192, 65536)
HEADS, KV_HEADS, HEAD_DIM = 64, 4, 128
DEVICE = "cuda"
SIZES: dict[str, Any] = {
    **{"compress_type": "avgpool", "kernel_size": 32, "kernel_stride": 16},
    **{"block_size": 64, "topk": 16, "window_size": 512},
}
ONE_THREAD = "eager, backward in the caller's thread"
MODES = (*("eager", "eager, lengths prepared", ONE_THREAD, "graph", "compiled"), "reduce-overhead")

Call = Callable[[], Any]


class Inputs:
    """One sequence of random tokens, and the calls on them."""

    def __init__(self, tokens: int, dispatcher: Any) -> None:
        generator = torch.Generator(DEVICE).manual_seed(0)

        def normal(*shape: int) -> Tensor:
            x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16, generator=generator)
            return x.requires_grad_()

        self.q, self.k, self.v = (normal(tokens, h, HEAD_DIM) for h in (HEADS, KV_HEADS, KV_HEADS))
        self.gate = normal(tokens, HEADS, 3).detach().sigmoid().requires_grad_()
        self.gradient = normal(tokens, HEADS, HEAD_DIM).detach()
        angles = torch.rand(tokens, HEAD_DIM // 2, device=DEVICE, generator=generator)
        self.cu_seqlens = torch.tensor([0, tokens], dtype=torch.int32, device=DEVICE)
        self.keywords = {
            **SIZES,
            "cu_seqlens": self.cu_seqlens,
            "cos": angles.cos(),
            "sin": angles.sin(),
            "dispatcher": dispatcher,
        }
        self.leaves = (self.q, self.k, self.v, self.gate)

    def lengths(self) -> ops.Lengths:
        sizes = (SIZES["kernel_size"], SIZES["kernel_stride"])
        return ops.Lengths.of(self.cu_seqlens, self.q.shape[0], *sizes)

    def forward(self, attention: Callable[..., Tensor], **more: Any) -> Call:
        @torch.no_grad()
        def call() -> Tensor:
            return attention(*self.leaves, **self.keywords, **more)

        return call

    def training(self, attention: Callable[..., Tensor], **more: Any) -> Call:
        def call() -> tuple[Tensor, ...]:
            o = attention(*self.leaves, **self.keywords, **more)
            return o, *torch.autograd.grad(o, self.leaves, self.gradient)

        return call


def gpu_ms(call: Call) -> float:
    """Mean time of a call among many in a row: the GPU's or the host's, whichever is longer."""
    for _ in range(3):
        call()
    calls = 10
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(calls):
        call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / calls


def graph_of(call: Call) -> Call:
    """A call as a replayed graph that gives its results."""
    results: list[Any] = []
    replay = graphed(lambda: results.append(call()))

    def run() -> Any:
        replay()
        return results[-1]

    return run


def detached(results: Any) -> Any:
    if isinstance(results, Tensor):
        return results.detach()
    return tuple(x.detach() for x in results)


def same(one: Any, other: Any) -> bool:
    pairs = ((one, other),) if isinstance(one, Tensor) else zip(one, other, strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


def in_one_thread(call: Call) -> Call:
    """A call whose backward pass PyTorch does not hand to a thread of the GPU's."""

    def run() -> Any:
        with torch.autograd.set_multithreading_enabled(False):
            return call()

    return run


def modes(x: Inputs, what: str) -> Iterator[tuple[str, Callable[[], Call]]]:
    make = x.forward if what == "forward" else x.training
    attention = ops.native_sparse_attention
    yield "eager", lambda: make(attention)
    yield "eager, lengths prepared", lambda: make(attention, lengths=x.lengths())
    if what != "forward":
        yield ONE_THREAD, lambda: in_one_thread(make(attention))
    yield "graph", lambda: graph_of(make(attention))
    yield "compiled", lambda: make(COMPILED)
    yield "reduce-overhead", lambda: make(REDUCED)


class Nothing(torch.autograd.Function):
    """A node without work: what autograd itself costs on this host."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def empty_calls() -> Iterator[tuple[str, str, Call]]:
    """What the host needs at least: for a node of autograd's graph, and for a launch by PyTorch."""
    x = torch.zeros(64, device=DEVICE, requires_grad=True)
    gradient, y = torch.ones_like(x), torch.zeros(64, device=DEVICE)

    def node() -> Any:
        return torch.autograd.grad(Nothing.apply(x), x, gradient)

    yield "an empty node, both passes", "eager", node
    yield "an empty node, both passes", ONE_THREAD, in_one_thread(node)
    yield "a launch of PyTorch's add_", "eager", lambda: y.add_(1)


COMPILED = torch.compile(ops.native_sparse_attention, fullgraph=True, dynamic=True)
REDUCED = torch.compile(ops.native_sparse_attention, fullgraph=True, mode="reduce-overhead")


def measure(
    x: Inputs, what: str, mode: str, make: Callable[[], Call], right: Any, profile: bool
) -> dict:
    row: dict[str, Any] = {"what": what, "mode": mode, "tokens": x.q.shape[0]}
    try:
        call = make()
        for _ in range(4):
            found = call()
        row["same"] = same(found, right)
        del found
        row["ms"] = gpu_ms(call)
        row |= host_cost(call, row["ms"]).columns(0.9 * row["ms"])
        row["kernels"] = launched(call)
        if profile:
            profiled(call)
    except Exception as error:
        row["error"] = f"{type(error).__name__}: {error}"[:2000]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seqlens", type=int, nargs="+", default=list(SEQLENS))
    parser.add_argument("--package", default="llama8b", help="generated package")
    parser.add_argument("--modes", nargs="+", default=MODES, help="only these, e.g. eager graph")
    parser.add_argument("--out", type=Path, help="file of the rows as JSON")
    parser.add_argument(
        "--profile", action="store_true", help="print where each call's host time goes"
    )
    options = parser.parse_args()
    dispatcher = nsagen.load(options.package)
    rows: list[dict[str, Any]] = []
    for what, mode, call in empty_calls():
        for _ in range(50):
            call()
        rows.append({"what": what, "mode": mode, "host_ms": host_cost(call, gpu_ms(call)).ms})
        print(json.dumps(rows[-1]), flush=True)
    for tokens in options.seqlens:
        x = Inputs(tokens, dispatcher)
        for what in ("forward", "forward and backward"):
            first = (x.forward if what == "forward" else x.training)(ops.native_sparse_attention)
            # Results with a graph would keep nodes of the leaves alive that belong to this stream,
            # and no capture on another one could use those.
            right = detached(first())
            for mode, make in modes(x, what):
                if mode not in options.modes:
                    continue
                row = measure(x, what, mode, make, right, options.profile)
                rows.append(row)
                shown = {n: v for n, v in row.items() if n != "kernels"}
                print(json.dumps(shown), flush=True)
                if options.out:
                    write(options.out, rows)
                gc.collect()
            del right
        del x
        gc.collect()
        torch.cuda.empty_cache()


def write(out: Path, rows: list[dict[str, Any]]) -> None:
    """The rows so far: a run that is cut short keeps what it measured."""
    counters = torch._dynamo.utils.counters
    about = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "dynamic_graphs_and_others": counters["stats"].get("unique_graphs", 0),
    }
    out.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def profiled(call: Call) -> None:
    for _ in range(5):
        call()
    torch.cuda.synchronize()
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(20):
        call()
    profiler.disable()
    torch.cuda.synchronize()
    pstats.Stats(profiler).sort_stats("tottime").print_stats(25)


if __name__ == "__main__":
    main()
