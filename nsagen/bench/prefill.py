"""Forward pass over one long sequence: each op, the whole attention, and dense attention.

nsagen bench prefill --seqlens 8192,32768,65536
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from nsagen import ops
from nsagen.bench.dense import DenseAttention, backends
from nsagen.bench.measure import (
    HOST_COLUMNS,
    Ceilings,
    host_cost,
    measure_ceilings,
    milliseconds,
)
from nsagen.bench.member import Member, MemberInputs
from nsagen.bench.public import public_calls
from nsagen.bench.results import Keep
from nsagen.bench.selections import learned_selection
from nsagen.bench.shape import Inputs, Shape
from nsagen.cases.base import Cost, Sizes, cases_of
from nsagen.ops.block_selection import block_selection_forward
from nsagen.ops.compressed_attention import compressed_attention_forward
from nsagen.ops.layout import positions_in_sequence
from nsagen.runtime import Dispatcher
from nsagen.runtime import dispatcher as registry

SEQLENS = (4096, 8192, 16384, 32768, 65536, 131072)

PARTS = (
    "compressed_attention",
    "block_selection",
    "selected_attention",
    "sliding_window_attention",
    "gated_sum",
)
"""The ops that make up `attention`; compression and rope come before it."""

COLUMNS = {
    "what": "",
    "tokens": "",
    "ms": ".3f",
    "floor_ms": ".3f",
    "of_floor": ".0%",
    "tflops": ".0f",
    "of_dense": ".2f",
    **HOST_COLUMNS,
}


def run(
    shape: Shape | Member,
    seqlens: Sequence[int] = SEQLENS,
    dispatcher: Dispatcher | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    selection: str = "random",
    keep: Keep | None = None,
    only: Collection[str] = (),
) -> list[dict[str, Any]]:
    """One row per op and length.

    Args:
        keep: takes the rows so far after each length.
        only: measure these rows alone, beside dense attention; by default all.
        selection: which blocks selected attention reads; see `nsagen.bench.selections`. Public
            implementations choose by themselves, and have rows with "random" only.

    Returns:
        rows with `what`, `tokens`, `ms`, `floor_ms` (see `Ceilings.floor_ms`), `of_floor` (the
        floor's share of the time), `tflops`, `of_dense` (time over the fastest dense attention's),
        and what an eager call costs the host: `host_ms`, `launches`, and `bound`, "host" where that
        is longer.
    """
    ceilings = measure_ceilings()
    rows: list[dict[str, Any]] = []
    for done, tokens in enumerate(seqlens):
        if progress:
            progress(f"{tokens} tokens", done, len(seqlens))
        rows += _rows_of_length(shape, tokens, dispatcher, ceilings, selection, only)
        if keep:
            keep(rows)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


@torch.no_grad()
def _rows_of_length(
    shape: Shape | Member,
    tokens: int,
    dispatcher: Dispatcher | None,
    ceilings: Ceilings,
    selection: str,
    only: Collection[str],
) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []

    def row(what: str, call: Callable[[], object], cost: Cost) -> None:
        if only and what not in only and not what.startswith("dense"):
            return
        ms, floor = milliseconds(call), ceilings.floor_ms(cost)
        found = {
            "what": what,
            "tokens": tokens,
            "ms": ms,
            "floor_ms": floor,
            "of_floor": floor / ms,
            "tflops": cost.flops / ms / 1e9,
            **host_cost(call, ms).columns(ms),
        }
        rows.append(found)

    for backend in backends():
        dense = DenseAttention(shape, tokens, backend)
        row(f"dense attention ({backend})", dense.forward, dense.cost)
        del dense
    if isinstance(shape, Member):
        member, total = MemberInputs.random(shape, tokens, dispatcher), Cost(0, 0)
        for op, call in member.forward_calls():
            cost = cost_of(shape, op, "forward", tokens)
            total = Cost(total.flops + cost.flops, total.bytes + cost.bytes)
            row(op, call, cost)
        row("attention", member.attention, total)
        return beside_dense(rows, "ms")
    inputs = Inputs.random(shape, tokens, dispatcher)
    total, topk_idx = Cost(0, 0), None
    if selection == "learned":
        topk_idx = learned_selection(shape.kv_heads, tokens, inputs.q.device)
    for op, call in _op_calls(inputs, topk_idx):
        cost = cost_of(shape, op, "forward", tokens)
        if op in PARTS:
            total = Cost(total.flops + cost.flops, total.bytes + cost.bytes)
        row(op, call, cost)
    if topk_idx is not None:
        row("attention", partial(inputs.attention_over, topk_idx), total)
        return beside_dense(rows, "ms")
    row("attention", inputs.attention, total)
    for name, call in public_calls(inputs):
        row(name, call, total)
    return beside_dense(rows, "ms")


def beside_dense(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """The rows with `of_dense`: a time over the fastest dense attention's of the same name."""
    fastest = min(row[name] for row in rows if row["what"].startswith("dense"))
    return [{**row, "of_dense": row[name] / fastest} for row in rows]


