"""Parts of family.py: the ops of M3's and MiniCPM4's layers."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from family_run import (
    INDEX,
    Layer,
    Run,
    Sizes,
    attention_workload,
    gradients,
    graphed,
    normal,
    offsets,
)
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nsagen import ops
from nsagen.core.workload import CACHE_DTYPES
from nsagen.ops import local_band, reference
from nsagen.ops.compress import compress
from nsagen.ops.selected_attention import selected_attention_forward


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
        time_attention(run, "M3 attention", a, backward=True)
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
    """Over the selected blocks; then the dense warm-up, beside PyTorch's by the reference."""
    s, layer = run.sizes, run.sizes.m3
    forms = {
        "default": ops.index_loss,
        "dense": ops.index_loss,
        "dense, PyTorch": reference.index_loss,
    }
    for how, op in forms.items():
        for tokens in s.lengths[: 1 if op is reference.index_loss else 2]:
            a = Attention(run, layer, tokens)
            q, k = a.q.detach(), a.k.detach()
            index = normal(s, tokens, layer.kv_heads, layer.dim, grad=True)
            keys = normal(s, tokens, 1, layer.dim, grad=True)
            blocks = a.topk_idx if how == "default" else None
            call = partial(op, q, k, index, keys, blocks, a.cu_seqlens, block_size=layer.block)
            with torch.no_grad():
                run.time("M3 index loss forward", how, tokens, call)
            run.time("M3 index loss backward", how, tokens, gradients(call, (index, keys)))


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
            attend = partial(ops.selected_attention_decode, q, k, v, blocks, at, slots, **size)
            for what, call in {"index": index, "attention": attend}.items():
                one = graphed(call, s.device)
                run.time(f"M3 decode {what}", "graph", context, one, batch=batch)
            both = graphed(lambda a=index, b=attend: (a(), b()), s.device)
            run.time(f"M3 decode, batch {batch}", "graph", context, both)
            del k, v, index_k, index, attend, both


def narrow_decode(run: Run) -> None:
    """A step of M3's and of MiniCPM's attention, selection too, on caches of each dtype."""
    s, context = run.sizes, run.sizes.lengths[-1]
    for batch in s.batches:
        at = torch.full((batch,), context - 1, dtype=torch.int32, device=s.device)
        slots = torch.arange(batch, dtype=torch.int32, device=s.device)
        for name, layer in (("M3", s.m3), ("MiniCPM", s.minicpm)):
            size, stride = (1, 1) if name == "M3" else s.window
            rule: Any = {"kernel_size": size, "kernel_stride": stride, "score_pool": "max"}
            rule = {**INDEX, **layer.blocks} if name == "M3" else {**rule, **layer.blocks}
            q = normal(s, batch, layer.heads, layer.dim)
            of_scores = q[:, : layer.kv_heads] if name == "M3" else q
            heads, entries = 1 if name == "M3" else layer.kv_heads, (context - size) // stride + 1
            caches = [normal(s, batch, entries, heads, layer.dim)]
            caches += [normal(s, batch, context, layer.kv_heads, layer.dim) for _ in range(2)]
            for cache_dtype in ("", *CACHE_DTYPES):
                (keys, k, v), scales = _stored(caches, cache_dtype)
                names = ("k_scale", "v_scale")
                select = partial(ops.block_selection_decode, of_scores, keys, at, slots, **rule)
                select = partial(select, k_scale=scales[0])
                args = (q, k, v, select(), at, slots)
                attend = partial(ops.selected_attention_decode, *args, block_size=layer.block)
                attend = partial(attend, **dict(zip(names, scales[1:], strict=True)))
                both = graphed(lambda a=select, b=attend: (a(), b()), s.device)
                how = cache_dtype or str(s.dtype)[6:]
                run.time(f"{name} decode on a cache of", how, context, both, batch=batch)
                del keys, k, v, args, select, attend, both


def _stored(
    caches: list[Tensor], cache_dtype: str
) -> tuple[Sequence[Tensor], Sequence[Tensor | None]]:
    """Caches in a dtype, and the scales of their rows, which lie with heads before entries."""
    if not cache_dtype:
        return caches, [None] * len(caches)
    pairs = [reference.quantize(cache, getattr(torch, cache_dtype)) for cache in caches]
    scales = [scale.transpose(1, 2).contiguous().transpose(1, 2) for _, scale in pairs]
    return [rows for rows, _ in pairs], scales


def minicpm_forward(run: Run) -> None:
    """Scores with the exact and with the coarse normalizer, and attention of 96 blocks."""
    s, layer, (size, stride) = run.sizes, run.sizes.minicpm, run.sizes.window
    for tokens in s.lengths[1:] or s.lengths:
        a = Attention(run, layer, tokens)
        ends, q, k = a.cu_seqlens, a.q.detach(), a.k.detach()

        def windows(times: int, k: Tensor = k, ends: Tensor = ends) -> tuple[Tensor, Tensor]:
            sizes: Any = {"kernel_size": times * size, "kernel_stride": times * stride}
            return compress(k, None, None, ends, compress_type="avgpool", **sizes)

        def select(times: int, q: Tensor = q, ends: Tensor = ends) -> Tensor:
            (fine, fine_ends), (coarse, coarse_ends) = windows(1), windows(times)
            sizes: Any = {"kernel_size": times * size, "kernel_stride": times * stride}
            lse = ops.compressed_lse(q, coarse, ends, coarse_ends, **sizes)
            rule: Any = {"kernel_size": size, "kernel_stride": stride, "score_pool": "max"}
            rule |= layer.blocks
            return ops.block_selection(q, fine, lse, ends, fine_ends, **rule)

        with torch.no_grad():
            for how, times in (("exact", 1), ("coarse", 4)):
                run.time("MiniCPM scores and top-k", how, tokens, partial(select, times))
            for form, call in a.forms(s).items():
                for how, times in (("exact", 1), ("coarse", 4)):
                    both = partial(_in_turn, partial(select, times), call)
                    run.time("MiniCPM forward with scores", f"{how}, {form}", tokens, both)
        time_attention(run, "MiniCPM attention", a, backward=True)


def _in_turn(*calls: Callable[[], object]) -> None:
    for call in calls:
        call()


def minicpm_64_blocks(run: Run) -> None:
    """The published comparison: two sequences, 64 blocks."""
    s, layer = run.sizes, replace(run.sizes.minicpm, topk=run.sizes.minicpm.topk * 2 // 3)
    a = Attention(run, layer, *(s.lengths[-1:] * 2))
    time_attention(run, "MiniCPM 64 blocks", a, backward=True)


def moba(run: Run) -> None:
    """Each query head selects for itself."""
    s = run.sizes
    tokens = s.lengths[:2][-1]
    for layer in s.moba:
        a, what = Attention(run, layer, tokens), f"MoBA {layer.block} x {layer.topk}"
        with torch.no_grad():
            run.time(f"{what} forward", "gathered", tokens, a.gathered)
        run.time(f"{what} backward", "gathered", tokens, gradients(a.gathered, a.leaves))


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
