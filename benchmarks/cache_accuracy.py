"""What caches of a narrow dtype change: logits, tokens and selected blocks of small trained models.

    python benchmarks/cache_accuracy.py                                    # minutes on a CPU
    python benchmarks/cache_accuracy.py --preset gpu --out $OUT/accuracy.json    # under 100 s

Trains three models on the text of examples/train_toy.py: that example's, with NSA; a Llama of
Transformers, which InfLLM-V2's and MoBA's forms then make sparse; and a MiniMax-M3, whose index
learns in the last third of its steps. Each then decodes validation text with each cache: the first
part of a sequence is prefilled, and the rest comes token by token, always the text's own. A row is
printed, and written, as soon as it is there; `--limit` ends the run in time.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "examples"))

from training.config import PRESETS, TrainConfig
from training.data import Task, task_of
from training.loop import Trainer
from training.parallel import join_world

from nsagen import ops
from nsagen.core.workload import CACHE_DTYPES
from nsagen.model import InferenceConfig

Decoded = tuple[Tensor, Tensor]
"""Logits [steps, S, vocab] of the last tokens of S sequences, and the blocks selected for them."""

LOOK = {"cpu": (8, 128), "gpu": (8, 64)}
"""Sequences, and the last tokens of each that are decoded."""

SECONDS = {"cpu": 90.0, "gpu": 9.0}
"""Of a training, at most."""

FORMS = {
    "cpu": {
        "InfLLM-V2": {
            **{"form": "infllm_v2", "kernel_size": 8, "kernel_stride": 4, "block_size": 16},
            **{"topk": 6, "local_blocks": 2, "dense_len": 0},
        },
        "MoBA": {"form": "moba", "block_size": 32, "topk": 3, "dense_decode": False},
        "MSA": {"index_block_size": 16, "index_topk_blocks": 4},
    },
    "gpu": {
        "InfLLM-V2": {"form": "infllm_v2", "topk": 16, "local_blocks": 5, "dense_len": 0},
        "MoBA": {"form": "moba", "block_size": 256, "topk": 4, "dense_decode": False},
        "MSA": {"index_block_size": 128, "index_topk_blocks": 8},
    },
}
"""Sizes of each member; what is left out is as released. MoBA's steps select, as its prompts do."""


@contextmanager
def selections(*homes: Any, name: str, pick: Callable[[Any], Tensor]) -> Iterator[list[Tensor]]:
    """The blocks that calls of an op select, where modules know it by this name."""
    chosen: list[Tensor] = []
    select = getattr(homes[0], name)

    def watched(*args: Any, **named: Any) -> Any:
        result = select(*args, **named)
        chosen.append(pick(result))
        return result

    for home in homes:
        setattr(home, name, watched)
    try:
        yield chosen
    finally:
        for home in homes:
            setattr(home, name, select)


class OfExample:
    """The example's model with NSA."""

    def __init__(self, config: TrainConfig, task: Task, world: Any) -> None:
        trainer = Trainer("nsa", config, task, None, world)
        trainer.run()
        self.model: Any = trainer.plain.eval()
        if world.device.type == "cuda":
            self.model.to(torch.bfloat16)
        self.dtype = str(next(self.model.parameters()).dtype)[6:]

    @torch.no_grad()
    def decode(self, ids: Tensor, steps: int, cache_dtype: str | None) -> Decoded:
        count, length = ids.shape
        self.model.inference_config = InferenceConfig(count, length, cache_dtype=cache_dtype)
        first, cache = length - steps, self.model.new_cache()
        ends = torch.arange(count + 1, dtype=torch.int32, device=ids.device) * first
        self.model.prefill(ids[:, :first].flatten(), ends, [first] * count, cache)
        slots = torch.arange(count, dtype=torch.int32, device=ids.device)
        how: dict[str, Any] = {
            "name": "compressed_attention_decode",
            "pick": lambda found: found[1],
        }
        with selections(ops, **how) as chosen:
            logits = [
                self.model.decode(ids[:, at], slots * 0 + at, slots, cache)
                for at in range(first, length)
            ]
        return torch.stack(logits), torch.stack(chosen).unflatten(0, (steps, -1))


