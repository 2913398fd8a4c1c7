"""From workloads and targets to the variants that a build renders."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from nsagen.codegen.template import (
    default_schedule,
    fallback_schedule,
    is_offered,
    kernel_fingerprint,
    kernel_name,
    space_for,
)
from nsagen.core.bucket import Bucket, covers_all
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.releases import Release, Releases
from nsagen.core.target import Target, parse_target
from nsagen.core.workload import Schedule, Workload

FALLBACK_PROVENANCE = "for Triton outside {}; not measured"
DEFAULT_PROVENANCE = "the architecture's default; not measured"


@dataclass(frozen=True)
class TunedSchedule:
    """A schedule that tuning found for a workload, target and bucket, and how it was found."""

    workload: Workload
    target: str
    bucket: Bucket
    schedule: Schedule
    provenance: str
    measured: bool


@dataclass(frozen=True)
class Use:
    """A target and bucket that a variant serves, and why it was chosen for them.

    Attributes:
        measured: whether the schedule won by measurement on a device of the target.
    """

    target: str
    bucket: Bucket
    provenance: str
    measured: bool = False


@dataclass(frozen=True)
class Variant:
    """One kernel file: a workload and schedule, for every target and bucket that chose it."""

    name: str
    workload: Workload
    schedule: Schedule
    uses: tuple[Use, ...]

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets to compile it for."""
        return tuple(dict.fromkeys(use.target for use in self.uses))

    def measured(self, target: str) -> bool:
        """Whether it serves the target because it won by measurement."""
        return any(use.measured for use in self.uses if use.target == target)

    @property
    def template(self) -> str:
        return space_for(self.workload, self.schedule.algorithm).template

    @property
    def triton(self) -> Releases | None:
        """The releases of Triton that it runs with; None means every release."""
        return space_for(self.workload, self.schedule.algorithm).triton

    def runs_with(self, release: Release | None) -> bool:
        """Whether it runs with a release of Triton, if the release is known."""
        return self.triton is None or release is None or release in self.triton

    @property
    def fingerprint(self) -> str:
        return kernel_fingerprint(self.workload, self.schedule)


def plan_variants(
    workloads: Iterable[Workload],
    targets: Iterable[str],
    tuned: Iterable[TunedSchedule] = (),
    together: Iterable[Sequence[Workload]] = (),
) -> tuple[Variant, ...]:
    """Choose schedules for each workload and target; equal choices share one file.

    A tuned schedule serves its bucket; the target's default schedule serves calls that no
    bucket covers.

    Args:
        together: more workloads, in groups of which a target gets all, if each is offered there,
            or none.

    Returns:
        the variants, sorted by name.

    Raises:
        SpecError: a target string names no known target.
        UnsupportedWorkloadError: no algorithm covers a workload.
    """
    parsed: list[Target] = [parse_target(text) for text in targets]
    found: dict[tuple[Workload, str], list[TunedSchedule]] = {}
    for choice in tuned:
        found.setdefault((choice.workload, choice.target), []).append(choice)
    wanted = [(workload, target) for workload in workloads for target in parsed]
    for target in parsed:
        wanted += [(workload, target) for workload in offered_together(together, target)]
    chosen: dict[tuple[Workload, Schedule], list[Use]] = {}
    for workload, target in dict.fromkeys(wanted):
        for schedule, use in _uses(workload, target, found.get((workload, str(target)), [])):
            chosen.setdefault((workload, schedule), []).append(use)
    variants = (Variant(kernel_name(w, s), w, s, tuple(uses)) for (w, s), uses in chosen.items())
    return tuple(sorted(variants, key=lambda variant: variant.name))


def offered_together(
    together: Iterable[Sequence[Workload]], target: Target, release: Release | None = None
) -> Iterator[Workload]:
    """The workloads of each group that a target is offered as a whole.

    Args:
        release: of Triton; None if the kernels may meet any.
    """
    for group in together:
        if all(is_offered(workload, target, release) for workload in group):
            yield from group


def _uses(
    workload: Workload, target: Target, tuned: Sequence[TunedSchedule]
) -> list[tuple[Schedule, Use]]:
    """What serves a workload on a target: tuned buckets, the remaining calls, other Tritons."""
    name = str(target)
    found = [
        (choice.schedule, Use(name, choice.bucket, choice.provenance, choice.measured))
        for choice in sorted(tuned, key=lambda choice: choice.bucket.order)
    ]
    if not covers_all([choice.bucket for choice in tuned]):
        found.append((default_schedule(workload, target), Use(name, Bucket(), DEFAULT_PROVENANCE)))
    releases = {space_for(workload, schedule.algorithm).triton for schedule, _ in found}
    if needed := next(filter(None, releases), None):
        other = Use(name, Bucket(), FALLBACK_PROVENANCE.format(needed))
        with suppress(UnsupportedWorkloadError):  # the dispatcher then says what it needs
            found.append((fallback_schedule(workload, target), other))
    return found
