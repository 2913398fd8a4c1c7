"""Two tasks over bytes: real text, and recall of what was seen anywhere before.

A batch depends on the seed and the step alone. So a resumed run reads what the unbroken run
would have read, and any number of processes or parts share one batch between them.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

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
        """The batch of a step: input_ids and targets, int64 [rows, seq_len]."""
        ...

    def describe(self) -> dict[str, object]:
        """What the data are, for the record."""
        ...


def generator_of(seed: int, split: Split, index: int) -> torch.Generator:
    """Random numbers of one batch."""
    text = f"{seed} {split} {index}".encode()
    digest = hashlib.sha256(text).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))


def python_sources() -> Iterator[tuple[str, bytes]]:
    """Python files that this machine has: the standard library's, then PyTorch's, by path."""
    roots = (Path(sysconfig.get_path("stdlib")), Path(torch.__file__).parent)
    for root in roots:
        paths = {path.relative_to(root).as_posix(): path for path in root.rglob("*.py")}
        for name in sorted(paths):
            if not {"site-packages", "test", "tests"} & set(name.split("/")):
                yield f"{root.name}/{name}", paths[name].read_bytes()


@dataclass(frozen=True)
class Corpus:
    """Documents, one after the other with a zero byte between: uint8 [bytes] for each split."""

    train: Tensor
    validation: Tensor
    documents: int
    sha256: str

    @classmethod
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
    """Needles: a value of each class lies somewhere in filler; the end asks for them in any order.

    Bytes 0 .. 191 are values, 12 of each class; 192 .. 207 ask for a class, and the value follows;
    the others are filler. Only the answers are scored: guessing is right once in 12 times.
    In training a value lies at 1 to seq_len / 128 places, the same number for all of a sequence,
    which is easier to learn from; in validation at one.
    """

    name = "recall"
    classes, values = 16, 12

    def __init__(self, seq_len: int, seed: int) -> None:
        self.seq_len, self.seed = seq_len, seed
        if seq_len < 3 * self.classes:
            raise ValueError(
                f"recall needs a seq_len of {3 * self.classes} or more, for {self.classes} values "
                f"and as many questions with answers; got {seq_len}; raise it"
            )

    def batch(self, split: Split, index: int, rows: int) -> tuple[Tensor, Tensor]:
        random = generator_of(self.seed + 1, split, index)

        def permuted(size: int) -> Tensor:
            return torch.rand((rows, size), generator=random).argsort(1)

        questions = self.classes * self.values
        body = self.seq_len - 2 * self.classes
        drawn = torch.randint(self.values, (rows, self.classes), generator=random)
        needles = torch.arange(self.classes) * self.values + drawn
        ids = torch.randint(questions + self.classes, 256, (rows, self.seq_len), generator=random)
        most = max(1, self.seq_len // 128) if split == "train" else 1
        places = permuted(body)[:, : self.classes * most].unflatten(1, (self.classes, most))
        copies = torch.randint(1, most + 1, (rows, 1, 1), generator=random)
        places = places.where(torch.arange(most) < copies, places[..., :1])
        ids.scatter_(1, places.flatten(1), needles.repeat_interleave(most, 1))
        asked = permuted(self.classes)
        answers = needles.gather(1, asked)
        ids[:, body::2], ids[:, body + 1 :: 2] = questions + asked, answers
        targets = torch.full_like(ids, IGNORED)
        targets[:, body::2] = answers
        return ids, targets

    def describe(self) -> dict[str, object]:
        return {
            "source": "random needles",
            "needles": self.classes,
            "guessing": round(1 / self.values, 4),
        }


def task_of(name: str, seq_len: int, seed: int, corpus_mib: int) -> Task:
    """The task of a name.

    Raises:
        ValueError: no task has this name, or it does not fit seq_len.
    """
    if name == "text":
        return TextTask(Corpus.read(corpus_mib << 20), seq_len, seed)
    if name == "recall":
        return RecallTask(seq_len, seed)
    raise ValueError(f"task must be text or recall; got {name!r}")


@dataclass(frozen=True)
class Packed:
    """Rows of a batch on a device: int64 [rows * seq_len] twice, and int32 [rows + 1]."""

    input_ids: Tensor
    targets: Tensor
    cu_seqlens: Tensor

    @classmethod
    def of(cls, input_ids: Tensor, targets: Tensor, device: torch.device) -> Packed:
        rows, seq_len = input_ids.shape
        ends = torch.arange(0, (rows + 1) * seq_len, seq_len, dtype=torch.int32)
        flat = (input_ids.flatten(), targets.flatten(), ends)
        return cls(*(tensor.to(device, non_blocking=True) for tensor in flat))
