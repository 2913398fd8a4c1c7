"""How near attention came to a GPU's roofline, read from results of `nsagen bench`."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from nsagen.core.errors import InvalidInputError

SHAPE = {
    **{"gqa_ratio": 16, "head_dim": 128, "kernel_size": 32, "kernel_stride": 16},
    **{"block_size": 64, "topk": 16, "window_size": 512},
}
"""Parameters of the NSA that benchmarks run by default."""

Points = tuple[tuple[float, float], ...]
"""(size, share of the roofline), by size."""


@dataclass(frozen=True)
class Efficiency:
    """Shares of the roofline that attention reaches; without points, the roofline itself.

    Attributes:
        source: where they come from.
        prefill: by tokens of a sequence.
        decode: by bytes that a step reads of a layer's cache.
        backward: by tokens of a sequence, of 2.5 times the forward pass's operations.
    """

    source: str = "roofline"
    prefill: Points = ()
    decode: Points = ()
    backward: Points = ()

    def of_prefill(self, tokens: int) -> float:
        """Share for one sequence's forward pass."""
        return between(self.prefill, tokens)

    def of_backward(self, tokens: int) -> float:
        """Share for one sequence's backward pass."""
        return between(self.backward, tokens)

    def of_decode(self, cache_bytes: float) -> float:
        """Share for one layer of a decoding step."""
        return between(self.decode, cache_bytes)


ROOFLINE = Efficiency()


def between(points: Points, size: float) -> float:
    """The share at a size, interpolated over the logarithm of sizes; beyond them, the nearest."""
    if not points:
        return 1.0
    if size <= points[0][0]:
        return points[0][1]
    for (low, share), (high, next_share) in pairwise(points):
        if size <= high:
            part = math.log(size / low) / math.log(high / low)
            return share + part * (next_share - share)
    return points[-1][1]


def efficiencies(folder: Path, flops: float, bandwidth: float) -> tuple[Efficiency, Efficiency]:
    """NSA's, of `SHAPE`, and dense attention's; the roofline if a folder lacks such results.

    Args:
        folder: a device's results, with some of prefill.json, train.json and decode.json.
        flops: operations a second of the roofline.
        bandwidth: bytes a second of the roofline.

    Raises:
        InvalidInputError: a file exists that no benchmark wrote.
    """
    prefill, device = _rows(folder / "prefill.json")
    decode, other = _rows(folder / "decode.json")
    train, third = _rows(folder / "train.json")
    if not prefill and not decode and not train:
        return ROOFLINE, ROOFLINE
    decode = [row for row in decode if row["what"] == "attention"]
    source = f"measured on {device or other or third}: {folder}"
    found = []
    for name, ms, read in (("attention", "ms", "bytes"), ("dense", "torch_ms", "dense_bytes")):
        found.append(
            Efficiency(
                source,
                _by_tokens(prefill, name, flops),
                tuple(
                    sorted((float(r[read]), r[read] / bandwidth / (1e-3 * r[ms])) for r in decode)
                ),
                _by_tokens(train, name, flops),
            )
        )
    return found[0], found[1]


def _by_tokens(rows: Sequence[Mapping[str, Any]], name: str, flops: float) -> Points:
    """Of several dense attentions, the fastest."""
    found: dict[float, float] = {}
    for row in rows:
        if row["what"].startswith(name):
            tokens = float(row["tokens"])
            found[tokens] = max(found.get(tokens, 0.0), 1e12 * row["tflops"] / flops)
    return tuple(sorted(found.items()))


def is_measured(parameters: Mapping[str, Any]) -> bool:
    """Whether benchmarks run an attention with these static parameters."""
    return all(parameters[name] == value for name, value in SHAPE.items())


def _rows(path: Path) -> tuple[Sequence[Mapping[str, Any]], str]:
    """Rows and device of a result; none if the file is missing or measured other shapes."""
    if not path.is_file():
        return [], ""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        about = content["provenance"]
        if "--set" in about["command"] or "heads" in about["command"]:
            return [], ""
        return content["rows"], about["device"]
    except (ValueError, KeyError, TypeError) as error:
        raise InvalidInputError(
            f"{path}: must be what nsagen bench wrote; got {type(error).__name__}: {error}; "
            "measure it again, or remove it"
        ) from None
