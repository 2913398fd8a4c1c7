"""Continue a dense model of Transformers as NSA: swap it, train what is new, then train all.

    python examples/continue_training.py                       # minutes on a CPU
    python examples/continue_training.py --preset gpu          # on one GPU
    python examples/continue_training.py --model FOLDER --preset gpu

Without --model it first trains the dense text model of `train_toy.py` and saves it as a checkpoint
folder. A folder of your own needs its tokenizer; without one its tokens are bytes. The text is the
Python source code that this machine has.

Writes continue.json, continue.png and the folder `nsa`, which AutoModelForCausalLM reads, into
--out. The distance to the dense model is that of the logits on validation text, relative.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
import triton
from torch import Tensor, nn
from training.config import PRESETS, TrainConfig, as_dict, config_of
from training.data import Corpus, TextTask
from training.figures import figures
from training.loop import Trainer, learning_rate
from training.parallel import join_world
from transformers import AutoModelForCausalLM, AutoTokenizer

from nsagen import __version__
from nsagen.core.files import replace_file
from nsagen.integrations.transformers import apply_nsa

STAGES = ("new", "all")


@dataclass(frozen=True)
class Measured:
    """Validation of both models after some steps."""

    step: int
    loss: float
    dense_loss: float
    distance: float


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, help="dense checkpoint folder (default: train the example's first)")
    add("--preset", choices=PRESETS, default="cpu", help="sizes to start from (default: cpu)")
    add("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
    default_out = Path(os.environ.get("OUT", "runs/continue"))
    add("--out", type=Path, default=default_out, help=f"folder (default: $OUT or {default_out})")
    add("--dense-steps", type=int, help="of the example's dense model (default: the preset's)")
    add("--new-steps", type=int, default=40, help="of the new parameters alone (default: 40)")
    add("--all-steps", type=int, default=80, help="of all parameters (default: 80)")
    add("--new-rate", type=float, default=1e-2, help="learning rate of the first stage")
    add("--all-rate", type=float, default=1e-3, help="and of the second")
    add("--seq-len", type=int, help="tokens of a sequence (default: the preset's)")
    add("--batch-tokens", type=int, help="tokens of a step (default: the preset's)")
    add("--corpus-mib", type=int, help="mebibytes of text (default: the preset's)")
    add("--threads", type=int, help="CPU threads")
    return parser.parse_args(arguments)


def main() -> int:
    options = parse()
    if options.threads:
        torch.set_num_threads(options.threads)
    names = ("seq_len", "batch_tokens", "corpus_mib")
    changes = {name: getattr(options, name) for name in names}
    config = config_of(options.preset, "text", {**changes, "steps": options.dense_steps})
    options.out.mkdir(parents=True, exist_ok=True)
    with join_world(options.device) as world:
        folder = options.model or train_dense(config, options.out / "dense", world)
        run(folder, config, options, world.device)
    return 0


def train_dense(config: TrainConfig, folder: Path, world: Any) -> Path:
    """The example's dense text model as a checkpoint folder; an earlier one is used again."""
    if not (folder / "config.json").exists():
        task = TextTask(Corpus.read(config.corpus_mib << 20), config.seq_len, config.seed)
        trainer = Trainer("dense", config, task, None, world)
        trainer.run(lambda done, history: progress("dense", done, config.steps, history.losses))
        trainer.plain.save_pretrained(folder)
    return folder


def corpus_of(folder: Path, config: TrainConfig) -> Corpus:
    """The text as the model's tokens: its tokenizer's, or bytes."""
    corpus = Corpus.read(config.corpus_mib << 20)
    if not (folder / "tokenizer_config.json").exists():
        return corpus
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def encoded(part: Tensor) -> Tensor:
        text = bytes(part.numpy()).decode("utf-8", "replace")
        return torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)

    return replace(corpus, train=encoded(corpus.train), validation=encoded(corpus.validation))


