"""Training as a user sees it: steps of the example's models, and layers of larger ones.

    python benchmarks/precompile.py               # on all cores, if time on the GPU is short
    python benchmarks/training_table.py --out training_table.json

Steps: `examples/train_toy.py --preset gpu`'s model on random bytes, 65536 tokens a step, eager and
compiled, with Native Sparse Attention and with dense attention (PyTorch's own choice): tokens/s.
Layers: one decoder layer of Llama 3.1 8B (32 heads of 128 over 8) and of the guide's model (over
2), in bfloat16, one sequence, forward and backward, with Native Sparse Attention and with
FlashAttention-4 where it is installed, else PyTorch's dense attention. Medians. Rows are written as
they come.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import math
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))

from training.config import PRESETS, ModelKind, TrainConfig
from training.loop import Trainer
from training.parallel import World

from nsagen.bench.dense import flash_attention_4
from nsagen.bench.measure import milliseconds
from nsagen.bench.results import provenance
from nsagen.core import compiler_cache
from nsagen.model import ToyLlamaConfig, ToyNSALlamaConfig
from nsagen.model.packing import Packed
from nsagen.model.rope import RotaryEmbedding
from nsagen.model.toy_llama import ToyLlamaLayer
from nsagen.model.toy_nsa_llama import ToyNSALlamaLayer

_GPU = PRESETS["gpu"]["text"]
STEPS: dict[str, TrainConfig] = {
    "4096": _GPU,
    "8192, 4 layers of 32 heads of 128": replace(
        _GPU, seq_len=8192, query_heads=32, head_dim=128, layers=4
    ),
    "16384": replace(_GPU, seq_len=16384),
    "65536": replace(_GPU, seq_len=65536),
}

_LLAMA: dict[str, Any] = {"num_key_value_heads": 8}
LAYERS: dict[str, tuple[ToyNSALlamaConfig, ToyLlamaConfig]] = {
    "Llama 3.1 8B": (ToyNSALlamaConfig(**_LLAMA), ToyLlamaConfig(**_LLAMA)),
    "the guide": (ToyNSALlamaConfig(topk=8), ToyLlamaConfig()),
}
SEQLENS = (4096, 16384, 65536, 131072)


class RandomBytes:
    """A task that takes the host no time."""

    name = "random bytes"

    def __init__(self, config: TrainConfig) -> None:
        self.shape = (config.rows, config.seq_len)

    @functools.cached_property
    def _ids(self) -> Tensor:
        return torch.randint(0, 256, self.shape)

    def batch(self, split: str, index: int, rows: int) -> tuple[Tensor, Tensor]:
        return self._ids, self._ids

    def describe(self) -> dict[str, object]:
        return {}


@dataclass(frozen=True)
class Case:
    """A row to measure: a training step, or a layer's passes."""

    what: str
    name: str
    kind: ModelKind
    how: str
    tokens: int

    def row(self) -> dict[str, Any]:
        return {
            **{"what": self.what, "model": self.name, "attention": self.kind, "how": self.how},
            "tokens": self.tokens,
        }


def cases() -> Iterator[Case]:
    """In the order in which they are measured: of each pair the sparse one first."""
    kinds: tuple[ModelKind, ...] = ("nsa", "dense")
    for name, config in STEPS.items():
        yield from (Case("step", name, kind, "eager", config.seq_len) for kind in kinds)
    yield from (Case("step", "4096", kind, "compiled", 4096) for kind in kinds)
    for tokens in SEQLENS:
        for name in LAYERS:
            yield from (Case("layer", name, kind, "eager", tokens) for kind in kinds)
    for name, config in list(STEPS.items())[1:]:
        yield from (Case("step", name, kind, "compiled", config.seq_len) for kind in kinds)


def trainer_of(config: TrainConfig, kind: ModelKind, how: str, device: torch.device) -> Trainer:
    trainer = Trainer(kind, config, RandomBytes(config), None, World(0, 1, device))
    if how == "compiled":
        compiled: Any = torch.compile(trainer.plain)
        trainer.model = compiled
    return trainer


