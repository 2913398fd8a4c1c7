"""Files of tuning records: round trips, what outdates a record, and which one a build uses."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from nsagen.codegen.build import build, check
from nsagen.codegen.template import default_schedule, kernel_fingerprint
from nsagen.codegen.tuned import outdated, tuned_schedules
from nsagen.core.bucket import Bucket
from nsagen.core.errors import SpecError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.records.files import load_records, records_text, save_records
from nsagen.records.record import TuningRecord
from nsagen.spec import load_spec
from nsagen.tune.search import Budget
from tests.tune.conftest import World, one_op, world

__all__ = ["one_op", "world"]  # fixtures

H100 = KNOWN_TARGETS["cuda:90"]


@pytest.fixture(scope="module")
def searched() -> list[tuple[TuningRecord, str]]:
    """The record and the file of one search, which all tests share, once it has ended."""
    return []


@pytest.fixture
def record(world: World, searched: list[tuple[TuningRecord, str]]) -> TuningRecord:
    """The record of a search, whose file is in the test's folder."""
    if not searched:
        searched.append((world.tune(trials=12).records[0], world.records.read_text()))
    found, text = searched[0]
    world.tuned.mkdir(parents=True, exist_ok=True)
    world.records.write_text(text)
    return found


def kernels(world: World) -> dict[str, str]:
    """Bucket -> file of the built package's table for cuda:90."""
    build(load_spec(world.spec), world.folder / "generated", tuned=world.tuned)
    text = (world.folder / "generated" / "one" / "dispatcher.py").read_text()
    found = {}
    for line in text.partition('"cuda:90"')[2].splitlines():
        if "Bucket(" in line:
            bucket, _, rest = line.partition(', "')
            found[bucket[bucket.index("Bucket") :]] = rest.partition('"')[0]
    return found


def header_of(world: World, name: str) -> str:
    path = world.folder / "generated" / "one" / "kernels" / f"{name}.py"
    return path.read_text().partition('"""')[0]


def test_numbers_and_odd_texts_survive(record: TuningRecord, tmp_path: Path) -> None:
    odd = replace(
        record,
        ms=1.5e-7,
        spread=0.0,
        default=None,
        runner_up=None,
        driver='5"7\\0: #{no}\n\x0c\u2028é',
        ended="",
        bucket=Bucket((1, None), (None, 4096)),
    )
    save_records(tmp_path, "gpu", "cuda:90", [odd, record])
    (tmp_path / "twice").mkdir()
    found = load_records(tmp_path / "gpu.yaml")
    assert set(found.records) == {odd, record}
    text = records_text("gpu", "cuda:90", found.records)
    assert text == (tmp_path / "gpu.yaml").read_text()


def test_saving_replaces_one_record_and_keeps_the_others(
    record: TuningRecord, tmp_path: Path
) -> None:
    large = replace(record, bucket=Bucket(tokens=(5000, None)))
    save_records(tmp_path, "gpu", "cuda:90", [record, large])
    save_records(tmp_path, "gpu", "cuda:90", [replace(record, ms=0.5)])
    assert set(load_records(tmp_path / "gpu.yaml").records) == {replace(record, ms=0.5), large}
    assert not list(tmp_path.glob("*.tmp"))


def another(record: TuningRecord) -> TuningRecord:
    """The record with a schedule that is not its own."""
    schedule = replace(record.schedule, knobs=(("block", 64), ("num_stages", 1), ("num_warps", 1)))
    fingerprint = kernel_fingerprint(record.workload, schedule)
    return replace(record, schedule=schedule, fingerprint=fingerprint)


