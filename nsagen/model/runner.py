"""The device half of a running batch: passes over prompts and steps of sequences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from nsagen.model.fused import renew_joined
from nsagen.model.packing import to_device
from nsagen.model.prefill import PrefillRows
from nsagen.model.roster import PromptPass
from nsagen.model.sampling import SamplingRows
from nsagen.model.sequences import Readout, RunningSequence
from nsagen.model.step import DecodeStep, Row


class BatchRunner:
    """Runs given work without changing any sequence; results go to the readout.

    Args:
        model: a `ToyNSALlama` or `ToyLlama` with an InferenceConfig.

    Attributes:
        cache: the model's, which the batch's sequences share.
        stale: whether the copies of weights that fused products read are to be renewed before the
            next work that reads them.
    """

    def __init__(self, model: Any) -> None:
        # Tensors made in inference mode could not be written outside it later.
        with torch.inference_mode(False):
            self.cache = model.new_cache()
            self._step = DecodeStep(model, self.cache)
        self.stale = False
        self._rows: list[RunningSequence] | None = []

    @property
    def model(self) -> Any:
        """What computes; None while it is lent to no batch."""
        return self._step.model

    @model.setter
    def model(self, model: Any) -> None:
        self._step.model = model

    @property
    def most_drafted(self) -> int:
        """Tokens of a draft that a step can verify."""
        return self._step.most_drafted

    def run_pass(self, chosen: PromptPass) -> Readout | None:
        """Run a pass over prompts.

        Returns:
            the first tokens of the sequences whose prompts it completes; None if there are none.
        """
        pieces = [piece for _, piece in chosen]
        parts = [one.request.prompt[piece.start : piece.end] for one, piece in chosen]
        tokens = torch.cat(parts)
        rows = PrefillRows.of(pieces, self.cache, self.model.may_fuse())
        self._renew(rows.fused)
        done = [i for i, (one, piece) in enumerate(chosen) if piece.end == one.length]
        if not done:
            self.model.hidden(tokens, rows, self.cache)
            return None
        ready = [chosen[i][0] for i in done]
        host = self._host_memory(len(ready))
        last = rows.cu_seqlens[1:][done] - 1
        logits = self.model.pass_logits(tokens, rows, self.cache, last)
        first = self._choose_first(ready, logits)
        self._step.newest[self._to_device([one.slot for one in ready])] = first
        return read_out(ready, first, host)

    def run_step(
        self,
        sequences: Sequence[RunningSequence],
        running: Sequence[RunningSequence],
        drafts: Mapping[RunningSequence, Sequence[int]],
        *,
        cuda_graph: bool,
    ) -> Readout:
        """Run a step: a token of each sequence, or several where a draft was right.

        If it fails, or what depends on it does, call `take_back`.

        Args:
            running: all sequences that have a newest token, which must not be lost.
            drafts: guesses of what follows; with any, the host waits for the step, because it
                must know how many were right before it can do anything else.
        """
        self._step.keep()
        if self.stale:  # prompts ran with a hook, which is gone
            self._renew(self.model.may_fuse())
        self._seat(sequences, running)
        host = self._host_memory(len(sequences))
        # A few sizes, not all: each is captured once. Rows past the last sequence are idle.
        count = min(1 << (len(sequences) - 1).bit_length(), self.cache.limits.max_batch_size)
        if not drafts:
            tokens = self._step.run(count, cuda_graph=cuda_graph)
            return read_out(sequences, tokens[: len(sequences)], host)
        guesses = [drafts.get(one, []) for one in sequences]
        accepted, *chosen = self._step.verify(guesses, count, cuda_graph=cuda_graph).tolist()
        rows = zip(sequences, accepted, *chosen, strict=False)  # idle rows are behind
        new = [(one, token) for one, right, *tokens in rows for token in tokens[: 1 + right]]
        owners, taken = zip(*new, strict=True)
        return Readout(owners, torch.tensor(taken, device="cpu"), None)

    def take_back(self) -> None:
        """Undo the last step: its sequences are as they were before."""
        self._rows = None  # what the device holds of them is unknown
        self._step.take_back()

    def clear(self) -> None:
        """Forget which sequences the last step had."""
        self._rows = []

    def _renew(self, fused: bool) -> None:
        """Copy joined weights again for new sequences, before the first work that reads them."""
        if fused and self.stale:
            renew_joined(self.model)
            self.stale = False

    def _choose_first(self, ready: Sequence[RunningSequence], logits: Tensor) -> Tensor:
        configs = [one.request.sampling for one in ready]
        if all(config.temperature == 0 for config in configs):
            return logits.argmax(-1)
        positions = self._to_device([one.length for one in ready])
        return SamplingRows.of(configs, logits.device).sample(logits, positions)

    def _seat(
        self, sequences: Sequence[RunningSequence], running: Sequence[RunningSequence]
    ) -> None:
        """Give the step's rows to these sequences."""
        if self._rows == sequences:
            return
        if self._rows is None:
            self._restore_newest(running)
        old = self._rows or []
        rows = [
            Row(one.slot, one.length + one.chosen - 1, one.request.sampling) for one in sequences
        ]
        self._step.fill(rows, [i for i, one in enumerate(old) if one in running])
        self._rows = list(sequences)

    def _restore_newest(self, running: Sequence[RunningSequence]) -> None:
        """After a failure, restore the newest tokens from the host's copy."""
        known = [(one.slot, *one.newest) for one in running if one.newest is not None]
        slots = self._to_device([slot for slot, *_ in known])
        self._step.newest[slots] = self._to_device([r.on_host()[place] for _, r, place in known])

    def _host_memory(self, count: int) -> Tensor:
        """Host memory for new tokens. Allocated before a step, so the step cannot fail on it."""
        pinned = self.cache.device.type == "cuda"
        return torch.empty(count, dtype=torch.int64, device="cpu", pin_memory=pinned)

    def _to_device(self, values: list[int]) -> Tensor:
        return to_device(values, torch.int64, self.cache.device)


def read_out(sequences: Sequence[RunningSequence], tokens: Tensor, host: Tensor) -> Readout:
    """Start copying new tokens to the host.

    Args:
        tokens: int64 [sequences]; the next step may change them.
        host: where they go.
    """
    host.copy_(tokens, non_blocking=True)
    arrived = None
    if tokens.is_cuda:
        arrived = torch.cuda.Event()
        arrived.record()
    return Readout(tuple(sequences), host, arrived)
