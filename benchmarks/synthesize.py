"""Make synthetic recordings of our own schedule spaces, for tests of the search alone.

    python benchmarks/synthesize.py benchmarks/recordings

The times come from a formula with interactions, ruggedness, failures and noise; no GPU was
asked, and the recordings say so (`"synthetic": true`). No claim may rest on them. To record a
real one: nsagen tune SPEC --op ... --record-exhaustive FILE.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from nsagen.core.target import parse_target
from nsagen.core.workload import STATIC_PARAMS, Param, Schedule, Workload
from nsagen.tune.evaluate import Candidates, Final, candidates_for, final_of
from nsagen.tune.outcome import Outcome
from nsagen.tune.recording import record
from nsagen.tune.task import Task, tasks_of

TARGET = parse_target("cuda:90")

SHAPE: dict[str, Param] = {
    **{"compress_type": "linear", "head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16},
    **{"kernel_size": 32, "kernel_stride": 16, "with_pe": False, "block_size": 64, "topk": 16},
    **{"init_blocks": 1, "local_blocks": 2, "window_size": 512},
}
"""That public implementations of NSA are measured on."""


def workload_of(op: str, pass_: str) -> Workload:
    names = STATIC_PARAMS[op, pass_]
    return Workload.of(op, pass_, dtype="bfloat16", **{name: SHAPE[name] for name in names})


SPACES = {
    "selected_attention": workload_of("selected_attention", "forward"),
    "compress_linear": workload_of("compress", "forward"),
    "native_sparse_attention_decode": workload_of("native_sparse_attention", "decode"),
}


class Formula:
    """Evaluates schedules by a made-up law that is the same in every run."""

    def __init__(self, workload: Workload) -> None:
        self._candidates = candidates_for(workload, TARGET)
        law = random.Random(str(workload))
        names = sorted({name for s in self._candidates.schedules for name, _ in s.knobs})
        self._best = {name: law.uniform(0.2, 0.8) for name in names}
        self._weight = {name: law.choice((0.05, 0.2, 0.8)) for name in names}
        self._pairs = [(a, b, law.uniform(-0.6, 0.6)) for a in names for b in names if a < b]
        self._values = {
            name: sorted(
                {dict(s.knobs)[name] for s in self._candidates.schedules if name in dict(s.knobs)}
            )
            for name in names
        }

    def candidates(self, task: Task) -> Candidates:
        return self._candidates

    def start(self, task: Task, schedule: Schedule) -> None:
        pass

    def ready(self, task: Task, schedule: Schedule) -> bool:
        return True

    def promise(self, task: Task, schedule: Schedule) -> float:
        return 0.0

    def finish(self, task: Task, schedule: Schedule, best_ms: float | None) -> Outcome:
        chance = random.Random(f"outcome {schedule}")
        compile_s = math.exp(chance.gauss(0.3, 0.4))
        crowded = sum(self._place(schedule, name) for name in self._best) / len(self._best)
        if chance.random() < 0.25 * crowded**2:
            reasons = ("compile: out of registers", "OutOfResources: shared memory", "hang")
            return Outcome(reason=chance.choice(reasons), compile_s=compile_s)
        ms = self._ms(schedule) * math.exp(chance.gauss(0.0, 0.03))
        repeats = tuple(ms * (1 + abs(chance.gauss(0.0, 0.004))) for _ in range(3))
        return Outcome(ms=sorted(repeats)[1], repeats=repeats, compile_s=compile_s)

    def finals(self, task: Task, schedules: Sequence[Schedule]) -> list[Final]:
        outcomes = [self.finish(task, schedule, None) for schedule in schedules]
        return [
            final_of(s, (o.ms,) if o.ms is not None else (), o.reason)
            for s, o in zip(schedules, outcomes, strict=True)
        ]

    def start_last(self, task: Task, schedule: Schedule) -> None:
        pass

    def last_ready(self, task: Task, schedule: Schedule) -> bool:
        return True

    def certify(self, task: Task, schedule: Schedule) -> str:
        return ""

    def close(self) -> None:
        pass

    def _place(self, schedule: Schedule, name: str) -> float:
        """Where a knob's value lies among its values, in 0..1."""
        values = self._values[name]
        value = dict(schedule.knobs).get(name, values[0])
        return values.index(value) / max(1, len(values) - 1)

    def _ms(self, schedule: Schedule) -> float:
        away = {name: self._place(schedule, name) - best for name, best in self._best.items()}
        log = sum(self._weight[name] * 4 * x**2 for name, x in away.items())
        log += sum(strength * away[a] * away[b] for a, b, strength in self._pairs)
        return math.exp(log)


def main() -> None:
    folder = Path(sys.argv[1])
    for name, workload in SPACES.items():
        (task, *_) = tasks_of([workload], seqlens=[16384], batches=[1], kv_heads=4)
        path = folder / f"synthetic_{name}.jsonl.gz"
        facts = {"device": "none", "made by": "benchmarks/synthesize.py"}
        count = record(task, Formula(workload), path, facts=facts, ahead=1, synthetic=True)
        print(f"{path}: {count} schedules, synthetic")


if __name__ == "__main__":
    main()
