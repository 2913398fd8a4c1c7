"""One decoding step: buffers that never move, and the CUDA graph that replays it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsagen.model.fused import CAPTURING, WeightState, refresh_joined, state_of
from nsagen.model.packing import to_device
from nsagen.model.sampling import SamplingConfig, SamplingRows


@dataclass(frozen=True)
class Row:
    """A row of a step: one sequence.

    Attributes:
        slot: its place in the cache.
        position: of its newest token, which the step gives to the model.
        sampling: how the next one is chosen.
    """

    slot: int
    position: int
    sampling: SamplingConfig


class DecodeStep:
    """Gives each row's newest token to the model and puts the next one in its place.

    All state is in device buffers whose memory never moves, and a step reads none of it on the
    host. So a CUDA graph of a step, once captured for a number of rows, replays for any sequences
    in them.

    Args:
        model: what decodes; its weights may change in place, and graphs are captured again when
            they move.
        cache: the model's.

    Attributes:
        newest: int64 [slots], by slot, the newest tokens of sequences that are in no row.
        tokens: int64 [rows], the rows' newest tokens.
        positions: int32 [rows], their positions; -1: an idle row.
        slots: int32 [rows].
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        rows, device = cache.limits.max_batch_size, cache.device
        self.newest = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.slots = torch.zeros(rows, dtype=torch.int32, device=device)
        self.sampling = SamplingRows(rows, device)
        self._rows: tuple[Row, ...] = ()
        self._graphs: dict[tuple[int, bool], torch.cuda.CUDAGraph] = {}
        self._state = WeightState((), ())
        self._pool: Any = None
        self._stream: torch.cuda.Stream | None = None

    def fill(self, rows: Sequence[Row], kept: Sequence[int]) -> None:
        """Change which sequences the rows hold.

        Args:
            rows: the new ones; those without an old row find their newest token in `newest`.
            kept: old rows whose sequences are among the new ones.
        """
        if kept:
            old = self._to_device([self._rows[i].slot for i in kept], torch.int64)
            self.newest[old] = self.tokens[self._to_device(list(kept), torch.int64)]
        count = len(rows)
        slots = self._to_device([row.slot for row in rows], torch.int32)
        self.slots.zero_()[:count] = slots
        self.positions.fill_(-1)
        self.positions[:count] = self._to_device([row.position for row in rows], torch.int32)
        self.tokens[:count] = self.newest[slots.to(torch.int64)]
        self.sampling.fill([row.sampling for row in rows])
        self._rows = tuple(rows)

    def run(self, count: int, *, cuda_graph: bool) -> Tensor:
        """Run a step of the first `count` rows; idle rows do nothing.

        Returns:
            `tokens[:count]`, which the next step changes.
        """
        sampled = any(row.sampling.temperature > 0 for row in self._rows)
        if not (cuda_graph and self.cache.device.type == "cuda"):
            return self.compute(count, sampled)
        state = state_of(self.model)
        if state is None:  # hooks and foreign modules run in Python, at every step
            return self.compute(count, sampled)
        if state.addresses != self._state.addresses:
            self._graphs.clear()
            self._pool = None  # the allocator drops a pool with the last graph that used it
        elif state.contents != self._state.contents:
            refresh_joined(self.model)
        if (count, sampled) not in self._graphs:
            self._graphs[count, sampled] = self._capture(count, sampled)
            state = state_of(self.model) or state
        self._state = state
        self._graphs[count, sampled].replay()
        return self.tokens[:count]

    def compute(self, count: int, sampled: bool) -> Tensor:
        """The work of `run`, launch by launch."""
        tokens, positions = self.tokens[:count], self.positions[:count]
        logits = self.model.step_logits(tokens, positions, self.slots[:count], self.cache)
        chosen = self.sampling.sample(logits, positions + 1) if sampled else logits.argmax(-1)
        tokens.copy_(chosen)
        positions.add_(positions >= 0)
        return tokens

    def _capture(self, count: int, sampled: bool) -> torch.cuda.CUDAGraph:
        tokens, positions = self.tokens.clone(), self.positions.clone()
        self.positions.fill_(-1)  # idle rows change no cache: warming up leaves no trace
        try:
            with CAPTURING:
                return self._captured(count, sampled)
        finally:
            self.tokens.copy_(tokens)
            self.positions.copy_(positions)

    def _captured(self, count: int, sampled: bool) -> torch.cuda.CUDAGraph:
        device = self.cache.device
        # Without a stream of its own, PyTorch captures on one that belongs to the GPU which was
        # current at the process's first capture. Graphs that share a pool share their stream.
        side = self._stream = self._stream or torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # loads kernels and workspaces, which a capture may not
            for _ in range(2):
                self.compute(count, sampled)
        torch.cuda.current_stream(device).wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may launch and allocate meanwhile: that does not touch this capture.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, side, capture_error_mode=mode):
            self.compute(count, sampled)
        return graph

    def _to_device(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return to_device(values, dtype, self.cache.device)
