"""Sequences that begin alike share pages, and get the tokens that they get without."""

from __future__ import annotations

import dataclasses
import random
from collections import Counter, defaultdict
from typing import Any

import pytest
import torch

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.model import ContinuousBatch, InferenceConfig, SamplingConfig, ToyLlama, ToyNSALlama
from tests.model.test_serving import alone, collect
from tests.model.tiny import dense_config, nsa_model

PAGED = InferenceConfig(4, 160, 8, paged=True, page_size=16, num_pages=40)
SHARED = InferenceConfig(4, 160, 8, paged=True, page_size=16, num_pages=40, share_prefixes=True)


SHAPE: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
}


def small(limits: InferenceConfig, **changes: Any) -> ToyNSALlama:
    return nsa_model(limits, **{**SHAPE, **changes})


def small_dense(limits: InferenceConfig) -> ToyLlama:
    generator = torch.Generator().manual_seed(1)
    return ToyLlama(dense_config(**SHAPE), limits, generator=generator).double()


def words(count: int, seed: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(512) for _ in range(count)]


def expected(model: ToyNSALlama | ToyLlama, prompt: list[int], steps: int = 8) -> list[int]:
    return alone(model, torch.tensor(prompt), steps)


class Watched:
    """How many tokens each pass and step computes. A new hook forgets prefixes: watch first."""

    def __init__(self, model: ToyNSALlama | ToyLlama) -> None:
        self.tokens: list[int] = []
        model.model.embed_tokens.register_forward_hook(self.see)

    def see(self, module: Any, args: tuple[torch.Tensor], output: Any) -> None:
        self.tokens.append(args[0].shape[0])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"kernel_size": 4},
        {"kernel_size": 32, "kernel_stride": 8},
        {"compress_type": "linear", "branch_kv": "separate"},
        {"compress_type": "mlp", "v_compress_type": "weightedpool"},
    ],
    ids=["usual", "windows meet", "windows span pages", "separate", "mlp"],
)
@pytest.mark.parametrize("chunk", [None, 13])
def test_a_prompt_computes_only_what_no_earlier_one_has(
    changes: dict[str, Any], chunk: int | None
) -> None:
    limits = InferenceConfig(**{**vars(SHARED), "prefill_chunk_size": chunk})
    model = small(limits, **changes)
    batch, head = ContinuousBatch(model), words(70, 1)
    prompts = [head + words(20, 2), head + words(9, 3), head[:50] + words(30, 4), head, head[:3]]
    assert collect_one(batch, prompts[0]) == expected(model, prompts[0])
    for prompt in prompts[1:]:
        new = collect_one(batch, prompt)
        assert new == expected(model, prompt)
    assert batch.cache.pages.free_pages == 40


def collect_one(batch: ContinuousBatch, prompt: list[int], **options: Any) -> list[int]:
    number = batch.add(prompt, **options)
    return collect(batch)[number]


def test_whole_pages_are_reused_and_their_tokens_not_computed_again() -> None:
    """Windows are of 8 tokens, one every 4. So a page's last window reaches 4 tokens past it, and
    a page is shared where those are equal too."""
    model = small(SHARED)
    batch, head = ContinuousBatch(model), words(52, 1)
    seen = Watched(model)
    for prompt, computed in (
        (head + words(10, 2), 62),
        (head + words(11, 3), 63 - 48),  # 52 equal tokens: three pages of 16, and 4 more
        (head[:51] + words(10, 4), 61 - 32),
        (head[:19] + words(10, 5), 29),
    ):
        seen.tokens.clear()
        number = batch.add(prompt, max_new_tokens=1)
        assert collect(batch)[number] == expected(model, prompt, 1)
        assert seen.tokens[0] == computed


