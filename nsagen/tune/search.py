"""A search: one Optuna study of a task on a device, advanced one schedule at a time."""

from __future__ import annotations

import itertools
import logging
import math
import time
import warnings
from collections.abc import Collection, Iterable
from dataclasses import dataclass

import optuna
from optuna.distributions import CategoricalDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.pruners import NopPruner
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, TrialState, create_trial

from nsagen.core.text import counted, shown_keys
from nsagen.core.workload import Param, Schedule
from nsagen.tune.encoding import Encoding
from nsagen.tune.outcome import Outcome, unknown_keys
from nsagen.tune.sampler import DEFAULT_SAMPLER, SpaceSampler, taken_schedules
from nsagen.tune.storage import owner, owner_is_dead, release_dead_trials
from nsagen.tune.task import Task, fingerprint_or_none

_log = logging.getLogger("nsagen.tune")

_RETRIES = 20

ANNOUNCEMENT_S = 1.0
"""Longest time another process may take from asking for a trial to choosing its schedule."""
_UNKNOWN_PENALTY = math.log(1e3)


@dataclass(frozen=True)
class Candidate:
    """A schedule that a study asks about."""

    trial: optuna.Trial
    schedule: Schedule


@dataclass(frozen=True)
class Measured:
    """A schedule and the result of its evaluation."""

    schedule: Schedule
    outcome: Outcome


@dataclass(frozen=True)
class Budget:
    """When a search ends, besides the time limit of its caller.

    Attributes:
        trials: most evaluations, failures included.
        patience: evaluations without an improvement of `gain` after which the search stops.
        gain: the least improvement that counts, as a share.
    """

    trials: int = 200
    patience: int = 60
    gain: float = 0.005


