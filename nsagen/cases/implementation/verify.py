"""Runs a foreign implementation through the cases, in this process."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from nsagen.cases.implementation.run import Row, Run
from nsagen.cases.implementation.setting import OPS, Setting, contract_of
from nsagen.cases.implementation.suite import CASES, NotHere
from nsagen.core.errors import InvalidInputError


def verify_implementation(
    function: Callable[..., Any],
    op: str,
    setting: Setting,
    device: torch.device | str,
    cases: Sequence[str] = tuple(CASES),
) -> Iterator[Row]:
    """A row for each output of each case, as the cases finish.

    A case that the function answers with an exception is `refused`, which is honest but not `ok`.
    """
    check_op(op)
    contract = contract_of(op, setting)
    for name in cases:
        row: Row = {"case": name, "output": "", "error": None, "threshold": None, "note": ""}
        try:
            run = Run(function, contract, op, setting, torch.device(device))
            for found in CASES[name](run):
                yield row | found
        except NotHere as reason:
            yield row | {"result": "skipped", "note": str(reason)}
        except Exception as error:  # any exception of a foreign function is its answer
            text = (str(error).strip() or "no message").splitlines()[0]
            yield row | {"result": "refused", "note": f"{type(error).__name__}: {text}"}


def default_device() -> str:
    """A GPU, or a CPU without one."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def check_op(op: str) -> None:
    """Refuse a name without a contract."""
    if op not in OPS:
        raise InvalidInputError(
            f"verify: --op must name the implementation's contract, one of {', '.join(OPS)}; "
            f"got {op or 'nothing'}; add --op (compressed_attention for block selection)"
        )
