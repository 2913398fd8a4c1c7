"""A running batch: sequences come and go without a trace in each other."""

from __future__ import annotations

import hashlib
import weakref
from collections import defaultdict
from contextlib import AbstractContextManager, suppress
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    NewToken,
    SamplingConfig,
    ToyLlama,
    ToyNSALlama,
    runner,
)
from nsagen.model.results import Results
from nsagen.model.roster import Roster
from tests.model.tiny import dense_config, nsa_model, packed_batch

LIMITS = InferenceConfig(3, 96, 8, prefill_chunk_size=17)
PAGED = InferenceConfig(3, 96, 8, prefill_chunk_size=17, paged=True, page_size=16, num_pages=10)


def prompts_of(lengths: list[int], seed: int = 0) -> list[Tensor]:
    return list(packed_batch(lengths, seed=seed)[0].split(lengths))


ALONE: dict[str, list[int]] = {}


def identity(model: ToyNSALlama | ToyLlama, prompt: Tensor) -> str:
    """A hash of all that a prompt's tokens depend on."""
    found = hashlib.sha256(f"{type(model)} {model.config} {prompt.tolist()}".encode())
    for name, x in model.state_dict().items():
        found.update(f"{name} {x.dtype} {tuple(x.shape)}".encode())
        found.update(x.reshape(-1).contiguous().view(torch.uint8).cpu().numpy())
    return found.hexdigest()


def unwatched(model: ToyNSALlama | ToyLlama) -> bool:
    """Whether no hook is called and no method is replaced where the model computes."""
    return not any(
        m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules()
    )


def alone(model: ToyNSALlama | ToyLlama, prompt: Tensor, steps: int) -> list[int]:
    """The tokens of a prompt by itself in one pass, decoded by forward.

    Kept for other tests of the same weights, unless hooks see what the model computes.
    """
    known = ALONE.setdefault(identity(model, prompt), []) if unwatched(model) else []
    text = torch.cat([prompt, prompt.new_tensor(known[:steps])])
    with torch.no_grad():
        for _ in range(steps - len(known)):
            cu_seqlens = torch.tensor([0, text.shape[0]], dtype=torch.int32)
            text = torch.cat([text, model(text, cu_seqlens)[-1:].argmax(-1)])
            known.append(int(text[-1]))
    return known[:steps]


def collect(batch: ContinuousBatch) -> dict[int, list[int]]:
    tokens: dict[int, list[int]] = defaultdict(list)
    for new in batch.run():
        tokens[new.sequence].append(new.token)
    return tokens


@pytest.mark.parametrize("limits", [LIMITS, PAGED], ids=["contiguous", "in pages"])
def test_sequences_come_and_go(limits: InferenceConfig) -> None:
    """Seven prompts through three slots, each entering as soon as there is room."""
    model = nsa_model(limits)
    prompts = prompts_of([40, 3, 25, 61, 8, 1, 33])
    steps = [5, 8, 2, 1, 6, 7, 3]
    batch = ContinuousBatch(model)
    todo = list(zip(prompts, steps, strict=True))
    tokens: dict[int, list[int]] = defaultdict(list)
    most = 0
    while todo or not batch.idle:
        try:
            while todo:
                batch.add(todo[0][0], max_new_tokens=todo[0][1])
                todo.pop(0)
        except CapacityError:
            pass
        most = max(most, batch.running + batch.waiting)
        for new in batch.step():
            tokens[new.sequence].append(new.token)
            assert new.finished == (
                "length" if len(tokens[new.sequence]) == steps[new.sequence] else ""
            )
    assert most >= 2
    for number, (prompt, count) in enumerate(zip(prompts, steps, strict=True)):
        assert tokens[number] == alone(model, prompt, count), f"sequence {number}"


def test_a_prompt_joins_while_others_decode() -> None:
    model = nsa_model(LIMITS)
    first, second = prompts_of([20, 50])
    batch = ContinuousBatch(model)
    batch.add(first)
    tokens: dict[int, list[int]] = defaultdict(list)
    while len(tokens[0]) < 3:
        for new in batch.step():
            tokens[new.sequence].append(new.token)
    batch.add(second)
    while not batch.idle:
        before = len(tokens[0])
        for new in batch.step():
            tokens[new.sequence].append(new.token)
        assert batch.waiting == 0 or len(tokens[0]) > before, "a chunk must not hold up the others"
    assert tokens[0] == alone(model, first, 8)
    assert tokens[1] == alone(model, second, 8)


