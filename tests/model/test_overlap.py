"""Calls that overlap on one model: each gets its own tokens, and leaves nothing on the model."""

from __future__ import annotations

import copy
import io
import pickle
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.model import ContinuousBatch, InferenceConfig, NewToken, ToyLlama, ToyNSALlama
from tests.model.tiny import dense_config, nsa_model, packed_batch

LIMITS = InferenceConfig(3, 64, 6)
Model = ToyNSALlama | ToyLlama


def dense() -> ToyLlama:
    generator = torch.Generator().manual_seed(1)
    return ToyLlama(dense_config(), LIMITS, generator=generator).double()


def sparse() -> ToyNSALlama:
    return nsa_model(LIMITS)


def saved(batch: object) -> None:
    torch.save(batch, io.BytesIO())


def prompt(length: int) -> tuple[Tensor, Tensor]:
    return packed_batch([length], seed=length)


@pytest.mark.parametrize("make", [sparse, dense])
def test_generate_within_generate(make: Callable[[], Model]) -> None:
    """Three calls deep, each from the stream of the one around it."""
    model = make()
    lengths = (9, 20, 13)
    expected = [model.generate(*prompt(length))[0].tolist() for length in lengths]
    seen: dict[int, list[int]] = {}

    def call(depth: int) -> None:
        entered = []

        def stream(new: NewToken) -> None:
            if not entered and depth + 1 < len(lengths):
                entered.append(True)
                call(depth + 1)

        seen[depth] = model.generate(*prompt(lengths[depth]), stream=stream)[0].tolist()

    call(0)
    assert [seen[depth] for depth in range(3)] == expected
    assert len(model._idle_batches) == 1, "one cache is kept, not one for each call"


@pytest.mark.parametrize("make", [sparse, dense])
def test_threads_that_generate(make: Callable[[], Model]) -> None:
    model = make()
    lengths = (8, 11, 14, 17)
    expected = {length: model.generate(*prompt(length))[0].tolist() for length in lengths}
    got: dict[int, list[object]] = {length: [] for length in lengths}
    start = threading.Barrier(len(lengths))

    def work(length: int) -> None:
        start.wait()
        for _ in range(4):
            try:
                got[length].append(model.generate(*prompt(length))[0].tolist())
            except Exception as error:
                got[length].append(error)

    in_threads([threading.Thread(target=work, args=(length,)) for length in lengths])
    assert got == {length: [expected[length]] * 4 for length in lengths}


def in_threads(threads: list[threading.Thread]) -> None:
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_batches_of_one_model_side_by_side() -> None:
    model = sparse()
    expected = [model.generate(*prompt(length))[0].tolist() for length in (9, 20)]
    batches = [ContinuousBatch(model), ContinuousBatch(model)]
    for batch, length in zip(batches, (9, 20), strict=True):
        batch.add(prompt(length)[0])
    tokens: list[list[int]] = [[], []]
    while not all(batch.idle for batch in batches):
        for batch, row in zip(batches, tokens, strict=True):
            row += [new.token for new in batch.step()]
    assert tokens == expected


def test_threads_share_a_batch() -> None:
    """Some add, one runs."""
    model = sparse()
    expected = {n: model.generate(*prompt(n))[0].tolist() for n in range(5, 14)}
    batch, owner = ContinuousBatch(model), {}
    tokens: dict[int, list[int]] = {}
    left = threading.Event()

    def add(lengths: range) -> None:
        for length in lengths:
            while True:
                try:
                    owner[batch.add(prompt(length)[0])] = length
                    break
                except CapacityError:
                    left.wait(0.001)

    def serve() -> None:
        while len(done) < len(expected):
            for new in batch.run():
                tokens.setdefault(new.sequence, []).append(new.token)
                if new.finished:
                    done.append(new.sequence)

    done: list[int] = []
    adders = [threading.Thread(target=add, args=(range(n, 14, 3),)) for n in (5, 6, 7)]
    in_threads([*adders, threading.Thread(target=serve)])
    assert {owner[number]: got for number, got in tokens.items()} == expected


def test_a_step_within_a_step_is_refused_and_does_no_harm() -> None:
    model = sparse()
    expected = model.generate(*prompt(9))[0].tolist()
    batch, refused = ContinuousBatch(model), []

    def hook(*args: object) -> None:
        try:
            batch.step()
        except InvalidInputError as error:
            refused.append(str(error))

    handle = model.model.embed_tokens.register_forward_hook(hook)
    batch.add(prompt(9)[0])
    assert [new.token for new in batch.run()] == expected
    handle.remove()
    assert len(refused) == 6
    assert "one step runs at a time, got a call from within a step" in refused[0]


def test_a_hook_may_add_and_cancel_while_a_step_runs() -> None:
    model = sparse()
    expected = {n: model.generate(*prompt(n))[0].tolist() for n in (9, 20)}
    batch, calls = ContinuousBatch(model), []

    def hook(*args: object) -> None:
        calls.append(True)
        if len(calls) == 1:  # during the prefill of number 0 and 1
            batch.cancel(0)
            batch.add(prompt(20)[0])

    model.model.embed_tokens.register_forward_hook(hook)
    batch.add(prompt(13)[0])
    batch.add(prompt(9)[0])
    tokens: dict[int, list[int]] = {}
    for new in batch.run():
        tokens.setdefault(new.sequence, []).append(new.token)
    assert tokens == {1: expected[9], 2: expected[20]}
    assert batch.free_slots == 3


@pytest.mark.parametrize("copy_", [copy.copy, copy.deepcopy, pickle.dumps, saved])
def test_a_batch_is_neither_copied_nor_saved(copy_: Callable[[object], object]) -> None:
    """A copy would share the cache and the slots, or leave them behind."""
    batch = ContinuousBatch(sparse())
    batch.add([1, 2, 3])
    batch.step()
    for held in (batch, {"mine": [batch]} if copy_ is not copy.copy else batch):
        with pytest.raises(InvalidInputError, match="a batch cannot be copied or saved, got copy"):
            copy_(held)
    assert [new.finished for new in batch.run()][-1] == "length"
    assert len({batch, ContinuousBatch(sparse())}) == 2, "each is itself"


def test_copies_made_during_a_call_have_nothing_of_it() -> None:
    model = sparse()
    expected = model.generate(*prompt(9))[0].tolist()
    copies: list[ToyNSALlama] = []

    def stream(new: NewToken) -> None:
        if not copies:
            copies.append(copy.deepcopy(model))
            copies.append(pickle.loads(pickle.dumps(model)))

    assert model.generate(*prompt(9), stream=stream)[0].tolist() == expected
    for one in copies:
        assert not one._idle_batches
        assert one.generate(*prompt(9))[0].tolist() == expected
    size = len(pickle.dumps(nsa_model(LIMITS)))
    assert len(pickle.dumps(model)) == size, "a pickle holds weights alone"
