"""Train ToyNSALlama and ToyLlama of one size side by side, on text or on a recall task.

    python examples/train_toy.py                          # a few minutes on a CPU
    python examples/train_toy.py --preset gpu             # 29 million parameters, 4096 tokens
    python examples/train_toy.py --task recall            # needles that lie far back
    torchrun --nproc-per-node 2 examples/train_toy.py --preset gpu --parallel fsdp
    torchrun --nproc-per-node 8 examples/train_toy.py --preset gpu --tp 2 --cp 2

The text is Python source code that this machine has, byte by byte. Writes <task>.json and
<task>.png into --out, and checkpoints, from which the same command goes on after an interruption.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from training import graphs
from training.config import PRESETS, ModelKind, TrainConfig, as_dict, config_of
from training.data import Task, task_of
from training.figures import figures
from training.loop import History, Trainer
from training.parallel import World, join_world

from nsagen import __version__

KINDS: dict[str, tuple[ModelKind, ...]] = {
    "both": ("nsa", "dense"),
    "nsa": ("nsa",),
    "dense": ("dense",),
}

HELP = {
    "seq_len": "tokens of a sequence",
    "batch_tokens": "tokens of a step, over all processes",
    "steps": "updates of the weights",
    "accumulate": "parts that each process computes its share of a step in",
    "dtype": "of the parameters: float32 or bfloat16",
    "amp": "matrix products in bfloat16 by autocast",
    "activation_checkpointing": "compute activations again in the backward pass: less memory",
    "corpus_mib": "mebibytes of text",
}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", choices=KINDS, default="both", help="which to train (default: both)")
    add("--task", choices=("text", "recall"), nargs="+", default=["text"])
    add("--preset", choices=PRESETS, default="cpu", help="sizes to start from (default: cpu)")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    fsdp = "weights over processes with other tokens (default: ddp, with --tp fsdp)"
    add("--parallel", choices=("ddp", "fsdp"), help=fsdp)
    add("--tp", type=int, default=1, help="processes that share key/value heads (default: 1)")
    add("--cp", type=int, default=1, help="processes that share each sequence (default: 1)")
    graph = "compute gradients by a CUDA graph, with NSA: much less work for the host"
    add("--graph", action="store_true", help=graph)
    default_out = Path(os.environ.get("OUT", "runs/train_toy"))
    add("--out", type=Path, default=default_out, help=f"folder (default: $OUT or {default_out})")
    add("--checkpoints", type=Path, help="folder of the checkpoints (default: in --out)")
    add("--fresh", action="store_true", help="start anew even where there are checkpoints")
    add("--threads", type=int, help="CPU threads of a process")
    sizes = parser.add_argument_group("changes to the preset")
    for field in fields(TrainConfig):
        option = "--" + field.name.replace("_", "-")
        kind = type(field.default)
        if kind is bool:
            sizes.add_argument(
                option, action=argparse.BooleanOptionalAction, help=HELP.get(field.name)
            )
        else:
            sizes.add_argument(option, type=kind, help=HELP.get(field.name))
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = {field.name for field in fields(TrainConfig)}
    changes = {name: value for name, value in vars(options).items() if name in names}
    try:
        configs = {name: config_of(options.preset, name, changes) for name in options.task}
        with join_world(options.device, options.tp, options.cp) as world:
            for kind in KINDS[options.model] if options.graph else ():
                graphs.check(kind, world, options.parallel)
            for name, config in configs.items():
                run_task(task_of(name, config), config, options, world)
    except ValueError as error:
        print(f"train_toy.py: {error}", file=sys.stderr)
        return 2
    return 0


def run_task(task: Task, config: TrainConfig, options: argparse.Namespace, world: World) -> None:
    """Train each model on a task; the first process writes the results."""
    console = Console(quiet=not world.is_first)
    runs: dict[str, History] = {}
    parameters: dict[str, int] = {}
    for kind in KINDS[options.model]:
        folder = (options.checkpoints or options.out / "checkpoints") / f"{task.name}-{kind}"
        if options.fresh and world.is_first:
            shutil.rmtree(folder, ignore_errors=True)
        world.wait()  # for the first process, before any looks for checkpoints
        trainer = Trainer(kind, config, task, folder, world, options.parallel, options.graph)
        parameters[kind] = trainer.parameters
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        with Progress(*columns, TimeRemainingColumn(), console=console) as progress:
            bar = progress.add_task(f"{task.name}, {kind}", total=config.steps)

            def show(done: int, history: History, bar: Any = bar, kind: str = kind) -> None:
                loss = f" loss {history.losses[-1]:.3f}" if history.losses else ""
                progress.update(bar, completed=done, description=f"{task.name}, {kind}{loss}")

            runs[kind] = trainer.run(show)
        del trainer
    if world.is_first:
        results = record(task, config, world, runs, parameters)
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / f"{task.name}.json").write_text(json.dumps(results, indent=1) + "\n")
        title = f"{task.name}, {config.seq_len} tokens a sequence"
        if plot := figures():
            plot.plot_runs(options.out / f"{task.name}.png", title, runs)
        for kind, summary in results["summary"].items():
            console.print(f"{task.name}, {kind}: {summary}")


def record(
    task: Task,
    config: TrainConfig,
    world: World,
    runs: dict[str, History],
    parameters: dict[str, int],
) -> dict[str, Any]:
    """Results with what they depend on."""
    gpu = world.device.type == "cuda"
    summary: dict[str, Any] = {
        kind: {
            "parameters": parameters[kind],
            "validation_loss": round(history.validations[-1].loss, 5),
            "accuracy": round(history.validations[-1].accuracy, 5),
            "tokens_per_second": round(
                config.batch_tokens * history.timed_steps / max(history.seconds, 1e-9)
            ),
        }
        for kind, history in runs.items()
    }
    if len(runs) == 2 and task.name == "text":  # recall ends near 0, of which ratios say nothing
        nsa, dense = (runs[kind].validations[-1].loss for kind in ("nsa", "dense"))
        summary["nsa loss / dense loss"] = round(nsa / dense, 4)
    return {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(world.device) if gpu else platform.machine(),
        "processes": world.size,
        "mesh": {"data": world.batches, "context": world.cp, "tensor": world.tp},
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "nsagen": __version__,
        },
        "task": task.name,
        "data": task.describe(),
        "config": as_dict(config),
        "summary": summary,
        "runs": {
            kind: {
                "seconds": round(history.seconds, 2),
                "losses": [round(loss, 5) for loss in history.losses],
                "validations": [asdict(one) for one in history.validations],
            }
            for kind, history in runs.items()
        },
    }


if __name__ == "__main__":
    sys.exit(main())