def run(folder: Path, config: TrainConfig, options: argparse.Namespace, device: Any) -> None:
    """Both stages, and what is measured before, between and after."""
    task = TextTask(corpus_of(folder, config), config.seq_len, config.seed + 1)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device).eval()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    apply_nsa(model, config.nsa_config())
    own = {name for name, _ in dense.named_parameters()}
    new = [parameter for name, parameter in model.named_parameters() if name not in own]
    losses: list[float] = []
    results: dict[str, Any] = {
        "command": " ".join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": triton.__version__,
            "transformers": transformers.__version__,
            "nsagen": __version__,
        },
        "data": task.describe(),
        "config": as_dict(config),
        "stages": {"new": options.new_steps, "all": options.all_steps},
        "rates": {"new": options.new_rate, "all": options.all_rate},
        "parameters": {
            "dense": sum(p.numel() for p in dense.parameters()),
            "new": sum(p.numel() for p in new),
        },
        "measured": {},
        "losses": [],
    }

    def look(name: str) -> None:
        """Measure, and write what there is so far."""
        one = rounded(measure(model, dense, task, config, device, len(losses)))
        results["measured"][name] = one
        results["losses"] = [round(loss, 5) for loss in losses]
        text = json.dumps(results, indent=1) + "\n"
        replace_file(options.out / "continue.json", text)
        print(f"{name}: {one}", flush=True)

    look("before")
    for stage, steps, rate in zip(
        STAGES,
        (options.new_steps, options.all_steps),
        (options.new_rate, options.all_rate),
        strict=True,
    ):
        model.requires_grad_(stage == "all")
        for parameter in new:
            parameter.requires_grad_(True)
        plan = replace(config, steps=steps, learning_rate=rate, warmup_steps=min(10, steps))
        train(model, task, plan, device, losses, stage)
        look("between" if stage == "new" else "after")
    model.save_pretrained(options.out / "nsa")
    if plot := figures():
        shown = (results["losses"], [*results["measured"].values()], options.new_steps)
        plot.plot_continued(options.out / "continue.png", *shown)


def train(
    model: nn.Module,
    task: TextTask,
    plan: TrainConfig,
    device: Any,
    losses: list[float],
    stage: str,
) -> None:
    """The steps of a stage; `losses` grows by theirs."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, plan.learning_rate, (0.9, 0.95), weight_decay=0.0)
    first = len(losses)
    model.train()
    for step in range(plan.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(plan, step)
        ids, targets = (t.to(device) for t in task.batch("train", first + step, plan.rows))
        loss = cross_entropy(logits_of(model, ids, plan), targets)
        loss.backward()
        nn.utils.clip_grad_norm_(trained, plan.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress(stage, step + 1, plan.steps, losses)


@torch.no_grad()
def measure(
    model: nn.Module, dense: nn.Module, task: TextTask, config: TrainConfig, device: Any, step: int
) -> Measured:
    """Losses and the distance on the validation batches, the same at every call."""
    model.eval()
    sums = torch.zeros(3, dtype=torch.float64)
    for index in range(config.eval_batches):
        ids, targets = (t.to(device) for t in task.batch("validation", index, config.rows))
        ours, theirs = (logits_of(one, ids, config) for one in (model, dense))
        distance = (ours - theirs).norm() / theirs.norm()
        losses = (cross_entropy(logits, targets) for logits in (ours, theirs))
        sums += torch.stack([*losses, distance]).double().cpu()
    return Measured(step, *(sums / config.eval_batches).tolist())


def logits_of(model: nn.Module, ids: Tensor, config: TrainConfig) -> Tensor:
    with torch.autocast(ids.device.type, torch.bfloat16, enabled=config.amp):
        return model(input_ids=ids, use_cache=False).logits.float()


def cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())


def rounded(one: Measured) -> dict[str, Any]:
    return {name: round(value, 5) for name, value in asdict(one).items()}


def progress(stage: str, done: int, steps: int, losses: list[float]) -> None:
    """A line every ten steps."""
    if losses and (done % 10 == 0 or done == steps):
        print(f"{time.strftime('%H:%M:%S')} {stage}: {done} of {steps}, loss {losses[-1]:.3f}")


if __name__ == "__main__":
    sys.exit(main())