def test_prompts_that_come_together_compute_their_beginning_once() -> None:
    model = small(SHARED)
    batch, head = ContinuousBatch(model), words(60, 1)
    prompts = [head + words(n, n) for n in (5, 17, 1)]
    seen = Watched(model)
    for prompt in prompts:
        batch.add(prompt, max_new_tokens=2)
    tokens = collect(batch)
    assert seen.tokens[:3] == [65, 1, 17 + 1 + 2 * 12]
    assert list(tokens.values()) == [expected(model, prompt, 2) for prompt in prompts]


def test_an_answer_is_a_prefix_too() -> None:
    """A chat's next turn as a request of its own finds the turns before it."""
    model = small(SHARED)
    batch, prompt, seen = ContinuousBatch(model), words(30, 1), Watched(model)
    answer = collect_one(batch, prompt, max_new_tokens=26)
    following = [*prompt, *answer, *words(4, 2)]
    seen.tokens.clear()
    assert collect_one(batch, following, max_new_tokens=1) == expected(model, following, 1)
    assert seen.tokens[0] == 60 - 48


def test_pages_of_ended_sequences_go_when_others_need_them() -> None:
    """The least recently used first; one sequence's end before its beginning."""
    limits = InferenceConfig(2, 96, 8, paged=True, page_size=16, num_pages=8, share_prefixes=True)
    model = small(limits)
    batch, old, new = ContinuousBatch(model), words(37, 1), words(37, 2)
    pages, seen = batch.cache.pages, Watched(model)
    assert pages is not None
    for prompt in (old, new):
        collect_one(batch, prompt, max_new_tokens=8)  # three pages, of which two are named
    assert (pages.free_pages, pages.index.unused) == (8, 4)
    collect_one(batch, old, max_new_tokens=1)  # is used again
    collect_one(batch, words(70, 3), max_new_tokens=8)  # five pages: four are free, one is taken
    for prompt, computed in ((old, 37 - 32), (new, 37 - 16)):
        seen.tokens.clear()
        assert collect_one(batch, prompt, max_new_tokens=1) == expected(model, prompt, 1)
        assert seen.tokens[0] == computed


def test_what_is_shared_needs_no_room() -> None:
    limits = InferenceConfig(4, 96, 8, paged=True, page_size=16, num_pages=8, share_prefixes=True)
    model = small(limits)
    batch, head = ContinuousBatch(model), words(68, 1)
    batch.add(head, max_new_tokens=8)  # five pages
    batch.step()
    batch.add([*head, 1], max_new_tokens=8)  # one more
    batch.add([*head, 2], max_new_tokens=8)
    batch.add([*head, 3], max_new_tokens=8)
    assert batch.cache.pages.free_pages == 0
    tokens = collect(batch)
    assert tokens[3] == expected(model, [*head, 3])
    assert batch.cache.pages.free_pages == 8
    assert batch.add(words(88, 5)) == 4, "whatever is kept gives way"
    with pytest.raises(CapacityError, match=r"sequence 5: its 40 tokens need 3 free pages.* got 2"):
        batch.add(words(32, 6))


def test_changed_weights_modules_and_hooks_forget_prefixes() -> None:
    model = small(SHARED)
    batch, prompt = ContinuousBatch(model), words(60, 1)
    assert collect_one(batch, prompt) == expected(model, prompt)
    with torch.no_grad():
        model.model.layers[0].self_attn.v_proj.weight.mul_(-1)
    assert collect_one(batch, prompt) == expected(model, prompt)
    hook = model.model.layers[0].register_forward_hook(lambda module, args, output: output * 0.5)
    assert collect_one(batch, prompt) == expected(model, prompt)
    hook.remove()
    model.model.layers[1].mlp.up_proj.weight.data.mul_(0.5)  # leaves no version
    batch.forget_prefixes()
    assert collect_one(batch, prompt) == expected(model, prompt)


