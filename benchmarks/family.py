"""MiniMax-M3's and MiniCPM4's layers: check every kernel, and time them beside dense attention.

    python benchmarks/family.py --out family.json          # on an H200: two and a half minutes
    python benchmarks/family.py --dry --out family.json    # tiny sizes on a CPU, by the references

Kernels are first compiled and compared with the float64 references, in processes of their own;
then they are timed one after another. What fails is in `failed`, what there was no time for in
`skipped`. Exits 1 if a result is wrong or a part failed. With --plot, draws the JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import math
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsagen import ops
from nsagen.cases.base import THRESHOLDS, cases_of, relative_error
from nsagen.cases.sizes import sizes_for
from nsagen.codegen.template import kernel_name, render, space_for
from nsagen.core.importing import import_file
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.ops import local_band
from nsagen.ops.compress import compress
from nsagen.ops.selected_attention import selected_attention_forward

SM90 = KNOWN_TARGETS["cuda:90"]
RESULTS = Path(__file__).parent / "results"


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
    window: tuple[int, int] = (32, 16)
    lengths: tuple[int, ...] = (8192, 32768, 131072)
    batches: tuple[int, ...] = (1, 32)


FULL = Sizes()
TINY = Sizes(
    device="cpu",
    dtype=torch.float32,
    m3=Layer(4, 2, 16, 16, 4, 0, 1, 32),
    minicpm=Layer(4, 2, 16, 8, 6, 1, 3, 32),
    window=(4, 2),
    lengths=(64, 128),
    batches=(1, 2),
)
WARM = replace(FULL, lengths=(8192,))

INDEX = {"kernel_size": 1, "kernel_stride": 1}
INDEX |= {"score_norm": "none", "score_heads": "each", "score_pool": "max"}

GOALS = {
    "M3 index and top-k": {8192: 0.18, 32768: 1.4, 131072: 20.0},
    "M3 attention forward": {8192: 2.8, 32768: 12.8, 131072: 57.0},
    "M3 attention backward": {8192: 5.3, 32768: 22.0},
    "M3 layer in Transformers": {8192: 9.0},
    "M3 decode, batch 1": {131072: 0.037},
    "M3 decode, batch 32": {32768: 0.133, 131072: 0.318},
    "MiniCPM attention forward": {131072: 65.0},
    "MiniCPM forward with scores": {131072: 90.0},
    "MiniCPM 64 blocks forward": {262144: 158.0},
    "MiniCPM 64 blocks backward": {262144: 469.0},
}
"""Milliseconds, by what and tokens in all; 262144 are two sequences."""

PUBLISHED = {
    "vLLM 0.33, Triton, H200, another run": {
        "M3 attention forward": {8192: 3.81, 32768: 16.8, 131072: 73.8},
        "M3 index and top-k": {8192: 0.22, 32768: 1.8, 131072: 27.2},
    },
    "InfLLM-V2's kernels, H100, published": {
        "MiniCPM 64 blocks forward": {262144: 158.0},
        "MiniCPM 64 blocks backward": {262144: 469.0},
    },
    "FlashAttention-2, H100, published beside them": {
        "MiniCPM 64 blocks forward": {262144: 832.0},
        "MiniCPM 64 blocks backward": {262144: 2063.0},
    },
    "dense cuDNN, H200, another run": {
        "M3 attention forward": {8192: 1.93, 32768: 28.9, 131072: 500.0},
        "M3 attention backward": {8192: 5.48, 32768: 81.6, 131072: 1300.0},
    },
}
"""Milliseconds that were not measured in this run."""


@dataclass
class Run:
    """One run's sizes and what it found.

    Attributes:
        times: whether to time; else each call is made once, so that its kernels are compiled.
        folder: where kernels' files lie.
        end: when to begin nothing more, by time.monotonic.
    """

    sizes: Sizes
    folder: Path
    times: bool = True
    end: float = math.inf
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


def choose(s: Sizes, layer: Layer, tokens: int, share: int = 1) -> Tensor:
    """Blocks as selection writes them: forced ones and random others, which `share` neighbours
    have in common."""
    parts, block = [], torch.arange(max(-(-tokens // layer.block), layer.topk), device=s.device)
    for start in range(0, tokens, 8192):
        t = torch.arange(start, min(start + 8192, tokens), device=s.device)
        own = (t // layer.block)[:, None]
        groups = -(-t.numel() // share)
        scores = torch.rand(layer.kv_heads, groups, block.numel(), device=s.device)
        scores = scores.repeat_interleave(share, 1)[:, : t.numel()]
        scores = scores.masked_fill((block < layer.init) | (block > own - layer.local), 2.0)
        best = scores.masked_fill(block > own, -1.0).topk(layer.topk)
        chosen = best.indices.masked_fill(best.values < 0, 1 << 30).sort(-1).values
        parts.append(chosen.masked_fill(chosen == 1 << 30, -1).to(torch.int32))
    return torch.cat(parts, 1).contiguous()


def gradients(call: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> Callable[[], Any]:
    """The backward pass of a call, made once."""
    o = call()
    do = torch.randn_like(o)
    return lambda: torch.autograd.grad(o, leaves, do, retain_graph=True)


def attention_workload(layer: Layer, op: str, pass_: str, **params: int) -> Workload:
    sizes = {"head_dim": layer.dim, "v_head_dim": layer.dim}
    sizes["gqa_ratio"] = layer.heads // layer.kv_heads
    return Workload.of(op, pass_, dtype="bfloat16", **sizes, **params)


class Attention:
    """Selected attention of one layer: as it is, and with its local blocks as dense rows."""

    def __init__(self, run: Run, layer: Layer, *lengths: int, share: int = 1) -> None:
        s, self.layer = run.sizes, layer
        heads, tokens = (layer.heads, layer.kv_heads, layer.kv_heads), sum(lengths)
        self.q, self.k, self.v = (normal(s, tokens, n, layer.dim, grad=True) for n in heads)
        self.cu_seqlens = offsets(s, *lengths)
        self.topk_idx = torch.cat([choose(s, layer, n, share) for n in lengths], 1).contiguous()
        self.leaves, self.scale = (self.q, self.k, self.v), layer.dim**-0.5

    def gathered(self) -> Tensor:
        args = (*self.leaves, self.topk_idx, self.layer.block, self.cu_seqlens)
        return ops.topk_sparse_attention(*args)

    def banded(self) -> Tensor:
        block = self.layer.block
        args = (*self.leaves, self.topk_idx, self.cu_seqlens, self.layer.local * block, block)
        return local_band.banded_attention(*args, self.scale)[0]

    def parts(self) -> Iterator[tuple[str, Callable[[], object]]]:
        """The band alone, and the rest from what it gave."""
        block, q, k, v = self.layer.block, *(x.detach() for x in self.leaves)
        sizes = (self.layer.local * block, block, self.scale)
        o, lse = local_band.band_attention_forward(q, k, v, self.cu_seqlens, *sizes)
        yield (
            "band alone",
            partial(local_band.band_attention_forward, q, k, v, self.cu_seqlens, *sizes),
        )
        blocks = (block, 0, self.layer.local, self.scale)
        args = (q, k, v, self.topk_idx, self.cu_seqlens, o, lse, *blocks)
        yield "the rest alone", partial(local_band.free_blocks_attention, *args)

    def forms(self, s: Sizes) -> dict[str, Callable[[], Tensor]]:
        """By the reference the band is only on kernels."""
        return {"gathered": self.gathered} | ({} if s.device == "cpu" else {"band": self.banded})


def time_attention(run: Run, what: str, a: Attention, how: str = "", *, backward: bool) -> None:
    """Both forms, forward and backward, and whether they agree and repeat."""
    s, tokens = run.sizes, a.q.shape[0]
    found: dict[str, list[Tensor]] = {}
    for form, call in a.forms(s).items():
        name = f"{form}{how}"
        with torch.no_grad():
            found[form] = [call()]
            same = torch.equal(found[form][0], call())
            run.time(f"{what} forward", name, tokens, call)
        if backward:
            grads = gradients(call, a.leaves)
            torch.manual_seed(0)
            first = grads()
            same = same and all(map(torch.equal, first, grads()))
            run.time(f"{what} backward", name, tokens, grads)
            del grads, first
        if not same:
            run.wrong[f"{what}, {name}, {tokens}: repeats"] = math.inf
    if "band" in found:
        run.agree(f"{what}, band{how}, {tokens}", found["band"][0], found["gathered"][0])
    if not how and s.device != "cpu":
        with torch.no_grad():
            for form, call in a.parts():
                run.time(f"{what} forward", form, tokens, call)


def two_pass_backward(run: Run, a: Attention) -> None:
    """M3's backward pass by plain Triton's kernels, beside the default's gradients."""
    if run.sizes.device == "cpu":
        return
    layer, tokens = a.layer, a.q.shape[0]
    w = attention_workload(layer, "selected_attention", "backward", block_size=layer.block)
    launch, (q, k, v) = run.kernel(w, "two_pass"), (x.detach() for x in a.leaves)
    with torch.no_grad():
        o, lse = selected_attention_forward(q, k, v, a.topk_idx, a.cu_seqlens, layer.block, a.scale)
    do, out = torch.randn_like(o), [torch.full_like(x, torch.nan) for x in (q, k, v)]
    args = (do, q, k, v, a.topk_idx, a.cu_seqlens, o, lse, *out, a.scale)
    launch(*args)
    for name, x, y in zip("qkv", out, torch.autograd.grad(a.gathered(), a.leaves, do), strict=True):
        run.agree(f"M3 attention backward, two_pass, {tokens}: d{name}", x, y)
    run.time("M3 attention backward", "two_pass", tokens, lambda: launch(*args))


