"""A case: example inputs of one call of an op, its expected outputs and its minimum cost.

Tests, `verify`, tuning, benchmarks and ahead-of-time compilation all take their inputs from
here, so each op is exercised in only one way.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch

from nsagen.cases.sizes import Sizes
from nsagen.core.workload import Workload

__all__ = [
    "THRESHOLDS",
    "Case",
    "Chunk",
    "Cost",
    "Sizes",
    "cases_of",
    "cu_seqlens_of",
    "poisoned",
    "relative_error",
]

THRESHOLDS = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1e-2}
"""Largest relative error ||out - ref|| / ||ref|| that an output of each dtype may have."""


@dataclass(frozen=True)
class Cost:
    """The least work that a call needs.

    Attributes:
        flops: multiplications and additions of its matrix products.
        bytes: each input read once and each output written once.
    """

    flops: float
    bytes: float


@dataclass(frozen=True)
class Case:
    """One call of a kernel's `launch`.

    Attributes:
        args: inputs and outputs in the order of `launch`.
        outputs: the output tensors by name; the same objects as in `args`, poisoned beforehand.
        expected: computes the same outputs with the float64 reference.
        cost: the least work of the call.
    """

    args: tuple[object, ...]
    outputs: dict[str, torch.Tensor]
    expected: Callable[[], dict[str, torch.Tensor]]
    cost: Cost


def cases_of(workload: Workload) -> ModuleType:
    """The module with the cases of a workload's op: `make_case(workload, sizes, device, seed)`."""
    suffix = "" if workload.pass_ == "forward" else f"_{workload.pass_}"
    stem = f"nsagen.cases.{workload.op}"
    if suffix and importlib.util.find_spec(stem + suffix):
        return importlib.import_module(stem + suffix)
    return importlib.import_module(stem)


def cu_seqlens_of(seqlens: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    """int32 [batch + 1] offsets of packed sequences."""
    ends = torch.tensor((0, *seqlens), dtype=torch.int64).cumsum(0).to(torch.int32)
    return ends.to(device)


@dataclass(frozen=True)
class Chunk:
    """Which tokens of packed sequences are queries: all, or the last ones of each.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: int32 [batch + 1], offsets of queries and of all tokens.
        q_start: int32 [batch], the position of each sequence's first query; None: 0.
        positions: [queries], of each query in its sequence.
    """

    cu_seqlens_q: torch.Tensor
    cu_seqlens_k: torch.Tensor
    q_start: torch.Tensor | None
    positions: torch.Tensor

    @classmethod
    def of(cls, sizes: Sizes, device: torch.device | str) -> Chunk:
        starts = [n - rows for n, rows in zip(sizes.seqlens, sizes.rows, strict=True)]
        positions = [
            torch.arange(start, n, device=device)
            for start, n in zip(starts, sizes.seqlens, strict=True)
        ]
        return cls(
            cu_seqlens_of(sizes.rows, device),
            cu_seqlens_of(sizes.seqlens, device),
            torch.tensor(starts, dtype=torch.int32, device=device) if sizes.queries else None,
            torch.cat([torch.empty(0, dtype=torch.int64, device=device), *positions]),
        )

    @property
    def named(self) -> dict[str, torch.Tensor]:
        """What a call of attention takes beside `cu_seqlens`; nothing where all are queries."""
        if self.q_start is None:
            return {}
        return {"cu_seqlens_k": self.cu_seqlens_k, "q_start": self.q_start}


def poisoned(
    shape: tuple[int, ...], dtype: torch.dtype, device: torch.device | str
) -> torch.Tensor:
    """An output that shows every element that a kernel forgets to write."""
    if dtype.is_floating_point:
        return torch.full(shape, float("nan"), dtype=dtype, device=device)
    return torch.full(shape, -(1 << 20), dtype=dtype, device=device)


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """||out - expected|| / ||expected|| in float64; infinities must agree in place and sign.

    Computed where `out` is. Returns inf if a NaN or an infinity has no counterpart in the other.
    """
    out, expected = out.double(), expected.to(out.device).double()
    finite = torch.isfinite(expected)
    same = torch.equal(torch.isfinite(out), finite) and torch.equal(out[~finite], expected[~finite])
    if not same or torch.isnan(expected).any():
        return float("inf")
    norm = expected[finite].norm().item()
    error = (out[finite] - expected[finite]).norm().item()
    return error / norm if norm > 0 else error
