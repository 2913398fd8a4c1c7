"""The whole attention beside dense attention, at every length that is published: one run of a GPU.

    python benchmarks/precompile.py               # on all cores, if time on the GPU is short
    python benchmarks/side_by_side.py --out OUT

Writes prefill.json, prefill_learned.json, train.json and decode.json as `nsagen bench` does, and
side_by_side.json: calls with compression included, small groups, MiniMax-M3's layer, whose
tokens share half of their blocks with their neighbours, and two step sizes of query_major.
64 query heads of 128 over 4 in bfloat16, kernel 32, stride 16, block 64, topk 16, window 512;
default schedules; medians, cold L2 cache.
Dense attention is cuDNN's and, where flash-attn-4 is installed, FlashAttention-4's. Parts run in
the order above, and rows are written as they come, so a run that is stopped keeps what it has.
"""

from __future__ import annotations

import argparse
import functools
import gc
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from forced_and_union import write
from torch import Tensor

from nsagen import ops
from nsagen.bench import decode, measure, prefill, train
from nsagen.bench.decode_cases import AttentionCaches
from nsagen.bench.dense import DenseAttention, backends
from nsagen.bench.results import write_results
from nsagen.bench.selections import learned_selection
from nsagen.bench.shape import Inputs, Shape
from nsagen.bench.tables import FLASH_4
from nsagen.codegen.template import space_for
from nsagen.core.importing import import_file
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule

SEQLENS = (8192, 32768, 65536, 131072)
EAGER = 2048

SHAPE = Shape()
DECODE = decode.Plan(contexts=(4096, 131072, 32768), model=None)
M3 = replace(SHAPE, block_size=128, init_blocks=0, local_blocks=1)


class OutOfTime(Exception):
    """A part's time is over."""


@dataclass
class Run:
    """What a run measures, and what it found.

    Attributes:
        out: folder of the results; None to write none.
        end: when nothing more begins, by time.monotonic.
        time: milliseconds of a call.
        rows: of side_by_side.json.
    """

    out: Path | None = None
    end: float = math.inf
    shape: Shape = SHAPE
    m3: Shape = M3
    seqlens: tuple[int, ...] = SEQLENS
    eager: int = EAGER
    decode: decode.Plan = DECODE
    device: str = "cuda"
    time: Callable[[Callable[[], object]], float] = measure.milliseconds
    rows: list[dict[str, Any]] = field(default_factory=list)

    def progress(self, what: str = "", done: int = 0, total: int = 0) -> None:
        if time.monotonic() > self.end:
            raise OutOfTime(what)

    def row(self, what: str, tokens: int, call: Callable[[], object], **more: Any) -> None:
        self.progress(what)
        self.rows.append({"what": what, "tokens": tokens, **more, "ms": self.time(call)})
        if self.out:
            print(self.rows[-1], flush=True)
            write_results("side_by_side", self.rows, self.out)

    def keep(self, name: str) -> Callable[[Any], object]:
        return functools.partial(write_results, name, folder=self.out)

    def inputs(self, shape: Shape, tokens: int, *, grad: bool = False) -> Inputs:
        return Inputs.random(shape, tokens, device=self.device, requires_grad=grad)


def with_compression(x: Inputs) -> Tensor:
    """The whole op: keys and values are compressed, without rope."""
    s = x.shape
    return ops.native_sparse_attention(
        *(x.q, x.k, x.v, x.gate),
        cu_seqlens=x.cu_seqlens,
        compress_type=s.compress_type,
        kernel_size=s.kernel_size,
        kernel_stride=s.kernel_stride,
        block_size=s.block_size,
        topk=s.topk,
        window_size=s.window_size,
    )


def compress(x: Inputs) -> None:
    windows = (x.cu_seqlens, x.shape.kernel_size, x.shape.kernel_stride)
    for tensor in (x.k, x.v):
        ops.avgpool_compress(tensor, None, *windows)


def over_learned(x: Inputs, topk_idx: Tensor) -> Tensor:
    compress(x)
    return x.attention_over(topk_idx)


def whole(run: Run) -> None:
    """Compression, three branches and their sum, and the gradients of all inputs."""
    for tokens in (run.eager, *run.seqlens):
        forward_of_whole(run, tokens)
        backward_of_whole(run, tokens)
        tidy()


@torch.no_grad()
def forward_of_whole(run: Run, tokens: int) -> None:
    x = run.inputs(run.shape, tokens)
    learned = learned_selection(run.shape.kv_heads, tokens, run.device)
    run.row("forward, random selections", tokens, lambda: with_compression(x))
    run.row("forward, learned selections", tokens, lambda: over_learned(x, learned))


