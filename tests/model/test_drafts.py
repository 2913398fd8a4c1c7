"""Several new tokens of a sequence in a step: the same tokens and the same cache as one by one."""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from nsagen.core.errors import InvalidInputError
from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    PromptLookup,
    SamplingConfig,
    ToyLlama,
    ToyNSALlama,
)
from nsagen.model.prefill import DecodeRows
from nsagen.model.step import DecodeStep, Row
from tests.model.tiny import dense_config, nsa_model, packed_batch

SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}
LIMITS = InferenceConfig(4, 160, 24)
PAGED = InferenceConfig(4, 160, 24, paged=True, page_size=16, num_pages=40)
GREEDY, WARM = SamplingConfig(), SamplingConfig(temperature=1.5, top_k=20, seed=3)


def small(limits: InferenceConfig = LIMITS, **changes: Any) -> ToyNSALlama:
    return nsa_model(limits, **{**SHAPE, **changes})


def small_dense(limits: InferenceConfig = LIMITS) -> ToyLlama:
    generator = torch.Generator().manual_seed(1)
    return ToyLlama(dense_config(**SHAPE), limits, generator=generator).double()


def filled(model: ToyNSALlama | ToyLlama, lengths: list[int]) -> Any:
    cache = model.new_cache()
    for slot, length in enumerate(lengths):
        cache.reserve(slot, length + 24)
    with torch.no_grad():
        model.prefill(*packed_batch(lengths), lengths, cache)
    return cache


def test_a_token_that_completes_a_window_is_appended_by_itself() -> None:
    """Tokens before it are in the cache by then, and those after it overwrite nothing it reads.

    Windows are of 8 tokens, one every 4: tokens 7, 11, 15, ... complete one.
    """
    starts = torch.tensor([8, 10, 11, -1], dtype=torch.int32)
    positions = starts + torch.arange(6, dtype=torch.int32)[:, None]
    positions[:, 3] = -1
    positions[3:, 1] = -1
    rows = DecodeRows.several(positions, torch.arange(4), (8, 4))
    assert len(rows.appended) == 5
    turns = [
        [[t for t in column if t >= 0] for column in turn.view(6, 4).T.tolist()]
        for turn in rows.appended
    ]
    assert turns == [
        [[8, 9, 10], [10], [], []],
        [[11], [11], [11], []],
        [[12, 13], [12], [12, 13, 14], []],
        [[], [], [15], []],
        [[], [], [16], []],
    ]
    few = DecodeRows.several(positions[:3], torch.arange(4), (8, 4))
    assert [turn.tolist()[:1] for turn in few.appended] == [[8], [-1], [-1]]
    assert len(few.appended) == 3, "one turn a token, where that is fewer"


FORMS: dict[str, dict[str, Any]] = {
    "usual": {},
    "windows meet": {"kernel_size": 16, "kernel_stride": 16},
    "mlp": {"compress_type": "mlp", "v_compress_type": "sigmoid_mul"},
    "separate": {"compress_type": "linear", "branch_kv": "separate"},
    "no windows": {"branches": ("sliding",)},
}


