"""What `nsagen plan`'s model says of benchmarks/distributed.py's cases, from what one GPU took."""

from __future__ import annotations

import math
from typing import Any

from benchmarks.distributed_cases import Case, Sizes
from nsagen.estimate.efficiency import Efficiency, Points
from nsagen.estimate.model import Gpu, Split
from nsagen.estimate.training import AROUND_SECONDS, Step, step_of


def share_of_roofline(sizes: Sizes, gpu: Gpu, alone: dict[str, Any]) -> float:
    """Attention's share of the roofline with which the estimate for one GPU is what one took."""
    case = Case(alone["what"], alone["tokens"], "alone", alone["graph"])
    roofline, others = (
        1e3 * estimate(sizes, gpu, case, 1, ((case.tokens, share),)).busy
        for share in (1.0, math.inf)
    )
    took = alone["ms"] - 1e3 * around(case)
    return min(1.0, (roofline - others) / max(took - others, roofline - others))


def around(case: Case) -> float:
    """Seconds of a case that are around its passes."""
    return AROUND_SECONDS if case.what != "attention" else 0.0


def predicted(sizes: Sizes, gpu: Gpu, case: Case, ranks: int, shares: Points) -> float:
    """Milliseconds of a case by the model of `nsagen plan`."""
    step = estimate(sizes, gpu, case, ranks, shares)
    passes = step.busy if case.graph else max(step.busy, step.host)
    return 1e3 * (passes + around(case))


def estimate(sizes: Sizes, gpu: Gpu, case: Case, ranks: int, shares: Points) -> Step:
    """What the model of `nsagen plan` says, with these shares at some numbers of tokens."""
    split = {
        "alone": Split(1, 1),
        "context": Split(1, 1, ranks),
        "tensor": Split(ranks, 1),
    }[case.split]
    efficiency = Efficiency("this run", shares, (), shares)
    recompute = case.what != "attention" and sizes.training(case.tokens).activation_checkpointing
    config = sizes.model(case)
    return step_of(config, gpu, case.tokens, 1, split, recompute, efficiency)
