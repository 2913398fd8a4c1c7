"""Retrieval in the manner of RULER, made from a seed: five tasks that one model learns at once.

Needles lie in filler, and the last quarter of a sequence asks for them, as in `RecallTask`:

- single: one needle, asked for again and again.
- several needles: eight, of which each question asks for any.
- several keys: one key is asked for; the other seven have four needles each, which distract.
- several values: each of eight keys has two values. A question is one of them, always the same of
  a key; the answer is the other one, which is nowhere near.
- variables: four have values, and four others are set to one of these. Questions ask for the
  latter: first find what a variable was set to, then that one's value.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from .config import TrainConfig
from .data import RecallTask, Split

KEYS, VALUES = RecallTask.classes, RecallTask.values
FIRST_QUESTION = KEYS * VALUES
FIRST_LINK = FIRST_QUESTION + KEYS

SHORTEST = 4096
"""Tokens of the first steps' sequences, where the full length is larger."""


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


def _among_others(random: Generator, rows: int) -> Tensor:
    keys = _any_order(random, rows)
    return _values(random, torch.cat([keys[:, :1], keys[:, 1:].repeat(1, 4)], 1))


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


def _by_key(needles: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    answers = needles.gather(1, asked)
    return FIRST_QUESTION + answers // VALUES, answers


def _by_first_value(needles: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    return needles.gather(1, asked), needles.gather(1, asked + KEYS)


def _by_link(needles: Tensor, asked: Tensor) -> tuple[Tensor, Tensor]:
    links = needles.gather(1, asked + KEYS // 2)
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


KINDS = {
    "single": Kind(1, 1, _one, _by_key),
    "several needles": Kind(KEYS, KEYS, _each, _by_key),
    "several keys": Kind(1 + 4 * (KEYS - 1), 1, _among_others, _by_key),
    "several values": Kind(2 * KEYS, KEYS, _two_of_each, _by_first_value),
    "variables": Kind(KEYS, KEYS // 2, _chains, _by_link),
}


class RetrievalTask(RecallTask):
    """One of `KINDS`; needles have at most 4 tokens, whatever the length.

    Args:
        kind: its name.
        seq_len, seed, easier_steps: as `RecallTask` has them.
    """

    first_filler = FIRST_LINK + KEYS * KEYS

    def __init__(self, kind: str, seq_len: int, seed: int, easier_steps: int = 0) -> None:
        self.name, self.kind = kind, KINDS[kind]
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

    The first 60% of the steps have copies of needles and sequences of at most `SHORTEST` tokens.
    The rest go up to the full length in equal parts, four times as long each. Validation is always
    of the full length.
    """

    name = "retrieval"

    def __init__(self, config: TrainConfig) -> None:
        self.config, self.easier_steps = config, config.steps * 6 // 10
        self.lengths = [config.seq_len]
        while self.lengths[0] > SHORTEST and self.lengths[0] % 4 == 0:
            self.lengths.insert(0, self.lengths[0] // 4)
        self.tasks = {length: self._tasks(length) for length in self.lengths}

    def _tasks(self, length: int) -> list[RetrievalTask]:
        return [RetrievalTask(k, length, self.config.seed, self.easier_steps) for k in KINDS]

    def length_of(self, split: Split, index: int) -> int:
        """Tokens of a step's sequences."""
        if split == "validation":
            return self.config.seq_len
        harder, steps = index - self.easier_steps, self.config.steps - self.easier_steps
        return self.lengths[max(0, harder * len(self.lengths) // steps)]

    def batch(self, split: Split, index: int, rows: int) -> tuple[Tensor, Tensor]:
        length = self.length_of(split, index)
        rows *= self.config.seq_len // length
        tasks = self.tasks[length]
        counts = [0] * len(tasks)
        for row in range(rows):
            counts[(index * rows + row) % len(tasks)] += 1
        parts = [task.batch(split, index, n) for task, n in zip(tasks, counts, strict=True) if n]
        ids, targets = (torch.cat(x) for x in zip(*parts, strict=True))
        return ids, targets

    def describe(self) -> dict[str, object]:
        return {
            "source": "random needles",
            "kinds": list(KINDS),
            "lengths": self.lengths,
            "easier_steps": self.easier_steps,
        }
