"""Runs tests under NVIDIA's compute-sanitizer, several at once: python tests/sanitize.py

The tests that tests/kernels/sanitize.txt names share the GPU, a few to a process: --together, or
the number that follows a name. A line says how each process ended, after what it printed if it
failed, and one sums up each tool. All tools share the processes. What took longest in the output of
an earlier run, which is committed, starts first; what a limit of time cuts off is `not reached`.

Kernels compile much faster without a sanitizer, and are not compiled again under one:

    python tests/sanitize.py --list tests/kernels/sanitize_short.txt --jobs 15 --tool none
    python tests/sanitize.py --list tests/kernels/sanitize_short.txt --jobs 15 --minutes 6
"""

from __future__ import annotations

import argparse
import heapq
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).parent / "kernels" / "sanitize.txt"
EARLIER = LIST.parents[2] / "benchmarks" / "results" / "nvidia-h200" / "sanitize.txt"
"""The output of an earlier run, for its times."""
KERNELS = Path(tempfile.gettempdir()) / "nsagen-test-kernels"  # as tests.support renders them
TOOLS = ("racecheck", "memcheck")
NO_TOOL = "none"
OTHERS = ("--kernel-name-exclude", "kns=_Z")
"""Leaves out PyTorch's kernels, whose names are C++'s; the names of Triton's have no capitals."""
OUTCOMES = ("passed", "failed", "skipped", "error")

PYTEST = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir=.")

HARMLESS = {
    "start": r"def |    gl\.warp_specialize\(|    run_\w+\(",
    "clear": r"        rows\.store\(",
    "hand over": r"        (sums\.store\(|d[kv] \+= sums\.load\()",
}
"""Lines that take part in a race which racecheck reports of pipelines and which does no harm.

start: Triton's warps find what to do in a byte each of shared memory, between barriers of all
threads that racecheck does not see.
clear: both consumers of a tile clear its last rows (`clear_rows`), each before it reads them, and
store the same.
hand over: a group of warps writes its sums, meets at a barrier of its own, and one of its threads
arrives where the other group waits to read them. racecheck does not follow the order from one
barrier to the next; tests/aot/test_pipeline_barriers.py sees that both are there.
"""

ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "NSAGEN_TEST_RIM": "0"}
"""Each tensor has an allocation of its own and no rim: an access past it is one of no memory."""


class Run(NamedTuple):
    """Some tests under one tool.

    Attributes:
        tests: the first one's name, or the function's of several.
        outcomes: how many tests had each of OUTCOMES.
        reported: errors, or hazards, that the tool counted, but for harmless ones.
        ended_well: whether it said so itself, or harmless races alone kept it from that.
        reached: whether it ended before the time was over.
        seconds: how long it took.
    """

    tests: str
    outcomes: dict[str, int]
    reported: int
    ended_well: bool
    reached: bool
    seconds: float
    output: str

    @property
    def ok(self) -> bool:
        """Whether tests ran, and nothing failed or was reported."""
        wrong = self.outcomes["failed"] + self.outcomes["error"] + self.reported
        return self.ended_well and wrong == 0 and sum(self.outcomes.values()) > 0


def collected(lines: list[str], together: int) -> list[list[str]]:
    """The tests of a list's lines, those of one function together, so many to a process.

    A line is a name, or a name and how many of its tests share a process instead of `together`.
    """
    together_of = {}
    for line in lines:
        name, count = re.fullmatch(r"(.+?)(?: (\d+))?", line).groups()
        together_of[name] = int(count or together)
    command = [sys.executable, *PYTEST, "--collect-only", *together_of]
    done = subprocess.run(command, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"sanitize: some tests are not there:\n{done.stdout}{done.stderr}")
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    functions = [list(group) for _, group in groupby(tests, lambda test: test.partition("[")[0])]
    found = []
    for all_ in functions:
        names = (name for name in together_of if all_[0].startswith(name))
        count = together_of.get(max(names, key=len, default=""), together)
        found += [all_[i : i + count] for i in range(0, len(all_), count)]
    return found


def name_of(tests: list[str]) -> str:
    """The test of a process, or the function of several."""
    return tests[0].partition("[")[0] if len(tests) > 1 else tests[0]


def longest_first(
    lists: list[list[str]], output: str, jobs: int, tools: int
) -> tuple[list[list[str]], float | None]:
    """The lists in order of their times in an output, and the seconds that `jobs` at once take.

    Tests without a time come first, and then the seconds are None.
    """
    took: dict[str, int] = {}
    ended = rf"^\w+: (.+?): \d+ (?:{'|'.join(OUTCOMES)}).*; (\d+) s$"
    for name, seconds in re.findall(ended, output, re.MULTILINE):
        took[name] = max(took.get(name, 0), int(seconds))
    ordered = sorted(lists, key=lambda tests: -took.get(name_of(tests), float("inf")))
    if any(name_of(tests) not in took for tests in lists):
        return ordered, None
    ends = [0.0] * jobs
    for tests in ordered:
        for _ in range(tools):
            heapq.heapreplace(ends, ends[0] + took[name_of(tests)])
    return ordered, max(ends)


def part_of(lists: list[list[str]], text: str) -> list[list[str]]:
    """The lists of one part, `I/N`; tests of one function are spread over the parts."""
    given = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, given.groups()) if given else (0, 0)
    if not 1 <= part <= parts:
        raise SystemExit(f"sanitize: --part must be I/N with I from 1 to N; got {text!r}")
    return lists[part - 1 :: parts]


