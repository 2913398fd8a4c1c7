"""Train toy models of several forms of attention on a task, at several lengths and seeds.

    python examples/evidence.py --seconds 540      # one GPU; start it again until all is there
    python examples/evidence.py --task text --forms nsa dense --lengths 4096 16384
    python examples/evidence.py --tiny             # on a CPU, seconds: does it all run?

The retrieval tasks are in `training/retrieval.py`, the text in `training/data.py`. Writes
TASK.json into --out after each run of one form, length and seed, and leaves out those that it has.
A run that --seconds ends goes on from its checkpoint. Several processes may write into one --out.
TASK.png shows what was measured.

Retrieval at the shortest length is trained from scratch, at a longer one from the weights of the
next shorter. Each model is then asked for more than it was trained for, too: sequences of the
longer lengths, shorter lists of blocks, more needles.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from safetensors.torch import load_file, save_file
from training.config import ModelKind, TrainConfig, as_dict, config_of, continued
from training.data import Task, task_of
from training.figures import figures
from training.loop import History, Trainer
from training.parallel import World, join_world
from training.retrieval import CROWD, KINDS, RetrievalMix, RetrievalTask
from training.rows import FORMS, HARDER, LENGTHS, MEASURES, SEEDS, Row, fewer, longer, table

from nsagen import __version__
from nsagen.core.files import locked, replace_file, replacing

TINY: dict[str, Any] = {
    "batch_tokens": 1024,
    "steps": 2,
    "warmup_steps": 1,
    "eval_batches": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "layers": 1,
    "topk": 16,
}
TINY_LENGTHS = (512, 1024)

SEQUENCES = 64
"""A model answers all questions of at most so many of each kind."""

Run = tuple[ModelKind, int, int]
"""Form, length and seed."""


class OutOfTime(Exception):
    """The seconds of a call are over, or a run would take too many."""


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--task", choices=MEASURES, default="retrieval", help="default: retrieval")
    add("--forms", nargs="+", default=list(FORMS), help=f"default: {' '.join(FORMS)}")
    add("--lengths", type=int, nargs="+", help=f"default: {' '.join(map(str, LENGTHS))}")
    add("--seeds", type=int, nargs="+", default=list(SEEDS), help="default: 0 1 2")
    add("--preset", choices=("cpu", "gpu"), default="gpu", help="sizes (default: gpu)")
    add("--steps", type=int, help="updates of the weights; default: the preset's")
    add("--seconds", type=float, default=float("inf"), help="stop after so many")
    most = "leave out a longer length whose steps would take more, by its first ones"
    add("--run-seconds", type=float, default=float("inf"), help=most)
    add("--tiny", action="store_true", help="two steps of one layer, of 512 and 1024 tokens")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    default_out = Path(os.environ.get("OUT", "runs/evidence"))
    add("--out", type=Path, default=default_out, help=f"folder (default: $OUT or {default_out})")
    return parser.parse_args(arguments)


def lengths_of(options: argparse.Namespace) -> tuple[int, ...]:
    """Those that retrieval is trained to, one after the other, and asked at."""
    return TINY_LENGTHS if options.tiny else LENGTHS


def before(options: argparse.Namespace, run: Run) -> Run | None:
    """The run that a run goes on from."""
    form, length, seed = run
    shorter = [n for n in lengths_of(options) if n < length]
    return (form, max(shorter), seed) if shorter and options.task == "retrieval" else None


def config_for(options: argparse.Namespace, run: Run) -> TrainConfig:
    changes: dict[str, Any] = {"seq_len": run[1], "seed": run[2], "steps": options.steps}
    if options.tiny:
        changes = {**TINY, **changes, "steps": options.steps or TINY["steps"]}
    config = config_of("cpu" if options.tiny else options.preset, options.task, changes)
    if before(options, run):
        config = continued(config)
    return replace(config, eval_every=config.steps)  # looked at once, at the end


def task_for(options: argparse.Namespace, run: Run, config: TrainConfig) -> Task:
    if options.task == "retrieval":
        return RetrievalMix(config, easier=before(options, run) is None)
    return task_of(options.task, config)


def weights_of(options: argparse.Namespace, run: Run) -> Path:
    return options.out / "weights" / ("-".join(map(str, (options.task, *run))) + ".safetensors")


def train(options: argparse.Namespace, run: Run, config: TrainConfig, world: World) -> Row:
    """The row of one run on a task.

    Raises:
        OutOfTime: the time is over, or would be; checkpoints have what was done.
    """
    form, length, seed = run
    folder = options.out / "checkpoints" / weights_of(options, run).stem
    trainer = Trainer(form, config, task_for(options, run, config), folder, world)
    shorter = before(options, run)
    if shorter:
        trainer.plain.load_state_dict(load_file(weights_of(options, shorter)))
    started: list[tuple[float, int]] = []

    def check(done: int, history: History) -> None:
        now = time.monotonic()
        if done == config.steps:
            return
        if now > options.deadline:
            if done:
                trainer.save(done)
            raise OutOfTime
        started.append((now, done))
        if len(started) == 7:  # the first step compiles
            seconds = (now - started[1][0]) / 5 * config.steps
            print(*run, f"about {seconds:.0f} s for {config.steps} steps", flush=True)
            if shorter and seconds > options.run_seconds:
                print(*run, f"left out: more than --run-seconds {options.run_seconds:g}")
                raise OutOfTime

    history = trainer.run(check)
    last = history.validations[-1]
    row: Row = {
        "form": form,
        "length": length,
        "seed": seed,
        "goes_on_from": shorter[1] if shorter else None,
        "loss": round(last.loss, 4),
        "parameters": trainer.parameters,
        "seconds": round(history.seconds, 1),
        "config": as_dict(config),
    }
    if options.task == "retrieval":
        row["accuracy"] = asked(trainer, KINDS)
        row["harder"] = harder(trainer, lengths_of(options))
        path = weights_of(options, run)
        path.parent.mkdir(exist_ok=True)
        with replacing(path) as writing:
            save_file(trainer.plain.state_dict(), writing)
    else:
        row["accuracy"] = {"next byte": round(last.accuracy, 4)}
    shutil.rmtree(folder, ignore_errors=True)
    return row


def asked(trainer: Trainer, kinds: Iterable[str]) -> dict[str, float]:
    """The accuracy of each kind of question, over at most `SEQUENCES` of each."""
    config, found = trainer.config, {}
    batches = min(config.eval_batches, max(1, SEQUENCES // config.rows))
    trainer.config = replace(config, eval_batches=batches)
    for kind in kinds:
        trainer.task = RetrievalTask(kind, config.seq_len, config.seed)
        found[kind] = round(trainer.validate(0).accuracy, 4)
    trainer.config = config
    return found


def harder(trained: Trainer, lengths: Sequence[int]) -> dict[str, dict[str, float]]:
    """Accuracies where a model is asked for what it was not trained for, by what that is."""
    config = trained.config
    fitting = [n for n in lengths if config.seq_len < n <= config.batch_tokens]
    others = {longer(n): replace(config, seq_len=n) for n in fitting}
    if trained.kind != "dense":
        lists = (config.topk // 2, config.topk // 4)
        others |= {fewer(n): replace(config, topk=n) for n in lists}
    found = {}
    for name, other in others.items():
        trainer = Trainer(trained.kind, other, trained.task, None, trained.world)
        trainer.plain.load_state_dict(trained.plain.state_dict())
        found[name] = asked(trainer, KINDS)
    return found | {CROWD: asked(trained, [CROWD])}


def read(path: Path) -> list[Row]:
    return json.loads(path.read_text())["rows"] if path.exists() else []


def add_row(path: Path, row: Row, world: World) -> None:
    """Add a row to the file, which is whole at all times."""
    gpu = world.device.type == "cuda"
    with locked(path.parent, path.stem):
        results = {
            "device": torch.cuda.get_device_name(world.device) if gpu else platform.machine(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "nsagen": __version__,
            },
            "rows": [*read(path), row],
        }
        replace_file(path, json.dumps(results, indent=1) + "\n")


def main() -> int:
    options = parse()
    try:
        with join_world(options.device) as world:
            return run_all(options, world)
    except ValueError as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return 2


def run_all(options: argparse.Namespace, world: World) -> int:
    options.deadline = time.monotonic() + options.seconds
    lengths = options.lengths or lengths_of(options)
    wrong = [form for form in options.forms if form not in FORMS]
    if wrong:
        raise ValueError(f"a form must be one of {', '.join(FORMS)}; got {wrong[0]!r}")
    path = options.out / f"{options.task}.json"
    known = {(row["form"], row["length"], row["seed"]): row["config"] for row in read(path)}
    wanted: list[Run] = [
        (form, length, seed)
        for seed in options.seeds
        for form in options.forms
        for length in sorted(lengths)
    ]
    configs = {run: config_for(options, run) for run in wanted}
    for run, config in configs.items():
        task_for(options, run, config)  # raises if it does not fit the length
        if run in known and known[run] != as_dict(config):
            raise ValueError(f"{path} has {run} of other settings; choose another --out")
        shorter = before(options, run)
        if run in known or shorter is None or (shorter in wanted and shorter not in known):
            continue
        if not weights_of(options, shorter).exists():
            raise ValueError(
                f"{run} goes on from the weights of {shorter}, which are not in "
                f"{weights_of(options, shorter)}; add {shorter[1]} to --lengths and choose an "
                "--out without its row"
            )
    options.out.mkdir(parents=True, exist_ok=True)
    for run in wanted:
        shorter = before(options, run)
        if run in known or (shorter and not weights_of(options, shorter).exists()):
            continue  # or the shorter one has been left out
        try:
            if time.monotonic() > options.deadline:
                raise OutOfTime
            row = train(options, run, configs[run], world)
        except OutOfTime:
            continue
        add_row(path, row, world)
        print(*run, row["accuracy"], f"{row['seconds']} s", flush=True)
    rows = read(path)
    report(options, rows, lengths)
    there = {(row["form"], row["length"], row["seed"]) for row in rows}
    missing = [run for run in wanted if run not in there]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there")
    return 0


def report(options: argparse.Namespace, rows: list[Row], lengths: Sequence[int]) -> None:
    """The tables of what was measured, and figures where matplotlib is installed."""
    shown = (rows, options.forms, lengths)
    print(table(*shown, MEASURES[options.task]))
    if options.task == "retrieval":
        print(table(*shown, HARDER))
    plot = figures() if rows else None
    if plot:
        path = options.out / f"{options.task}.png"
        plot.plot_rows(path, *shown, MEASURES[options.task])
        if options.task == "retrieval" and not options.tiny:
            plot.plot_longer(path.with_stem("retrieval-longer"), *shown)


if __name__ == "__main__":
    sys.exit(main())
