"""Everything at once: random adds, cancels, errors, overlaps and weight updates on one model.

Whatever happens around it, each request gets the tokens that it gets alone, once and in order, and
when all is done every slot and page is free.
"""

from __future__ import annotations

import random
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    SamplingConfig,
    ToyLlama,
    ToyNSALlama,
    fused,
    generation,
)
from nsagen.model.fused import state_of
from tests.model.tiny import dense_config, nsa_model

VOCAB = 64
POISON = VOCAB - 1  # a pass over it fails; no prompt but a poisoned one has it
SMALL = {"vocab_size": VOCAB, "num_hidden_layers": 1, "hidden_size": 32, "head_dim": 16}
SMALL |= {"intermediate_size": 32}
BAD: list[dict[str, Any]] = [
    {"prompt": [VOCAB]},
    {"prompt": []},
    {"prompt": [0.5]},
    {"prompt": [1], "stop_tokens": [None]},
    {"prompt": [1], "max_new_tokens": 1000},
    {"prompt": [1], "max_new_tokens": True},
    {"prompt": [1], "sampling": "greedy"},
]


class Broken(Exception):
    """A fault of the device: no request's own."""


@dataclass
class Wanted:
    """A request, and what has been seen of it."""

    prompt: list[int]
    settings: dict[str, Any]
    poisoned: bool
    tokens: list[int] = field(default_factory=list)
    end: str = ""


