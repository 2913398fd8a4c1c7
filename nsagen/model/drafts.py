"""Drafts: guesses of a sequence's next tokens, which one step verifies together."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Sequence
from typing import Any

from nsagen.core.errors import InvalidInputError
from nsagen.model.checks import is_integer, require

Drafter = Callable[[Sequence[int], int], Sequence[int]]
"""Guesses what follows a sequence: called with all its tokens so far, and how many it may guess.
It returns at most that many, or none. If it changes the tokens, it spoils its own guesses only."""

MOST_DRAFTED = 7
"""Tokens of a draft that a step verifies, beside the one that it gets anyway."""


class PromptLookup:
    """Guesses that what followed the newest few tokens the last time will follow them again.

    Quoting, editing and code repeat their context. It costs no model.

    Args:
        match: how many of the newest tokens must have been there before.
    """

    def __init__(self, match: int = 3) -> None:
        fits = is_integer(match) and match > 0
        rule = "match must be a positive integer"
        require(fits, "PromptLookup", rule, repr(match), "2 to 4 are usual")
        self.match = match
        self._after: dict[tuple[int, ...], int] = {}
        self._seen = 0

    def __call__(self, tokens: Sequence[int], most: int) -> Sequence[int]:
        size = self.match
        for first in range(self._seen, len(tokens) - size):
            self._after[tuple(tokens[first : first + size])] = first + size
        self._seen = max(self._seen, len(tokens) - size)
        place = self._after.get(tuple(tokens[-size:]))
        return () if place is None else tokens[place : place + most]


def check_drafter(where: str, drafter: Any) -> None:
    """Check what makes a sequence's drafter.

    Raises:
        InvalidInputError: neither None nor a function that needs no argument.
    """
    if drafter is None:
        return
    try:
        inspect.signature(drafter).bind()
    except (TypeError, ValueError):
        raise InvalidInputError(
            f"{where}: drafter must be what makes a sequence's drafter, called without arguments, "
            f"got {drafter!r}; pass a class such as PromptLookup, or a lambda"
        ) from None


def check_draft(draft: Any, most: int, vocab_size: int) -> list[int]:
    """The tokens of a draft.

    Raises:
        InvalidInputError: too many of them, or something that is no token.
    """
    where, advice = "drafter", "return a list of token numbers"
    sequence = isinstance(draft, Sequence) and not isinstance(draft, str | bytes)
    require(sequence, where, "a draft must be a sequence of tokens", repr(draft), advice)
    rule = f"a draft may have {most} tokens here"
    require(len(draft) <= most, where, rule, str(len(draft)), "return fewer")
    rule = f"a draft's tokens must be from 0 to {vocab_size - 1}"
    tokens: list[Any] = list(draft)
    for token in tokens:
        require(is_integer(token) and 0 <= token < vocab_size, where, rule, repr(token), advice)
    return [operator.index(token) for token in tokens]
