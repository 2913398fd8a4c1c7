"""Small checks whose messages name where, the rule, what came and what to do."""

from __future__ import annotations

from typing import Any

from nsagen.core.errors import InvalidInputError


def require(holds: bool, where: str, rule: str, came: str, advice: str) -> None:
    """Raise unless a rule holds.

    Raises:
        InvalidInputError: "<where>: <rule>, got <came>; <advice>".
    """
    if not holds:
        raise InvalidInputError(f"{where}: {rule}, got {came}; {advice}")


def require_integers(config: Any, names: tuple[str, ...], minimum: int) -> None:
    """Check that the named fields of a config are integers, at least `minimum`.

    Raises:
        InvalidInputError: names the config and its field.
    """
    for name in names:
        value = getattr(config, name)
        require(
            isinstance(value, int) and not isinstance(value, bool) and value >= minimum,
            type(config).__name__,
            f"{name} must be an integer of at least {minimum}",
            repr(value),
            f"set {name} to such a number",
        )


def require_numbers(config: Any, names: tuple[str, ...]) -> None:
    """Check that the named fields of a config are positive numbers.

    Raises:
        InvalidInputError: names the config and its field.
    """
    for name in names:
        value = getattr(config, name)
        require(
            isinstance(value, int | float) and not isinstance(value, bool) and value > 0,
            type(config).__name__,
            f"{name} must be a positive number",
            repr(value),
            f"set {name} to such a number",
        )


def require_head_dim(where: str, name: str, value: Any) -> None:
    """Check a head size.

    Raises:
        InvalidInputError: names it and its rule.
    """
    require(
        isinstance(value, int) and value % 8 == 0 and 16 <= value <= 256,
        where,
        f"{name} must be a multiple of 8 from 16 to 256",
        repr(value),
        "choose e.g. 64 or 128",
    )