def test_a_run_of_another_size_discards_no_record_and_serves_all_calls(
    world: World, record: TuningRecord
) -> None:
    """One size a run makes one bucket, of all calls: the newest run's schedule is used."""
    other = replace(another(record), sizes="1 x 99 tokens, 8 kv heads", date="2098-01-01T00:00:00Z")
    save_records(world.tuned, "nvidia-h200", "cuda:90", [other])
    assert set(load_records(world.records).records) == {record, other}
    spec = load_spec(world.spec)
    (choice,) = tuned_schedules([world.tuned], spec.workloads(), spec.targets).choices
    assert (choice.bucket, choice.schedule) == (record.bucket, other.schedule)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("\n  ms: ", "\n  ms: fast # ", r"records\.0\.ms: Input should be a valid number"),
        ("objective:", "objectif:", r"records\.0\.objective: Field required"),
        ("block: ", "blok: {}, block: ", "must be valid|knobs"),
        ('dtype: "float16"', 'dtype: "float8"', "dtype must be one of float16"),
        ("device: ", "device: [", "must be valid YAML"),
        ("tokens: [null, null]", "tokens: [9, 2]", "least <= greatest"),
    ],
)
def test_a_damaged_file_is_refused_with_its_place(
    world: World, record: TuningRecord, old: str, new: str, message: str
) -> None:
    text = world.records.read_text()
    assert old in text
    world.records.write_text(text.replace(old, new, 1))
    with pytest.raises(SpecError, match=message) as error:
        load_records(world.records)
    assert str(error.value).startswith(str(world.records))


def test_a_record_holds_while_its_kernel_renders_to_the_same_code(
    world: World, record: TuningRecord
) -> None:
    assert outdated(record, H100) == ""
    world.change_template("over every element", "over each of the elements")  # a docstring
    world.change_template("(1, 2, 3, 4)", "(1, 2, 3, 4, 6)")  # another knob value
    assert outdated(record, H100) == ""
    world.change_template("tl.float32)", "tl.float64)")
    assert outdated(record, H100) == "its template changed"


def test_a_record_of_a_value_that_is_gone_is_outdated(world: World, record: TuningRecord) -> None:
    block = record.schedule.block
    world.change_template("block >= 32 * s.num_warps", f"block != {block}")
    assert outdated(record, H100) == "its schedule is no longer valid: an element a thread"
    gone = replace(record, schedule=replace(record.schedule, algorithm="gone"))
    assert "needs an algorithm that covers it" in outdated(gone, H100)


def test_a_build_uses_records_and_says_so(world: World) -> None:
    records = world.tune(trials=12, seqlens=(1024, 8192)).records
    default = default_schedule(records[1].workload, H100)
    print_of_default = kernel_fingerprint(records[1].workload, default)
    confirmed = replace(records[1], schedule=default, fingerprint=print_of_default)
    save_records(world.tuned, "nvidia-h200", "cuda:90", [confirmed])
    found = kernels(world)
    assert list(found) == ["Bucket(tokens=(None, 2896))", "Bucket(tokens=(2897, None))"]
    small = header_of(world, found["Bucket(tokens=(None, 2896))"])
    assert "cuda:90 (tokens <= 2896)" in small
    assert f"tuned on nvidia-h200: {records[0].ms:.4g} ms at 1 x 1024 tokens" in small
    assert check(load_spec(world.spec), world.folder / "generated", tuned=world.tuned) == []


def test_one_winner_for_all_sizes_is_one_entry(world: World) -> None:
    world.change_template("(1, 2, 3, 4)", "(1, 3)")  # few enough to measure all
    world.tune(budget=Budget(100, patience=100), seqlens=(1024, 8192))
    assert list(kernels(world)) == ["Bucket()"]


def test_sizes_that_were_not_tuned_get_the_default(world: World, record: TuningRecord) -> None:
    world.records.unlink()
    save_records(
        world.tuned, "nvidia-h200", "cuda:90", [replace(record, bucket=Bucket(tokens=(5, 99)))]
    )
    found = kernels(world)
    assert list(found) == ["Bucket(tokens=(5, 99))", "Bucket()"]
    assert "not measured" in header_of(world, found["Bucket()"])


def test_outdated_records_are_named_and_not_used(world: World, record: TuningRecord) -> None:
    world.change_template("tl.float32)", "tl.float64)")
    result = build(load_spec(world.spec), world.folder / "generated", tuned=world.tuned)
    (note,) = result.notes
    assert note.startswith("nvidia-h200.yaml: 1 outdated and not used, such as gated")
    assert note.endswith("its template changed; run nsagen tune on nvidia-h200")
    assert {use.measured for v in result.variants for use in v.uses} == {False}