def cost_of(shape: Shape | Member, op: str, pass_: str, tokens: int) -> Cost:
    """The least work of an op on one sequence."""
    sizes = Sizes((tokens,), shape.heads_of(op), topk=shape.topk)
    workload = shape.workload(op, pass_)
    return cases_of(workload).make_case(workload, sizes, "meta").cost


def _op_calls(
    inputs: Inputs, topk_idx: Tensor | None = None
) -> Iterator[tuple[str, Callable[[], object]]]:
    """Each op of the forward pass, on what the earlier ones make, or on given blocks."""
    s, key = inputs.shape, registry.DEFAULT if inputs.dispatcher is None else inputs.dispatcher.key
    window = (s.kernel_size, s.kernel_stride)
    scale = s.head_dim**-0.5
    if s.compress_type == "avgpool":
        yield (
            "compress",
            partial(
                ops.avgpool_compress,
                inputs.k,
                None,
                inputs.cu_seqlens,
                *window,
                dispatcher=inputs.dispatcher,
            ),
        )
    positions = positions_in_sequence(inputs.cu_seqlens, inputs.tokens)
    angles = torch.rand(inputs.tokens, s.head_dim // 2, device=inputs.q.device)
    tables = (angles.cos(), angles.sin(), positions)
    yield "rope", partial(ops.rope, inputs.q, *tables, dispatcher=inputs.dispatcher)

    of_windows = (inputs.cu_seqlens, inputs.window_cu_seqlens, *window)
    compressed = partial(
        compressed_attention_forward, inputs.q, inputs.ck, inputs.cv, *of_windows, scale, key
    )
    yield "compressed_attention", compressed
    o_compressed, lse = compressed()
    blocks = (s.block_size, s.topk, s.init_blocks, s.local_blocks)
    selection = partial(
        block_selection_forward,
        inputs.q,
        inputs.ck,
        lse,
        *of_windows,
        *blocks,
        scale,
        dispatcher=key,
    )
    yield "block_selection", selection
    topk_idx = selection() if topk_idx is None else topk_idx
    selected = partial(
        ops.topk_sparse_attention,
        *(inputs.q, inputs.k, inputs.v, topk_idx, s.block_size, inputs.cu_seqlens),
        dispatcher=inputs.dispatcher,
    )
    yield "selected_attention", selected
    sliding = partial(
        ops.sliding_window_attention,
        *(inputs.q, inputs.k, inputs.v, s.window_size, inputs.cu_seqlens),
        dispatcher=inputs.dispatcher,
    )
    yield "sliding_window_attention", sliding
    branches = (o_compressed, selected(), sliding())
    yield "gated_sum", partial(ops.gated_sum, *branches, inputs.gate, dispatcher=inputs.dispatcher)
