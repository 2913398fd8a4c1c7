"""Runs tests under NVIDIA's compute-sanitizer, several lists at once: python tests/sanitize.py

Each line of tests/kernels/sanitize.txt is a run of its own; a few of them share the GPU. A line
says how each ended, after what it printed if it failed, and one sums up each tool.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import NamedTuple

LIST = Path(__file__).parent / "kernels" / "sanitize.txt"
TOOLS = ("memcheck", "racecheck")
OUTCOMES = ("passed", "failed", "skipped", "error")

ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "NSAGEN_TEST_RIM": "0"}
"""Each tensor has an allocation of its own and no rim: an access past it is one of no memory."""


class Run(NamedTuple):
    """One line of the list under one tool.

    Attributes:
        outcomes: how many tests had each of OUTCOMES.
        reported: errors, or hazards, that the tool counted.
        seconds: how long it took.
    """

    tests: str
    ok: bool
    outcomes: dict[str, int]
    reported: int
    seconds: float
    output: str


def run(sanitizer: str, tool: str, tests: str) -> Run:
    """Run one line of the list."""
    command = [sanitizer, "--tool", tool, "--error-exitcode", "1", "--target-processes", "all"]
    command += [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", tests]
    start = time.monotonic()
    done = subprocess.run(
        command, env=os.environ | ENVIRONMENT, text=True, capture_output=True, check=False
    )
    output = done.stdout + done.stderr
    last_lines = "\n".join(re.findall(r"^.* in [\d.]+s.*$", output, re.MULTILINE))  # pytest's
    counts = re.findall(rf"(\d+) ({'|'.join(OUTCOMES)})", last_lines)
    outcomes = {word: sum(int(n) for n, found in counts if found == word) for word in OUTCOMES}
    summaries = re.findall(r"(?:ERROR SUMMARY|RACECHECK SUMMARY): (\d+) ", output)
    seconds = time.monotonic() - start
    return Run(tests, done.returncode == 0, outcomes, sum(map(int, summaries)), seconds, output)


def counted(runs: list[Run]) -> str:
    """How many tests had which outcome, and what the tool reported."""
    total = {word: sum(one.outcomes[word] for one in runs) for word in OUTCOMES}
    tests = ", ".join(f"{n} {word}" for word, n in total.items() if n) or "no tests ran"
    return f"{tests}; {sum(one.reported for one in runs)} errors reported"


def check(sanitizer: str, tool: str, lines: list[str], jobs: int) -> bool:
    """Run all lines under a tool; say how each ended, and sum up."""
    start = time.monotonic()
    runs = []
    with ThreadPoolExecutor(jobs) as pool:
        for done in as_completed(pool.submit(run, sanitizer, tool, tests) for tests in lines):
            one = done.result()
            runs.append(one)
            if not one.ok:
                print(f"--- {tool}: {one.tests}\n{one.output}")
            print(f"{tool}: {one.tests}: {counted([one])}; {one.seconds:.0f} s", flush=True)
    failed = sum(not one.ok for one in runs)
    seconds = time.monotonic() - start
    print(
        f"{tool}: {counted(runs)}; {failed} of {len(runs)} lists failed; {seconds:.0f} s",
        flush=True,
    )
    return failed == 0


def main() -> int:
    parser = argparse.ArgumentParser(description="Tests under compute-sanitizer.")
    parser.add_argument("--jobs", type=int, default=8, help="lists at once; default: 8")
    parser.add_argument("--sanitizer", default="compute-sanitizer", help="the program")
    parser.add_argument("--tool", action="append", help=f"default: {' and '.join(TOOLS)}")
    parser.add_argument("--list", type=Path, default=LIST, help="a file of tests, one run a line")
    given = parser.parse_args()
    lines = given.list.read_text("utf-8").split()
    passed = [check(given.sanitizer, tool, lines, given.jobs) for tool in given.tool or TOOLS]
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