def m3_attention(run: Run) -> None:
    s = run.sizes
    for tokens in s.lengths:
        a = Attention(run, s.m3, tokens)
        time_attention(run, "M3 attention", a, backward=tokens <= 32768)
        if tokens <= 32768:
            two_pass_backward(run, a)


def m3_shared(run: Run) -> None:
    """Selections that 16 neighbours share, also by union tiles."""
    s = run.sizes
    for tokens in s.lengths:
        a = Attention(run, s.m3, tokens, share=16)
        time_attention(run, "M3 attention", a, ", 16 neighbours agree", backward=False)
        if s.device == "cpu":
            continue
        w = attention_workload(s.m3, "selected_attention", "forward", block_size=s.m3.block)
        launch, (q, k, v) = run.kernel(w, "union_tiles"), (x.detach() for x in a.leaves)
        o, lse = torch.full_like(q, torch.nan), q.new_full(q.shape[:2], torch.nan).float()
        args = (q, k, v, a.topk_idx, a.cu_seqlens, o, lse, a.scale)
        launch(*args)
        with torch.no_grad():
            run.agree(f"M3 attention, union tiles, {tokens}", o, a.gathered())
        how = "union tiles, 16 neighbours agree"
        run.time("M3 attention forward", how, tokens, partial(launch, *args))