def test_measured_before_ranked_then_the_newest_device(world: World, record: TuningRecord) -> None:
    ranked = replace(record, objective="static", date="2099-01-01T00:00:00Z")
    save_records(world.tuned, "static-cuda-90", "cuda:90", [ranked])
    spec = load_spec(world.spec)

    def chosen() -> str:
        found = tuned_schedules([world.tuned], spec.workloads(), spec.targets)
        (choice,) = found.choices
        assert [note.partition(":")[0] for note in found.notes] == (
            []
            if choice.measured
            else ["not measured on a GPU but ranked by compile-time resources"]
        )
        return choice.provenance.partition(":")[0]

    assert chosen() == "tuned on nvidia-h200"
    newer = replace(another(record), date="2098-01-01T00:00:00Z", bucket=Bucket((1, None)))
    save_records(world.tuned, "nvidia-h100", "cuda:90", [newer])
    assert chosen() == "tuned on nvidia-h100"
    world.records.unlink()
    (world.tuned / "nvidia-h100.yaml").unlink()
    assert chosen() == "ranked by compile-time resources for cuda-90; not run"


def test_records_of_other_versions_are_read_as_far_as_they_are_understood_and_kept(
    record: TuningRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = replace(record, bucket=Bucket(tokens=(5000, None)), nsagen="9.0")
    path = save_records(tmp_path, "gpu", "cuda:90", [record, newer])
    text = path.read_text().replace('  nsagen: "9.0"\n', '  nsagen: "9.0"\n  joules: [1.5, "x"]\n')
    unread = '- {workload: "of another kind", nsagen: "9.0"}\n'
    path.write_text(f"{text}{unread}")
    found = load_records(path)
    assert set(found.records) == {record, newer}
    assert caplog.messages == [
        f"{path}: 1 records of another version of nsagen cannot be read here; they are kept and "
        "not used",
        f"{path}: nsagen 9.0 wrote joules, which is not understood here; it is kept and not used",
    ]
    save_records(tmp_path, "gpu", "cuda:90", [replace(record, ms=0.5)])
    kept = path.read_text()
    assert 'joules: [1.5, "x"]' in kept
    assert '- workload: "of another kind"\n  nsagen: "9.0"\n' in kept
    assert set(load_records(path).records) == {replace(record, ms=0.5), newer}
    save_records(tmp_path, "gpu", "cuda:90", [replace(newer, nsagen=record.nsagen)])
    assert "joules" not in path.read_text()


def test_keys_of_a_newer_version_are_kept_and_lost_comments_are_named(
    record: TuningRecord, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    newer = replace(record, bucket=Bucket(tokens=(5000, None)), nsagen="9.0")
    path = save_records(tmp_path, "gpu", "cuda:90", [record, newer])
    clock = 'clock: {mhz: [1980, 1.5], note: "# of 2"}\n'
    path.write_text(path.read_text().replace("records:\n", f"{clock}records:\n"))
    save_records(tmp_path, "gpu", "cuda:90", [replace(record, ms=0.5)])
    kept = load_records(path).extra
    assert kept == {"clock": {"mhz": [1980, 1.5], "note": "# of 2"}}
    assert "comments" not in caplog.text
    path.write_text(path.read_text() + "  # measured in the cold\n")
    save_records(tmp_path, "gpu", "cuda:90", [replace(record, ms=0.25)])
    assert f"{path}: nsagen writes this file; its comments were not kept" in caplog.text


def test_a_file_of_records_may_be_a_link(record: TuningRecord, tmp_path: Path) -> None:
    shared = tmp_path / "shared" / "h200.yaml"
    shared.parent.mkdir()
    link = tmp_path / "gpu.yaml"
    link.symlink_to(shared)
    for ms in (1.0, 0.5):
        save_records(tmp_path, "gpu", "cuda:90", [replace(record, ms=ms)])
        assert link.is_symlink()
        assert [one.ms for one in load_records(shared).records] == [ms]
    (tmp_path / "other.yaml").symlink_to("other.yaml")
    with pytest.raises(OSError, match="symbolic links"):
        save_records(tmp_path, "other", "cuda:90", [record])
