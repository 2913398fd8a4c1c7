"""The branches of Native Sparse Attention, any of which may be off."""

from __future__ import annotations

from collections.abc import Sequence

from nsagen.core.errors import InvalidInputError

BRANCHES = ("compressed", "selected", "sliding")
"""In the order of a gate's columns."""


def branches_on(op: str, branches: Sequence[str], window_size: int) -> tuple[str, ...]:
    """The branches to compute, in the order of `BRANCHES`; a window of 0 turns the sliding one off.

    Raises:
        InvalidInputError: an unknown branch, or no branch left.
    """
    for name in branches:
        if name not in BRANCHES:
            raise InvalidInputError(
                f"{op}: branches must be of {', '.join(BRANCHES)}; got {name!r}; correct the name"
            )
    on = tuple(name for name in BRANCHES if name in branches and (name != "sliding" or window_size))
    if not on:
        raise InvalidInputError(
            f"{op}: one branch must be on; got branches {tuple(branches)} and window_size "
            f"{window_size}; turn one on"
        )
    return on