def m3_index(run: Run) -> None:
    s, layer = run.sizes, run.sizes.m3
    for tokens in s.lengths:
        q, k = normal(s, tokens, layer.kv_heads, layer.dim), normal(s, tokens, 1, layer.dim)
        ends, rule = offsets(s, tokens), {**INDEX, **layer.blocks}
        run.time(
            *("M3 index and top-k", "default", tokens),
            partial(ops.block_selection, q, k, None, ends, ends, **rule),
        )


def m3_index_loss(run: Run) -> None:
    s, layer = run.sizes, run.sizes.m3
    for tokens in s.lengths[:2]:
        a = Attention(run, layer, tokens)
        q, k = a.q.detach(), a.k.detach()
        index = normal(s, tokens, layer.kv_heads, layer.dim, grad=True)
        keys = normal(s, tokens, 1, layer.dim, grad=True)
        args, size = (q, k, index, keys, a.topk_idx, a.cu_seqlens), {"block_size": layer.block}
        call = partial(ops.index_loss, *args, **size)
        with torch.no_grad():
            run.time("M3 index loss forward", "default", tokens, call)
        grads = gradients(call, (index, keys))
        run.time("M3 index loss backward", "default", tokens, grads)


def m3_decode(run: Run) -> None:
    s, layer = run.sizes, run.sizes.m3
    for context in s.lengths[-2:] if len(s.lengths) > 1 else s.lengths:
        for batch in s.batches:
            cache = (batch, context, layer.kv_heads, layer.dim)
            index_q = normal(s, batch, layer.kv_heads, layer.dim)
            index_k, q = (
                normal(s, batch, context, 1, layer.dim),
                normal(s, batch, layer.heads, layer.dim),
            )
            k, v = normal(s, *cache), normal(s, *cache)
            at = torch.full((batch,), context - 1, dtype=torch.int32, device=s.device)
            slots = torch.arange(batch, dtype=torch.int32, device=s.device)
            rule: Any = {**INDEX, **layer.blocks}
            index = partial(ops.block_selection_decode, index_q, index_k, at, slots, **rule)
            blocks, size = index(), {"block_size": layer.block}
            args = (q, k, v, blocks, at, slots)
            attend = partial(ops.selected_attention_decode, *args, **size)
            branch = partial(
                ops.native_sparse_attention_decode,
                *(*args, torch.zeros_like(q), q.new_ones(*q.shape[:2], 3)),
                **{**size, "window_size": 0, "branches": ("selected",)},
            )
            run.agree(f"M3 decode, {batch} x {context}, a gated branch", branch(), attend())
            calls = {"index": index, "attention": attend, "attention, a gated branch": branch}
            calls |= _decode_schedules(run, args)
            for what, call in calls.items():
                one = graphed(call, s.device)
                run.time(f"M3 decode {what}", "graph", context, one, batch=batch)
            both = graphed(lambda a=index, b=attend: (a(), b()), s.device)
            run.time(f"M3 decode, batch {batch}", "graph", context, both)
            del k, v, args, index_k, index, attend, branch, calls, both


