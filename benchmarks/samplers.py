"""Compare samplers on recordings: how many evaluations until the choice is nearly the best.

    python benchmarks/samplers.py benchmarks/recordings/*.jsonl.gz --samplers gp tpe

E5 and E2 are the median evaluations, over the seeds, until the chosen schedule is within 5% and
2% of the recording's optimum; hit rate is the share of searches that end within 2%. The chosen
schedule is judged by the recording's time, not by the search's own noisy one.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import optuna
from score_samplers import Score, random_score, score

from nsagen.tune.recording import load_recording

CONTENDERS = ("gp", "optuna-gp", "optuna-gp/categorical", "tpe", "tpe/categorical")


def row(name: str, result: Score, seconds: float) -> str:
    e5, e2 = (f"{'>budget' if n == float('inf') else f'{n:.0f}':>8}" for n in result.evaluations)
    return f"  {name:24}{e5}{e2}{result.hit_rate:>10.2f}{seconds:>10.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("recordings", type=Path, nargs="+")
    parser.add_argument("--samplers", nargs="*", default=list(CONTENDERS))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--budget", type=int, default=200)
    args = parser.parse_args()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    for path in args.recordings:
        recording = load_recording(path)
        kind = "SYNTHETIC, no claim" if recording.synthetic else recording.facts["device"]
        print(f"{recording.task} ({kind}): {len(recording.outcomes)} schedules")
        print(f"  {'sampler':24}{'E5':>8}{'E2':>8}{'hit rate':>10}{'seconds':>10}")
        print(row("random (closed form)", random_score(recording, args.budget), 0.0))
        for name in args.samplers:
            sampler, _, encoding = name.partition("/")
            start = time.perf_counter()
            result = score(
                recording,
                sampler,
                encoding or "integer",  # type: ignore[arg-type]
                seeds=args.seeds,
                budget=args.budget,
            )
            print(row(name, result, time.perf_counter() - start), flush=True)


if __name__ == "__main__":
    main()
