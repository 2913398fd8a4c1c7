"""The runs under a sanitizer are counted and summed up; a program of the tests stands in for it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from nsagen.aot.compile import recording
from nsagen.cases.base import cases_of
from nsagen.codegen.template import spaces_of
from nsagen.core.workload import CACHE_DTYPES, STATIC_PARAMS
from tests import sanitize as sanitizers
from tests.kernels.test_each_algorithm import calls, module_of, simplify, sizes_of

ROOT = Path(__file__).parents[1]
FAKE = """\
#!{python}
import subprocess, sys
at = sys.argv.index({python!r})
code = subprocess.run(sys.argv[at:]).returncode
errors = {errors}
print({races!r})
print(f"========= ERROR SUMMARY: {{errors}} errors")
sys.exit(code or min(errors, 1) or {code})
"""


def sanitize(
    folder: Path,
    *tests: str,
    tool: str = "",
    errors: int = 0,
    races: str = "",
    code: int = 0,
    more: tuple[str, ...] = (),
) -> subprocess.CompletedProcess[str]:
    fake, names = folder / "sanitizer", folder / "list.txt"
    fake.write_text(FAKE.format(python=sys.executable, errors=errors, races=races, code=code))
    fake.chmod(0o755)
    names.write_text("\n".join(tests) + "\n")
    script = str(ROOT / "tests" / "sanitize.py")
    command = [sys.executable, script, "--sanitizer", str(fake), "--list", str(names)]
    return subprocess.run(
        [*command, "--jobs", "2", *(["--tool", tool] if tool else []), *more],
        cwd=folder,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},  # starts sooner
        text=True,
        capture_output=True,
        check=False,
    )


@pytest.fixture
def passing(tmp_path: Path) -> str:
    path = tmp_path / "test_passing.py"
    path.write_text("def test_one(): pass\ndef test_two(): pass\n")
    return path.name


@pytest.fixture
def failing(tmp_path: Path) -> str:
    path = tmp_path / "test_failing.py"
    path.write_text("def test_three(): assert 1 == 2\n")
    return path.name


def test_each_tool_is_summed_up(tmp_path: Path, passing: str) -> None:
    done = sanitize(tmp_path, passing)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    summary = ": 2 passed; 0 errors reported; 0 of 2 runs failed; "
    ends = [line.partition(summary)[0] for line in lines if summary in line]
    assert ends == ["racecheck", "memcheck"]
    each = [line for line in lines if ": 1 passed; 0 errors reported; " in line]
    assert len(each) == len(lines) - 2 == 4


def test_a_failing_test_is_shown(tmp_path: Path, passing: str, failing: str) -> None:
    done = sanitize(tmp_path, passing, failing, tool="memcheck")
    assert done.returncode == 1
    assert "assert 1 == 2" in done.stdout
    assert "memcheck: 2 passed, 1 failed; 0 errors reported; 1 of 3 runs failed" in done.stdout


def test_parts_have_each_test_once(tmp_path: Path, passing: str) -> None:
    found = []
    for part in ("1/2", "2/2"):
        done = sanitize(tmp_path, passing, tool="racecheck", more=("--part", part))
        assert done.returncode == 0, done.stdout
        assert "racecheck: 1 passed; 0 errors reported; 0 of 1 runs failed" in done.stdout
        found += [line for line in done.stdout.splitlines() if "::test_" in line]
    assert {line.split(":")[3] for line in found} == {"test_one", "test_two"}


def test_a_part_that_is_none_is_refused() -> None:
    for text in ("0/2", "3/2", "2"):
        with pytest.raises(SystemExit, match="--part must be I/N with I from 1 to N"):
            sanitizers.part_of([["a"], ["b"]], text)


def test_no_processes_at_once_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["sanitize.py", "--jobs", "0"])
    with pytest.raises(SystemExit):
        sanitizers.main()
    assert "--jobs must be at least 1; got 0" in capsys.readouterr().err


def test_what_has_no_time_left_is_stopped_and_fails(tmp_path: Path) -> None:
    (tmp_path / "test_slow.py").write_text("import time\ndef test_slow(): time.sleep(1000)\n")
    done = sanitize(tmp_path, "test_slow.py", tool="racecheck", more=("--minutes", "0.2"))
    assert done.returncode == 1
    assert "sanitize: stopped: no time is left; take more parts" in done.stdout
    assert (
        "racecheck: not reached; 0 errors reported; 0 of 1 runs failed, 1 not reached"
        in done.stdout
    )


def test_what_is_not_reached_is_not_started(tmp_path: Path, passing: str) -> None:
    one = sanitizers.run("no such program", "memcheck", [passing], time.monotonic())
    assert (one.reached, one.ok) == (False, False)
    assert sanitizers.counted([one]) == "not reached; 0 errors reported"


def test_what_took_longest_starts_first() -> None:
    output = """\
