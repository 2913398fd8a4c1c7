"""Searches on the fake GPU: what is tried, what survives, what is decided."""

from __future__ import annotations

import os
import signal
from dataclasses import replace

import optuna
import pytest
from optuna.trial import TrialState

from nsagen.core.errors import TuneError
from nsagen.core.workload import Schedule
from nsagen.records.files import load_records
from nsagen.spec import load_spec
from nsagen.tune import final_round, open_search, session
from nsagen.tune.evaluate import Final
from nsagen.tune.final_round import decide
from nsagen.tune.search import Budget
from nsagen.tune.settings import Settings, Step
from nsagen.tune.storage import open_storage
from tests.tune.conftest import Silent, World
from tests.tune.fake import FACTS, FakeCompiler, fake_ms


def trials_of(world: World, *states: TrialState) -> list[optuna.trial.FrozenTrial]:
    storage = open_storage(world.url)
    (name,) = optuna.get_all_study_names(storage)
    return optuna.load_study(study_name=name, storage=storage).get_trials(states=states or None)


def test_the_winner_is_recorded_with_its_evidence(world: World) -> None:
    (record,) = world.tune(trials=30, sampler="gp").records
    assert load_records(world.records).records == (record,)
    assert record.default is not None
    assert record.runner_up is not None
    assert record.ms < record.default.ms
    assert record.ms <= record.runner_up.ms
    assert record.ms == pytest.approx(fake_ms(str(record.schedule)), rel=0.01)
    assert (record.measured, record.failed, record.ended) == (30, 0, "30 schedules are measured")
    assert (record.triton, record.driver) == ("3.6.0", "570.1")
    assert record.sizes == "1 x 4096 tokens, 8 kv heads"


