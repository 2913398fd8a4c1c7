"""Small checks whose messages name where, the rule, what came and what to do."""

from __future__ import annotations

import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError


def require(holds: bool, where: str, rule: str, came: str, advice: str) -> None:
    """Raise unless a rule holds.

    Raises:
        InvalidInputError: "<where>: <rule>, got <came>; <advice>".
    """
    if not holds:
        raise InvalidInputError(f"{where}: {rule}, got {came}; {advice}")


def require_kind(where: str, name: str, value: Any, kind: type, advice: str) -> None:
    """Check that an argument is of a class.

    Raises:
        InvalidInputError: names the argument, the class and the value.
    """
    article = "an" if kind.__name__[0] in "AEIOU" else "a"
    rule = f"{name} must be {article} {kind.__name__}"
    require(isinstance(value, kind), where, rule, repr(value), advice)


def require_dispatcher(where: str, dispatcher: Any) -> None:
    """Check that an argument is a package's dispatcher, something that acts as one, or None.

    Raises:
        InvalidInputError: it cannot launch kernels.
    """
    require(
        dispatcher is None or callable(getattr(dispatcher, "launcher", None)),
        where,
        "dispatcher must be a generated package's dispatcher or None",
        repr(dispatcher),
        'pass one, such as nsagen.load("llama8b")',
    )


def require_generator(where: str, generator: Any) -> None:
    """Check the source of initial weights.

    Raises:
        InvalidInputError: neither a torch.Generator nor None.
    """
    require(
        generator is None or isinstance(generator, torch.Generator),
        where,
        "generator must be a torch.Generator or None",
        repr(generator),
        "pass one, such as torch.Generator().manual_seed(0)",
    )


def checked_device(where: str, device: Any) -> torch.device:
    """A device that PyTorch has here.

    Raises:
        InvalidInputError: not a device, or one that this machine or PyTorch lacks.
    """
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError, ValueError):
        found = None
    rule = "device must be one that PyTorch has here"
    advice = 'such as "cpu" or "cuda"; nsagen doctor shows the GPUs'
    require(found is not None, where, rule, repr(device), advice)
    assert found is not None
    if found.type == "cuda":
        count = torch.cuda.device_count()
        came = f"{str(found)!r}, and PyTorch sees {count} GPUs"
        require((found.index or 0) < count, where, rule, came, advice)
    return found


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has one value at each place: it is neither sparse nor nested."""
    return tensor.layout is torch.strided and not tensor.is_nested


def kind_of(tensor: Tensor) -> str:
    """A tensor's dtype and shape; its kind if it isn't dense."""
    if tensor.is_nested:
        return f"a nested tensor of {tensor.dtype}"
    if tensor.layout is not torch.strided:
        return f"{tensor.dtype} with layout {tensor.layout}"
    return f"{tensor.dtype} with shape {list(tensor.shape)}"


def is_bool(value: Any) -> bool:
    """Whether a value is a bool, or a tensor of bools."""
    return isinstance(value, bool) or (isinstance(value, Tensor) and value.dtype is torch.bool)


def is_integer(value: Any) -> bool:
    """Whether a value is a Python, NumPy or zero-dimensional tensor integer, and not a bool."""
    if is_bool(value) or (isinstance(value, Tensor) and value.dim() != 0):
        return False
    try:
        operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return False
    return True


def is_number(value: Any) -> bool:
    """Whether a value is a Python or NumPy number, and not a bool."""
    return isinstance(value, Real) and not isinstance(value, bool)


def require_integers(config: Any, names: tuple[str, ...], minimum: int) -> None:
    """Check that the named fields of a config are integers, at least `minimum`; make them Python's.

    Raises:
        InvalidInputError: names the config and its field.
    """
    for name in names:
        value = getattr(config, name)
        require(
            is_integer(value) and value >= minimum,
            type(config).__name__,
            f"{name} must be an integer of at least {minimum}",
            repr(value),
            f"set {name} to such a number",
        )
        object.__setattr__(config, name, operator.index(value))


def require_numbers(config: Any, names: tuple[str, ...]) -> None:
    """Check that the named fields of a config are positive numbers; make them Python's.

    Raises:
        InvalidInputError: names the config and its field.
    """
    for name in names:
        set_number(config, name)
        value = getattr(config, name)
        require(
            is_number(value) and value > 0,
            type(config).__name__,
            f"{name} must be a positive number",
            repr(value),
            f"set {name} to such a number",
        )


def set_number(config: Any, name: str) -> None:
    """Make a field of a frozen config that holds a number a Python number."""
    value = getattr(config, name)
    if is_number(value) and type(value) not in (int, float):
        object.__setattr__(config, name, float(value))


def require_head_dim(where: str, name: str, value: Any) -> None:
    """Check a head size.

    Raises:
        InvalidInputError: names it and its rule.
    """
    require(
        is_integer(value) and value % 8 == 0 and 16 <= value <= 256,
        where,
        f"{name} must be a multiple of 8 from 16 to 256",
        repr(value),
        "choose e.g. 64 or 128",
    )
