"""What caches of a narrow dtype change: logits, tokens and selected blocks of the example's model.

    python benchmarks/cache_accuracy.py --out cache_accuracy.json                 # minutes on a CPU
    python benchmarks/cache_accuracy.py --preset gpu --out $OUT/cache_accuracy.json

Trains the text model of examples/train_toy.py, then decodes validation text with each cache: the
first part of a sequence is prefilled, and the rest comes token by token, always the text's own.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from training.config import PRESETS
from training.data import task_of
from training.loop import Trainer
from training.parallel import join_world

from nsagen import ops
from nsagen.core.workload import CACHE_DTYPES
from nsagen.model import InferenceConfig, ToyNSALlama


@torch.no_grad()
def decoded(model: ToyNSALlama, ids: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Logits [steps, S, vocab] of the last `steps` tokens of ids [S, N], and the blocks that each
    layer selected for them, [steps, layers, HK, S, topk]."""
    count, length = ids.shape
    first, cache = length - steps, model.new_cache()
    ends = torch.arange(count + 1, dtype=torch.int32, device=ids.device) * first
    model.prefill(ids[:, :first].flatten(), ends, [first] * count, cache)
    slots = torch.arange(count, dtype=torch.int32, device=ids.device)
    chosen: list[Tensor] = []
    select = ops.compressed_attention_decode

    def watched(*args: Any, **named: Any) -> tuple[Tensor, Tensor]:
        o, topk_idx = select(*args, **named)
        chosen.append(topk_idx)
        return o, topk_idx

    logits: list[Tensor] = []
    ops.compressed_attention_decode = watched
    try:
        for position in range(first, length):
            logits.append(model.decode(ids[:, position], slots * 0 + position, slots, cache))
    finally:
        ops.compressed_attention_decode = select
    return torch.stack(logits), torch.stack(chosen).unflatten(0, (steps, -1))


def changed_blocks(before: Tensor, after: Tensor) -> float:
    """The share of blocks selected before that are not selected after."""
    kept = (before[..., :, None] == after[..., None, :]).any(-1)
    return float((~kept & (before >= 0)).sum() / (before >= 0).sum())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--steps", type=int, help="of training; the preset's by default")
    parser.add_argument("--sequences", type=int, default=8)
    parser.add_argument("--decoded", type=int, default=128, help="last tokens of each")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("cache_accuracy.json"))
    options = parser.parse_args()
    config = PRESETS[options.preset]["text"]
    config = dataclasses.replace(config, steps=options.steps or config.steps)
    with join_world(options.device) as world:
        task = task_of("text", config)
        trainer = Trainer("nsa", config, task, None, world)
        trainer.run()
        model: Any = trainer.plain.eval()
        if world.device.type == "cuda":
            model.to(torch.bfloat16)
        ids, targets = task.batch("validation", 0, options.sequences)
        ids, targets = ids.to(world.device), targets.to(world.device)[:, -options.decoded :].T
        rows: list[dict[str, Any]] = []
        plain, blocks = torch.empty(0), torch.empty(0)
        for cache_dtype in (None, *CACHE_DTYPES):
            model.inference_config = InferenceConfig(*ids.shape, cache_dtype=cache_dtype)
            logits, chosen = decoded(model, ids, options.decoded)
            if cache_dtype is None:
                plain, blocks = logits, chosen
            rows.append(
                {
                    "cache": cache_dtype or str(next(model.parameters()).dtype)[6:],
                    "logits": float((logits - plain).norm() / plain.norm()),
                    "tokens": float((logits.argmax(-1) != plain.argmax(-1)).double().mean()),
                    "blocks": changed_blocks(blocks, chosen),
                    "loss": float(
                        torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
                    ),
                }
            )
    about = {"config": dataclasses.asdict(config), "device": str(world.device)}
    about |= {"sequences": options.sequences, "decoded": options.decoded}
    options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    print("| cache | logits' relative error | tokens that differ | blocks that change | loss |")
    print("| --- | ---: | ---: | ---: | ---: |")
    for row in rows:
        shares = " | ".join(f"{row[name]:.2%}" for name in ("logits", "tokens", "blocks"))
        print(f"| {row['cache']} | {shares} | {row['loss']:.4f} |")


if __name__ == "__main__":
    main()