class Search:
    """Searches the schedules of a task. Several processes may search one task together."""

    def __init__(
        self,
        task: Task,
        encoding: Encoding,
        storage: BaseStorage,
        *,
        scope: str,
        first: Iterable[Schedule],
        sampler: str = DEFAULT_SAMPLER,
        seed: int = 0,
    ) -> None:
        """Open or make the study, keep what is still true, and queue what goes first.

        Args:
            scope: what is measured and where, e.g. "time on nvidia-h200".
            first: schedules to try before any other: the default, then neighbours' winners.
        """
        self.task = task
        self.encoding = encoding
        stem = f"{scope}: {task} ({task.sizes_text})"
        studies = [n for n in optuna.get_all_study_names(storage) if n.startswith(f"{stem} #")]
        self.study = optuna.create_study(
            storage=storage,
            study_name=self._name(storage, studies, f"{stem} #{encoding.sha256[:8]}"),
            sampler=SpaceSampler(sampler, encoding, seed),
            pruner=NopPruner(),
            load_if_exists=True,
        )
        self._note_others()
        release_dead_trials(self.study)
        self._take_over(storage, studies)
        self.line_up(first)

    def _note_others(self) -> None:
        complete = self.study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        others = len(complete) - len(_evaluated(self.study))
        if others:
            _log.warning(
                "tune: %d of %d trials of the study %r were written by another version of nsagen "
                "or another tool; they are not used",
                others,
                len(complete),
                self.study.study_name,
            )
        if unknown := {key for trial in complete for key in unknown_keys(trial.user_attrs)}:
            _log.warning(
                "tune: trials of the study %r say %s, which is not understood here; it is kept and "
                "not used",
                self.study.study_name,
                shown_keys(unknown),
            )

    def ask(self) -> Candidate | None:
        """The next schedule to evaluate; None when all have been evaluated."""
        for _ in range(_RETRIES):
            trial = self._ask()
            schedule = self.encoding.schedule_of(trial.params)
            self._await_announcements(trial.number)
            others = self._taken(asking=trial.number)
            if schedule not in others:
                trial.set_user_attr("schedule", str(schedule))
                return Candidate(trial, schedule)
            self.study.tell(trial, state=TrialState.FAIL)  # another process was faster
            if len(others) >= len(self.encoding):
                return None
        return None

    def _await_announcements(self, number: int) -> None:
        """Let earlier trials of other processes name their schedules: one of two must yield."""
        end = time.monotonic() + ANNOUNCEMENT_S
        while any(map(self._is_choosing, self._running(number))) and time.monotonic() < end:
            time.sleep(0.01)

    def _running(self, before: int) -> list[FrozenTrial]:
        trials = self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        return [trial for trial in trials if trial.number < before]

    def _is_choosing(self, trial: FrozenTrial) -> bool:
        """Whether another process, alive as far as we know, has yet to name a schedule."""
        who = trial.user_attrs.get("owner", "")
        return (
            "schedule" not in trial.user_attrs
            and who not in ("", owner())
            and not owner_is_dead(who)
        )

    def _ask(self) -> optuna.Trial:
        with warnings.catch_warnings():  # `heartbeats` sends the heartbeats
            warnings.filterwarnings("ignore", "Heartbeat of storage", UserWarning)
            trial = self.study.ask()
        trial.set_user_attr("owner", owner())  # before the sampler takes its time
        for name, distribution in self.encoding.distributions.items():
            if isinstance(distribution, IntDistribution):
                trial.suggest_int(name, distribution.low, distribution.high)
            elif isinstance(distribution, CategoricalDistribution):
                trial.suggest_categorical(name, distribution.choices)
        return trial

    def tell(self, candidate: Candidate, outcome: Outcome) -> bool:
        """Report an evaluation. A failure gets a finite value because failed trials teach nothing.

        Returns:
            whether it counts: false if another trial has the same schedule by now.
        """
        trial = candidate.trial
        value = self._penalty() if outcome.ms is None else math.log(max(outcome.ms, 1e-9))
        try:
            trial.set_user_attr("outcome", outcome.as_json())
            trial.set_constraint("runs", 0.0 if outcome.ok else 1.0)
            self.study.tell(trial, value)
        except (UpdateFinishedTrialError, ValueError):
            # Another process took this one for dead: it slept, or a clock was set forward.
            return self._add(candidate, outcome, value)
        return True

    def _add(self, candidate: Candidate, outcome: Outcome, value: float) -> bool:
        """Keep an evaluation whose trial was given up, unless another trial made it meanwhile."""
        if candidate.schedule in self._taken():
            return False
        attributes = {
            **candidate.trial.user_attrs,
            "owner": owner(),
            "schedule": str(candidate.schedule),
            "outcome": outcome.as_json(),
        }
        self.study.add_trial(
            create_trial(
                params=self.encoding.params_of(candidate.schedule),
                distributions=self.encoding.distributions,
                value=value,
                user_attrs=attributes,
            )
        )
        return True

    def give_up(self) -> None:
        """Leave what this process asked for but did not evaluate to a later search."""
        for trial in self.study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if trial.user_attrs.get("owner") == owner():
                self.study.tell(trial.number, state=TrialState.FAIL)

    def measured(self) -> list[Measured]:
        """Every evaluation so far, in the order of the trials."""
        return [
            Measured(self.encoding.schedule_of(trial.params), outcome)
            for trial, outcome in _evaluated(self.study)
        ]

    def best(self, count: int) -> list[Measured]:
        """The fastest schedules so far, fastest first."""
        good = [m for m in self.measured() if m.outcome.ok]
        return sorted(good, key=lambda m: (m.outcome.ms or 0.0, m.schedule))[:count]

    def finished(self, budget: Budget) -> str:
        """Why the search ends by itself; empty while it continues."""
        values = [t.value if outcome.ok else None for t, outcome in _evaluated(self.study)]
        if len(values) >= len(self.encoding):
            return "every schedule is measured"
        if len(values) >= budget.trials:
            some = "1 schedule is" if budget.trials == 1 else f"{budget.trials} schedules are"
            return f"{some} measured"
        best, since = math.inf, 0
        for value in values:
            improved = value is not None and value < best + math.log1p(-budget.gain)
            since = 0 if improved or best == math.inf else since + 1
            best = min(best, math.inf if value is None else value)
        if since >= budget.patience:
            return f"nothing better in {counted(since, 'schedule')}"
        return ""

    def _name(self, storage: BaseStorage, studies: Collection[str], stem: str) -> str:
        """Name of the study to continue: the first with unchanged kernels, or a new one."""
        for number in itertools.count(1):
            name = f"{stem}-{number}"
            if name not in studies or self._all_hold(name, storage):
                return name
        raise AssertionError

    def _all_hold(self, name: str, storage: BaseStorage) -> bool:
        study = optuna.load_study(study_name=name, storage=storage)
        return all(self._holds(trial, outcome) for trial, outcome in _evaluated(study))

    def _holds(self, trial: FrozenTrial, outcome: Outcome) -> bool:
        """Whether a schedule's kernel is still the one that was evaluated."""
        schedule = schedule_from_text(trial.user_attrs["schedule"])
        return (outcome.fingerprint or None) == fingerprint_or_none(self.task, schedule)

    def _take_over(self, storage: BaseStorage, studies: Iterable[str]) -> None:
        """Add earlier studies' measurements of kernels whose code has not changed.

        So a new value of a knob or an edit of the template discards only what it concerns.
        """
        for name in studies:
            if name != self.study.study_name:
                earlier = optuna.load_study(study_name=name, storage=storage)
                for trial, outcome in _evaluated(earlier):
                    self._take_over_trial(trial, outcome)

    def _take_over_trial(self, trial: FrozenTrial, outcome: Outcome) -> None:
        schedule = schedule_from_text(trial.user_attrs["schedule"])
        if not self.encoding.expresses(schedule) or schedule in self._taken():
            return
        if not self._holds(trial, outcome):
            return
        self.study.add_trial(
            create_trial(
                params=self.encoding.params_of(schedule),
                distributions=self.encoding.distributions,
                value=trial.value,
                user_attrs=trial.user_attrs,
                system_attrs=trial.system_attrs,
            )
        )

    def line_up(self, schedules: Iterable[Schedule]) -> None:
        """Queue schedules to be asked for next, in this order, unless already queued."""
        taken = self._taken()
        waiting = [
            trial.system_attrs.get("fixed_params")
            for trial in self.study.get_trials(deepcopy=False, states=(TrialState.WAITING,))
        ]
        for schedule in dict.fromkeys(s for s in schedules if self.encoding.expresses(s)):
            params = self.encoding.params_of(schedule)
            if schedule not in taken and params not in waiting:
                self.study.enqueue_trial(params)

    def _taken(self, asking: int | None = None) -> set[Schedule]:
        return taken_schedules(self.study, self.encoding, asking)

    def _penalty(self) -> float:
        """The worst value seen: bad, but not an outlier that would bend a model."""
        seen = [t.value for t, outcome in _evaluated(self.study) if outcome.ok]
        return max((value for value in seen if value is not None), default=_UNKNOWN_PENALTY)


def schedule_from_text(text: str) -> Schedule:
    """The schedule that a schedule's `str` describes."""
    algorithm, _, knobs = text.removesuffix(")").partition("(")
    pairs = (knob.split("=", 1) for knob in knobs.split(", ") if knob)
    return Schedule.of(algorithm, {name: _knob_value(value) for name, value in pairs})


def _knob_value(text: str) -> Param:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.lstrip("-").isdecimal() else text


def _evaluated(study: optuna.Study) -> list[tuple[FrozenTrial, Outcome]]:
    """The trials of a study that ended, with their outcomes, as far as this version reads them."""
    found = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    pairs = [(trial, Outcome.of_trial(trial.user_attrs)) for trial in found]
    return [(trial, outcome) for trial, outcome in pairs if outcome is not None]