class OfTransformers:
    """A model of Transformers, its config's `nsagen` set by `settings`."""

    def __init__(self, model: Any, settings: dict[str, Any]) -> None:
        from nsagen.integrations.attention_cache import remember_caches

        self.model, self.settings = model, settings
        model.config.nsagen = settings
        model.set_attn_implementation("nsagen")
        remember_caches(model)
        self.dtype = str(model.dtype)[6:]

    @torch.no_grad()
    def decode(self, ids: Tensor, steps: int, cache_dtype: str | None) -> Decoded:
        from transformers import DynamicCache

        from nsagen.integrations import minimax_m3
        from nsagen.model import forms

        self.model.config.nsagen = {**self.settings, "cache_dtype": cache_dtype}
        names = inspect.signature(self.model.forward).parameters
        cache = DynamicCache(config=self.model.config)
        given = {"cache" if "cache" in names else "past_key_values": cache}
        length = ids.shape[1]
        logits, how = [], {"name": "block_selection_decode", "pick": lambda found: found}
        self.model(ids[:, : length - steps], **given, use_cache=True, logits_to_keep=1)
        with selections(forms, minimax_m3, **how) as chosen:  # type: ignore[arg-type]
            for at in range(length - steps, length):
                out = self.model(ids[:, at : at + 1], **given, use_cache=True)
                logits.append(out.logits[:, -1])
        return torch.stack(logits), torch.stack(chosen).unflatten(0, (steps, -1))


def trained(model: Any, config: TrainConfig, task: Task, device: Any, seconds: float) -> Any:
    """A model of Transformers after some steps, or as many as the time allows."""
    model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.1)
    began, learns = time.monotonic(), getattr(model.config, "nsagen", None)
    for step in range(config.steps):
        used = max(step / config.steps, (time.monotonic() - began) / seconds)
        if used >= 1:
            break
        if learns is not None:  # the index costs time, and follows what attention has learned
            model.config.nsagen = {**learns, "index_loss_coef": float(used > 2 / 3)}
        for group in optimizer.param_groups:
            group["lr"] = config.learning_rate * min(1.0, (step + 1) / config.warmup_steps)
        ids, targets = (x.to(device) for x in task.batch("train", step, config.rows))
        with torch.autocast(device.type, torch.bfloat16, enabled=config.amp):
            out = model(ids, use_cache=False)
        loss = functional.cross_entropy(out.logits.flatten(0, 1).float(), targets.flatten())
        if getattr(out, "index_loss", None) is not None:
            loss = loss + out.index_loss
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), config.clip_norm)
        optimizer.step()
    print(f"{type(model).__name__}: {step} steps, loss {float(loss.detach()):.3f}", file=sys.stderr)
    return model.to(torch.bfloat16).eval() if device.type == "cuda" else model.eval()


def sizes_of(config: TrainConfig) -> dict[str, Any]:
    return {
        "vocab_size": 256,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": min(4, config.layers),
        "num_attention_heads": config.query_heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "max_position_embeddings": config.seq_len,
        "initializer_range": config.initializer_range,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id")),
    }


def members(
    preset: str, config: TrainConfig, task: Task, world: Any, seconds: float, wanted: list[str]
) -> Iterator[tuple[str, Any]]:
    """Each member's name and model, trained when its turn comes."""
    forms, device = FORMS[preset], world.device
    longer = dataclasses.replace(config, steps=10 * config.steps)  # as many as the time allows
    if {"InfLLM-V2", "MoBA"} & set(wanted):
        import transformers

        import nsagen.integrations.transformers

        torch.manual_seed(0)
        llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes_of(config)))
        llama = trained(llama, longer, task, device, seconds)
        for name in ("InfLLM-V2", "MoBA"):
            if name in wanted:
                yield name, OfTransformers(llama, forms[name])
    if "MSA" in wanted:
        from transformers.models.minimax_m3_vl import configuration_minimax_m3_vl as m3_config
        from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

        import nsagen.integrations.transformers  # noqa: F401

        sizes, layers = sizes_of(config), min(4, config.layers)
        kinds = {
            "layer_types": ["minimax_m3_sparse"] * layers,
            "mlp_layer_types": ["dense"] * layers,
            "dense_intermediate_size": config.intermediate_size,
            "index_n_heads": config.kv_heads,
            "index_head_dim": config.head_dim,
        }
        given = m3_config.MiniMaxM3VLTextConfig(**sizes, **kinds, **forms["MSA"])
        given.nsagen = {"index_warmup": True}
        torch.manual_seed(0)
        model = m3.MiniMaxM3VLForCausalLM._from_config(given, attn_implementation="nsagen")
        yield "MSA", OfTransformers(trained(model, longer, task, device, seconds), {})
    if "NSA" in wanted:
        yield "NSA", OfExample(config, task, world)


