"""Two tasks over bytes: real text, and recall of what was seen anywhere before.

A batch depends on the seed and the step alone. So a resumed run reads what the unbroken run
would have read, and any number of processes or parts share one batch between them.
"""

from __future__ import annotations

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from nsagen.distributed import ContextParallel, Shard

from .config import TrainConfig

Split = Literal["train", "validation"]

IGNORED = -100
"""The target of a token that is not scored, as `cross_entropy` takes it."""

VALIDATION_EVERY = 16
"""Every so many-th document is for validation."""


class Task(Protocol):
    """A source of sequences.

    Attributes:
        name: for files and titles.
    """

    name: str

    def batch(self, split: Split, index: int, rows: int) -> tuple[Tensor, Tensor]:
        """The batch of a step: input_ids and targets, int64 [rows, seq_len]; or as many tokens in
        more and shorter rows, in equal numbers."""
        ...

    def describe(self) -> dict[str, object]:
        """What the data are, for the record."""
        ...


def generator_of(seed: int, split: Split, index: int) -> torch.Generator:
    """Random numbers of one batch."""
    text = f"{seed} {split} {index}".encode()
    digest = hashlib.sha256(text).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


_NO_SOURCES = {"site-packages", "test", "tests"}
"""Folders that are not looked into."""


def python_sources() -> Iterator[tuple[str, bytes]]:
    """Python files that this machine has: the standard library's, then PyTorch's, by path."""
    roots = (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent)
    for root in roots:
        paths = {}
        for folder, inner, files in os.walk(root):
            inner[:] = [name for name in inner if name not in _NO_SOURCES]
            found = (Path(folder, name) for name in files if name.endswith(".py"))
            paths |= {path.relative_to(root).as_posix(): path for path in found}
        for name in sorted(paths):
            yield f"{root.name}/{name}", paths[name].read_bytes()


@dataclass(frozen=True)
class Corpus:
    """Documents, one after the other with a zero byte between: uint8 [bytes] for each split."""

    train: Tensor
    validation: Tensor
    documents: int
    sha256: str

    @classmethod
    @functools.cache  # many runs of one process train on it
    def read(cls, limit: int) -> Corpus:
        """Read documents until they have `limit` bytes in all."""
        parts: dict[bool, list[bytes]] = {False: [], True: []}
        digest, total, count = hashlib.sha256(), 0, 0
        for name, text in python_sources():
            if total >= limit:
                break
            parts[count % VALIDATION_EVERY == VALIDATION_EVERY - 1].append(text + b"\0")
            digest.update(name.encode() + b"\0" + text)
            total, count = total + len(text), count + 1
        train, validation = (
            torch.frombuffer(bytearray(b"".join(parts[which])), dtype=torch.uint8)
            for which in (False, True)
        )
        return cls(train, validation, count, digest.hexdigest())


class TextTask:
    """Predict the next byte of Python source code."""

    name = "text"

    def __init__(self, corpus: Corpus, seq_len: int, seed: int) -> None:
        self.corpus, self.seq_len, self.seed = corpus, seq_len, seed
        shortest = min(len(corpus.train), len(corpus.validation))
        if shortest <= seq_len:
            raise ValueError(
                f"each part of the corpus must be longer than seq_len {seq_len}; "
                f"got {shortest} bytes; raise corpus_mib"
            )

    def batch(self, split: Split, index: int, rows: int) -> tuple[Tensor, Tensor]:
        source = self.corpus.train if split == "train" else self.corpus.validation
        random = generator_of(self.seed, split, index)
        starts = torch.randint(len(source) - self.seq_len, (rows, 1), generator=random)
        pieces = source[starts + torch.arange(self.seq_len + 1)].long()
        return pieces[:, :-1], pieces[:, 1:]

    def describe(self) -> dict[str, object]:
        return {
            "source": "Python files of the standard library and of PyTorch",
            "documents": self.corpus.documents,
            "train_bytes": len(self.corpus.train),
            "validation_bytes": len(self.corpus.validation),
            "sha256": self.corpus.sha256,
        }