def run(sanitizer: str, tool: str, tests: list[str], end: float) -> Run:
    """Run some tests in a process, which is stopped at `end` of the monotonic clock."""
    command = [sys.executable, *PYTEST, *tests]
    if tool != NO_TOOL:
        options = ("--error-exitcode", "1", "--target-processes", "all", *OTHERS)
        command = [sanitizer, "--tool", tool, *options, *command]
    start = time.monotonic()
    if start >= end:
        return Run(name_of(tests), dict.fromkeys(OUTCOMES, 0), 0, False, False, 0.0, "")
    process = subprocess.Popen(
        command,
        env=os.environ | ENVIRONMENT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    late = ""
    try:
        output, _ = process.communicate(timeout=max(0.0, end - start))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the sanitizer, and the tests below it
        output, _ = process.communicate()
        late = "sanitize: stopped: no time is left; take more parts\n"
    output += late
    last_lines = "\n".join(re.findall(r"^.* in [\d.]+s.*$", output, re.MULTILINE))  # pytest's
    counts = re.findall(rf"(\d+) ({'|'.join(OUTCOMES)})", last_lines)
    outcomes = {word: sum(int(n) for n, found in counts if found == word) for word in OUTCOMES}
    summaries = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) ", output)
    ignored = sum(map(harmless, races(output)))
    reported = sum(map(int, summaries)) - ignored
    ended_well = (process.returncode == 0 or ignored > 0) and not late
    seconds = time.monotonic() - start
    return Run(name_of(tests), outcomes, reported, ended_well, not late, seconds, output)


def races(output: str) -> Iterator[list[tuple[str, int]]]:
    """The places, file and line, that take part in each race that was reported."""
    for report in output.split("Race reported between")[1:]:
        own = report.partition("========= \n")[0]
        yield [(name, int(line)) for name, line in re.findall(r" in (\S+\.py):(\d+)", own)]


def harmless(places: list[tuple[str, int]]) -> bool:
    """Whether all places of a race are lines of one kind of HARMLESS."""
    if not places or not all((KERNELS / name).exists() for name, _ in places):
        return False
    lines = [(KERNELS / name).read_text("utf-8").splitlines()[at - 1] for name, at in places]
    return any(all(re.match(kind, line) for line in lines) for kind in HARMLESS.values())


def counted(runs: list[Run]) -> str:
    """How many tests had which outcome, and what the tool reported."""
    total = {word: sum(one.outcomes[word] for one in runs) for word in OUTCOMES}
    nothing = "no tests ran" if any(one.reached for one in runs) else "not reached"
    tests = ", ".join(f"{n} {word}" for word, n in total.items() if n) or nothing
    return f"{tests}; {sum(one.reported for one in runs)} errors reported"


def check(sanitizer: str, tools: list[str], lists: list[list[str]], jobs: int, end: float) -> bool:
    """Run all tests under each tool; say how each process ended, and sum up."""
    start = time.monotonic()
    runs: dict[str, list[Run]] = {tool: [] for tool in tools}
    with ThreadPoolExecutor(jobs) as pool:
        started = {
            pool.submit(run, sanitizer, tool, tests, end): tool for tests in lists for tool in tools
        }
        for done in as_completed(started):
            one, tool = done.result(), started[done]
            runs[tool].append(one)
            if not one.ok and one.output:
                print(f"--- {tool}: {one.tests}\n{one.output}")
            print(f"{tool}: {one.tests}: {counted([one])}; {one.seconds:.0f} s", flush=True)
    seconds = time.monotonic() - start
    for tool, all_ in runs.items():
        failed = sum(one.reached and not one.ok for one in all_)
        missing = sum(not one.reached for one in all_)
        ends = f"{failed} of {len(all_)} runs failed" + f", {missing} not reached" * (missing > 0)
        print(f"{tool}: {counted(all_)}; {ends}; {seconds:.0f} s", flush=True)
    return all(one.ok for all_ in runs.values() for one in all_)


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests under compute-sanitizer.")
    parser.add_argument("--jobs", type=int, default=8, help="processes at once; default: 8")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program")
    parser.add_argument(
        "--tool",
        action="append",
        choices=(*TOOLS, "synccheck", "initcheck", NO_TOOL),
        help=f"default: {' and '.join(TOOLS)}; none: the tests alone",
    )
    parser.add_argument("--together", type=int, default=4, help="tests a process; default: 4")
    parser.add_argument("--list", type=Path, default=LIST, help="a file of names of tests")
    parser.add_argument("--part", default="1/1", help="the I-th of N parts of the list, I/N")
    parser.add_argument(
        "--minutes", type=float, default=24 * 60, help="stop what runs after these; default: a day"
    )
    given = parser.parse_args()
    if given.jobs < 1:
        parser.error(f"--jobs must be at least 1; got {given.jobs}")
    end = time.monotonic() + 60 * given.minutes
    lists = collected(given.list.read_text("utf-8").splitlines(), given.together)
    lists = part_of(lists, given.part)
    tools = given.tool or list(TOOLS)
    earlier = EARLIER.read_text("utf-8") if EARLIER.exists() else ""
    lists, seconds = longest_first(lists, earlier, given.jobs, len(tools))
    if seconds:
        print(f"sanitize: about {seconds:.0f} s with {given.jobs} jobs, as in {EARLIER.name}")
    return 0 if check(given.sanitizer, tools, lists, given.jobs, end) else 1


if __name__ == "__main__":
    sys.exit(main())