def test_stop_tokens_and_limits_of_each_sequence() -> None:
    model = nsa_model(LIMITS)
    prompts = prompts_of([12, 30, 7])
    texts = [alone(model, prompt, 8) for prompt in prompts]
    batch = ContinuousBatch(model)
    stop = texts[0][3]
    batch.add(prompts[0], stop_tokens=[stop])
    batch.add(prompts[1], max_new_tokens=2)
    batch.add(prompts[2], stop_tokens=[texts[2][0]])
    ends: dict[int, str] = {}
    tokens: dict[int, list[int]] = defaultdict(list)
    for new in batch.run():
        assert new.sequence not in ends, "nothing may follow a sequence's end"
        tokens[new.sequence].append(new.token)
        if new.finished:
            ends[new.sequence] = new.finished
    assert ends == {0: "stop", 1: "length", 2: "stop"}
    assert tokens[0] == texts[0][: texts[0].index(stop) + 1]
    assert tokens[1] == texts[1][:2]
    assert tokens[2] == texts[2][:1]


def test_running_out_refuses_the_new_one_and_leaves_the_others() -> None:
    model = nsa_model(PAGED)
    prompts = prompts_of([60, 50, 30])
    batch = ContinuousBatch(model)
    batch.add(prompts[0])
    batch.step()
    batch.add(prompts[1])
    with pytest.raises(CapacityError, match=r"sequence 2: its 38 tokens need 3 free pages.*got 1"):
        batch.add(prompts[2])
    tokens = collect(batch)
    assert tokens[1] == alone(model, prompts[1], 8)
    assert batch.add(prompts[2]) == 2
    assert collect(batch)[2] == alone(model, prompts[2], 8)
    assert batch.cache.pages is not None
    assert batch.cache.pages.free_pages == 10


def test_slots_run_out_too() -> None:
    batch = ContinuousBatch(nsa_model(LIMITS))
    for prompt in prompts_of([5, 6, 7]):
        batch.add(prompt)
    with pytest.raises(CapacityError, match=r"sequence 3: .*max_batch_size=3; wait until"):
        batch.add([1, 2])


def test_cancelling_frees_the_slot_and_silences_the_sequence() -> None:
    model = nsa_model(LIMITS)
    prompts = prompts_of([12, 30, 50, 9])
    batch = ContinuousBatch(model)
    for prompt in prompts[:3]:
        batch.add(prompt)
    batch.step()
    batch.cancel(0)
    batch.cancel(2)  # still waiting
    batch.cancel(17)  # no such sequence
    assert batch.add(prompts[3]) == 3
    tokens = collect(batch)
    assert set(tokens) == {1, 3}
    assert tokens[1] == alone(model, prompts[1], 8)
    assert tokens[3] == alone(model, prompts[3], 8)


def test_leaving_the_loop_loses_nothing() -> None:
    model = nsa_model(LIMITS)
    prompts = prompts_of([12, 30, 7])
    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt)
    tokens: dict[int, list[int]] = defaultdict(list)
    ended = set()
    while not batch.idle:
        for new in batch.run():
            tokens[new.sequence].append(new.token)
            ended |= {new.sequence} if new.finished else set()
            break
        if len(tokens[0]) == 3:  # another reader takes what is there, and what comes
            for new in batch.step():
                tokens[new.sequence].append(new.token)
                ended |= {new.sequence} if new.finished else set()
    assert ended == {0, 1, 2}
    assert tokens == {i: alone(model, prompt, 8) for i, prompt in enumerate(prompts)}


def test_a_cancelled_sequence_is_silent_wherever_its_tokens_are() -> None:
    """Waiting, running, in flight after its last step, and computed but not read."""
    model = nsa_model(InferenceConfig(3, 96, 8))
    prompts = prompts_of([12, 10, 7])
    expected = alone(model, prompts[1], 3)
    for seen in range(9):  # so many tokens are read before two of three are cancelled
        batch = ContinuousBatch(model)
        for prompt in prompts:
            batch.add(prompt, max_new_tokens=3)
        tokens: dict[int, list[int]] = defaultdict(list)
        cancelled = False
        while not batch.idle:
            if sum(map(len, tokens.values())) == seen:
                batch.cancel(0)
                batch.cancel(2)
                cancelled = True
            for new in batch.run():
                assert not (cancelled and new.sequence != 1)
                tokens[new.sequence].append(new.token)
                break
        assert tokens[1] == expected
        assert batch.free_slots == 3
        assert not batch._roster.unread


