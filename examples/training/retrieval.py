"""Retrieval in the manner of RULER, made from a seed: six tasks that one model learns at once.

Needles lie in filler, and the last quarter of a sequence asks for them, as in `RecallTask`:

- single: one needle, asked for again and again.
- several needles: eight, of which each question asks for any.
- several keys: one key is asked for; the other seven have four needles each, which distract.
- several values: each of eight keys has two values. A question is one of them, always the same of
  a key; the answer is the other one, which is nowhere near.
- variables: four have values, and four others are set to one of these. Questions ask for the
  latter: first find what a variable was set to, then that one's value.
- longer chains: two of those four are set to one that has a value, and the other two to these.
  Questions ask for the last two: there are two links to follow.

One more is asked and never trained: several keys with twelve needles of each other key.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .config import TrainConfig
from .data import RecallTask, Split

KEYS, VALUES = RecallTask.classes, RecallTask.values
FIRST_QUESTION = KEYS * VALUES
FIRST_LINK = FIRST_QUESTION + KEYS


def _any_order(random: Generator, rows: int) -> Tensor:
    """The keys of each row in random order: [rows, KEYS]."""
    return torch.rand((rows, KEYS), generator=random).argsort(1)


def _values(random: Generator, keys: Tensor) -> Tensor:
    """A value for each key of [rows, n], as a token."""
    return keys * VALUES + torch.randint(0, VALUES, keys.shape, generator=random)


def _one(random: Generator, rows: int) -> Tensor:
    return _values(random, _any_order(random, rows)[:, :1])


def _each(random: Generator, rows: int) -> Tensor:
    return _values(random, _any_order(random, rows))


def _among_others(random: Generator, rows: int, of_each: int) -> Tensor:
    keys = _any_order(random, rows)
    return _values(random, torch.cat([keys[:, :1], keys[:, 1:].repeat(1, of_each)], 1))


def _two_of_each(random: Generator, rows: int) -> Tensor:
    """[rows, 2 * KEYS]: first values, then the others."""
    first = _each(random, rows)
    keys, value = first // VALUES, first % VALUES
    step = torch.randint(1, VALUES, keys.shape, generator=random)
    return torch.cat([first, keys * VALUES + (value + step) % VALUES], 1)


def _chains(random: Generator, rows: int) -> Tensor:
    """[rows, KEYS]: half the keys' values, then links of the other half to them."""
    keys, half = _any_order(random, rows), KEYS // 2
    links = FIRST_LINK + keys[:, half:] * KEYS + keys[:, :half]
    return torch.cat([_values(random, keys[:, :half]), links], 1)


def _longer_chains(random: Generator, rows: int) -> Tensor:
    """[rows, KEYS]: half the keys' values, two links to these, and two links to the latter."""
    keys, half = _any_order(random, rows), KEYS // 2
    links = FIRST_LINK + keys[:, half:] * KEYS + keys[:, [0, 1, half, half + 1]]
    return torch.cat([_values(random, keys[:, :half]), links], 1)


def _by_key(needles: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    answers = needles.gather(1, asked)
    return FIRST_QUESTION + answers // VALUES, answers


def _by_first_value(needles: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    return needles.gather(1, asked), needles.gather(1, asked + KEYS)


def _by_link(needles: Tensor, asked: Tensor, first: int = KEYS // 2) -> tuple[Tensor, Tensor]:
    links = needles.gather(1, asked + first)
    return FIRST_QUESTION + (links - FIRST_LINK) // KEYS, needles.gather(1, asked)


@dataclass(frozen=True)
class Kind:
    """A task.

    Attributes:
        needles: of a sequence.
        choices: of a question.
        draw: the needles' tokens, [rows, needles], of random numbers and rows.
        ask: questions and answers, of needles and choices.
    """

    needles: int
    choices: int
    draw: Callable[[Generator, int], Tensor]
    ask: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def _several_keys(of_each: int) -> Kind:
    draw = functools.partial(_among_others, of_each=of_each)
    return Kind(1 + of_each * (KEYS - 1), 1, draw, _by_key)


KINDS = {
    "single": Kind(1, 1, _one, _by_key),
    "several needles": Kind(KEYS, KEYS, _each, _by_key),
    "several keys": _several_keys(4),
    "several values": Kind(2 * KEYS, KEYS, _two_of_each, _by_first_value),
    "variables": Kind(KEYS, KEYS // 2, _chains, _by_link),
    "longer chains": Kind(KEYS, 2, _longer_chains, functools.partial(_by_link, first=KEYS - 2)),
}
CROWD = "12 of each other key"
UNSEEN = {CROWD: _several_keys(12)}
"""Not trained on."""


class RetrievalTask(RecallTask):
    """One of `KINDS` or `UNSEEN`; needles have at most 4 tokens, whatever the length.

    Args:
        kind: its name.
        seq_len, seed, easier_steps: as `RecallTask` has them.
    """

    first_filler = FIRST_LINK + KEYS * KEYS

    def __init__(self, kind: str, seq_len: int, seed: int, easier_steps: int = 0) -> None:
        self.name, self.kind = kind, (KINDS | UNSEEN)[kind]
        self.needles = self.kind.needles
        super().__init__(seq_len, seed, easier_steps)

    def needle_tokens(self, seq_len: int) -> int:
        return min(4, super().needle_tokens(seq_len))

    def draw(self, random: Generator, rows: int) -> Tensor:
        return self.kind.draw(random, rows)

    def ask(self, random: Generator, needles: Tensor) -> tuple[Tensor, Tensor]:
        shape = (len(needles), self.questions)
        return self.kind.ask(needles, torch.randint(0, self.kind.choices, shape, generator=random))


class RetrievalMix:
    """All kinds in turn, a sequence each.

    Args:
        config: of the run.
        easier: whether the first 60% of the steps have copies of needles.
    """

    name = "retrieval"

    def __init__(self, config: TrainConfig, easier: bool = True) -> None:
        self.easier_steps = config.steps * 6 // 10 if easier else 0
        sizes = (config.seq_len, config.seed, self.easier_steps)
        self.tasks = [RetrievalTask(kind, *sizes) for kind in KINDS]

    def batch(self, split: Split, index: int, rows: int) -> tuple[Tensor, Tensor]:
        counts = [0] * len(self.tasks)
        for row in range(rows):
            counts[(index * rows + row) % len(self.tasks)] += 1
        shares = zip(self.tasks, counts, strict=True)
        parts = [task.batch(split, index, count) for task, count in shares if count]
        ids, targets = (torch.cat(x) for x in zip(*parts, strict=True))
        return ids, targets

    def describe(self) -> dict[str, object]:
        return {
            "source": "random needles",
            "kinds": list(KINDS),
            "easier_steps": self.easier_steps,
        }
