"""One run of `nsagen tune`: which tasks, on what device, and where results are kept."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import optuna

from nsagen.core.compiler import compiler_name
from nsagen.core.errors import InvalidInputError, TuneError
from nsagen.core.files import check_replaceable, check_writable, scratch_folder
from nsagen.core.paths import cache_dir, prepare_compiler_cache
from nsagen.core.target import parse_target
from nsagen.core.text import counted
from nsagen.core.worker import Worker, compile_workers
from nsagen.core.workload import Schedule
from nsagen.records.files import load_records, save_records
from nsagen.records.record import TuningRecord
from nsagen.runtime.device import slug
from nsagen.spec import Spec
from nsagen.tune import recording
from nsagen.tune.compiler import CompilePool
from nsagen.tune.cost_model import StaticEvaluator
from nsagen.tune.evaluate import Evaluator, TimedEvaluator
from nsagen.tune.outcome import Outcome
from nsagen.tune.recording import load_recording
from nsagen.tune.selection import Selection, specs_of, tasks_on
from nsagen.tune.settings import Device, Settings, Step
from nsagen.tune.simulate import ReplayEvaluator
from nsagen.tune.storage import open_storage, sqlite_url, storage_errors
from nsagen.tune.task import Task
from nsagen.tune.tuner import Tuner

MEASURER = "nsagen.tune.measure:GpuMeasurer"
COMPILER = "nsagen.tune.compiler:Compiler"
IDENTIFY_LIMIT_S = 60.0


@dataclass(frozen=True)
class Places:
    """Where to keep things and where to run.

    Attributes:
        out: folder below which records are written; None: beside each spec.
        url: of the storage of studies; None: a file in the user cache.
        target: for the static objective; None: the newest of the specs'.
        jobs: processes that compile.
        check_report: refuses the page about a device's searches, before any work, if it must not
            be written; None: no page is wanted.
        watch: whether to show the studies on a page of this machine.
    """

    out: Path | None = None
    url: str | None = None
    target: str | None = None
    jobs: int = 1
    check_report: Callable[[str], object] | None = None
    watch: bool = False

    def started(self, device: Device) -> None:
        """Refuse what could not be written at the end, now that the device is known."""
        if self.check_report is not None:
            self.check_report(device.slug)

    def folder(self, spec: Spec) -> Path:
        """Where a spec's records are written."""
        return spec.tuned_folder if self.out is None else self.out / spec.name


class Watcher(Protocol):
    """Receives the progress of a run."""

    def watched(self, address: str) -> None:
        """A page shows the studies now."""
        ...

    def step(self, step: Step) -> None:
        """A schedule was evaluated."""
        ...

    def decided(self, record: TuningRecord, device: str) -> None:
        """A record was decided."""
        ...


@dataclass
class Result:
    """The result of a run.

    Attributes:
        device: its slug.
        url: of the storage of the studies; empty if nothing is kept.
        studies: names of the searches, one a task.
        files: the files written.
        records: in the order of their decision.
        failures: a line for each task without a record.
        notes: what else a reader must know.
    """

    device: str
    url: str = ""
    studies: list[optuna.Study] = field(default_factory=list)
    files: list[Path] = field(default_factory=list)
    records: list[TuningRecord] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def tune(
    name: str | None, selection: Selection, settings: Settings, places: Places, watcher: Watcher
) -> Result:
    """Tune a spec's workloads on this machine's GPU, or rank them for a target without one.

    Records are written as soon as they are decided, each into the file of every spec that has
    the workload.

    Args:
        name: of the spec; None: those that ./generated was built from.

    Raises:
        SpecError, InvalidInputError: the spec, or the selection from it, is wrong.
        TuneError: no GPU answers, or the storage cannot be opened.
        OSError: a folder of records cannot be written.
    """
    specs = specs_of(name, Path("generated"))
    tasks = selection.tasks(specs)
    for spec in specs:
        check_writable(places.folder(spec))
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    if places.url is None:
        _check_user_cache()
    with evaluator_for(settings, specs, places) as (device, _, evaluator):
        places.started(device)
        tasks = tasks_on(tasks, specs, device.target)
        url = default_study_url(device.slug) if places.url is None else places.url
        result = Result(device.slug, url)
        folders = {spec.name: places.folder(spec) for spec in specs}
        having = {s.name: {*s.workloads(), *chain(*s.forced_once())} for s in specs}
        files = [folder / f"{device.slug}.yaml" for folder in folders.values()]
        for path in files:
            check_replaceable(path)
        known = [r for f in files if f.exists() for r in load_records(f).records]

        def keep(record: TuningRecord) -> None:
            for spec, workloads in having.items():
                if record.workload in workloads:
                    path = save_records(folders[spec], device.slug, str(device.target), [record])
                    if path not in result.files:
                        result.files.append(path)
            decided[record.key] = record
            watcher.decided(record, device.slug)

        decided: dict[Any, TuningRecord] = {}
        storage = open_storage(result.url)
        tuner = Tuner(device, storage, evaluator, settings, known, watcher.step)
        with storage_errors(result.url), _page(places, result.url, watcher):
            result.failures += tuner.run(tasks, keep)
        result.records += decided.values()
        if settings.seconds is not None and settings.objective == "static":
            result.notes.append(_covered(tasks, result, settings.seconds))
        result.studies += tuner.studies
    return result


def _covered(tasks: Sequence[Task], result: Result, seconds: float) -> str:
    """How far a ranking came in its time."""
    done = len(result.records)
    alone = sum(record.measured == 1 and record.of > 1 for record in result.records)
    only = f", {alone} with one schedule only" if alone else ""
    more = "; the same command goes on, and --time sets another limit"
    return f"{done} of {len(tasks)} workloads and sizes ranked in {seconds:g} s{only}{more}"