def test_generate_shares_within_a_call() -> None:
    model, plain = small(SHARED), small(PAGED)
    head = words(40, 1)
    prompts = [head + words(n, n) for n in (3, 9)]
    ids = torch.tensor([token for prompt in prompts for token in prompt])
    offsets = torch.tensor([0, 43, 92])
    seen = Watched(model)
    assert torch.equal(model.generate(ids, offsets), plain.generate(ids, offsets))
    assert seen.tokens[:2] == [43, 17]
    model.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)
    plain.model.layers[0].mlp.up_proj.weight.data.mul_(0.5)
    assert torch.equal(model.generate(ids, offsets), plain.generate(ids, offsets))


def test_a_failed_pass_starts_again_where_the_sequence_began() -> None:
    """Its own pages, which others may share by now, are not written to again."""
    model = small(InferenceConfig(**{**vars(SHARED), "prefill_chunk_size": 30}))
    batch, head, fails = ContinuousBatch(model), words(40, 1), []

    def fault(module: Any, args: Any, output: Any) -> None:
        if fails and fails.pop(0):
            raise RuntimeError("device")

    model.model.layers[1].register_forward_hook(fault)
    seen = Watched(model)
    collect_one(batch, head, max_new_tokens=1)
    prompts = [head + words(40, 2), head + words(50, 3)]
    for prompt in prompts:
        batch.add(prompt, max_new_tokens=3)
    seen.tokens.clear()
    fails += [False, True]
    tokens = collect(batch)
    assert seen.tokens[:4] == [30, (80 - 62) + 12, 30, 80 - 48 - 30]
    assert [tokens[1], tokens[2]] == [expected(model, prompt, 3) for prompt in prompts]


CACHES = {
    "contiguous": InferenceConfig(4, 160, 8),
    "in pages": PAGED,
    "shared": SHARED,
}


@pytest.mark.parametrize(("cache", "dense"), [*((c, False) for c in CACHES), ("contiguous", True)])
def test_a_fork_goes_on_from_the_same_tokens(cache: str, dense: bool) -> None:
    limits = CACHES[cache]
    model = small_dense(limits) if dense else small(limits)
    batch, prompt = ContinuousBatch(model), words(45, 1)
    first = batch.add(prompt, max_new_tokens=12, keep=True)
    early, seen = batch.fork(first, max_new_tokens=3), Watched(model)  # it waits
    got: dict[int, list[int]] = defaultdict(list)
    while len(got[first]) < 7:
        for new in batch.step():
            got[new.sequence].append(new.token)
    seen.tokens.clear()
    fork = batch.fork(first, sampling=SamplingConfig(temperature=2.0, seed=5), max_new_tokens=4)
    known = [*prompt, *got[first]]
    for new in batch.run():
        got[new.sequence].append(new.token)
    text = expected(model, prompt, 12)
    assert got[first] == text
    assert got[early] == text[:3]
    ids, ends = torch.tensor(known), torch.tensor([0, len(known)])
    warm = SamplingConfig(temperature=2.0, seed=5)
    assert got[fork] == model.generate(ids, ends, 4, sampling=warm)[0].tolist()
    assert 1 <= seen.tokens[0] <= 8, "the last windows' tokens, and no more"
    late = batch.fork(first, max_new_tokens=2)  # from one that has ended and was kept
    assert collect(batch)[late] == expected(model, [*prompt, *text], 2)
    batch.cancel(first)
    with pytest.raises(InvalidInputError, match="fork of sequence 0: the sequence must wait, run"):
        batch.fork(first)
    assert batch.free_slots == 4
    assert batch.cache.pages is None or batch.cache.pages.free_pages == 40