def changed_blocks(before: Tensor, after: Tensor) -> float:
    """The share of blocks selected before that are not selected after."""
    kept = (before[..., :, None] == after[..., None, :]).any(-1)
    return float((~kept & (before >= 0)).sum() / (before >= 0).sum())


def main() -> None:
    names = [*FORMS["cpu"], "NSA"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--preset", choices=PRESETS, default="cpu")
    parser.add_argument("--members", nargs="+", choices=names, default=names)
    parser.add_argument("--steps", type=int, help="of training; the preset's, or 60 on a GPU")
    parser.add_argument("--seconds", type=float, help="of a training in Transformers, at most")
    parser.add_argument("--limit", type=float, default=90.0, help="seconds until no row begins")
    parser.add_argument("--sequences", type=int)
    parser.add_argument("--decoded", type=int, help="last tokens of each")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path("cache_accuracy.json"))
    options = parser.parse_args()
    began, gpu = time.monotonic(), options.preset == "gpu"
    sequences, decoded = LOOK[options.preset]
    sequences, decoded = options.sequences or sequences, options.decoded or decoded
    config = PRESETS[options.preset]["text"]
    steps = options.steps or (60 if gpu else config.steps)
    config = dataclasses.replace(config, steps=steps, warmup_steps=min(config.warmup_steps, steps))
    config = dataclasses.replace(config, eval_every=steps, corpus_mib=min(12, config.corpus_mib))
    rows: list[dict[str, Any]] = []
    what = ("logits' relative error", "tokens that differ", "blocks that change", "loss")
    print(f"| member | cache | {' | '.join(what)} |")
    print("| --- | --- | ---: | ---: | ---: | ---: |", flush=True)
    with join_world(options.device) as world:
        task = task_of("text", config)
        ids, targets = task.batch("validation", 0, sequences)
        ids, targets = ids.to(world.device), targets.to(world.device)[:, -decoded:].T
        about = {"config": dataclasses.asdict(config), "device": str(world.device)}
        about |= {"sequences": sequences, "decoded": decoded, "forms": FORMS[options.preset]}
        seconds = options.seconds or SECONDS[options.preset]
        for member, model in members(options.preset, config, task, world, seconds, options.members):
            plain, blocks = torch.empty(0), torch.empty(0)
            for cache_dtype in (None, *CACHE_DTYPES):
                if gpu and time.monotonic() - began > options.limit:
                    print(f"stopped: {options.limit} s are over", file=sys.stderr)
                    return
                logits, chosen = model.decode(ids, decoded, cache_dtype)
                if cache_dtype is None:
                    plain, blocks = logits, chosen
                row = {
                    "member": member,
                    "cache": cache_dtype or model.dtype,
                    "logits": float((logits - plain).norm() / plain.norm()),
                    "tokens": float((logits.argmax(-1) != plain.argmax(-1)).double().mean()),
                    "blocks": changed_blocks(blocks, chosen),
                    "loss": float(
                        functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())
                    ),
                    "seconds": round(time.monotonic() - began, 1),
                }
                rows.append(row)
                options.out.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
                shares = " | ".join(f"{row[name]:.2%}" for name in ("logits", "tokens", "blocks"))
                print(f"| {member} | {row['cache']} | {shares} | {row['loss']:.4f} |", flush=True)


if __name__ == "__main__":
    main()