def test_a_number_is_given_once() -> None:
    """A reader that outlives `clear` cannot take a new sequence for its own."""
    batch = ContinuousBatch(nsa_model(LIMITS))
    assert batch.add([1, 2]) == 0
    batch.clear()
    assert batch.idle
    assert batch.add([1, 2]) == 1
    batch.cancel(0)
    assert {new.sequence for new in batch.run()} == {1}


def poison(
    model: ToyNSALlama | ToyLlama, token: int, error: type[BaseException] = RuntimeError
) -> None:
    """Any pass over the token raises."""

    def check(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        if (args[0] == token).any():
            raise error("poisoned")

    model.model.embed_tokens.register_forward_pre_hook(check)


def unused(*texts: list[int] | Tensor) -> int:
    """A token that is in none of the texts."""
    used = {int(token) for text in texts for token in text}
    return next(token for token in range(512) if token not in used)


@pytest.mark.parametrize("limits", [LIMITS, PAGED, InferenceConfig(3, 96, 8)], ids=str)
def test_a_failing_prompt_ends_alone(limits: InferenceConfig) -> None:
    model = nsa_model(limits)
    prompts = prompts_of([12, 30, 7])
    texts = {i: alone(model, prompts[i], 8) for i in (0, 2)}
    prompts[1][20] = unused(*prompts, *texts.values())
    poison(model, int(prompts[1][20]))
    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt)
    tokens, errors = defaultdict(list), {}
    for new in batch.run():
        if new.finished == "error":
            errors[new.sequence] = repr(new.error)
            assert new.token == -1
        else:
            tokens[new.sequence].append(new.token)
    assert errors == {1: "RuntimeError('poisoned')"}
    assert tokens == texts
    assert batch.free_slots == 3
    assert batch.cache.pages is None or batch.cache.pages.free_pages == 10


@pytest.mark.parametrize("limits", [LIMITS, PAGED], ids=["contiguous", "in pages"])
def test_a_sequence_that_fails_while_it_decodes_ends_alone(limits: InferenceConfig) -> None:
    model = nsa_model(limits)
    prompts = prompts_of([12, 30, 7], seed=2)
    texts = [alone(model, prompt, 8) for prompt in prompts]
    poison(model, texts[1][2])
    first = [*map(int, torch.cat(prompts)), *texts[0], *texts[2], *texts[1][:2]]
    assert texts[1][2] not in first, "the third new token is nowhere else"
    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt)
    got: dict[int, list[int]] = defaultdict(list)
    ends = {}
    for new in batch.run():
        assert new.sequence not in ends
        got[new.sequence].append(new.token)
        if new.finished:
            ends[new.sequence] = new.finished
    assert ends == {0: "length", 1: "error", 2: "length"}
    assert got == {0: texts[0], 1: [*texts[1][:3], -1], 2: texts[2]}
    assert batch.free_slots == 3


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_fault_of_no_sequence_leaves_all_as_they_were(error: type[BaseException]) -> None:
    """Each of several fails, or the user interrupts: the step raises, and goes on when called."""
    model = nsa_model(PAGED)
    prompts = prompts_of([12, 30, 7])
    texts = [alone(model, prompt, 8) for prompt in prompts]
    broken: list[bool] = []

    def fail(*args: object) -> None:
        if broken:
            raise error("broken")

    model.model.layers[1].input_layernorm.register_forward_pre_hook(fail)
    model.model.norm.register_forward_pre_hook(fail)
    model.lm_head.register_forward_pre_hook(fail)
    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt)
    got: dict[int, list[int]] = defaultdict(list)
    faults = 0
    while not batch.idle:
        broken[:] = [True] if batch.running == 3 and faults % 2 == 0 else []
        faults += batch.running == 3
        try:
            for new in batch.step():
                got[new.sequence].append(new.token)
        except error:
            continue
    assert faults > 4
    assert got == dict(enumerate(texts))


@pytest.mark.parametrize("at", range(6))
@pytest.mark.parametrize(
    ("owner", "name"),
    [(runner, "read_out"), (Results, "expect"), (Roster, "end"), (Results, "_received")],
)
def test_a_failure_between_a_step_and_its_results_loses_no_token(
    monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int
) -> None:
    """As where no memory is left for a copy to the host."""
    model = nsa_model(InferenceConfig(3, 96, 8, paged=True, page_size=32))
    prompts = prompts_of([12, 30, 7])
    texts = [alone(model, prompt, 4) for prompt in prompts]
    calls = iter(range(1000))
    work = getattr(owner, name)

    def fail_once(*args: Any, **options: Any) -> object:
        if next(calls) == at:
            raise MemoryError("no room")
        return work(*args, **options)

    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt, max_new_tokens=4)
    monkeypatch.setattr(owner, name, fail_once)
    got: dict[int, list[int]] = defaultdict(list)
    while not batch.idle:
        with suppress(MemoryError):
            for new in batch.run():
                got[new.sequence].append(new.token)
    assert got == dict(enumerate(texts))
    assert batch.free_slots == 3
    assert batch.cache.pages is not None
    assert batch.cache.pages.free_pages == 9