class Soak:
    """A model, two batches of it, and what is expected of each request."""

    def __init__(self, model: ToyNSALlama | ToyLlama, seed: int) -> None:
        self.model, self.draw = model, random.Random(seed)
        self.batches = [ContinuousBatch(model), ContinuousBatch(model)]
        self.open: list[dict[int, Wanted]] = [{}, {}]
        self.done: list[Wanted] = []
        self.events: Counter[str] = Counter()
        self.broken = threading.local()

    def run(self, events: int) -> None:
        actions: list[tuple[Callable[[], None], int]] = [
            (self.add, 30),
            (self.step, 25),
            (self.read_some, 15),
            (self.refuse, 8),
            (self.cancel, 6),
            (self.fault, 5),
            (self.generate, 4),
            (self.in_threads, 2),
            (self.touch_weights, 3),
            (self.hook, 2),
            (self.update_weights, 2),
            (self.broken_weights, 2),
            (self.interrupt, 3),
            (self.failing_stream, 2),
            (self.refused_weights, 2),
            (self.change_in_hook, 3),
        ]
        for _ in range(events):
            (action,) = self.draw.choices(*zip(*actions, strict=True))
            self.events[action.__name__] += 1
            action()
        self.drain()
        self.compare()

    # Events.

    def request(self) -> Wanted:
        draw = self.draw
        length = draw.choice([1, 3, 7, 8, 17, 33])
        if draw.random() < 0.3:
            prompt = [token % POISON for token in range(length)]  # some begin alike
        else:
            prompt = [draw.randrange(VOCAB - 1) for _ in range(length)]
        poisoned = draw.random() < 0.1
        if poisoned:
            prompt[draw.randrange(len(prompt))] = POISON
        settings: dict[str, Any] = {"max_new_tokens": draw.randint(1, 6)}
        if draw.random() < 0.4:
            settings["stop_tokens"] = draw.sample(range(VOCAB), 8)
        if draw.random() < 0.3:
            settings["sampling"] = SamplingConfig(0.9, 20, 0.95, seed=draw.randrange(100))
        return Wanted(prompt, settings, poisoned)

    def add(self) -> None:
        which, wanted = self.draw.randrange(2), self.request()
        buffer = torch.tensor(wanted.prompt)
        try:
            number = self.batches[which].add(buffer, **wanted.settings)
        except CapacityError:
            self.events["full"] += 1
            return
        buffer.fill_(0)
        assert number not in self.open[which]
        self.open[which][number] = wanted

    def refuse(self) -> None:
        batch, bad = self.draw.choice(self.batches), dict(self.draw.choice(BAD))
        before = room(batch)
        with pytest.raises(InvalidInputError):
            batch.add(bad.pop("prompt"), **bad)
        assert room(batch) == before

    def step(self) -> None:
        self.step_of(self.draw.randrange(2))

    def step_of(self, which: int) -> None:
        self.seen(which, self.batches[which].step())

    def read_some(self) -> None:
        which = self.draw.randrange(2)
        left = self.draw.randrange(6)
        for new in self.batches[which].run(prompts_first=self.draw.random() < 0.3):
            self.seen(which, [new])
            left -= 1
            if left <= 0:
                break

    def cancel(self) -> None:
        which = self.draw.randrange(2)
        if self.open[which]:
            number = self.draw.choice(list(self.open[which]))
            self.batches[which].cancel(number)
            del self.open[which][number]

    def fault(self) -> None:
        """A step in which the device fails, at all or at some of the passes."""
        which = self.draw.randrange(2)
        batch = self.batches[which]
        self.broken.passes = [Broken if self.draw.random() < 0.7 else None for _ in range(8)]
        alone = batch.running + batch.waiting
        try:
            self.seen(which, batch.step(), faults=alone)
        except Broken:
            self.events["raised"] += 1
        self.broken.passes = []

    def generate(self) -> None:
        """A call of its own, in whose stream a batch goes on."""
        wanted = self.request()
        wanted.settings.pop("stop_tokens", None)
        prompt = torch.tensor(wanted.prompt)
        steps: list[None] = []

        def stream(new: Any) -> None:
            if not steps:
                steps.append(None)
                self.step()

        ends = torch.tensor([0, len(prompt)])
        if wanted.poisoned:
            with pytest.raises(ValueError, match="poisoned"):
                self.model.generate(prompt, ends, **wanted.settings, stream=stream)
            return
        rows = self.model.generate(prompt, ends, **wanted.settings, stream=stream)
        wanted.tokens, wanted.end = rows[0].tolist(), "length"
        self.done.append(wanted)

    def in_threads(self) -> None:
        """Two calls at once beside a step of a batch."""
        calls = [self.request() for _ in range(2)]
        for call in calls:
            call.settings.pop("stop_tokens", None)
            call.prompt, call.poisoned = [t % POISON for t in call.prompt], False

        def work(call: Wanted) -> None:
            ends = torch.tensor([0, len(call.prompt)])
            rows = self.model.generate(torch.tensor(call.prompt), ends, **call.settings)
            call.tokens, call.end = rows[0].tolist(), "length"

        threads = [threading.Thread(target=work, args=(call,)) for call in calls]
        for thread in threads:
            thread.start()
        self.step()
        for thread in threads:
            thread.join(60)
        assert all(call.end for call in calls)
        self.done += calls

    def touch_weights(self) -> None:
        """A write that changes no value, while all runs."""
        with torch.no_grad():
            for weight in self.model.parameters():
                weight.mul_(1.0)

    def hook(self) -> None:
        """Steps for which modules must be called."""
        handle = self.model.model.layers[0].register_forward_hook(lambda *args: None)
        self.step()
        self.step()
        handle.remove()

    def update_weights(self) -> None:
        """New weights, between requests: those that run are finished, or cancelled."""
        if self.draw.random() < 0.5:
            self.drain()
        for batch, numbers in zip(self.batches, self.open, strict=True):
            if self.draw.random() < 0.5:
                batch.clear()
            for number in numbers:
                batch.cancel(number)
            numbers.clear()
        self.compare()
        noise = torch.Generator().manual_seed(self.draw.randrange(1000))
        state = {
            name: weight + torch.randn(weight.shape, generator=noise, dtype=weight.dtype) * 0.02
            for name, weight in self.model.state_dict().items()
        }
        way = self.draw.randrange(3)
        if way < 2:
            self.model.load_state_dict(state, assign=way == 1)
        else:
            for name, weight in self.model.named_parameters():
                weight.data.copy_(state[name])
            for batch in self.batches:  # which cannot see such a write
                batch.forget_prefixes()
        self.events[f"way {way}"] += 1

    def broken_weights(self) -> None:
        """Weights that are not numbers for a while: tokens mean nothing, but nothing stays."""
        self.drain()
        self.compare()
        name, weight = self.draw.choice(list(self.model.named_parameters()))
        kept = weight.detach().clone()
        with torch.no_grad():
            if name.endswith("embed_tokens.weight"):
                weight[1:] = float("nan")  # a prompt may have a number or two
            else:
                weight.fill_(self.draw.choice([float("nan"), float("inf"), -float("inf"), 1e308]))
        for _ in range(self.draw.randint(1, 8)):
            self.add()
        which = self.draw.randrange(2)
        news = [(which, new) for new in self.batches[which].step()]
        if self.draw.random() < 0.5:
            news += [(i, new) for i, batch in enumerate(self.batches) for new in batch.run()]
        for i, new in news:
            wanted = self.open[i][new.sequence]
            assert 0 <= new.token < VOCAB or (wanted.poisoned and new.finished == "error"), new
        for batch, numbers in zip(self.batches, self.open, strict=True):
            for number in numbers:
                batch.cancel(number)
            numbers.clear()
        with torch.no_grad():
            weight.copy_(kept)

    def interrupt(self) -> None:
        """Ctrl-C within a pass: it comes through, and the next step goes on from before it."""
        which = self.draw.randrange(2)
        self.broken.passes = [KeyboardInterrupt, *[None] * self.draw.randrange(3)]
        try:
            self.step_of(which)
        except KeyboardInterrupt:
            self.events["interrupted"] += 1
        self.broken.passes = []

    def failing_stream(self) -> None:
        """A callback that raises ends its own call."""
        tokens, left = [1, 2, 3], [self.draw.randrange(3)]

        def stream(new: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Broken

        with pytest.raises(Broken):
            self.model.generate(torch.tensor(tokens), torch.tensor([0, 3]), 4, stream=stream)

    def refused_weights(self) -> None:
        """Loading another model's weights fails, while all runs."""
        state = {**self.model.state_dict(), "another": torch.zeros(1)}
        with pytest.raises(RuntimeError, match="Unexpected key"):
            self.model.load_state_dict(state)

    def change_in_hook(self) -> None:
        """A hook adds a sequence and cancels one while a step runs."""
        done: list[None] = []

        def change(*args: object) -> None:
            if not done:
                done.append(None)
                self.add()
                self.cancel()

        handle = self.model.model.layers[0].register_forward_hook(change)
        self.step()
        handle.remove()

    # What is expected.

    def seen(self, which: int, new_tokens: list[Any], faults: int = 0) -> None:
        for new in new_tokens:
            wanted = self.open[which][new.sequence]  # silent once it is cancelled or has ended
            if new.finished == "error":
                broken = isinstance(new.error, Broken)
                assert wanted.poisoned or (broken and faults), new
                assert new.token == -1
            else:
                wanted.tokens.append(new.token)
            if new.finished:
                wanted.end = new.finished
                self.done.append(self.open[which].pop(new.sequence))

    def drain(self) -> None:
        for which, batch in enumerate(self.batches):
            for new in batch.run():
                self.seen(which, [new])
            assert not self.open[which]

    def compare(self) -> None:
        """All that has ended since the last time against the same alone."""
        self.broken.calm = True
        for wanted in self.done:
            if wanted.poisoned:
                assert (wanted.end, wanted.tokens) == ("error", [])
                continue
            alone = self.alone(wanted)
            if wanted.end == "error":  # a fault of the device, where only one ran
                alone = alone[: len(wanted.tokens)]
            assert wanted.tokens == alone
        self.events["compared"] += len(self.done)
        self.done.clear()
        self.broken.calm = False

    @torch.no_grad()
    def alone(self, wanted: Wanted) -> list[int]:
        limit = wanted.settings["max_new_tokens"]
        stops = wanted.settings.get("stop_tokens", ())
        sampling = wanted.settings.get("sampling")
        text = torch.tensor(wanted.prompt)
        if sampling is not None:
            ends = torch.tensor([0, len(text)])
            tokens = self.model.generate(text, ends, limit, sampling=sampling)[0].tolist()
        else:
            for _ in range(limit):
                ends = torch.tensor([0, len(text)], dtype=torch.int32)
                text = torch.cat([text, self.model(text, ends)[-1:].argmax(-1)])
            tokens = text[len(wanted.prompt) :].tolist()
        last = next((i for i, token in enumerate(tokens) if token in stops), limit)
        return tokens[: last + 1]


def room(batch: ContinuousBatch) -> tuple[int, int]:
    """Free slots and pages."""
    pages = batch.cache.pages
    return batch.free_slots, -1 if pages is None else pages.free_pages


def faulty(soak: Soak) -> Callable[..., Tensor]:
    """An embedding that fails over poison, and where a fault of the device is due."""

    def forward(module: torch.nn.Embedding, ids: Tensor) -> Tensor:
        passes = getattr(soak.broken, "passes", [])
        error = passes.pop() if passes else None
        if error is not None:
            raise error
        decoding = ids._base is not None  # a model may well choose that token itself
        if not (decoding or getattr(soak.broken, "calm", False)) and (ids == POISON).any():
            raise ValueError("poisoned")
        return torch.nn.functional.embedding(ids, module.weight)

    return forward


CASES = {
    "contiguous": (nsa_model, InferenceConfig(3, 48, 6)),
    "in chunks": (nsa_model, InferenceConfig(4, 48, 6, prefill_chunk_size=9)),
    "in pages": (
        nsa_model,
        InferenceConfig(4, 48, 6, paged=True, page_size=16, num_pages=7, prefill_chunk_size=20),
    ),
    "in shared pages": (
        nsa_model,
        InferenceConfig(
            *(4, 48, 6),
            **{"paged": True, "page_size": 16, "num_pages": 7, "share_prefixes": True},
            prefill_chunk_size=20,
        ),
    ),
    "dense": (None, InferenceConfig(3, 48, 6, prefill_chunk_size=11)),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("events", [60, pytest.param(2000, marks=pytest.mark.slow)])
@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_all_at_once(case: str, events: int, monkeypatch: pytest.MonkeyPatch) -> None:
    make, limits = CASES[case]
    if make is None:
        config = dense_config(**SMALL)
        model: Any = ToyLlama(config, limits, generator=torch.Generator().manual_seed(1)).double()
    else:
        model = make(limits, **SMALL)
    monkeypatch.setattr(generation, "may_fuse", lambda model, _: state_of(model) is not None)
    soak = Soak(model, seed=events)
    free = [room(batch) for batch in soak.batches]
    forward = faulty(soak)
    kind = type("Faulty", (torch.nn.Embedding,), {"forward": forward})
    monkeypatch.setitem(fused._FORWARD, kind, forward)  # and still the model's modules are bare
    model.model.embed_tokens.__class__ = kind
    assert model.may_fuse()
    soak.run(events)
    assert [room(batch) for batch in soak.batches] == free
    assert not any(batch._roster.unread for batch in soak.batches)
    (idle,) = model._idle_batches
    assert room(idle) == free[0]
    assert soak.events["compared"] > events / 8, soak.events
    if events > 1000:
        ways = ("raised", "interrupted", "full", "way 0", "way 1", "way 2")
        assert min(soak.events[name] for name in ways) > 0