class RecallTask:
    """Needles in filler: one value of each class lies far back; the last quarter asks for them.

    Bytes 0 .. 63 are values, 8 of each class; 64 .. 71 ask for a class; the others are filler.
    Needles lie between a sixteenth and half of a sequence. A needle is a value, as many times in a
    row as the sequence has 1024 tokens, at least twice. The last quarter are questions, each of any
    class. Answers are targets and no inputs, so that none is ever nearby: its needle lies more than
    a quarter of the sequence before a question. Guessing is right once in 8 times.

    In the first steps of training, a sequence has copies of its needles, a few or many, as many of
    each: attention that is still spread evenly over a sequence has to find something there.

    Args:
        easier_steps: how many steps have copies.

    Attributes:
        least_distance: from a question back to its answer, in tokens.
    """

    name = "recall"
    classes, values = 8, 8
    needles = classes
    first_filler = classes * values + classes

    def __init__(self, seq_len: int, seed: int, easier_steps: int = 0) -> None:
        self.seq_len, self.seed, self.easier_steps = seq_len, seed, easier_steps
        self.first, self.last, self.questions = seq_len // 16, seq_len // 2, seq_len // 4
        self.least_distance = seq_len - self.questions - (self.last - 1)
        self.length = self.needle_tokens(seq_len)
        self.places = (self.last - self.first) // self.length
        if self.places < self.needles:
            raise ValueError(
                f"{self.name} needs room for {self.needles} values between a sixteenth and half of "
                f"seq_len; got seq_len={seq_len}; raise it"
            )

    def batch(self, split: Split, index: int, rows: int) -> tuple[Tensor, Tensor]:
        random = generator_of(self.seed + 1, split, index)

        def uniform(*shape: int) -> Tensor:
            return torch.rand((rows, *shape), generator=random)

        def integers(start: int, end: int, size: int) -> Tensor:
            return torch.randint(start, end, (rows, size), generator=random)

        ids = integers(self.first_filler, 256, self.seq_len)
        needles = self.draw(random, rows)
        easier = split == "train" and index < self.easier_steps
        most = self.places // self.needles if easier else 1
        copies = (most + 1) ** uniform(1, 1)  # at least 1, and as often below the root as above it
        places = uniform(self.places).argsort(1)[:, : self.needles * most]
        places = places.unflatten(1, (self.needles, most))
        places = places.where(torch.arange(1, most + 1) <= copies, places[..., :1]).flatten(1)
        tokens = self.first + places[..., None] * self.length + torch.arange(self.length)
        ids.scatter_(1, tokens.flatten(1), needles.repeat_interleave(most * self.length, 1))
        targets = torch.full_like(ids, IGNORED)
        ids[:, -self.questions :], targets[:, -self.questions :] = self.ask(random, needles)
        return ids, targets

    def needle_tokens(self, seq_len: int) -> int:
        """Tokens of a needle."""
        return max(2, seq_len // 1024)

    def draw(self, random: torch.Generator, rows: int) -> Tensor:
        """The token of each needle: [rows, needles]."""
        shape = (rows, self.classes)
        drawn = torch.randint(0, self.values, shape, generator=random)
        return torch.arange(self.classes) * self.values + drawn

    def ask(self, random: torch.Generator, needles: Tensor) -> tuple[Tensor, Tensor]:
        """Questions and their answers: [rows, questions] each."""
        shape = (len(needles), self.questions)
        asked = torch.randint(0, self.classes, shape, generator=random)
        return self.classes * self.values + asked, needles.gather(1, asked)

    def describe(self) -> dict[str, object]:
        return {
            "source": "random needles",
            "needles": self.needles,
            "needle_tokens": self.length,
            "guessing": round(1 / self.values, 4),
            "least_distance": self.least_distance,
            "easier_steps": self.easier_steps,
        }


def task_of(name: str, config: TrainConfig) -> Task:
    """The task of a name.

    Raises:
        ValueError: no task has this name, or it does not fit seq_len.
    """
    if name == "text":
        return TextTask(Corpus.read(config.corpus_mib << 20), config.seq_len, config.seed)
    if name == "recall":
        return RecallTask(config.seq_len, config.seed, config.steps * 6 // 10)
    raise ValueError(f"task must be text or recall; got {name!r}")


@dataclass(frozen=True)
class Packed:
    """Rows of a batch on a device: int64 [rows * seq_len] twice, and int32 [rows + 1]; or a
    process's part of each sequence."""

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor | Shard

    @classmethod
    def of(
        cls,
        input_ids: Tensor,
        targets: Tensor,
        device: torch.device,
        context: ContextParallel | None = None,
    ) -> Packed:
        """With `context`, this process's part of each sequence."""
        rows, seq_len = input_ids.shape
        ends = torch.arange(0, (rows + 1) * seq_len, seq_len, dtype=torch.int32)
        ids, goals = (x.flatten().to(device, non_blocking=True) for x in (input_ids, targets))
        if context is None:
            return cls(ids, goals, ends.to(device, non_blocking=True))
        shard = context.shard(ends, device)  # lengths that are on the host already
        return cls(shard.take(ids), shard.take(goals), shard)