def simulate(path: Path, settings: Settings, places: Places, watcher: Watcher) -> Result:
    """Search a recording as if on a GPU; keeps nothing unless a storage is named.

    Raises:
        TuneError: not a recording.
    """
    table = load_recording(path)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    facts = {"device": "unknown", "target": "cuda:90", "driver": "", "triton": "", **table.facts}
    device = Device(f"replay-{facts['device']}", parse_target(facts["target"]), "", "")
    places.started(device)
    if places.url is None:
        storage = optuna.storages.InMemoryStorage()
    else:
        storage = open_storage(places.url)
    result = Result(device.slug, places.url or "")
    evaluator = ReplayEvaluator(table, settings.seed)
    tuner = Tuner(device, storage, evaluator, settings, (), watcher.step)
    with _page(places, result.url, watcher):
        result.failures += tuner.run([table.task], result.records.append)
    result.studies += tuner.studies
    for record in result.records:
        optimum, true = table.optimum_ms, table.true_ms(record.schedule)
        result.notes.append(
            f"the recording's optimum is {optimum:.4g} ms; what was chosen takes {true:.4g} ms, "
            f"{100 * (true / optimum - 1):.1f}% more"
        )
    if table.synthetic:
        result.notes.append("the recording is synthetic: it says nothing about any GPU")
    return result


def record(
    name: str | None,
    selection: Selection,
    path: Path,
    settings: Settings,
    places: Places,
    watcher: Watcher,
) -> Result:
    """Measure every schedule of the one selected workload and size, into `path`.

    Raises:
        InvalidInputError: more than one is selected.
        TuneError: no GPU answers.
    """
    specs = specs_of(name, Path("generated"))
    tasks = selection.tasks(specs)
    if len(tasks) != 1:
        shown = "; ".join(str(task) for task in tasks[:4])
        raise InvalidInputError(
            f"tune: --record-exhaustive takes one workload and size; got {len(tasks)}: {shown}; "
            "choose with --op, --pass, --seqlens, --batch and a spec of one shape"
        )
    recording.check_free(path, tasks[0])
    with evaluator_for(settings, specs, places) as (device, facts, evaluator):
        places.started(device)
        tasks_on(tasks, specs, device.target)
        result = Result(device.slug, files=[path])

        def step(count: int, of: int, schedule: Schedule, outcome: Outcome) -> None:
            watcher.step(
                Step(tasks[0], 1, 1, count, of, schedule, outcome.reason, outcome.ms, None)
            )

        count = recording.record(
            tasks[0],
            evaluator,
            path,
            facts=facts,
            ahead=places.jobs,
            seconds=settings.seconds,
            on_step=step,
        )
        result.notes.append(f"{path} has {counted(count, 'schedule')} of {tasks[0]}")
    return result


@contextmanager
def _page(places: Places, url: str, watcher: Watcher) -> Iterator[None]:
    """The page that shows the studies, if it is wanted."""
    if not places.watch:
        yield
        return
    from nsagen.tune.watch import watched

    with watched(open_storage(url)) as address:
        watcher.watched(address)
        yield


def default_study_url(device: str) -> str:
    """The local file that keeps a device's studies."""
    return sqlite_url(cache_dir() / "tune" / f"{device}.db")


def _check_user_cache() -> None:
    try:
        check_writable(cache_dir())
    except OSError as error:
        raise TuneError(
            f"tune: the user cache, {cache_dir()}, must be a folder that can be written, because "
            f"it keeps the studies; got {error.strerror}: {error.filename}; "
            "set NSAGEN_CACHE_DIR to another, or name a storage with --study"
        ) from None


@contextmanager
def evaluator_for(
    settings: Settings, specs: Sequence[Spec], places: Places
) -> Iterator[tuple[Device, dict[str, Any], Evaluator]]:
    """The device, facts about it, and the evaluator; its processes end with the block."""
    prepare_compiler_cache("tune")
    with scratch_folder("tune") as folder, ExitStack() as started:
        workers = compile_workers(places.jobs, COMPILER)
        for one in workers:
            started.callback(one.close)
        facts: dict[str, Any] = {}
        if settings.objective == "static":
            name = places.target or max(target for spec in specs for target in spec.targets)
            target = parse_target(name)
            device = Device(f"static-{slug(name)}", target, "none", compiler_name())
            pool = CompilePool(folder, device.target, workers, first=0)  # nothing runs
            evaluator: Evaluator = StaticEvaluator(pool)
        else:
            worker = Worker(MEASURER)
            started.callback(worker.close)
            device, facts = identify(worker)
            pool = CompilePool(folder, device.target, workers)
            evaluator = TimedEvaluator(pool, worker, settings.end())
        started.callback(evaluator.close)  # the first to run
        yield device, facts, evaluator


def identify(worker: Worker) -> tuple[Device, dict[str, Any]]:
    """The device that a worker measures on, and all facts that it reports about itself.

    Raises:
        TuneError: it has no GPU.
    """
    reply = worker.ask("identify", limit_s=IDENTIFY_LIMIT_S)
    if reply.reason:
        raise TuneError(f"tune: the GPU must answer; {reply.reason}; see nsagen doctor")
    facts = reply.value
    if not facts:
        raise TuneError(
            "tune: times are measured on a GPU; PyTorch sees none here; run it where one is, or "
            "add --objective static to rank schedules by what the compiler says of them"
        )
    target = parse_target(facts["target"])
    return Device(facts["device"], target, facts["driver"], facts["triton"]), facts