def _decode_schedules(run: Run, args: tuple[Tensor, ...]) -> dict[str, Callable[[], object]]:
    """The decoding kernel with more and fewer splits, and in other steps."""
    layer, q = run.sizes.m3, args[0]
    if run.sizes.device == "cpu":
        return {}
    sizes = {"block_size": layer.block, "topk": layer.topk}
    w, o = attention_workload(layer, "selected_attention", "decode", **sizes), torch.empty_like(q)
    found: dict[str, Callable[[], object]] = {}
    for knobs in ({"programs": 132}, {"programs": 264}, {"block_n": 128}, {"combine_warps": 1}):
        launch = run.kernel(w, "split_kv", **knobs)
        name = ", ".join(f"{knob} {value}" for knob, value in knobs.items())
        found[f"attention, {name}"] = partial(launch, *args, o, layer.dim**-0.5)
    return found


def minicpm_forward(run: Run) -> None:
    """Scores with the exact and with the coarse normalizer, and attention of 96 blocks."""
    s, layer, (size, stride) = run.sizes, run.sizes.minicpm, run.sizes.window
    for tokens in s.lengths[1:] or s.lengths:
        a = Attention(run, layer, tokens)
        ends, q, k = a.cu_seqlens, a.q.detach(), a.k.detach()

        def windows(times: int, k: Tensor = k, ends: Tensor = ends) -> tuple[Tensor, Tensor]:
            sizes = {"kernel_size": times * size, "kernel_stride": times * stride}
            return compress(k, None, None, ends, compress_type="avgpool", **sizes)

        def select(times: int, q: Tensor = q, ends: Tensor = ends) -> Tensor:
            (fine, fine_ends), (coarse, coarse_ends) = windows(1), windows(times)
            sizes = {"kernel_size": times * size, "kernel_stride": times * stride}
            lse = ops.compressed_lse(q, coarse, ends, coarse_ends, **sizes)
            rule: Any = {"kernel_size": size, "kernel_stride": stride, "score_pool": "max"}
            rule |= layer.blocks
            return ops.block_selection(q, fine, lse, ends, fine_ends, **rule)

        with torch.no_grad():
            for how, times in (("exact", 1), ("coarse", 4)):
                run.time("MiniCPM scores and top-k", how, tokens, partial(select, times))
            for form, call in a.forms(s).items():

                def both(call: Callable[[], Tensor] = call, select: Any = select) -> Tensor:
                    select(1)
                    return call()

                run.time("MiniCPM forward with scores", f"exact, {form}", tokens, both)
        time_attention(run, "MiniCPM attention", a, backward=True)


def minicpm_64_blocks(run: Run) -> None:
    """The published comparison: two sequences, 64 blocks."""
    s, layer = run.sizes, replace(run.sizes.minicpm, topk=run.sizes.minicpm.topk * 2 // 3)
    a = Attention(run, layer, *(s.lengths[-1:] * 2))
    time_attention(run, "MiniCPM 64 blocks", a, backward=True)


def dense(run: Run) -> None:
    """Dense attention on M3's heads, in this run; longer ones are in PUBLISHED."""
    s = run.sizes
    for tokens in s.lengths[:2]:
        heads = (s.m3.heads, s.m3.kv_heads, s.m3.kv_heads)
        q, k, v = (normal(s, 1, n, tokens, s.m3.dim, grad=True) for n in heads)
        call = partial(scaled_dot_product_attention, q, k, v, is_causal=True, enable_gqa=True)
        with torch.no_grad(), _cudnn(s):
            run.time("dense attention forward", "cuDNN, 64 heads over 4", tokens, call)


def _cudnn(s: Sizes) -> contextlib.AbstractContextManager[Any]:
    if s.device == "cpu":
        return contextlib.nullcontext()
    from torch.nn.attention import SDPBackend, sdpa_kernel

    return sdpa_kernel(SDPBackend.CUDNN_ATTENTION)


def m3_config(layer: Layer, layers: int = 1, **changes: Any) -> Any:
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

    return m3.MiniMaxM3VLTextConfig(
        **{
            "vocab_size": 97,
            "hidden_size": layer.hidden,
            "intermediate_size": 64,
            "dense_intermediate_size": 64,
            "shared_intermediate_size": 64,
            "num_hidden_layers": layers,
            "num_attention_heads": layer.heads,
            "num_key_value_heads": layer.kv_heads,
            "head_dim": layer.dim,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "index_n_heads": layer.kv_heads,
            "index_head_dim": layer.dim,
            "index_block_size": layer.block,
            "index_topk_blocks": layer.topk,
            "layer_types": ["minimax_m3_sparse"] * layers,
            "mlp_layer_types": ["dense"] * layers,
            "max_position_embeddings": 524288,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "partial_rotary_factor": 0.5,
            },
            "bos_token_id": None,
            "eos_token_id": None,
            "pad_token_id": 0,
            **changes,
        }
    )