@pytest.mark.parametrize("limits", [LIMITS, PAGED], ids=["contiguous", "in pages"])
@pytest.mark.parametrize("form", FORMS)
def test_the_cache_and_logits_are_those_of_one_token_after_another(
    form: str, limits: InferenceConfig
) -> None:
    model, lengths = small(limits, **FORMS[form]), [5, 30, 41]
    tokens = packed_batch([21], seed=3)[0].view(7, 3)
    positions = torch.tensor(lengths, dtype=torch.int32) + torch.arange(7)[:, None].int()
    slots = torch.arange(3, dtype=torch.int32)
    one, several = filled(model, lengths), filled(model, lengths)
    logits = model.several_logits(tokens, positions, slots, several)
    for i in range(7):
        step = model.step_logits(tokens[i], positions[i], slots, one)
        torch.testing.assert_close(logits[i], step, rtol=0, atol=1e-12)
    for expected, got in zip(one.tensors(), several.tensors(), strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("dense", [False, True], ids=["nsa", "dense"])
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_a_step_takes_what_is_right_and_leaves_no_trace_of_the_rest(
    sampling: SamplingConfig, dense: bool
) -> None:
    """What the rest overwrote is back: keys before rope that the next windows need."""
    model = small_dense() if dense else small()
    lengths, rows = [30, 41, 12], []
    one = DecodeStep(model, filled(model, lengths))
    several = DecodeStep(model, filled(model, lengths))
    for step in (one, several):
        step.newest[:3] = torch.tensor([7, 8, 9])
        rows = [Row(slot, length, sampling) for slot, length in enumerate(lengths)]
        step.fill(rows, kept=[])
    right = torch.stack([one.run(4, cuda_graph=False).clone() for _ in range(12)])
    draft = right[:5, 0].tolist()
    drafts = [draft, [*right[:2, 1].tolist(), 511 - int(right[2, 1]), 5, 5, 5], []]
    verified = several.verify(drafts, 4, cuda_graph=False)
    assert verified[0].tolist() == [5, 2, 0, 0]
    assert torch.equal(verified[1:7, 0], right[:6, 0])
    assert torch.equal(verified[1:4, 1], right[:3, 1])
    assert several.positions.tolist() == [36, 44, 13, -1]
    after = [several.run(4, cuda_graph=False).clone() for _ in range(5)]
    for row, taken in enumerate([6, 3, 1]):
        got = [int(step[row]) for step in after]
        assert got == right[taken : taken + 5, row].tolist()


def test_state_is_as_before_a_step_that_fails() -> None:
    model, lengths = small(), [30, 41]
    step = DecodeStep(model, filled(model, lengths))
    step.fill([Row(0, 30, GREEDY), Row(1, 41, GREEDY)], kept=[])
    rings = [layer.k_raw.clone() for layer in step.cache]

    def fault(module: Any, args: Any, output: Any) -> None:
        raise RuntimeError("device")

    model.model.layers[1].register_forward_hook(fault)
    with pytest.raises(RuntimeError, match="device"):
        step.verify([[1, 2, 3], [4]], 2, cuda_graph=False)
    assert not torch.equal(rings[0], step.cache[0].k_raw)
    step.take_back()
    assert all(map(torch.equal, rings, (layer.k_raw for layer in step.cache)))


@pytest.mark.parametrize("dense", [False, True], ids=["nsa", "dense"])
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
def test_verifying_reads_no_value_on_the_host(dense: bool, sampled: bool) -> None:
    """So it can be captured in a CUDA graph."""
    model = small_dense() if dense else small()
    model = model.to(torch.bfloat16).to("meta")
    assert DecodeStep(model, model.new_cache()).compute(3, sampled, 4).shape == (3,)


class Replay:
    """In place of a CUDA graph: computes the step again."""

    def __init__(self, step: DecodeStep, kind: tuple[int, bool, int]) -> None:
        self.step, self.kind, self.replays = step, kind, 0

    def replay(self) -> None:
        self.step.compute(*self.kind)
        self.replays += 1


def test_steps_are_captured_once_for_a_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows and tokens of a row are rounded up to powers of two."""
    captured: list[tuple[int, bool, int]] = []

    def capture(self: DecodeStep, kind: tuple[int, bool, int]) -> tuple[Any, Any]:
        captured.append(kind)
        before = self.cache.overwritten(self.positions[: kind[0]], self.slots[: kind[0]], kind[2])
        return Replay(self, kind), before

    monkeypatch.setattr(DecodeStep, "_capture", capture)
    monkeypatch.setattr(DecodeStep, "_may_capture", True)
    model = small()
    step = DecodeStep(model, filled(model, [30, 41]))
    step.fill([Row(0, 30, GREEDY), Row(1, 41, GREEDY)], kept=[])
    for drafts in ([[1], []], [[1, 2], [3]], [[], [1, 2, 3]], [[1] * 4, []], [[1] * 7, [1]]):
        step.verify(drafts, 2, cuda_graph=True)
    step.run(2, cuda_graph=True)
    step.verify([[1], [1]], 2, cuda_graph=True)
    assert captured == [(2, False, 2), (2, False, 4), (2, False, 8), (2, False, 1)]


def test_few_tokens_of_a_window_limit_a_draft() -> None:
    """More would overwrite keys that the draft's own windows need."""
    model = small(kernel_size=4, kernel_stride=2)
    step = DecodeStep(model, filled(model, [30]))
    assert step.most_drafted == 3
    step.fill([Row(0, 30, GREEDY)], kept=[])
    assert step.verify([[1, 2, 3]], 1, cuda_graph=False).shape == (5, 1)


# In a batch.


class Told:
    """A drafter that knows the answer, and errs now and then."""

    def __init__(self, answers: dict[int, list[int]], errs: float, seed: int = 0) -> None:
        self.answers, self.errs, self.draw = answers, errs, random.Random(seed)

    def __call__(self, tokens: Sequence[int], most: int) -> list[int]:
        answer = self.answers[tokens[0]]
        known = answer[len(tokens) :][: self.draw.randint(0, most)]
        return [t if self.draw.random() >= self.errs else (t + 1) % 512 for t in known]


def texts(
    model: ToyNSALlama | ToyLlama, prompts: list[list[int]], **options: Any
) -> list[list[int]]:
    batch = ContinuousBatch(model)
    numbers = [batch.add(prompt, **options) for prompt in prompts]
    tokens: dict[int, list[int]] = defaultdict(list)
    for new in batch.run():
        tokens[new.sequence].append(new.token)
    return [tokens[number] for number in numbers]


def prompts_of(*lengths: int) -> list[list[int]]:
    return [
        [i, *part.tolist()] for i, part in enumerate(packed_batch([*lengths])[0].split(lengths))
    ]


@pytest.mark.parametrize(
    ("limits", "dense"),
    [
        (LIMITS, False),
        (PAGED, False),
        (replace(PAGED, cache_dtype="int8", share_prefixes=True), False),
        (LIMITS, True),
    ],
    ids=["contiguous", "in pages", "int8 in shared pages", "dense"],
)
@pytest.mark.parametrize("sampling", [GREEDY, WARM], ids=["greedy", "sampled"])
def test_drafts_change_no_token(
    limits: InferenceConfig, dense: bool, sampling: SamplingConfig
) -> None:
    model = small_dense() if dense else small(limits)
    prompts = prompts_of(20, 33, 7)
    expected = texts(model, prompts, sampling=sampling)
    told = {prompt[0]: prompt + answer for prompt, answer in zip(prompts, expected, strict=True)}
    drafter = Told(told, errs=0.3)
    batch = ContinuousBatch(model)
    numbers = [
        batch.add(prompt, sampling=sampling, drafter=(lambda: drafter) if i != 1 else None)
        for i, prompt in enumerate(prompts)
    ]
    tokens: dict[int, list[int]] = defaultdict(list)
    steps = 0
    while not batch.idle:
        steps += 1
        for new in batch.step():
            tokens[new.sequence].append(new.token)
    assert [tokens[number] for number in numbers] == expected
    assert batch.accepted > 10
    assert batch.drafted > batch.accepted


def test_right_drafts_save_steps() -> None:
    model = small()
    (prompt,) = prompts_of(20)
    (answer,) = texts(model, [prompt])
    calls: Counter[str] = Counter()
    model.model.embed_tokens.register_forward_hook(lambda *args: calls.update(["passes"]))
    told = Told({0: prompt + answer}, errs=0.0)
    told.draw.randint = lambda low, high: high  # type: ignore[method-assign]
    assert texts(model, [prompt], drafter=lambda: told) == [answer]
    assert calls["passes"] == 1 + 3, "the prompt, two times 8 tokens, and the last 7"


def test_a_stop_token_within_a_draft_ends_the_sequence_there_and_it_can_be_resumed() -> None:
    model = small(PAGED)
    (prompt,) = prompts_of(20)
    (answer,) = texts(model, [prompt])
    stop = answer[12]
    end = answer.index(stop) + 1
    told = Told({0: prompt + answer}, errs=0.0, seed=1)
    batch = ContinuousBatch(model)
    number = batch.add(prompt, stop_tokens=[stop], keep=True, drafter=lambda: told)
    assert [new.token for new in batch.run()] == answer[:end]
    turn = [5, 6, 7]
    (following,) = texts(model, [[*prompt, *answer[:end], *turn]])
    batch.resume(number, turn)
    assert [new.token for new in batch.run()] == following
    batch.cancel(number)
    assert batch.cache.pages is not None
    assert batch.cache.pages.free_pages == 40


def test_a_failing_step_runs_again_without_drafts() -> None:
    model = small()
    prompts = prompts_of(20, 33)
    expected = texts(model, prompts)
    fails: list[bool] = []

    def fault(module: Any, args: Any, output: Any) -> None:
        if args[0].shape[0] > 2 and fails and fails.pop():
            raise RuntimeError("device")

    model.model.layers[1].register_forward_hook(fault)
    told = Told({p[0]: p + a for p, a in zip(prompts, expected, strict=True)}, errs=0.5)
    batch = ContinuousBatch(model)
    for prompt in prompts:
        batch.add(prompt, drafter=lambda: told)
    tokens: dict[int, list[int]] = defaultdict(list)
    for count, new in enumerate(batch.run()):
        tokens[new.sequence].append(new.token)
        if count % 5 == 0:
            fails.append(True)
    assert list(tokens.values()) == expected


def test_a_step_that_fails_before_it_computes_takes_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """As where no memory is left for its tokens: what the step before it wrote stays."""
    model = small()
    (prompt,) = prompts_of(20)
    (answer,) = texts(model, [prompt])
    told = Told({0: prompt + answer}, errs=0.0)
    batch = ContinuousBatch(model)
    batch.add(prompt, drafter=lambda: told)
    tokens = [new.token for new in batch.step()]
    while batch.accepted == 0:
        tokens += [new.token for new in batch.step()]
    raw = [layer.k_raw.clone() for layer in batch.cache]

    def full(*args: Any) -> None:
        raise MemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(batch._runner, "_host_memory", full)
        with pytest.raises(MemoryError):
            batch._driver.run_step(
                batch._roster.running, {batch._roster.running[0]: [1, 2]}, cuda_graph=False
            )
    assert all(map(torch.equal, raw, (layer.k_raw for layer in batch.cache)))
    assert tokens + [new.token for new in batch.run()] == answer


@pytest.mark.parametrize(
    ("draft", "text"),
    [
        ([512], "a draft's tokens must be from 0 to 511, got 512"),
        ([True], "a draft's tokens must be from 0 to 511, got True"),
        ([1] * 8, "a draft may have 7 tokens here, got 8; return fewer"),
        (3, "a draft must be a sequence of tokens, got 3"),
        (None, "a draft must be a sequence of tokens, got None"),
    ],
)
def test_a_bad_draft_ends_its_own_sequence(draft: Any, text: str) -> None:
    model = small()
    prompts = prompts_of(20, 33)
    expected = texts(model, prompts)
    batch = ContinuousBatch(model)
    batch.add(prompts[0], drafter=lambda: lambda tokens, most: draft)
    good = batch.add(prompts[1])
    news = list(batch.run())
    (failed,) = [new for new in news if new.finished == "error"]
    assert failed.sequence == 0
    assert text in str(failed.error)
    assert [new.token for new in news if new.sequence == good] == expected[1]


def test_a_drafter_that_changes_its_tokens_spoils_no_other_sequence() -> None:
    """Pages that sequences share are named by their tokens, which are not the drafter's list."""
    model = small(replace(PAGED, share_prefixes=True))
    (prompt,) = prompts_of(33)
    (answer,) = texts(model, [prompt], max_new_tokens=1)
    later = [*prompt, *answer, *[3] * 30]
    (expected,) = texts(model, [later])

    def appends(tokens: Sequence[int], most: int) -> list[int]:
        assert isinstance(tokens, list)
        tokens.append(3)
        return []

    batch = ContinuousBatch(model)
    batch.add(prompt, max_new_tokens=40, drafter=lambda: appends)
    list(batch.run())
    batch.add(later)
    assert [new.token for new in batch.run()] == expected


@pytest.mark.parametrize("drafter", [3, PromptLookup(), lambda tokens, most: []])
def test_a_drafter_is_made_for_each_sequence(drafter: Any) -> None:
    batch = ContinuousBatch(small())
    with pytest.raises(InvalidInputError, match=r"sequence 0: drafter must be what makes"):
        batch.add([1], drafter=drafter)


def test_prompt_lookup_proposes_what_followed_the_last_time() -> None:
    lookup = PromptLookup(match=2)
    text = [1, 2, 3, 4, 1, 2, 9, 8, 1, 2]
    assert list(lookup(text, 3)) == [9, 8, 1]
    text += [3]
    assert list(lookup(text, 3)) == [4, 1, 2]
    text += [7, 7]
    assert list(lookup(text, 3)) == []
    assert list(PromptLookup()([1, 2], 3)) == []
    with pytest.raises(InvalidInputError, match="match must be a positive integer, got 0"):
        PromptLookup(0)


def test_generate_with_drafts() -> None:
    model = small()
    ids = torch.tensor([5, 6, 7, 8] * 6 + [9, 1, 2, 3])
    offsets = torch.tensor([0, 24, 28])
    expected = model.generate(ids, offsets)
    assert torch.equal(model.generate(ids, offsets, drafter=PromptLookup), expected)
    with pytest.raises(InvalidInputError, match="generate: drafter must be what makes"):
        model.generate(ids, offsets, drafter=3)  # type: ignore[arg-type]