@pytest.mark.parametrize(("cache", "dense"), [*((c, False) for c in CACHES), ("contiguous", True)])
def test_a_second_turn_computes_only_its_own_tokens(cache: str, dense: bool) -> None:
    limits = CACHES[cache]
    model = small_dense(limits) if dense else small(limits)
    batch, text, seen = ContinuousBatch(model), words(41, 1), Watched(model)
    answer = expected(model, text)
    stop = next(token for token in answer[2:] if token not in answer[:2])
    number = batch.add(text, stop_tokens=[stop], keep=True)
    other = batch.add(words(20, 7), max_new_tokens=30)
    got: dict[int, list[int]] = defaultdict(list)
    for turn in range(4):
        while len(got[number]) < 8 and stop not in got[number]:
            for new in batch.step():
                got[new.sequence].append(new.token)
        assert got[number] == answer[: len(got[number])]
        text = [*text, *got.pop(number), *words(5 + turn, turn)]
        batch.resume(number, words(5 + turn, turn), max_new_tokens=8)
        answer = expected(model, text)
        seen.tokens.clear()
        for new in batch.step():
            got[new.sequence].append(new.token)
        assert seen.tokens[0] <= 1 + 5 + turn + (0 if dense else 7)
        stop = -1
    batch.cancel(number)
    for new in batch.run():
        got[new.sequence].append(new.token)
    assert got[other] == expected(model, words(20, 7), 30)


def test_a_fork_shares_whole_pages_and_copies_the_last() -> None:
    """What either writes afterwards is in pages of its own."""
    model = small(PAGED)
    batch, prompt = ContinuousBatch(model), words(45, 1)
    first = batch.add(prompt, max_new_tokens=20)
    tokens = [new.token for new in batch.step()]
    fork = batch.fork(first, max_new_tokens=20)
    pages = batch.cache.pages
    assert pages is not None
    one, other = (list(pages.of(batch._roster.unread[number].slot)) for number in (first, fork))
    # Of 45 tokens the last 4 can still change a window: two pages are whole, the third has 9.
    assert one[:2] == other[:2]
    assert not set(one[2:]) & set(other[2:])
    assert [pages._holders[page] for page in one] == [2, 2, 1, 1, 1]
    third = [layer.v[one[2], :8].clone() for layer in batch.cache]
    assert all(
        torch.equal(layer.v[other[2], :8], kept)
        for layer, kept in zip(batch.cache, third, strict=True)
    )
    batch.cancel(first)
    assert [pages._holders[page] for page in other[:2]] == [1, 1]
    forked = [new.token for new in batch.run() if new.sequence == fork]
    assert forked == expected(model, prompt + tokens, 20)
    assert pages.free_pages == 40


def test_refusals_of_turns() -> None:
    limits = InferenceConfig(4, 160, 8, paged=True, page_size=16, num_pages=32)
    batch = ContinuousBatch(small(limits))
    number = batch.add([1, 2, 3], max_new_tokens=2, keep=True)
    plain = batch.add([1, 2, 3], max_new_tokens=2)
    with pytest.raises(InvalidInputError, match=r"resume of sequence 0: .*got one that still runs"):
        batch.resume(number, [4])
    collect(batch)
    with pytest.raises(InvalidInputError, match=r"resume of sequence 1: .*got an unknown number"):
        batch.resume(plain, [4])
    with pytest.raises(InvalidInputError, match=r"at most InferenceConfig\.max_length=160"):
        batch.resume(number, [4] * 150)
    with pytest.raises(InvalidInputError, match="a turn must have a token"):
        batch.resume(number, [])
    with pytest.raises(InvalidInputError, match="keep must be True or False, got 1"):
        batch.add([1], keep=1)  # type: ignore[arg-type]
    for seed in range(3):
        batch.add(words(150, seed))
    with pytest.raises(
        CapacityError, match="resume of sequence 0: its 58 tokens need 3 free pages"
    ):
        batch.resume(number, words(45, 2))
    batch.clear()
    assert batch.cache.pages is not None
    assert batch.cache.pages.free_pages == 32


def test_prefixes_need_pages() -> None:
    with pytest.raises(InvalidInputError, match="share_prefixes needs paged=True"):
        InferenceConfig(share_prefixes=True)


