"""Samplers that never repeat a schedule, and that choose the same again when a study resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from optuna.distributions import BaseDistribution
from optuna.samplers import BaseSampler, GPSampler, TPESampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from nsagen.core.errors import InvalidInputError
from nsagen.core.text import nearest
from nsagen.core.workload import Schedule
from nsagen.tune.encoding import Encoding
from nsagen.tune.outcome import Outcome

STARTUP = 4
"""Evaluations before a model is trusted: the default, neighbours' winners, then random ones."""

OPTUNA_SAMPLERS: Mapping[str, Callable[[int], BaseSampler]] = {
    "optuna-gp": lambda seed: GPSampler(
        seed=seed, n_startup_trials=STARTUP, deterministic_objective=False
    ),
    "tpe": lambda seed: TPESampler(seed=seed, n_startup_trials=STARTUP, multivariate=True),
}
"""Name -> makes Optuna's sampler from a seed; proposals move to the nearest new schedule."""

SAMPLERS = ("gp", *OPTUNA_SAMPLERS, "random")
"""What can steer a search; "gp" is `nsagen.tune.surrogate`."""

DEFAULT_SAMPLER = "gp"
"""The best of `benchmarks/samplers.py`."""


class SpaceSampler(BaseSampler):
    """Proposes only valid, new schedules.

    Each trial has its own generator, seeded by the trial's number: a search that was stopped
    and resumed proposes the same schedules as an uninterrupted one.
    """

    def __init__(self, name: str, encoding: Encoding, seed: int = 0) -> None:
        if name not in SAMPLERS:
            raise InvalidInputError(
                f"tune: sampler must be one of {', '.join(SAMPLERS)}; got {name!r}; "
                f"{nearest(name, SAMPLERS)}"
            )
        self._name = name
        self._encoding = encoding
        self._seed = seed

    def infer_relative_search_space(
        self, study: Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return self._encoding.distributions

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        if "fixed_params" in trial.system_attrs:  # enqueued: nothing to choose
            return {}
        seed = self._seed * 1_000_003 + trial.number
        taken = taken_schedules(study, self._encoding)
        told = [
            t
            for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if _is_ours(t, self._encoding)
        ]
        if self._name == "random" or len(told) < STARTUP:
            schedule = self._encoding.random(taken, seed)
        elif self._name == "gp":
            schedule = self._expected_best(told, taken, seed)
        else:
            several = {n: d for n, d in search_space.items() if not d.single()}
            sampler = OPTUNA_SAMPLERS[self._name](seed)
            proposal = sampler.sample_relative(study, trial, several) if several else {}
            first = self._encoding.params_of(self._encoding.schedules[0])
            schedule = self._encoding.nearest({**first, **proposal}, taken, seed)
        # When no schedule is free, a repeat tells the search so.
        return self._encoding.params_of(schedule or self._encoding.schedules[0])

    def _expected_best(
        self, told: list[FrozenTrial], taken: set[Schedule], seed: int
    ) -> Schedule | None:
        from nsagen.tune.surrogate import propose  # imports SciPy, which takes a second

        encoding = self._encoding
        ranks = [encoding.rank_of(encoding.schedule_of(trial.params)) for trial in told]
        pending = sorted({encoding.rank_of(schedule) for schedule in taken} - set(ranks))
        free = encoding.free(taken)
        if not len(free):
            return None
        values = np.array([trial.value for trial in told], dtype=np.float64)
        chosen = propose(
            encoding.points, np.array(ranks), values, np.array(pending, dtype=np.intp), free, seed
        )
        return encoding.schedules[chosen]

    def sample_independent(
        self,
        study: Study,
        trial: FrozenTrial,
        param_name: str,
        param_distribution: BaseDistribution,
    ) -> Any:
        raise AssertionError(f"{param_name} was not sampled with the others")


def taken_schedules(study: Study, encoding: Encoding, asking: int | None = None) -> set[Schedule]:
    """The schedules that trials have measured or are measuring.

    Args:
        asking: the number of a trial that is about to choose. Later trials count only once they
            have noted their schedule, because a trial that waited in the queue has an early number.
    """
    states = (TrialState.COMPLETE, TrialState.RUNNING)
    return {
        encoding.schedule_of(trial.params)
        for trial in study.get_trials(deepcopy=False, states=states)
        if _is_ours(trial, encoding)
        and (asking is None or trial.number < asking or "schedule" in trial.user_attrs)
    }


def _is_ours(trial: FrozenTrial, encoding: Encoding) -> bool:
    """Whether a trial names a schedule and, once complete, has a readable outcome."""
    if trial.params.keys() != encoding.distributions.keys():
        return False
    return trial.state != TrialState.COMPLETE or Outcome.of_trial(trial.user_attrs) is not None
