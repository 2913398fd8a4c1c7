"""Dispatch tables: from a workload and target to kernels, one per range of run-time sizes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import Workload

Range = tuple[int | None, int | None]
"""A closed range (least, greatest); None means no limit."""

_ANY: Range = (None, None)


@dataclass(frozen=True, order=True)
class Bucket:
    """A range of run-time sizes, closed at both ends. `Bucket()` covers every call.

    Attributes:
        tokens: query tokens of the call or, when decoding, its rows.
        context: tokens that a query may look back on. A call that does not know its
            context is covered only by buckets without limits on it.
    """

    tokens: Range = _ANY
    context: Range = _ANY

    def __post_init__(self) -> None:
        for name, (least, greatest) in (("tokens", self.tokens), ("context", self.context)):
            if least is not None and greatest is not None and least > greatest:
                raise InvalidInputError(
                    f"Bucket: {name} must be (least, greatest) with least <= greatest; "
                    f"got ({least}, {greatest}); swap them"
                )

    def covers(self, tokens: int, context: int | None = None) -> bool:
        """Whether a call of these sizes falls into the bucket."""
        if context is None and self.context != _ANY:
            return False
        return _within(self.tokens, tokens) and _within(self.context, context or 0)

    @property
    def source(self) -> str:
        """Python that makes the bucket, as generated tables write it."""
        limits = (("tokens", self.tokens), ("context", self.context))
        return f"Bucket({', '.join(f'{n}={v}' for n, v in limits if v != _ANY)})"

    @property
    def order(self) -> tuple[int, int]:
        """Sorts buckets from small calls to large ones."""
        return (self.context[0] or 0, self.tokens[0] or 0)

    def __str__(self) -> str:
        limits = (("tokens", self.tokens), ("context", self.context))
        texts = [f"{name} {_text(limit)}" for name, limit in limits if limit != _ANY]
        return ", ".join(texts) or "any size"


def covers_all(buckets: Iterable[Bucket]) -> bool:
    """Whether every call falls into one of the buckets, whether or not it knows its context."""
    ranges = [bucket.tokens for bucket in buckets if bucket.context == _ANY]
    reached = -1  # calls of up to this many tokens are covered
    for least, greatest in sorted(ranges, key=lambda limits: limits[0] or 0):
        if (least or 0) > reached + 1:
            return False
        if greatest is None:
            return True
        reached = max(reached, greatest)
    return False


def _within(limits: Range, value: int) -> bool:
    least, greatest = limits
    return (least is None or least <= value) and (greatest is None or value <= greatest)


def _text(limits: Range) -> str:
    least, greatest = limits
    if least is None:
        return f"<= {greatest}"
    return f">= {least}" if greatest is None else f"{least}..{greatest}"


Entries = tuple[tuple[Bucket, str], ...]
"""(bucket, name of the kernel's module) pairs; the first bucket that covers a call serves it."""

Table = Mapping[Workload, Mapping[str, Entries]]
"""Workload -> target, e.g. "cuda:90" -> entries."""
