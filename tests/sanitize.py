"""Runs tests under NVIDIA's compute-sanitizer, several at once: python tests/sanitize.py

The tests that tests/kernels/sanitize.txt names share the GPU, a few to a process. A line says how
each process ended, after what it printed if it failed, and one sums up each tool.

Where a command may take ten minutes, one part of a list at a time, for each of 1/4 to 4/4:

    python tests/sanitize.py --list tests/kernels/sanitize_short.txt \\
        --tool racecheck --part 1/4 --minutes 9
"""

from __future__ import annotations

import argparse
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
KERNELS = Path(tempfile.gettempdir()) / "nsagen-test-kernels"  # as tests.support renders them
TOOLS = ("memcheck", "racecheck")
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
        outcomes: how many tests had each of OUTCOMES.
        reported: errors, or hazards, that the tool counted, but for harmless ones.
        ended_well: whether it said so itself, or harmless races alone kept it from that.
        seconds: how long it took.
    """

    tests: str
    outcomes: dict[str, int]
    reported: int
    ended_well: bool
    seconds: float
    output: str

    @property
    def ok(self) -> bool:
        """Whether tests ran, and nothing failed or was reported."""
        wrong = self.outcomes["failed"] + self.outcomes["error"] + self.reported
        return self.ended_well and wrong == 0 and sum(self.outcomes.values()) > 0


def collected(names: list[str], together: int) -> list[list[str]]:
    """The tests of some names, at most `together` in a list, and those of one function."""
    command = [sys.executable, *PYTEST, "--collect-only"]
    done = subprocess.run([*command, *names], text=True, capture_output=True, check=False)
    if done.returncode != 0:
        raise SystemExit(f"sanitize: some tests are not there:\n{done.stdout}{done.stderr}")
    tests = [line for line in done.stdout.splitlines() if "::" in line]
    functions = [list(group) for _, group in groupby(tests, lambda test: test.partition("[")[0])]
    return [all_[i : i + together] for all_ in functions for i in range(0, len(all_), together)]


def part_of(lists: list[list[str]], text: str) -> list[list[str]]:
    """The lists of one part, `I/N`; tests of one function are spread over the parts."""
    given = re.fullmatch(r"(\d+)/(\d+)", text)
    part, parts = map(int, given.groups()) if given else (0, 0)
    if not 1 <= part <= parts:
        raise SystemExit(f"sanitize: --part must be I/N with I from 1 to N; got {text!r}")
    return lists[part - 1 :: parts]


def run(sanitizer: str, tool: str, tests: list[str], end: float) -> Run:
    """Run some tests in a process, which is stopped at `end` of the monotonic clock."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    command += [sys.executable, *PYTEST, *tests]
    start = time.monotonic()
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
    name = tests[0].partition("[")[0] if len(tests) > 1 else tests[0]
    return Run(name, outcomes, reported, ended_well, time.monotonic() - start, output)


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
    tests = ", ".join(f"{n} {word}" for word, n in total.items() if n) or "no tests ran"
    return f"{tests}; {sum(one.reported for one in runs)} errors reported"


def check(sanitizer: str, tool: str, lists: list[list[str]], jobs: int, end: float) -> bool:
    """Run all tests under a tool; say how each process ended, and sum up."""
    start = time.monotonic()
    runs = []
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed(pool.submit(run, sanitizer, tool, tests, end) for tests in lists):
            one = done.result()
            runs.append(one)
            if not one.ok:
                print(f"--- {tool}: {one.tests}\n{one.output}")
            print(f"{tool}: {one.tests}: {counted([one])}; {one.seconds:.0f} s", flush=True)
    failed = sum(not one.ok for one in runs)
    seconds = time.monotonic() - start
    print(
        f"{tool}: {counted(runs)}; {failed} of {len(runs)} runs failed; {seconds:.0f} s",
        flush=True,
    )
    return failed == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests under compute-sanitizer.")
    parser.add_argument("--jobs", type=int, default=8, help="processes at once; default: 8")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program")
    parser.add_argument("--tool", action="append", help=f"default: {' and '.join(TOOLS)}")
    parser.add_argument("--together", type=int, default=4, help="tests a process; default: 4")
    parser.add_argument("--list", type=Path, default=LIST, help="a file of names of tests")
    parser.add_argument("--part", default="1/1", help="the I-th of N parts of the list, I/N")
    parser.add_argument(
        "--minutes", type=float, default=24 * 60, help="stop what runs after these; default: a day"
    )
    given = parser.parse_args()
    end = time.monotonic() + 60 * given.minutes
    lists = collected(given.list.read_text("utf-8").split(), given.together)
    lists = part_of(lists, given.part)
    tools = given.tool or TOOLS
    passed = [check(given.sanitizer, tool, lists, given.jobs, end) for tool in tools]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