class Soak:
    """A batch that shares prefixes, in too few pages; texts of few words begin alike often."""

    def __init__(self, seed: int) -> None:
        limits = InferenceConfig(
            *(5, 96, 6), prefill_chunk_size=40, paged=True, page_size=16, num_pages=17
        )
        self.plain = small(limits, num_hidden_layers=1)
        self.model = small(dataclasses.replace(limits, share_prefixes=True), num_hidden_layers=1)
        self.batch, self.draw = ContinuousBatch(self.model), random.Random(seed)
        self.texts: dict[int, list[int]] = {}
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.kept: set[int] = set()
        self.done: list[tuple[list[int], list[int]]] = []
        self.count: Counter[str] = Counter()

    def run(self, events: int) -> None:
        """Until so many sequences have come, by arrival, fork or turn, or ended."""
        actions = [self.add, self.fork, self.resume, self.cancel, self.step]
        while sum(self.count[name] for name in ("add", "fork", "resume", "end")) < events:
            (action,) = self.draw.choices(actions, [30, 12, 12, 6, 60])
            try:
                action()
            except CapacityError:
                self.count["full"] += 1
        while not self.batch.idle:
            self.step()
        for number in self.kept:
            self.batch.cancel(number)

    def few(self, most: int) -> int:
        return self.draw.randint(1, most)

    def add(self) -> None:
        head = words(52, self.few(3))[: self.few(52)]
        prompt, keep = head + words(self.few(8) - 1, self.few(4)), self.draw.random() < 0.3
        number = self.batch.add(prompt, max_new_tokens=self.few(6), keep=keep)
        self.texts[number] = prompt
        self.count["add"] += 1
        if keep:
            self.kept.add(number)

    def one_of(self, numbers: set[int]) -> int | None:
        return self.draw.choice(sorted(numbers)) if numbers else None

    def fork(self) -> None:
        number = self.one_of(
            {*(one.number for one in self.batch._roster.running), *self.batch._roster.kept}
        )
        if number is not None:
            text = self.texts[number] + self.tokens[number]
            self.texts[self.batch.fork(number, max_new_tokens=self.few(4))] = text
            self.count["fork"] += 1

    def resume(self) -> None:
        number = self.one_of(self.kept - set(self.batch._roster.unread))
        if number is not None and len(self.texts[number]) < 76:
            turn = words(self.few(6), self.few(4))
            self.batch.resume(number, turn, max_new_tokens=self.few(5))
            self.texts[number] = self.texts[number] + self.tokens.pop(number) + turn
            self.count["resume"] += 1

    def cancel(self) -> None:
        number = self.one_of({*self.batch._roster.unread, *self.kept})
        if number is not None:
            self.batch.cancel(number)
            self.kept.discard(number)
            self.count["end"] += 1

    def step(self) -> None:
        for new in self.batch.step():
            self.tokens[new.sequence].append(new.token)
            if new.finished:
                self.count["end"] += 1
                number = new.sequence
                self.done.append((self.texts[number], list(self.tokens[number])))

    def compare(self) -> None:
        """Every answer against that of a model without shared prefixes."""
        longest: dict[tuple[int, ...], int] = defaultdict(int)
        for text, tokens in self.done:
            longest[tuple(text)] = max(longest[tuple(text)], len(tokens))
        plain = {
            text: self.plain.generate(torch.tensor(text), torch.tensor([0, len(text)]), most)
            for text, most in longest.items()
        }
        for text, tokens in self.done:
            assert tokens == plain[tuple(text)][0, : len(tokens)].tolist()


@pytest.mark.parametrize("events", [70, pytest.param(2000, marks=pytest.mark.slow)])
def test_arrivals_forks_turns_and_ends_leak_no_page(events: int) -> None:
    soak = Soak(seed=events)
    soak.run(events)
    pages = soak.batch.cache.pages
    assert pages is not None
    assert pages.free_pages == 17
    assert not any(pages._holders)
    assert soak.batch.free_slots == 5
    assert min(soak.count[name] for name in ("add", "fork", "resume")) > events / 20
    assert soak.count["full"] > 0
    soak.compare()