def test_another_compiler_is_measured_anew(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where both studies have as many outcomes: the record is of the present one."""
    (first,) = world.tune().records
    monkeypatch.setitem(FACTS, "triton", "3.6.0 with DISABLE_LLVM_OPT=true")
    watcher = Silent()
    (second,) = world.tune(watcher=watcher).records
    assert (first.triton, second.triton) == ("3.6.0", "3.6.0 with DISABLE_LLVM_OPT=true")
    assert len(watcher.steps) == first.measured == second.measured


def test_a_static_study_is_of_the_compilers_settings(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = load_spec(world.spec)
    places, settings = session.Places(jobs=1), Settings(objective="static")
    names = set()
    for value in ("0", "1"):
        monkeypatch.setenv("DISABLE_LLVM_OPT", value)
        with session.evaluator_for(settings, [spec], places) as (device, _, _):
            names.add(device.triton)
    assert len(names) == 2


def test_failures_are_told_as_finite_values_with_their_reason(world: World) -> None:
    world.behave(
        {
            "compile@block=32,": "memory",
            "block=64": "illegal",
            "num_stages=4": "wrong",
            "num_warps=2": "memory",
        }
    )
    watcher = Silent()
    (record,) = world.tune(trials=50, watcher=watcher).records
    reasons = {step.reason.split(":")[0] for step in watcher.steps if step.reason}
    assert reasons == {"compile", "RuntimeError", "MemoryError", "WrongOutputError"}
    assert record.measured == 50
    assert record.failed == sum(bool(step.reason) for step in watcher.steps) > 5
    assert (record.schedule.block, record.schedule.num_warps) != (64, 2)
    told = trials_of(world, TrialState.COMPLETE)
    assert len(told) == 50
    worst = max(t.value for t in told if t.user_attrs["outcome"]["ms"] is not None)
    assert all(t.value <= max(worst, 7.0) for t in told)


def test_a_wrong_finalist_does_not_win(world: World) -> None:
    best = world.tune(trials=30).records[0].schedule
    world.records.unlink()
    world.behave({f"certify@{best}": "wrong"})
    (record,) = world.tune(trials=30).records
    assert record.schedule != best
    assert record.measured == 30


def test_where_nothing_runs_there_is_no_record(world: World) -> None:
    world.behave({"": "memory"})
    result = world.tune(trials=3)
    assert result.records == []
    assert result.failures == [
        "gated_sum forward f16_dv32, any size: no schedule ran; "
        "MemoryError: out of memory: tried to allocate 80 GiB"
    ]


def test_a_second_run_goes_on_and_repeats_nothing(world: World) -> None:
    world.tune(trials=8)
    watcher = Silent()
    (record,) = world.tune(trials=14, watcher=watcher).records
    assert [step.count for step in watcher.steps] == list(range(9, 15))
    assert record.measured == 14
    again = Silent()
    assert world.tune(trials=14, watcher=again).records == [record]  # its date included
    assert again.steps == []
    tried = [t.user_attrs["schedule"] for t in trials_of(world, TrialState.COMPLETE)]
    assert len(set(tried)) == len(tried) == 14


def test_the_default_goes_first_then_neighbours_winners(world: World) -> None:
    watcher = Silent()
    first, second = world.tune(trials=12, seqlens=(1024, 8192), watcher=watcher).records
    assert first.default is not None
    of_second = [step.schedule for step in watcher.steps if step.number == 2]
    assert {first.default.schedule, first.schedule} <= set(of_second[:4])
    assert (str(first.bucket), str(second.bucket)) == ("tokens <= 2896", "tokens >= 2897")


def test_it_stops_when_nothing_better_is_expected(world: World) -> None:
    (record,) = world.tune(budget=Budget(trials=200, patience=8)).records
    # One more was already with the device when the eighth one came to nothing.
    assert record.ended == "nothing better in 9 schedules"
    assert record.measured < record.of


def test_a_small_space_is_measured_whole(world: World) -> None:
    world.change_template("(1, 2, 3, 4)", "(1, 3)")
    (record,) = world.tune(budget=Budget(trials=500, patience=500)).records
    assert record.measured == record.of
    assert record.ended == "every schedule is measured"


def test_ctrl_c_ends_a_search_whose_device_keeps_nobody_waiting(world: World) -> None:
    """Each measurement is over before it is waited for."""

    class Impatient(Silent):
        def step(self, step: Step) -> None:
            super().step(step)
            if len(self.steps) == 3:
                os.kill(os.getpid(), signal.SIGINT)

    watcher = Impatient()
    with pytest.raises(KeyboardInterrupt):
        world.tune(trials=12, watcher=watcher)
    assert len(watcher.steps) == 3
    assert not trials_of(world, TrialState.RUNNING)


def test_time_is_shared_among_the_tasks(world: World) -> None:
    world.behave({"": "slow 0.1"})  # so that time, not the last schedule, ends each
    result = world.tune(trials=200, seqlens=(1024, 8192), seconds=4.0)
    assert [record.ended for record in result.records] == ["its time is up"] * 2


def test_a_new_value_of_a_knob_discards_nothing(world: World) -> None:
    (before,) = world.tune(trials=12).records
    world.change_template("(1, 2, 3, 4)", "(1, 2, 3, 4, 5)")
    watcher = Silent()
    (after,) = world.tune(trials=14, watcher=watcher).records
    assert after.of > before.of
    assert len(watcher.steps) == 2  # the other twelve are known
    assert after.measured == 14


def test_a_change_of_the_kernel_discards_its_times(world: World) -> None:
    world.tune(trials=12)
    world.change_template("tl.float32)", "tl.float64)")
    watcher = Silent()
    world.tune(trials=12, watcher=watcher)
    assert len(watcher.steps) == 12


def test_searches_take_turns_when_there_are_compilers_for_several(world: World) -> None:
    """Neither waits for the other to end, and each gets as much of the device."""
    watcher = Silent()
    result = world.tune(trials=10, seqlens=(1024, 8192), watcher=watcher, ahead=6)
    numbers = [step.number for step in watcher.steps]
    assert len(result.records) == 2
    assert sorted(numbers) == [1] * 10 + [2] * 10
    assert numbers.index(2) < 6
    assert 10 - numbers[:12].count(1) <= 6


def test_of_what_is_compiled_the_healthiest_is_measured_first(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the static cost; the default goes before all others, and the worst is not forbidden."""
    real = FakeCompiler.compile

    def spilling(self: FakeCompiler, path, workload, schedule, *rest):
        found = real(self, path, workload, schedule, *rest)
        spill = 512 if schedule.num_warps == 1 else 0
        kernels = tuple({**kernel, "spill_bytes": spill} for kernel in found.kernels)
        return replace(found, kernels=kernels)

    monkeypatch.setattr(FakeCompiler, "compile", spilling)
    watcher = Silent()
    (record,) = world.tune(trials=30, watcher=watcher, ahead=30).records
    warps = [step.schedule.num_warps for step in watcher.steps]
    assert record.default is not None
    assert watcher.steps[0].schedule == record.default.schedule
    assert warps[1:10].count(1) < warps.count(1) - 1
    assert record.measured == 30


def test_no_search_begins_when_the_time_is_up(world: World) -> None:
    result = world.tune(trials=200, seqlens=(1024, 8192, 65536), seconds=0.02)
    assert len(result.records) == 1
    assert [line.rpartition(": ")[2] for line in result.failures] == (
        ["not begun; the time is up; the same command goes on from here"] * 2
    )


def test_a_search_is_not_waited_for_long_after_the_time_is_up(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its first schedule is still being compiled; the next run tries it again."""
    monkeypatch.setattr(open_search, "GRACE_S", 0.0)
    world.behave({"compile@": "slow 1"})
    result = world.tune(seconds=0.02)
    (line,) = result.failures
    told = "no schedule was tried; its time is up; the same command goes on from here"
    assert line.rpartition(": ")[2] == told
    assert not result.records
    assert not trials_of(world, TrialState.RUNNING)
    world.behave({})
    assert len(world.tune().records) == 1


def final(ms: float, *, block: int = 0, noise: float = 0.0) -> Final:
    schedule = Schedule.of("a", {"block": block})
    return Final(schedule, ms, tuple(ms * (1 + noise * (i % 2)) for i in range(9)))


@pytest.mark.parametrize(
    ("other", "wins"),
    [
        (final(0.98, block=1), True),
        (final(0.995, block=1), False),  # less than a percent
        (final(0.98, block=1, noise=0.05), False),  # slower in every other round
        (final(1.0, block=1), False),
    ],
)
def test_the_default_wins_ties(other: Final, wins: bool) -> None:
    default = final(1.0)
    running = sorted([default, other], key=lambda f: f.ms)
    assert decide(running, default, 0.01) == (other if wins else default)


@pytest.mark.parametrize("stage", ["compile@", "", "certify@"])
def test_a_full_disk_is_no_result_of_a_schedule(world: World, stage: str) -> None:
    """It would stay in the study, and no later run would try the schedule again."""
    world.behave({stage: "full"})
    with pytest.raises(TuneError, match=r"Triton's cache, .*; got OSError: .*TRITON_CACHE_DIR"):
        world.tune(trials=4)
    assert not world.records.exists()
    world.behave({})
    (record,) = world.tune(trials=4).records
    assert (record.measured, record.failed) == (4, 0)


def test_only_files_that_were_written_are_named(world: World) -> None:
    world.behave({"": "wrong"})
    result = world.tune(trials=2)
    assert result.failures
    assert not result.files
    assert not world.records.exists()
    world.behave({})
    world.change_template("BLOCK = ", "MORE = 1\nBLOCK = ")
    assert world.tune(trials=2).files == [world.records]


def test_a_record_says_why_a_slower_default_stays(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(final_round.MARGIN, "time", 0.99)
    (record,) = world.tune().records
    assert record.default is not None
    assert record.default.schedule == record.schedule
    assert record.runner_up is not None
    assert record.runner_up.ms < record.ms
    assert record.ended == (
        "12 schedules are measured; the default stays, as the runner-up is not clearly faster"
    )


def test_what_another_version_says_of_its_trials_is_told(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.tune(trials=2)
    storage = open_storage(world.url)
    (name,) = optuna.get_all_study_names(storage)
    study = optuna.load_study(study_name=name, storage=storage)
    (first, *_) = study.get_trials(states=(TrialState.COMPLETE,))
    first.user_attrs["outcome"] |= {"joules": 3}
    first.user_attrs["clock"] = 1980
    study.add_trial(first)
    world.tune(trials=4)
    assert (
        f"tune: trials of the study {name!r} say clock, joules, which is not understood here; it "
        "is kept and not used"
    ) in caplog.messages
