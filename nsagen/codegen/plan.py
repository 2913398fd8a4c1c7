"""From workloads and targets to the variants that a build renders."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nsagen.codegen.target import Target, parse_target
from nsagen.codegen.template import default_schedule, kernel_name, space_for, template_hash
from nsagen.workload import Schedule, Workload

DEFAULT_PROVENANCE = "the architecture's default; not measured"


@dataclass(frozen=True)
class Variant:
    """One kernel file: a workload and schedule, for every target that chose that schedule."""

    name: str
    workload: Workload
    schedule: Schedule
    targets: tuple[str, ...]
    provenance: str

    @property
    def template(self) -> str:
        return space_for(self.workload, self.schedule.algorithm).template

    @property
    def template_sha256(self) -> str:
        return template_hash(self.template)


def plan_variants(workloads: Iterable[Workload], targets: Iterable[str]) -> tuple[Variant, ...]:
    """Choose a schedule for each workload and target; equal choices share one file.

    Returns:
        the variants, sorted by name.

    Raises:
        SpecError: a target string names no known target.
        UnsupportedWorkloadError: no algorithm covers a workload.
    """
    parsed: list[Target] = [parse_target(text) for text in targets]
    chosen: dict[tuple[Workload, Schedule], list[str]] = {}
    for workload in workloads:
        for target in parsed:
            schedule = default_schedule(workload, target)
            chosen.setdefault((workload, schedule), []).append(str(target))
    variants = (
        Variant(kernel_name(w, s), w, s, tuple(names), DEFAULT_PROVENANCE)
        for (w, s), names in chosen.items()
    )
    return tuple(sorted(variants, key=lambda variant: variant.name))