class InterruptedLock:
    """A batch's lock, with Ctrl-C right after it is released for the n-th time."""

    def __init__(self, lock: AbstractContextManager[bool], at: int) -> None:
        self.lock, self.left = lock, at

    def __enter__(self) -> None:
        self.lock.__enter__()

    def __exit__(self, *_: object) -> None:
        self.lock.__exit__(None, None, None)
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("at", range(1, 8))
@pytest.mark.parametrize("way", ["step", "run"])
def test_an_interrupt_as_results_are_handed_over_loses_none(way: str, at: int) -> None:
    model = nsa_model(LIMITS)
    prompts = prompts_of([12, 30])
    texts = [alone(model, prompt, 3) for prompt in prompts]
    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt, max_new_tokens=3)
    batch._lock = InterruptedLock(batch._lock, at)  # type: ignore[assignment]
    got: dict[int, list[int]] = defaultdict(list)
    while not batch.idle:
        with suppress(KeyboardInterrupt):
            for new in batch.step() if way == "step" else batch.run():
                got[new.sequence].append(new.token)
    assert got == dict(enumerate(texts))
    assert batch.running == 0


def test_a_sequence_that_was_cancelled_in_a_failing_step_does_not_run_again() -> None:
    model = nsa_model(LIMITS)
    prompts = prompts_of([12, 30, 7])
    texts = [alone(model, prompt, 8) for prompt in prompts]
    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt)
    got: dict[int, list[int]] = defaultdict(list)
    rows: list[int] = []
    failed: list[int] = []

    def cancel_and_fail(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        rows.append(len(args[0]))
        if batch.running == 3 and len(rows) > 2:
            failed.append(len(rows))
            batch.cancel(0)
            raise RuntimeError("after the cancelling")

    model.lm_head.register_forward_pre_hook(cancel_and_fail)
    for new in batch.run():
        got[new.sequence].append(new.token)
    assert {i: got[i] for i in (1, 2)} == {1: texts[1], 2: texts[2]}
    assert rows[failed[0] :][:3] == [1, 1, 2], "each of the others ran alone, once"


def test_an_error_holds_no_tensors() -> None:
    model = nsa_model(LIMITS)
    alive = []

    def fail(module: torch.nn.Module, args: tuple[Tensor, ...]) -> None:
        big = torch.zeros(1000)
        alive.append(weakref.ref(big))
        raise RuntimeError(f"failed with {big.shape}")

    model.model.embed_tokens.register_forward_pre_hook(fail)
    batch = ContinuousBatch(model)
    batch.add([1, 2, 3])
    (new,) = batch.run()
    assert repr(new.error) == "RuntimeError('failed with torch.Size([1000])')"
    assert alive[0]() is None


def test_generate_raises_what_a_step_raised() -> None:
    model = nsa_model(LIMITS)
    batch = packed_batch([12, 30])
    expected = model.generate(*batch)
    token = unused(batch[0], expected.flatten())
    poison(model, token, ZeroDivisionError)
    with pytest.raises(ZeroDivisionError, match="poisoned"):
        model.generate(batch[0].clone().index_fill(0, torch.tensor([20]), token), batch[1])
    assert torch.equal(model.generate(*batch), expected)


def test_a_prefill_with_nothing_to_do() -> None:
    batch = ContinuousBatch(nsa_model(LIMITS))
    batch.prefill()
    assert batch.step() == []
    assert list(batch.run()) == []


def test_a_dense_model_serves_as_well() -> None:
    model = ToyLlama(dense_config(), LIMITS, generator=torch.Generator().manual_seed(1)).double()
    prompts = prompts_of([20, 3, 31])
    batch = ContinuousBatch(model)
    for steps, prompt in enumerate(prompts, 2):
        batch.add(prompt, max_new_tokens=steps)
    tokens = collect(batch)
    for steps, prompt in enumerate(prompts, 2):
        assert tokens[steps - 2] == alone(model, prompt, steps)


@pytest.mark.parametrize("form", ["dense", "contiguous", "in pages"])
def test_what_a_slot_held_before_reaches_no_later_sequence(form: str) -> None:
    """Not even NaN, which adding minus infinity does not mask."""
    model: ToyNSALlama | ToyLlama = nsa_model(PAGED if form == "in pages" else LIMITS)
    if form == "dense":
        model = ToyLlama(dense_config(), LIMITS).double()
    with torch.no_grad():
        model.model.embed_tokens.weight[7] = float("nan")
    batch = ContinuousBatch(model)
    for _ in range(2):
        batch.add([7] * 70)
    list(batch.run())
    prompts = [prompt.clamp(min=8) for prompt in prompts_of([9, 20, 5])]
    numbers = [batch.add(prompt) for prompt in prompts]
    tokens = collect(batch)
    for number, prompt in zip(numbers, prompts, strict=True):
        assert tokens[number] == alone(model, prompt, 8)


def test_a_batch_refuses_work_while_its_model_has_another_dtype() -> None:
    """Refused by name and without harm: the batch goes on when the model is back."""
    model, prompts = nsa_model(PAGED), prompts_of([20, 3])
    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt)
    tokens = {0: [], 1: []}
    for new in batch.step() + batch.step():
        tokens[new.sequence].append(new.token)
    free = batch.free_slots
    model.float()
    text = "must stay as it was .*got weights of torch.float32 on cpu and a cache of torch.float64"
    for call in (batch.step, batch.prefill, lambda: next(batch.run()), lambda: batch.add([1])):
        with pytest.raises(InvalidInputError, match=text):
            call()
    assert batch.free_slots == free
    model.double()
    for number, rest in collect(batch).items():
        tokens[number] += rest
    assert tokens == {i: alone(model, prompt, 8) for i, prompt in enumerate(prompts)}


