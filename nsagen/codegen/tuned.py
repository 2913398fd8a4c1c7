"""Turns files of tuning records into what a build uses of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from nsagen.codegen.plan import TunedSchedule
from nsagen.codegen.template import kernel_fingerprint, space_for
from nsagen.core.bucket import Bucket
from nsagen.core.errors import NsagenError
from nsagen.core.target import Target, parse_target
from nsagen.core.workload import Workload
from nsagen.records.files import DeviceRecords, load_folder
from nsagen.records.record import TuningRecord


@dataclass(frozen=True)
class Tuned:
    """What a spec's tuning records amount to.

    Attributes:
        choices: the schedules to use.
        hashes: name of a records' file -> its SHA-256.
        notes: what a user must know: records that a change outdated, and why.
        devices: device's slug -> the schedules measured on it, whether or not another device's
            were chosen for its architecture.
    """

    choices: tuple[TunedSchedule, ...] = ()
    hashes: tuple[tuple[str, str], ...] = ()
    notes: tuple[str, ...] = ()
    devices: Mapping[str, tuple[TunedSchedule, ...]] = field(default_factory=dict)


def tuned_schedules(
    folders: Sequence[Path], workloads: Sequence[Workload], targets: Sequence[str]
) -> Tuned:
    """What a build uses of the records in some folders.

    For a workload, target and bucket, a measured record goes before a ranked one, and the newer
    before the older. A target's buckets come from one device and one run's sizes, so that
    ranges of different runs do not overlap; the newest record decides which.

    Raises:
        SpecError: a file is not one of tuning records.
    """
    files = [file for folder in folders for file in load_folder(folder)]
    wanted, notes = set(workloads), []
    found: dict[tuple[Workload, str], list[tuple[str, TuningRecord]]] = {}
    for file in files:
        if file.target not in targets:
            continue
        stale = {}
        for record in file.records:
            if record.workload not in wanted:
                continue
            if reason := outdated(record, parse_target(file.target)):
                stale.setdefault(reason, []).append(record)
                continue
            found.setdefault((record.workload, file.target), []).append((file.device, record))
        notes += _stale_notes(file, stale)
    hashes = tuple((file.path.name, file.sha256) for file in files)
    names = sorted({device for pairs in found.values() for device, _ in pairs})
    devices = {name: _schedules(found, name) for name in names if not name.startswith("static-")}
    choices = _schedules(found)
    if ranked := [choice for choice in choices if not choice.measured]:
        notes.append(
            f"not measured on a GPU but ranked by compile-time resources: {len(ranked)} of "
            f"{len(choices)} tuned schedules, such as {ranked[0].workload}'s for {ranked[0].target}"
        )
    return Tuned(choices, hashes, tuple(notes), devices)


_Found = Mapping[tuple[Workload, str], list[tuple[str, TuningRecord]]]


def _schedules(found: _Found, only: str | None = None) -> tuple[TunedSchedule, ...]:
    """The preferred schedules, of one device only if it is named."""
    return tuple(
        TunedSchedule(
            workload, target, r.bucket, r.schedule, r.evidence(device), r.objective == "time"
        )
        for (workload, target), pairs in found.items()
        for device, r in _preferred([pair for pair in pairs if only in (None, pair[0])])
    )


def outdated(record: TuningRecord, target: Target) -> str:
    """Why a record no longer holds; empty while it does.

    It holds while the winner's kernel renders to the code that was measured.
    """
    workload, schedule = record.workload, record.schedule
    try:
        space = space_for(workload, schedule.algorithm)
        if wrong := space.violations(workload, schedule, target):
            return f"its schedule is no longer valid: {wrong[0]}"
        if kernel_fingerprint(workload, schedule) != record.fingerprint:
            return "its template changed"
    except NsagenError as error:
        return str(error)
    return ""


def _preferred(records: list[tuple[str, TuningRecord]]) -> list[tuple[str, TuningRecord]]:
    """The records to use for a workload and target: one device, disjoint, the newest first."""
    measured = [pair for pair in records if pair[1].objective == "time"]
    newest = sorted(measured or records, key=lambda pair: (pair[1].date, pair[0]), reverse=True)
    chosen: list[tuple[str, TuningRecord]] = []
    for device, record in newest:
        same_device = not chosen or chosen[0][0] == device
        if same_device and not any(_overlap(record.bucket, other.bucket) for _, other in chosen):
            chosen.append((device, record))
    return chosen


def _overlap(a: Bucket, b: Bucket) -> bool:
    return all(
        (low[0] or 0) <= (float("inf") if high[1] is None else high[1])
        for one, two in ((a.tokens, b.tokens), (a.context, b.context))
        for low, high in ((one, two), (two, one))
    )


def _stale_notes(file: DeviceRecords, stale: dict[str, list[TuningRecord]]) -> list[str]:
    return [
        f"{file.path.name}: {len(records)} outdated and not used, such as "
        f"{records[0].workload}, {records[0].bucket}: {reason}; run nsagen tune on {file.device}"
        for reason, records in stale.items()
    ]
