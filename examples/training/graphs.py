"""A step's loss and gradients as a CUDA graph: one launch of the host in place of thousands.

The exchanges of ranks that share sequences or heads are part of the graph. Clipping and the
optimizer's update, a few launches, run after it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .config import ModelKind
from .data import Packed
from .parallel import Parallel, World

Recorded = tuple[list[Tensor], Callable[[], object]]
"""Results of a call, and what computes them again in the same place."""

DEVICES = ("cuda",)
WARM_UP = 3
"""Calls before a capture, which load kernels and connect ranks."""

_log = logging.getLogger(__name__)


def check(kind: ModelKind, world: World, parallel: Parallel | None) -> None:
    """Raise ValueError for a run whose steps cannot be captured."""
    wrong = ""
    if world.device.type not in DEVICES:
        wrong = f"needs a GPU; got {world.device.type}"
    elif kind != "nsa":
        wrong = f"takes --model nsa: others read lengths on the host; got {kind}"
    elif parallel == "fsdp" or (world.tp > 1 and world.shares > 1):
        wrong = f"takes whole weights; got fsdp, --tp {world.tp} and {world.size} processes"
    if wrong:
        raise ValueError(f"--graph {wrong}; leave it out")


class Graphed:
    """Replays a computation of a step's loss and gradients, which the first call captures.

    Later batches must have as many tokens and sequences; where ranks share sequences, of the same
    lengths. Others are computed without the graph, and a line of the log says so, once.

    Args:
        compute: the loss of some parts, by a number of scored tokens on the device; it adds to the
            parameters' gradients.
        parameters: those of the model.
    """

    def __init__(
        self, compute: Callable[[list[Packed], Tensor], Tensor], parameters: Sequence[nn.Parameter]
    ) -> None:
        self._compute, self._parameters = compute, list(parameters)
        self._parts: list[Packed] = []
        self._scored = torch.empty(())
        self._held: list[nn.Parameter] = []
        self._results: list[Tensor] = []
        self._replay: Callable[[], object] | None = None
        self._told = False

    def __call__(self, parts: list[Packed], scored: int) -> Tensor:
        """The loss; gradients are in place of the parameters' until the next call."""
        if self._replay is None:
            self._parts = parts  # nobody else writes to these
            self._scored = torch.tensor(float(scored), device=parts[0].input_ids.device)
            self._results, self._replay = record(self._run)
        elif _looks(parts) != _looks(self._parts):
            if not self._told:
                _log.warning("--graph: a batch of other lengths than the first; runs without it")
            self._told = True
            return self._compute(parts, torch.full_like(self._scored, scored))
        for own, part in zip(self._parts, parts, strict=True):
            for mine, new in zip(_tensors(own), _tensors(part), strict=True):
                mine.copy_(new)
        self._scored.fill_(scored)
        self._replay()
        loss, *gradients = self._results
        for parameter, gradient in zip(self._held, gradients, strict=True):
            parameter.grad = gradient
        return loss.clone()

    def _run(self) -> list[Tensor]:
        for parameter in self._parameters:
            parameter.grad = None
        loss = self._compute(self._parts, self._scored)
        self._held = [p for p in self._parameters if p.grad is not None]
        return [loss, *(p.grad for p in self._held if p.grad is not None)]


def _looks(parts: list[Packed]) -> list[Any]:
    """What must be alike; a shard is the same one for batches of the same lengths."""
    return [
        (
            p.input_ids.shape,
            p.cu_seqlens.shape if isinstance(p.cu_seqlens, Tensor) else p.cu_seqlens,
        )
        for p in parts
    ]


def _tensors(part: Packed) -> list[Tensor]:
    return [x for x in (part.input_ids, part.targets, part.cu_seqlens) if isinstance(x, Tensor)]


def record(call: Callable[[], list[Tensor]]) -> Recorded:
    """Capture a call on the current GPU."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    # The backward pass and NCCL have threads of their own, whose calls do not end this capture.
    with torch.cuda.graph(graph, stream=side, capture_error_mode="thread_local"):
        results = call()
    return results, graph.replay
