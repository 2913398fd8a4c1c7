"""One decoding step: buffers that never move, and the CUDA graphs that replay it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nsagen.model.drafts import MOST_DRAFTED
from nsagen.model.fused import CAPTURING, WeightState, refresh_joined, state_of
from nsagen.model.packing import to_device
from nsagen.model.sampling import SamplingConfig, SamplingRows

if TYPE_CHECKING:
    from nsagen.model.cache import Overwritten


Kind = tuple[int, bool, int]
"""What a step is captured for: its rows, whether any of them is sampled, tokens of each."""


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
    in them. A step that verifies drafts gives several tokens of each row to the model. It takes
    those that the model would have chosen itself, and the one that it chooses after them.

    Args:
        model: what decodes; its weights may change in place, and graphs are captured again when
            they move.
        cache: the model's.

    Attributes:
        newest: int64 [slots], by slot, the newest tokens of sequences that are in no row.
        tokens: int64 [rows], the rows' newest tokens.
        positions: int32 [rows], their positions; -1: an idle row.
        slots: int32 [rows]; idle rows have the slots of no row, so that all are different.
        most_drafted: tokens of a draft.
        drafts: int64 [most_drafted, rows], down a column.
        drafted: int32 [rows], how many of these there are.
        verified: int64 [most_drafted + 2, rows]: how many tokens of a draft were right, and under
            that the chosen ones, of which the first `1 + that` count.
    """

    def __init__(self, model: Any, cache: Any) -> None:
        self.model, self.cache = model, cache
        rows, device = cache.limits.max_batch_size, cache.device
        self.newest = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.positions = torch.full((rows,), -1, dtype=torch.int32, device=device)
        self.slots = torch.arange(rows, dtype=torch.int32, device=device)
        self.most_drafted = most = min(MOST_DRAFTED, cache.most_together - 1)
        self.drafts = torch.zeros(most, rows, dtype=torch.int64, device=device)
        self.drafted = torch.zeros(rows, dtype=torch.int32, device=device)
        self.verified = torch.zeros(most + 2, rows, dtype=torch.int64, device=device)
        self.sampling = SamplingRows(rows, device)
        self._rows: tuple[Row, ...] = ()
        self._graphs: dict[Kind, tuple[torch.cuda.CUDAGraph, Overwritten | None]] = {}
        self._before: Overwritten | None = None
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
        taken = [row.slot for row in rows]
        others = sorted(set(range(len(self.slots))) - set(taken))
        self.slots.copy_(self._to_device(taken + others, torch.int32))
        slots = self.slots[:count]
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
        self._run((count, self._sampled, 1), cuda_graph)
        return self.tokens[:count]

    def verify(self, drafts: Sequence[Sequence[int]], count: int, *, cuda_graph: bool) -> Tensor:
        """Run a step of the first `count` rows and of what may follow their newest tokens.

        Args:
            drafts: of each row, at most `most_drafted` tokens; none after the last row with any.

        Returns:
            the first columns of `verified`, [2 + n, count] with n >= the longest draft.
        """
        longest = max(map(len, drafts))
        # A few sizes, not all: each is captured once.
        tokens = min(1 << longest.bit_length(), self.most_drafted + 1)
        self.drafted.zero_()[: len(drafts)] = self._to_device([*map(len, drafts)], torch.int32)
        rows = [[*draft, *[0] * (tokens - 1 - len(draft))] for draft in drafts]
        columns = to_device([t for row in rows for t in row], torch.int64, self.cache.device)
        self.drafts[: tokens - 1, : len(drafts)] = columns.view(len(drafts), tokens - 1).T
        self._run((count, self._sampled, tokens), cuda_graph)
        return self.verified[: 1 + tokens, :count]

    def keep(self) -> None:
        """Keep what the last step wrote: `take_back` is for the next one."""
        self._before = None

    def take_back(self) -> None:
        """After a failure, put back what the last step's tokens overwrote in the cache."""
        if self._before is not None:
            index = self._before.index
            if index is not None:
                self._before.restore(torch.ones_like(index[0], dtype=torch.bool))

    @property
    def _sampled(self) -> bool:
        return any(row.sampling.temperature > 0 for row in self._rows)

    def _run(self, kind: Kind, cuda_graph: bool) -> None:
        self._before = None
        captures = cuda_graph and self._may_capture
        state = state_of(self.model) if captures else None
        if state is None:  # hooks and foreign modules run in Python, at every step
            self.compute(*kind)
            return
        if state.addresses != self._state.addresses:
            self._graphs.clear()
            self._pool = None  # the allocator drops a pool with the last graph that used it
        elif state.contents != self._state.contents:
            refresh_joined(self.model)
        if kind not in self._graphs:
            self._graphs[kind] = self._capture(kind)
            state = state_of(self.model) or state
        self._state = state
        graph, self._before = self._graphs[kind]
        graph.replay()

    @property
    def _may_capture(self) -> bool:
        return self.cache.device.type == "cuda"

    def compute(self, count: int, sampled: bool, several: int = 1) -> Tensor:
        """The work of `run` or, with several tokens of each row, of `verify`, launch by launch."""
        tokens, positions = self.tokens[:count], self.positions[:count]
        slots = self.slots[:count]
        if several > 1:
            self._compute_several(tokens, positions, slots, sampled, several)
            return tokens
        logits = self.model.step_logits(tokens, positions, slots, self.cache)
        tokens.copy_(self._choose(logits, positions + 1, sampled))
        positions.add_(positions >= 0)
        return tokens

    def _compute_several(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, sampled: bool, several: int
    ) -> None:
        count = tokens.shape[0]
        offsets = torch.arange(several, dtype=torch.int32, device=positions.device)[:, None]
        there = (positions >= 0) & (offsets <= self.drafted[:count])
        given = torch.cat((tokens[None], self.drafts[: several - 1, :count]))
        places = (positions + offsets).masked_fill(~there, -1)
        self._before = before = self.cache.overwritten(positions, slots, several)
        logits = self.model.several_logits(given, places, slots, self.cache)
        after = positions + 1
        chosen = torch.stack([self._choose(x, after + i, sampled) for i, x in enumerate(logits)])
        right = (chosen[:-1] == given[1:]) & there[1:]
        accepted = right.to(torch.int64).cumprod(0).sum(0)
        before.restore(offsets > accepted)
        self.verified[0, :count] = accepted
        self.verified[1 : 1 + several, :count] = chosen
        tokens.copy_(chosen.gather(0, accepted[None])[0])
        positions.add_(((accepted + 1) * (positions >= 0)).to(torch.int32))

    def _choose(self, logits: Tensor, positions: Tensor, sampled: bool) -> Tensor:
        """The tokens at these positions, int64 [rows]."""
        return self.sampling.sample(logits, positions) if sampled else logits.argmax(-1)

    def _capture(self, kind: Kind) -> tuple[torch.cuda.CUDAGraph, Overwritten | None]:
        tokens, positions = self.tokens.clone(), self.positions.clone()
        self.positions.fill_(-1)  # idle rows change no cache: warming up leaves no trace
        try:
            with CAPTURING:
                return self._captured(kind), self._before
        finally:
            self._before = None  # nothing has run yet
            self.tokens.copy_(tokens)
            self.positions.copy_(positions)

    def _captured(self, kind: Kind) -> torch.cuda.CUDAGraph:
        device = self.cache.device
        # Without a stream of its own, PyTorch captures on one that belongs to the GPU which was
        # current at the process's first capture. Graphs that share a pool share their stream.
        side = self._stream = self._stream or torch.cuda.Stream(device)
        side.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(side):  # loads kernels and workspaces, which a capture may not
            for _ in range(2):
                self.compute(*kind)
        torch.cuda.current_stream(device).wait_stream(side)
        if self._pool is None:
            self._pool = torch.cuda.graph_pool_handle()
        graph = torch.cuda.CUDAGraph()
        # Other threads may launch and allocate meanwhile: that does not touch this capture.
        mode = "thread_local"
        with torch.cuda.graph(graph, self._pool, side, capture_error_mode=mode):
            self.compute(*kind)
        return graph

    def _to_device(self, values: list[int], dtype: torch.dtype) -> Tensor:
        return to_device(values, dtype, self.cache.device)