def backward_of_whole(run: Run, tokens: int) -> None:
    x = run.inputs(run.shape, tokens, grad=True)
    leaves, do = (x.q, x.k, x.v, x.gate), torch.randn_like(x.q)
    gradients = functools.partial(torch.autograd.grad, inputs=leaves, grad_outputs=do)
    if tokens == run.eager:
        run.row("forward and backward", tokens, lambda: gradients(with_compression(x)))
    o = with_compression(x)
    run.row("backward", tokens, lambda: gradients(o, retain_graph=True))


def groups(run: Run) -> None:
    """Selected attention in smaller groups: of as many query heads, and of fewer."""
    tokens = run.seqlens[min(1, len(run.seqlens) - 1)]
    all_heads = run.shape.query_heads
    for heads, group in (
        *((all_heads // 2, 4), (all_heads // 4, 1)),
        *((all_heads, 4), (all_heads, 1)),
    ):
        shape = replace(run.shape, gqa_ratio=group, kv_heads=heads // group)
        x = run.inputs(shape, tokens, grad=True)
        leaves = (x.q, x.k, x.v)
        with torch.no_grad():
            topk_idx = x.compressed()[1]
        call = functools.partial(
            ops.topk_sparse_attention, *leaves, topk_idx, shape.block_size, x.cu_seqlens
        )
        of = {"group": group, "query_heads": heads}
        with torch.no_grad():
            run.row("selected attention forward", tokens, call, **of)
        o = call()
        do = torch.randn_like(o)
        gradients = functools.partial(torch.autograd.grad, o, leaves, do, retain_graph=True)
        run.row("selected attention backward", tokens, gradients, **of)
        del x, o, call, gradients, leaves, do
        tidy()


def half_shared(shape: Shape, tokens: int, device: str) -> Tensor:
    """topk_idx int32 [HK, N, topk]: a token's own block, and others of which it has each in common
    with the token before it with a probability of one half."""
    free, generator = shape.topk - 1, torch.Generator(device).manual_seed(0)
    lists = []
    token = torch.arange(tokens, device=device)
    own = token[:, None] // shape.block_size
    place = torch.arange(free, device=device)
    for _ in range(shape.kv_heads):
        new = torch.rand(tokens, free, device=device, generator=generator) < 0.5
        new |= token[:, None] == 0
        source = torch.where(new, token[:, None], 0).cummax(0).values
        # Each place draws from blocks of its own, in proportion to those that there are.
        drawn = torch.rand(tokens, free, device=device, generator=generator).gather(0, source)
        chosen = ((place + drawn) * own / free).long().clamp(max=own - 1)
        few = own <= free
        chosen = torch.where(few, torch.where(place < own, place, 1 << 30), chosen)
        # Two places of a token whose blocks are few may draw the same one: it counts once.
        chosen = torch.cat([chosen, own], 1).sort(1).values
        repeats = torch.zeros_like(chosen, dtype=torch.bool)
        repeats[:, 1:] = chosen[:, 1:] == chosen[:, :-1]
        chosen = chosen.masked_fill(repeats, 1 << 30).sort(1).values
        lists.append(torch.where(chosen == 1 << 30, -1, chosen))
    return torch.stack(lists).to(torch.int32).contiguous()


def m3(run: Run) -> None:
    """MiniMax-M3's selected attention, whose neighbours share half of their blocks."""
    for tokens in run.seqlens[:2] + run.seqlens[3:]:
        x = run.inputs(run.m3, tokens)
        topk_idx = half_shared(run.m3, tokens, run.device)
        call = functools.partial(
            ops.topk_sparse_attention, x.q, x.k, x.v, topk_idx, run.m3.block_size, x.cu_seqlens
        )
        with torch.no_grad():
            run.row("M3 attention, neighbours share half", tokens, call)
        del x, topk_idx, call
        tidy()


def steps(run: Run) -> None:
    """Selected attention's query_major on whole lists by steps of 16 and of 32 keys."""
    w = run.shape.workload("selected_attention", "forward")
    default = space_for(w, "query_major").default_schedule(w, KNOWN_TARGETS["cuda:90"])
    with tempfile.TemporaryDirectory() as folder:
        for tokens in run.seqlens[:3:2]:
            x = run.inputs(run.shape, tokens)
            topk_idx = learned_selection(run.shape.kv_heads, tokens, run.device)
            o, lse = torch.empty_like(x.q), torch.empty(x.q.shape[:2], device=run.device)
            args = (x.q, x.k, x.v, topk_idx, x.cu_seqlens, o, lse, run.shape.head_dim**-0.5)
            for keys in (16, 32):
                schedule = Schedule.of("query_major", dict(default.knobs), block_n=keys)
                launch = import_file(write(Path(folder), f"steps of {keys}", (w, schedule))).launch
                call = functools.partial(launch, *args)
                run.row("query_major, learned selections", tokens, call, block_n=keys)
            del x, topk_idx, o, lse, args
            tidy()


def tidy() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def forward(run: Run) -> None:
    prefill.run(run.shape, run.seqlens, None, run.progress, keep=run.keep("prefill"))


def forward_learned(run: Run) -> None:
    only, keep = {"selected_attention", "attention"}, run.keep("prefill_learned")
    prefill.run(run.shape, run.seqlens, None, run.progress, "learned", keep, only)


def backward(run: Run) -> None:
    train.run(run.shape, run.seqlens, None, run.progress, run.keep("train"))


def decoding(run: Run) -> None:
    decode.run(run.decode, run.progress, run.device, run.keep("decode"))


PARTS: dict[str, Callable[[Run], None]] = {
    "whole": whole,
    "groups": groups,
    "m3": m3,
    "steps": steps,
    "prefill": forward,
    "train": backward,
    "decode": decoding,
    "prefill_learned": forward_learned,
}


def short_calls(run: Run) -> dict[str, Callable[[], object]]:
    """Calls that together compile what the parts run, the longest first."""
    tokens, some = run.eager, replace(run, seqlens=(run.eager,), time=once, out=None)
    x = run.inputs(run.shape, tokens, grad=True)
    s, qkv = x.shape, (x.q, x.k, x.v)
    blocks = functools.partial(learned_selection, s.kv_heads, tokens, run.device)
    selected: Callable[[], Tensor] = lambda: ops.topk_sparse_attention(  # noqa: E731
        *qkv, blocks(), s.block_size, x.cu_seqlens
    )
    sliding = functools.partial(ops.sliding_window_attention, *qkv, s.window_size, x.cu_seqlens)
    branches = [torch.randn_like(x.q, requires_grad=True) for _ in range(3)]
    gated = functools.partial(ops.gated_sum, *branches, x.gate)
    found: dict[str, Callable[[], object]] = {
        "whole, gradients": lambda: gradients_of(lambda: with_compression(x), (*qkv, x.gate)),
        "whole": lambda: without_gradients(lambda: with_compression(x)),
        "attention, gradients": lambda: gradients_of(x.attention, x.leaves),
        "compressed, gradients": lambda: gradients_of(lambda: x.compressed()[0], (x.q, x.ck, x.cv)),
        "selected, gradients": lambda: gradients_of(selected, qkv),
        "learned": lambda: without_gradients(lambda: over_learned(x, blocks())),
        "groups": lambda: groups(some),
        "sliding, gradients": lambda: gradients_of(sliding, qkv),
        "selected": lambda: without_gradients(selected),
        "sliding": lambda: without_gradients(sliding),
        "m3": lambda: m3(some),
        "compressed": lambda: without_gradients(x.compressed),
        "gated sum": lambda: gradients_of(gated, (*branches, x.gate)),
    }
    for batch, context in ((1, 4096), (4, 4096), (32, 4096), (1, 131072)):
        sizes = (batch, context, torch.device(run.device), run.decode.dtype)
        found[f"decode, {batch} x {context}"] = functools.partial(decode_step, run, *sizes)
    return found


def decode_step(run: Run, *sizes: Any) -> None:
    AttentionCaches(run.decode.attention, *sizes).sparse()


def dense_call(run: Run, backend: str) -> None:
    dense = DenseAttention(run.shape, run.eager, backend, requires_grad=True)
    gradients_of(dense.forward, (dense.q, dense.k, dense.v))


@torch.no_grad()
def without_gradients(call: Callable[[], object]) -> None:
    call()


def gradients_of(call: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> None:
    o = call()
    torch.autograd.grad(o, leaves, torch.randn_like(o))


def once(call: Callable[[], object]) -> float:
    call()
    return 0.0


def leave_out_broken() -> None:
    """Measure without FlashAttention-4 where it is installed and does not run."""
    try:
        if FLASH_4 in backends():
            dense_call(Run(), FLASH_4)
    except Exception:  # whatever another package raises
        traceback.print_exc()
        prefill.backends = train.backends = lambda: ("cuDNN",)


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing later")
    parser.add_argument("--out", type=Path, default=Path())
    args = parser.parse_args()
    run, failed = Run(args.out, time.monotonic() + args.seconds), []
    leave_out_broken()
    for name in args.parts:
        start = time.monotonic()
        try:
            PARTS[name](run)
        except OutOfTime as error:
            print(f"{name}: no time is left for {error}", flush=True)
        except Exception as error:  # the other parts may run
            traceback.print_exc()
            failed.append(f"{name}: {type(error).__name__}")
        tidy()
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    print(f"failed: {', '.join(failed) or 'none'}")
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
