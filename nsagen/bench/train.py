"""Forward and backward pass over one long sequence: each op, all of them, and dense attention.

nsagen bench train --seqlens 8192,32768,65536
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsagen import ops
from nsagen.bench.dense import DenseAttention, backends
from nsagen.bench.measure import (
    HOST_COLUMNS,
    Ceilings,
    HostCost,
    host_cost,
    measure_ceilings,
    milliseconds,
)
from nsagen.bench.member import Member, MemberInputs
from nsagen.bench.prefill import PARTS, beside_dense, cost_of
from nsagen.bench.results import Keep
from nsagen.bench.shape import Inputs, Shape
from nsagen.cases.base import Cost
from nsagen.runtime import Dispatcher

SEQLENS = (4096, 8192, 16384, 32768, 65536)

COLUMNS = {
    "what": "",
    "tokens": "",
    "forward_ms": ".3f",
    "backward_ms": ".3f",
    "floor_ms": ".3f",
    "tflops": ".0f",
    "of_dense": ".2f",
    "peak_gib": ".2f",
    **HOST_COLUMNS,
}


def run(
    shape: Shape | Member,
    seqlens: Sequence[int] = SEQLENS,
    dispatcher: Dispatcher | None = None,
    progress: Callable[[str, int, int], None] | None = None,
    keep: Keep | None = None,
) -> list[dict[str, Any]]:
    """One row per op and length.

    Args:
        keep: takes the rows so far after each length.

    Returns:
        rows with `what`, `tokens`, `forward_ms`, `backward_ms`, `floor_ms` and `tflops` (of the
        backward pass, whose products are 2.5 times the forward's), `of_dense` (backward over the
        fastest dense attention's) and, for the whole attention, `peak_gib`: the most memory held
        besides inputs, outputs and gradients.
    """
    ceilings = measure_ceilings()
    rows: list[dict[str, Any]] = []
    for done, tokens in enumerate(seqlens):
        if progress:
            progress(f"{tokens} tokens", done, len(seqlens))
        rows += _rows_of_length(shape, tokens, dispatcher, ceilings)
        if keep:
            keep(rows)
        gc.collect()
        torch.cuda.empty_cache()
    return rows


def _rows_of_length(
    shape: Shape | Member, tokens: int, dispatcher: Dispatcher | None, ceilings: Ceilings
) -> list[dict[str, Any]]:
    def row(what: str, times: tuple[float, float], host: HostCost, cost: Cost) -> dict[str, Any]:
        backward = Cost(2.5 * cost.flops, 2 * cost.bytes)
        return {
            "what": what,
            "tokens": tokens,
            "forward_ms": times[0],
            "backward_ms": times[1],
            "floor_ms": ceilings.floor_ms(backward),
            "tflops": backward.flops / times[1] / 1e9,
            **host.columns(sum(times)),
        }

    rows: list[dict[str, Any]] = []
    for backend in backends():
        dense = DenseAttention(shape, tokens, backend, requires_grad=True)
        leaves = (dense.q, dense.k, dense.v)
        times = forward_and_backward(dense.forward, leaves)
        host = host_of_training(dense.forward, leaves, sum(times))
        rows.append(row(f"dense attention ({backend})", times, host, dense.cost))
        del dense, leaves
    calls: Mapping[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]]
    inputs: Inputs | MemberInputs
    if isinstance(shape, Member):
        inputs = MemberInputs.random(shape, tokens, dispatcher, requires_grad=True)
        calls, parts = inputs.training_calls(), ("selected_attention",)
    else:
        inputs = Inputs.random(shape, tokens, dispatcher, requires_grad=True)
        calls, parts = _branch_calls(inputs), PARTS
    costs = {op: cost_of(shape, op, "forward", tokens) for op in parts}
    for op, (call, leaves) in calls.items():
        times = forward_and_backward(call, leaves)
        cost = costs.get(op) or cost_of(shape, op, "forward", tokens)
        rows.append(row(op, times, host_of_training(call, leaves, sum(times)), cost))
    whole = Cost(sum(c.flops for c in costs.values()), sum(c.bytes for c in costs.values()))
    times = forward_and_backward(inputs.attention, inputs.leaves)
    host = host_of_training(inputs.attention, inputs.leaves, sum(times))
    rows.append({**row("attention", times, host, whole), "peak_gib": peak_memory(inputs)})
    return beside_dense(rows, "backward_ms")


def _branch_calls(
    inputs: Inputs,
) -> dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]]:
    """Each differentiable op of the attention, and the tensors whose gradients it gives."""
    s = inputs.shape
    with torch.no_grad():
        topk_idx = inputs.compressed()[1]
    qkv = (inputs.q, inputs.k, inputs.v)
    branches = [torch.randn_like(inputs.q, requires_grad=True) for _ in range(3)]

    def selected() -> Tensor:
        return ops.topk_sparse_attention(
            *qkv, topk_idx, s.block_size, inputs.cu_seqlens, dispatcher=inputs.dispatcher
        )

    def sliding() -> Tensor:
        return ops.sliding_window_attention(
            *qkv, s.window_size, inputs.cu_seqlens, dispatcher=inputs.dispatcher
        )

    def gated() -> Tensor:
        one, two, three = branches
        return ops.gated_sum(one, two, three, inputs.gate, dispatcher=inputs.dispatcher)

    return {
        "compressed_attention": (
            lambda: inputs.compressed()[0],
            (inputs.q, inputs.ck, inputs.cv),
        ),
        "selected_attention": (selected, qkv),
        "sliding_window_attention": (sliding, qkv),
        "gated_sum": (gated, (*branches, inputs.gate)),
    }


def forward_and_backward(
    call: Callable[[], Tensor], leaves: Sequence[Tensor]
) -> tuple[float, float]:
    """Median milliseconds of a call, and of the gradients of its output."""
    with torch.no_grad():
        forward = milliseconds(call)
    output = call()
    gradient = torch.randn_like(output)
    backward = milliseconds(
        lambda: torch.autograd.grad(output, leaves, gradient, retain_graph=True)
    )
    return forward, backward


def host_of_training(
    call: Callable[[], Tensor], leaves: Sequence[Tensor], gpu_ms: float
) -> HostCost:
    """What an eager call and the gradients of its output cost on the host; they take the GPU
    `gpu_ms`."""
    gradient = torch.randn_like(call())
    return host_cost(lambda: torch.autograd.grad(call(), leaves, gradient), gpu_ms)


def peak_memory(inputs: Inputs | MemberInputs) -> float:
    """Most GiB held during forward and backward, besides inputs, output and gradients."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = inputs.attention()
    gradient = torch.randn_like(output)
    gradients = torch.autograd.grad(output, inputs.leaves, gradient)
    kept = sum(x.nbytes for x in (output, gradient, *gradients))
    return (torch.cuda.max_memory_allocated() - before - kept) / 2**30
