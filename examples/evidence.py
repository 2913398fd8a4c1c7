"""Train toy models of several forms of attention on a task, at several lengths and seeds.

    python examples/evidence.py --seconds 540      # one GPU; start it again until all is there
    python examples/evidence.py --task text --forms nsa dense --lengths 4096 16384
    python examples/evidence.py --tiny             # on a CPU, seconds: does it all run?

The retrieval tasks are in `training/retrieval.py`, the text in `training/data.py`. Writes
TASK.json into --out after each run of one form, length and seed, and leaves out those that it has.
A run that --seconds ends goes on from its checkpoint. TASK.png shows what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from training.config import ModelKind, TrainConfig, as_dict, config_of
from training.data import Task, task_of
from training.loop import History, Trainer
from training.parallel import World, join_world
from training.plot import plot_rows
from training.retrieval import KINDS, RetrievalMix, RetrievalTask
from training.rows import FORMS, LENGTHS, MEASURES, SEEDS, Row, table

from nsagen import __version__

TINY: dict[str, Any] = {
    "batch_tokens": 512,
    "steps": 2,
    "warmup_steps": 1,
    "eval_batches": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "layers": 1,
}


class OutOfTime(Exception):
    """The seconds of a call are over."""


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
    add("--tiny", action="store_true", help="two steps of one layer, of 256 and 512 tokens")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    default_out = Path(os.environ.get("OUT", "runs/evidence"))
    add("--out", type=Path, default=default_out, help=f"folder (default: $OUT or {default_out})")
    return parser.parse_args(arguments)


def config_for(options: argparse.Namespace, length: int, seed: int) -> TrainConfig:
    changes: dict[str, Any] = {"seq_len": length, "seed": seed, "steps": options.steps}
    if options.tiny:
        changes = {**TINY, **changes, "steps": options.steps or TINY["steps"]}
    config = config_of("cpu" if options.tiny else options.preset, options.task, changes)
    return replace(config, eval_every=config.steps)  # looked at once, at the end


def task_for(name: str, config: TrainConfig) -> Task:
    return RetrievalMix(config) if name == "retrieval" else task_of(name, config)


def train(
    name: str, form: ModelKind, config: TrainConfig, folder: Path, world: World, deadline: float
) -> Row:
    """The row of one run on a task.

    Raises:
        OutOfTime: the deadline has passed; checkpoints have what was done.
    """
    trainer = Trainer(form, config, task_for(name, config), folder, world)

    def check(done: int, history: History) -> None:
        if done < config.steps and time.monotonic() > deadline:
            if done:
                trainer.save(done)
            raise OutOfTime

    history = trainer.run(check)
    last = history.validations[-1]
    if name == "retrieval":
        found = {}
        for kind in KINDS:
            trainer.task = RetrievalTask(kind, config.seq_len, config.seed)
            found[kind] = round(trainer.validate(config.steps).accuracy, 4)
    else:
        found = {"next byte": round(last.accuracy, 4)}
    return {
        "form": form,
        "length": config.seq_len,
        "seed": config.seed,
        "accuracy": found,
        "loss": round(last.loss, 4),
        "parameters": trainer.parameters,
        "seconds": round(history.seconds, 1),
        "config": as_dict(config),
    }


def write(path: Path, rows: list[Row], world: World) -> None:
    """Replace the file: it is whole at all times."""
    gpu = world.device.type == "cuda"
    results = {
        "device": torch.cuda.get_device_name(world.device) if gpu else platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "nsagen": __version__,
        },
        "rows": rows,
    }
    writing = path.with_suffix(".writing")
    writing.write_text(json.dumps(results, indent=1) + "\n")
    writing.replace(path)


def main() -> int:
    options = parse()
    try:
        with join_world(options.device) as world:
            return run_all(options, world)
    except ValueError as error:
        print(f"evidence.py: {error}", file=sys.stderr)
        return 2


def run_all(options: argparse.Namespace, world: World) -> int:
    deadline = time.monotonic() + options.seconds
    lengths = options.lengths or ([256, 512] if options.tiny else LENGTHS)
    wrong = [form for form in options.forms if form not in FORMS]
    if wrong:
        raise ValueError(f"a form must be one of {', '.join(FORMS)}; got {wrong[0]!r}")
    path = options.out / f"{options.task}.json"
    rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []
    known = {(row["form"], row["length"], row["seed"]): row["config"] for row in rows}
    wanted = [(f, n, s) for f in options.forms for n in lengths for s in options.seeds]
    configs = {run: config_for(options, *run[1:]) for run in wanted}
    for run, config in configs.items():
        task_for(options.task, config)  # raises if it does not fit the length
        if run in known and known[run] != as_dict(config):
            raise ValueError(f"{path} has {run} of other settings; choose another --out")
    options.out.mkdir(parents=True, exist_ok=True)
    left = [run for run in wanted if run not in known]
    for run in left:
        folder = options.out / "checkpoints" / "-".join(map(str, (options.task, *run)))
        try:
            if time.monotonic() > deadline:
                raise OutOfTime
            row = train(options.task, run[0], configs[run], folder, world, deadline)
        except OutOfTime:
            break
        rows.append(row)
        write(path, rows, world)
        shutil.rmtree(folder, ignore_errors=True)
        print(*run, row["accuracy"], f"{row['seconds']} s", flush=True)
    shown = (rows, options.forms, lengths, MEASURES[options.task])
    if rows:
        plot_rows(path.with_suffix(".png"), *shown)
    print(table(*shown))
    there = {(row["form"], row["length"], row["seed"]) for row in rows}
    missing = [run for run in wanted if run not in there]
    print(f"{len(wanted) - len(missing)} of {len(wanted)} runs are there")
    return 0


if __name__ == "__main__":
    sys.exit(main())