def measured_step(trainer: Trainer, steps: int) -> dict[str, Any]:
    """Median of some steps after three that compile and warm up."""
    times = []
    for step in range(3 + steps):
        synchronize()
        start = time.perf_counter()
        trainer.step(step)
        synchronize()
        times.append(time.perf_counter() - start)
    seconds = statistics.median(times[3:])
    return {"ms": 1e3 * seconds, "tokens_per_second": trainer.config.batch_tokens / seconds}


def attend_by_flash_4(q: Tensor, k: Tensor, v: Tensor, *_: Any) -> Tensor:
    """One whole sequence, q [N, HQ, D]."""
    call = flash_attention_4()
    assert call is not None
    return call(q[None], k[None], v[None], causal=True)[0][0]


def layer_of(name: str, kind: ModelKind, device: torch.device) -> torch.nn.Module:
    sparse, dense = LAYERS[name]
    with device:
        if kind == "nsa":
            layer: Any = ToyNSALlamaLayer(sparse, RotaryEmbedding(sparse.rope), None, None)
        else:
            layer = ToyLlamaLayer(dense, RotaryEmbedding(dense.rope), None)
            if flash_attention_4():
                layer.self_attn.attend = attend_by_flash_4
    return layer.to(device, torch.bfloat16)


def measured_layer(
    case: Case, device: torch.device, timed: Callable[[Callable[[], object]], float]
) -> dict[str, Any]:
    """Forward without gradients, and backward of the input and all weights."""
    layer, config = layer_of(case.name, case.kind, device), LAYERS[case.name][0]
    x = torch.randn(case.tokens, config.hidden_size, device=device, dtype=torch.bfloat16)
    x.requires_grad_()
    ends = torch.tensor([0, case.tokens], dtype=torch.int32, device=device)
    windows = (config.kernel_size, config.kernel_stride) if case.kind == "nsa" else None
    rows = Packed.of(ends, case.tokens, (case.tokens,), windows)
    with torch.no_grad():
        forward = timed(lambda: layer(x, rows))
    leaves, o = (x, *layer.parameters()), layer(x, rows)
    do = torch.randn_like(o)
    backward = timed(lambda: torch.autograd.grad(o, leaves, do, retain_graph=True))
    more = {"dense": "FlashAttention-4" if flash_attention_4() else "PyTorch"}
    return {"forward_ms": forward, "backward_ms": backward} | (more if case.kind == "dense" else {})


def measure(
    case: Case,
    device: torch.device,
    steps: int = 8,
    timed: Callable[[Callable[[], object]], float] = milliseconds,
) -> dict[str, Any]:
    # torch.compile would move the cache in the middle of a process, and kernels compile again.
    os.environ.setdefault(compiler_cache.VARIABLE, str(compiler_cache.compiler_cache()))
    if case.what == "layer":
        return case.row() | measured_layer(case, device, timed)
    trainer = trainer_of(STEPS[case.name], case.kind, case.how, device)
    return case.row() | measured_step(trainer, steps)


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def tidy() -> None:
    torch.compiler.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def once(call: Callable[[], object]) -> float:
    call()
    return 0.0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=math.inf, help="begin nothing later")
    parser.add_argument("--out", type=Path, default=Path("training_table.json"))
    args = parser.parse_args()
    end, rows, failed = time.monotonic() + args.seconds, [], 0
    for case in cases():
        if time.monotonic() > end:
            print(f"no time is left from {case.row()} on")
            break
        try:
            rows.append(measure(case, torch.device("cuda")))
        except Exception as error:  # the other rows may be measured
            traceback.print_exc()
            rows.append(case.row() | {"error": f"{type(error).__name__}: {error}"[:300]})
            failed += 1
        print(rows[-1], flush=True)
        content = {"provenance": provenance(), "rows": rows}
        args.out.write_text(json.dumps(content, indent=1) + "\n")
        tidy()
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
