"""How good a sampler is: searches of recordings, beside random search in closed form."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

import optuna

from nsagen.tune.encoding import Encoding, Kind
from nsagen.tune.recording import Recording
from nsagen.tune.search import Budget, Search
from nsagen.tune.simulate import ReplayEvaluator

WITHIN = (0.05, 0.02)

_SETTLED = 0.005
"""A choice this near to the optimum is not searched on from: noise cannot lead it far away."""


@dataclass(frozen=True)
class Score:
    """A sampler on a recording.

    Attributes:
        evaluations: median evaluations until the choice is within 5% and 2% of the optimum, in
            this order; infinite where half of the searches never get there.
        hit_rate: share of the searches whose choice is within 2% in the end.
    """

    evaluations: tuple[float, ...]
    hit_rate: float


def score(
    recording: Recording,
    sampler: str,
    kind: Kind = "integer",
    *,
    seeds: int = 20,
    budget: int = 200,
) -> Score:
    """Search a recording once a seed. Failures count as evaluations.

    The choice is the fastest by the search's own noisy times; it is judged by the recording's.
    """
    runs = [_search(recording, sampler, kind, seed, budget) for seed in range(seeds)]
    medians = tuple(statistics.median(run[i] for run in runs) for i in range(len(WITHIN)))
    return Score(medians, sum(run[-1] for run in runs) / seeds)


def random_score(recording: Recording, budget: int = 200) -> Score:
    """What random search without replacement scores, in closed form."""
    total = len(recording.outcomes)
    good = [_count_within(recording, share) for share in WITHIN]
    medians = tuple(
        next((float(n) for n in range(1, budget + 1) if _chance(total, k, n) >= 0.5), math.inf)
        for k in good
    )
    return Score(medians, _chance(total, good[-1], budget))


def _chance(total: int, good: int, drawn: int) -> float:
    """That `drawn` of `total` things have at least one of the `good` ones."""
    drawn = min(drawn, total)
    return 1 - math.comb(total - good, drawn) / math.comb(total, drawn)


def _count_within(recording: Recording, share: float) -> int:
    limit = (1 + share) * recording.optimum_ms
    return sum(recording.true_ms(schedule) <= limit for schedule in recording.outcomes)


def _search(
    recording: Recording, sampler: str, kind: Kind, seed: int, budget: int
) -> Sequence[float]:
    """Evaluations until within 5% and 2%, and 1.0 or 0.0: whether the choice is within 2%."""
    evaluator = ReplayEvaluator(recording, seed)
    encoding = Encoding(tuple(recording.outcomes), kind)
    search = Search(
        recording.task,
        encoding,
        optuna.storages.InMemoryStorage(),
        scope="benchmark",
        first=[recording.default, *recording.others],
        sampler=sampler,
        seed=seed,
    )
    reached = [math.inf] * len(WITHIN)
    best_ms, apart = math.inf, math.inf
    for count in range(1, budget + 1):
        if search.finished(Budget(budget, patience=budget)) or apart <= _SETTLED:
            break
        candidate = search.ask()
        if candidate is None:
            break
        outcome = evaluator.finish(recording.task, candidate.schedule, None)
        search.tell(candidate, outcome)
        if outcome.ms is not None and outcome.ms < best_ms:
            best_ms = outcome.ms
            apart = recording.true_ms(candidate.schedule) / recording.optimum_ms - 1
        for i, share in enumerate(WITHIN):
            if apart <= share:
                reached[i] = min(reached[i], count)
    return [*reached, float(apart <= WITHIN[-1])]