racecheck: test_a.py::test_n: 2 passed; 0 errors reported; 20 s
memcheck: test_a.py::test_n: 2 passed; 0 errors reported; 25 s
racecheck: test_a.py::test_n[x: 1 y]: 1 passed; 0 errors reported; 30 s
memcheck: test_b.py::test_m: not reached; 0 errors reported; 99 s
memcheck: 5 passed; 0 errors reported; 0 of 4 runs failed, 1 not reached; 60 s
"""
    several, one = ["test_a.py::test_n[a]", "test_a.py::test_n[b]"], ["test_a.py::test_n[x: 1 y]"]
    assert sanitizers.longest_first([several, one], output, jobs=2, tools=2) == ([one, several], 55)
    new = ["test_b.py::test_m[a]", "test_b.py::test_m[b]"]
    ordered, seconds = sanitizers.longest_first([several, one, new], output, jobs=2, tools=2)
    assert ordered == [new, one, several]
    assert seconds is None


def test_what_the_sanitizer_reports_fails(tmp_path: Path, passing: str) -> None:
    done = sanitize(tmp_path, passing, tool="memcheck", errors=3)
    assert done.returncode == 1
    assert "memcheck: 2 passed; 6 errors reported; 2 of 2 runs failed" in done.stdout


RACE = """\
========= Error: Race reported between Read access at kernel+0x1b0 in pipeline.py:{}
=========     and Write access at kernel+0x6810 in pipeline.py:{} [248 hazards]
=========     and Write access at kernel+0xb680 in pipeline.py:{} [210 hazards]
========= \n"""
KERNEL = """\
def kernel(x):
    gl.warp_specialize(
    run_pipeline(
        [(produce, x)])
        rows.store(gl.where(row < start, rows.load(), 0.0))
        sums.store(gl.convert_layout(dk, DK_LAYOUT))
        dk += sums.load(DK_LAYOUT)
"""


@pytest.mark.parametrize(
    ("places", "known"),
    [
        ((1, 1, 2), True),
        ((1, 1, 3), True),
        ((4, 1, 2), False),
        ((5, 5, 5), True),
        ((5, 1, 2), False),  # of two kinds
        ((6, 7, 7), True),
        ((6, 5, 5), False),
    ],
)
def test_races_that_do_no_harm(
    places: tuple[int, ...], known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sanitizers, "KERNELS", tmp_path)
    (tmp_path / "pipeline.py").write_text(KERNEL)
    (found,) = sanitizers.races(RACE.format(*places))
    assert found == [("pipeline.py", line) for line in places]
    assert sanitizers.harmless(found) == known


@pytest.mark.parametrize(("read", "reported"), [(1, 0), (4, 1)])
def test_races_that_do_no_harm_are_left_out(
    read: int, reported: int, tmp_path: Path, passing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    (tmp_path / "nsagen-test-kernels").mkdir()
    (tmp_path / "nsagen-test-kernels" / "pipeline.py").write_text(KERNEL)
    race = RACE.format(read, 1, 2)
    done = sanitize(tmp_path, f"{passing}::test_one", tool="racecheck", errors=1, races=race)
    assert done.returncode == reported, done.stdout
    assert f"racecheck: 1 passed; {reported} errors reported;" in done.stdout


def test_a_race_at_no_place_is_none_to_leave_out(tmp_path: Path, passing: str) -> None:
    race = "========= Error: Race reported between Read access at kernel+0x1b0\n========= \n"
    done = sanitize(tmp_path, f"{passing}::test_one", tool="racecheck", errors=1, races=race)
    assert done.returncode == 1
    assert "racecheck: 1 passed; 1 errors reported; 1 of 1 runs failed" in done.stdout


def test_a_sanitizer_that_fails_without_a_word_is_no_success(tmp_path: Path, passing: str) -> None:
    done = sanitize(tmp_path, f"{passing}::test_one", tool="memcheck", code=3)
    assert done.returncode == 1
    assert "memcheck: 1 passed; 0 errors reported; 1 of 1 runs failed" in done.stdout


def test_a_name_of_no_test_is_said(tmp_path: Path) -> None:
    done = sanitize(tmp_path, "tests/kernels/test_nothing.py::test_at_all")
    assert done.returncode == 1
    assert "sanitize: some tests are not there" in done.stderr


def test_tests_alone_have_no_sanitizer(
    tmp_path: Path, passing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    one = sanitizers.run("no such program", "none", [passing], time.monotonic() + 60)
    assert one.ok
    assert one.outcomes["passed"] == 2


def test_tests_share_a_process_as_a_line_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a", "b"):
        (tmp_path / f"test_{name}.py").write_text(
            "import pytest\n"
            "@pytest.mark.parametrize('n', ['x 1', 'y 2', 'z 3'])\n"
            "def test_n(n): pass\n"
        )
    lists = sanitizers.collected(["test_a.py::test_n 2", "test_b.py"], together=1)
    assert [[test[5:6] + test[-4:-3] for test in tests] for tests in lists] == [
        ["ax", "ay"],
        ["az"],
        *(["bx"], ["by"], ["bz"]),
    ]


def test_kernels_of_pytorch_are_left_out(passing: str) -> None:
    """`echo` in place of the sanitizer."""
    one = sanitizers.run("echo", "racecheck", [passing], time.monotonic() + 60)
    assert "--kernel-name-exclude kns=_Z" in one.output


@pytest.mark.parametrize("name", ["sanitize.txt", "sanitize_short.txt"])
def test_every_line_of_the_lists_is_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Collected in this process, which has imported the tests."""
    monkeypatch.chdir(ROOT)
    quiet = ("-q", "--collect-only", "-p", "no:cacheprovider", "-p", "no:faulthandler")
    lines = sanitizers.LIST.with_name(name).read_text("utf-8").splitlines()
    names = [re.sub(r" \d+$", "", line) for line in lines]
    assert pytest.main([*quiet, *names]) == pytest.ExitCode.OK


def test_every_kernel_is_launched_under_the_sanitizer() -> None:
    """Whatever a launch chooses by lengths, heads or gates, some call of the list reaches it."""
    launched: dict[tuple[str, str, str], set[str]] = {}
    could: dict[tuple[str, str, str], set[str]] = {}
    for call in (call for general in (True, False) for call in calls(general)):
        key, module = (call.work.op, call.work.pass_, call.algorithm), module_of(call)
        assert module.__file__
        source, own = Path(module.__file__).read_text("utf-8"), r"^\w+__\w{8}"
        kernels = {name for name, x in vars(module).items() if isinstance(x, triton.JITFunction)}
        kernels = {name for name in kernels if re.search(rf"\b{name}\[.*\]\(", source)}
        could.setdefault(key, set()).update(re.sub(own, "", name) for name in kernels)
        case = cases_of(call.work).make_case(
            call.work, replace(sizes_of(call), any_order=False), "meta"
        )
        with recording(module) as made, pytest.MonkeyPatch.context() as patch:
            simplify(module, call, patch)
            module.launch(*case.args)
        names = {re.sub(own, "", launch.kernel.__name__) for launch in made}
        launched.setdefault(key, set()).update(names)
    assert launched == could


def test_every_algorithm_is_sanitized() -> None:
    every = [call for general in (True, False) for call in calls(general)]
    found = {(call.work.op, call.work.pass_, call.algorithm) for call in every}
    spaces = {(*key, space.algorithm) for key in STATIC_PARAMS for space in spaces_of(*key)}
    assert found == spaces
    assert {value for call in every for _, value in call.work.params} >= {*CACHE_DTYPES, "none"}
    assert any("local_blocks" in dict(call.work.params) for call in calls(general=False))