def test_refusals_name_the_sequence() -> None:
    batch = ContinuousBatch(nsa_model(LIMITS))
    for prompt, settings, text in (
        ([], {}, "sequence 0: a prompt must have at least one token"),
        ([1] * 90, {}, r"sequence 0: .*max_length=96, got 90 \+ 8 = 98"),
        ([600], {}, "sequence 0: input_ids must be from 0 to vocab_size-1=511"),
        ([[1]], {}, r"sequence 0: a prompt must be integers with shape \[L\]"),
        ([0.5], {}, r"sequence 0: a prompt must be integers with shape \[L\], .*got torch.float32"),
        ([1], {"max_new_tokens": 0}, "sequence 0: max_new_tokens must be positive"),
    ):
        with pytest.raises(InvalidInputError, match=text):
            batch.add(prompt, **settings)
    assert batch.idle
    with pytest.raises(InvalidInputError, match="ContinuousBatch: the model needs an Inference"):
        ContinuousBatch(nsa_model())


def test_generate_streams_in_order_and_pads_after_a_stop() -> None:
    model = nsa_model(InferenceConfig(3, 64, 6))
    batch = packed_batch([12, 30])
    plain = model.generate(*batch)
    stop = int(plain[0, 2])
    seen: list[NewToken] = []
    tokens = model.generate(*batch, stop_tokens=[stop], stream=seen.append)
    ended = plain[0].tolist().index(stop) + 1
    assert tokens[0].tolist() == plain[0, :ended].tolist() + [-1] * (6 - ended)
    for row in range(2):
        streamed = [new.token for new in seen if new.sequence == row]
        assert streamed == [token for token in tokens[row].tolist() if token >= 0]
    assert [new.finished for new in seen if new.finished].count("stop") >= 1


def test_a_failing_callback_leaves_the_model_ready() -> None:
    model = nsa_model(InferenceConfig(3, 64, 6))
    batch = packed_batch([12, 30])
    expected = model.generate(*batch)

    def fail(new: NewToken) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        model.generate(*batch, stream=fail)
    assert torch.equal(model.generate(*batch), expected)


def test_chance_does_not_depend_on_when_a_sequence_comes() -> None:
    model = nsa_model(LIMITS)
    first, second = prompts_of([20, 9])
    config = SamplingConfig(temperature=1.2, top_p=0.9, seed=11)
    batch = ContinuousBatch(model)
    batch.add(second, sampling=config)
    expected = collect(batch)[0]
    batch.add(first, sampling=SamplingConfig(temperature=2.0, seed=5))
    for _ in range(3):
        batch.step()
    batch.add(second, sampling=config)
    assert collect(batch)[2] == expected