def m3_model(config: Any, s: Sizes, attention: str) -> Any:
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

    import nsagen.integrations.transformers  # noqa: F401

    torch.manual_seed(0)  # weights are drawn on the CPU: the same for every device
    model = m3.MiniMaxM3VLForCausalLM._from_config(config, attn_implementation=attention)
    return model.to(s.device, s.dtype).eval()


def m3_in_transformers(run: Run) -> None:
    """One attention layer, projections and indexer included, by hooks around the module."""
    s = run.sizes
    model = m3_model(m3_config(s.m3), s, "nsagen")
    kinds = [("nsagen", n, False) for n in (s.lengths[0], s.lengths[-1])]
    kinds += [("nsagen, band", n, True) for n in (s.lengths[0], s.lengths[-1])]
    kinds += [("sdpa", s.lengths[0], False)] if run.times else []
    outputs: dict[str, Tensor] = {}
    for how, tokens, band in kinds:
        if time.monotonic() > run.end:
            run.skipped.append(f"M3 layer in Transformers, {how}, {tokens}")
            continue
        local_band.ASKED = "1" if band else "0"
        model.set_attn_implementation(how.split(",")[0])
        ids = torch.randint(1, 97, (1, tokens), generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            ms, peak, o = _layer(model, ids.to(s.device), s, 3 if run.times else 1)
        if run.times:
            row = {"what": "M3 layer in Transformers", "how": how, "tokens": tokens}
            run.rows.append({**row, "ms": ms, "peak_gib": peak})
            print(f"{row}: {ms:.3f} ms, {peak:.2f} GiB", flush=True)
        outputs[f"{how}, {tokens}"] = o.cpu()  # so that it is in no later peak
        del o
    for tokens in dict.fromkeys(tokens for _, tokens, _ in kinds):
        expected = outputs.get(f"nsagen, {tokens}")
        for how, limit in (("nsagen, band", 0.01), ("sdpa", 0.05)):  # its scores round otherwise
            found = outputs.get(f"{how}, {tokens}")
            if found is not None and expected is not None:
                run.agree(f"M3 layer in Transformers, {how}, {tokens}", found, expected, limit)


def _layer(model: Any, ids: Tensor, s: Sizes, calls: int) -> tuple[float, float, Tensor]:
    """(median ms of the attention module, peak GiB of the whole call, the module's output)."""
    stamps: list[Any] = []
    outputs: list[Tensor] = []

    def stamp() -> None:
        if s.device == "cpu":
            stamps.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        stamps.append(event)

    def after(_: Any, __: Any, found: Any) -> None:
        stamp()
        if len(stamps) == 2 * (calls + 1):
            outputs.append(found[0])

    module = model.model.layers[0].self_attn
    hooks = [
        module.register_forward_pre_hook(lambda *_: stamp()),
        module.register_forward_hook(after),
    ]
    if s.device != "cpu":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(calls + 1):
        model(ids, use_cache=False, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    pairs = list(zip(stamps[2::2], stamps[3::2], strict=True))
    if s.device == "cpu":
        return 1e3 * statistics.median(b - a for a, b in pairs), 0.0, outputs[0]
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() / 2**30
    return statistics.median(a.elapsed_time(b) for a, b in pairs), peak, outputs[0]


def small_models(run: Run) -> None:
    """Small random models in bfloat16 against float32 ones on the CPU. Rounding may choose other
    blocks, so the bound is wide; Transformers' own attention stands beside."""
    s, tiny = run.sizes, run.sizes.device == "cpu"
    cpu = replace(s, device="cpu", dtype=torch.float32)
    layer = s.m3 if tiny else Layer(32, 2, 128, 128, 4, 0, 1, 256)
    config = m3_config(layer, 2, initializer_range=0.05)
    ids = torch.randint(1, 97, (1, 100 if tiny else 1500), generator=torch.manual_seed(3))
    with torch.no_grad():
        if not run.times:
            m3_model(config, s, "nsagen")(ids.to(s.device))
            minicpm_model(replace(s.minicpm, topk=40, hidden=256), "nsagen").to(s.device, s.dtype)(
                ids.to(s.device)
            )
            return
        right = m3_model(config, cpu, "eager")(ids).logits
        errors = {
            kind: relative_error(m3_model(config, s, kind)(ids.to(s.device)).logits.cpu(), right)
            for kind in ("nsagen", "eager")
        }
    _models_agree(run, "MiniMaxM3", errors, s)
    layer = s.minicpm if tiny else replace(s.minicpm, topk=40, hidden=256)
    length = 100 if tiny else 3000
    ids = torch.randint(1, 97, (1, length), generator=torch.manual_seed(3))
    with torch.no_grad():
        models = {kind: minicpm_model(layer, kind) for kind in ("nsagen", "sdpa")}
        logits = {kind: model(ids).logits for kind, model in models.items()}
        errors = {
            kind: relative_error(
                model.to(s.device, s.dtype)(ids.to(s.device)).logits.cpu(), logits[kind]
            )
            for kind, model in models.items()
        }
    if relative_error(logits["nsagen"], logits["sdpa"]) < 1e-4:
        run.wrong["small MiniCPM: is sparse"] = 0.0
    _models_agree(run, "MiniCPM", errors, s)


def _models_agree(run: Run, name: str, errors: dict[str, float], s: Sizes) -> None:
    for kind, error in errors.items():
        run.rows.append({"what": f"small {name}", "how": kind, "tokens": 0, "error": error})
        print(f"small {name}, {kind}: relative error {error:.2e}", flush=True)
    ours, dense = errors.values()
    limit = 1e-5 if s.dtype == torch.float32 else max(2 * dense, 0.05)
    if not ours <= limit:
        run.wrong[f"small {name}"] = ours


def minicpm_model(layer: Layer, attention: str) -> Any:
    from nsagen.integrations.minicpm import MiniCPMConfig, MiniCPMForCausalLM

    sparse = {"kernel_size": 32, "kernel_stride": 16, "init_blocks": 1, "block_size": 64}
    window = (layer.local - 1) * layer.block
    if layer.block != 64:
        sparse |= {"kernel_size": 4, "kernel_stride": 2, "block_size": layer.block}
    sparse |= {"window_size": window, "topk": layer.topk - window // layer.block, "dense_len": 0}
    config = MiniCPMConfig(
        vocab_size=97,
        hidden_size=layer.hidden,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=layer.heads,
        num_key_value_heads=layer.kv_heads,
        head_dim=layer.dim,
        max_position_embeddings=8192,
        initializer_range=0.05,
        tie_word_embeddings=False,
        sparse_config=sparse if attention == "nsagen" else None,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    model = MiniCPMForCausalLM._from_config(config, attn_implementation=attention)
    return model.eval()


PARTS: dict[str, Callable[[Run], None]] = {
    "m3_attention": m3_attention,
    "minicpm_forward": minicpm_forward,
    "m3_index": m3_index,
    "minicpm_64_blocks": minicpm_64_blocks,
    "m3_decode": m3_decode,
    "m3_in_transformers": m3_in_transformers,
    "m3_index_loss": m3_index_loss,
    "m3_shared": m3_shared,
    "small_models": small_models,
    "dense": dense,
}
"""What is measured, what matters most first."""


def checked(s: Sizes = FULL) -> dict[str, tuple[Workload, str]]:
    """(workload, algorithm) of every kernel that is compared with its float64 reference; "": the
    default."""
    found: dict[str, tuple[Workload, str]] = {}
    index: Any = {"head_dim": s.m3.dim, "gqa_ratio": s.m3.kv_heads, **INDEX, **s.m3.blocks}
    scores: Any = {"kernel_size": s.window[0], "kernel_stride": s.window[1]}
    group = {"head_dim": s.minicpm.dim, "gqa_ratio": s.minicpm.heads // s.minicpm.kv_heads}
    chosen = {**group, **scores, **s.minicpm.blocks, "score_pool": "max"}
    for pass_ in ("forward", "decode"):
        for name, params in (("M3", index), ("MiniCPM", chosen)):
            w = Workload.of("block_selection", pass_, dtype="bfloat16", **params)
            found[f"{name} selection {pass_}"] = (w, "")
    lse = Workload.of("compressed_lse", "forward", dtype="bfloat16", **group, **scores)
    found["MiniCPM lse"] = (lse, "")
    for pass_ in ("forward", "backward"):
        sizes = {"head_dim": s.m3.dim, "index_head_dim": s.m3.dim, "block_size": s.m3.block}
        sizes["gqa_ratio"] = s.m3.heads // s.m3.kv_heads
        w = Workload.of("index_loss", pass_, dtype="bfloat16", **sizes)
        found[f"M3 index loss {pass_}"] = (w, "")
    for name, layer in (("M3", s.m3), ("MiniCPM", s.minicpm)):
        of = partial(attention_workload, layer)
        block = {"block_size": layer.block}
        window = {"window_size": layer.local * layer.block, **block}
        free = {**block, "init_blocks": 0, "local_blocks": layer.local}
        if layer.local > 2:  # the cases choose 16 blocks in all
            free["local_blocks"] = 9
        for pass_ in ("forward", "backward"):
            found[f"{name} attention {pass_}"] = (of("selected_attention", pass_, **block), "")
            w = of("sliding_window_attention", pass_, **window)
            found[f"{name} band {pass_}"] = (w, "")
        found[f"{name} the rest"] = (of("selected_attention", "forward", **free), "")
        w = of("selected_attention", "backward", **block)
        found[f"{name} pipeline"] = (w, "warp_specialized")
        step = of("selected_attention", "decode", **block, topk=layer.topk)
        found[f"{name} decode"] = (step, "")
    w = attention_workload(s.m3, "selected_attention", "forward", block_size=s.m3.block)
    found["M3 union tiles"] = (w, "union_tiles")
    return found


def check(run: Run, name: str) -> None:
    """Compare one kernel's outputs with the float64 reference."""
    from nsagen.codegen.template import default_schedule

    w, algorithm = checked()[name]
    algorithm = algorithm or default_schedule(w, SM90).algorithm
    launch = run.kernel(w, algorithm)
    sizes = sizes_for(w)
    if w.named().get("local_blocks"):  # such a kernel takes lists as selection writes them
        sizes = replace(sizes, any_order=False)
    case = cases_of(w).make_case(w, sizes, run.sizes.device, seed=1)
    launch(*case.args)
    for output, wanted in case.expected().items():
        out = case.outputs[output]
        if out.dtype.is_floating_point:
            run.agree(f"{name}: {output}", out, wanted)
        elif not torch.equal(out, wanted.to(out.device)):
            run.wrong[f"{name}: {output}"] = math.inf


def child(kind: str, name: str, folder: Path) -> dict[str, float]:
    """Compile a part's kernels by short calls, or check a kernel; what is wrong."""
    own = folder / f"{kind}-{name}".replace(" ", "-")  # no process reads what another is writing
    own.mkdir()
    run = Run(WARM, own, times=False)
    if kind == "part":
        PARTS[name](run)
    else:
        check(run, name)
    torch.cuda.synchronize()
    return run.wrong


def failure(error: BaseException) -> str:
    lines = "".join(traceback.format_exception(error)).strip().splitlines()
    return "\n".join(lines[-6:])


def compile_and_check(
    folder: Path, seconds: float, parts: list[str], kernels: list[str]
) -> tuple[dict[str, float], dict[str, str]]:
    """(wrong, failed) of all children; those that take too long count as failed."""
    jobs = [("part", name) for name in parts if name != "dense"]
    jobs += [("check", name) for name in kernels]
    wrong: dict[str, float] = {}
    failed: dict[str, str] = {}
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(16, os.cpu_count() or 8), mp_context=context)
    futures: dict[tuple[str, str], Future[dict[str, float]]] = {
        job: pool.submit(child, *job, folder) for job in jobs
    }
    end = time.monotonic() + seconds
    for (kind, name), future in futures.items():
        try:
            wrong |= future.result(max(0.0, end - time.monotonic()))
        except Exception as error:
            failed[f"{kind} {name}"] = failure(error)
    for process in list(getattr(pool, "_processes", {}).values()):
        process.terminate()
    pool.shutdown(wait=False, cancel_futures=True)
    return wrong, failed


def goals(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each goal beside the best row of it."""
    found = []
    for what, by_tokens in GOALS.items():
        for tokens, goal in by_tokens.items():
            same = [r for r in rows if r["what"] == what and r["tokens"] == tokens]
            same = [r for r in same if not any(n in r["how"] for n in ("agree", "alone", "sdpa"))]
            best = min(same, key=lambda r: r["ms"], default=None)
            row = {"what": what, "tokens": tokens, "goal_ms": goal}
            if best is not None:
                row |= {"ms": best["ms"], "how": best["how"], "met": best["ms"] <= goal}
            found.append(row)
    return found


def run_all(
    sizes: Sizes, seconds: float, parts: list[str], kernels: list[str] | None = None
) -> dict[str, Any]:
    """What the JSON file holds.

    Args:
        seconds: after which nothing is begun.
        kernels: names of `checked`; None: all.
    """
    start = time.monotonic()
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as name:  # Triton reads a kernel's file when it compiles
        run = Run(sizes, Path(name), end=start + seconds)
        if sizes.device != "cpu":
            run.wrong, failed = compile_and_check(
                Path(name), 0.45 * seconds, parts, list(checked()) if kernels is None else kernels
            )
            print(f"compiled and checked in {time.monotonic() - start:.0f} s", flush=True)
        for part in parts:
            try:
                PARTS[part](run)
            except Exception as error:
                failed[part] = failure(error)
            gc.collect()
            if sizes.device != "cpu":
                torch.cuda.empty_cache()
    versions = {"torch": torch.__version__, "triton": _triton()}
    device = torch.cuda.get_device_name() if sizes.device != "cpu" else "cpu"
    return {
        **{"device": device, **versions, "seconds": time.monotonic() - start},
        **{"rows": run.rows, "goals": goals(run.rows), "published": PUBLISHED},
        **{"wrong": run.wrong, "failed": failed, "skipped": run.skipped},
    }


def _triton() -> str:
    import triton

    return triton.__version__


def draw(content: dict[str, Any], out: Path) -> None:
    """Time over length: dense and others (dashed where measured elsewhere) beside ours."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    from nsagen.bench.plot import NSA, STYLE

    whats = ["M3 attention forward", "M3 index and top-k", "M3 attention backward"]
    whats += ["MiniCPM attention forward", "MiniCPM 64 blocks forward"]
    rows = [r for r in content["rows"] if "ms" in r and "alone" not in r["how"]]
    with mpl.rc_context(STYLE):
        figure, axes = plt.subplots(1, len(whats), figsize=(4.2 * len(whats), 4.2))
        for axis, what in zip(axes, whats, strict=True):
            ours = [r for r in rows if r["what"] == what]
            for i, how in enumerate(dict.fromkeys(r["how"] for r in ours)):
                of = [r for r in ours if r["how"] == how]
                style = {"color": NSA, "alpha": max(0.3, 1 - 0.2 * i), "marker": "os^vD"[i % 5]}
                xs, ys = [r["tokens"] for r in of], [r["ms"] for r in of]
                axis.plot(xs, ys, label=f"nsagen, {how}", **style)
            dense_rows = [r for r in rows if r["what"] == "dense attention forward"]
            if what == "M3 attention forward" and dense_rows:
                xs, ys = [r["tokens"] for r in dense_rows], [r["ms"] for r in dense_rows]
                axis.plot(xs, ys, "-", color="#1c2430", marker=".", label="dense cuDNN")
            for i, (peer, of_peer) in enumerate(content["published"].items()):
                points = {int(n): ms for n, ms in of_peer.get(what, {}).items()}
                if points:
                    style = {"linestyle": "--", "marker": "x", "color": f"C{i + 1}"}
                    axis.plot(*zip(*points.items(), strict=True), label=peer, **style)
            axis.set(title=what, xlabel="tokens", ylabel="ms", xscale="log", yscale="log")
            axis.set_xscale("log", base=2)
            axis.grid(linewidth=0.6)
            if axis.lines:
                axis.legend(fontsize=6, frameon=False)
        figure.suptitle(f"{content['device']}, bfloat16; dashed: measured or published elsewhere")
        figure.tight_layout()
        figure.savefig(out, dpi=130)
        plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=RESULTS / "nvidia-h200" / "family.json")
    parser.add_argument("--plot", type=Path, help="draw --out, which is there, and measure nothing")
    parser.add_argument("--dry", action="store_true", help="tiny sizes on a CPU")
    parser.add_argument("--seconds", type=float, default=145.0, help="begin nothing after these")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--no-checks", action="store_true", help="compare no kernel by itself")
    args = parser.parse_args()
    if args.plot:
        draw(json.loads(args.out.read_text()), args.plot)
        return 0
    seconds = math.inf if args.dry else args.seconds
    torch.set_num_threads(min(8, os.cpu_count() or 1))  # small models run on the CPU too
    kernels = [] if args.no_checks else None
    content = run_all(TINY if args.dry else FULL, seconds, args.parts, kernels)
    args.out.write_text(json.dumps(content, indent=1) + "\n")
    for row in content["goals"]:
        print(json.dumps(row))
    for key in ("wrong", "failed", "skipped"):
        print(f"{key}: {json.dumps(content[key], indent=1)}")
    return bool(content["wrong"] or content["failed"])


if __name__ == "__main__":
    sys.exit(main())
