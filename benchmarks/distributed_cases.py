"""What benchmarks/distributed.py measures: its cases and their sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch

from examples.training.config import PRESETS, TrainConfig
from nsagen.model import ToyNSALlamaConfig

SPLITS = ("alone", "context", "tensor")
WHAT = ("attention", "step", "longest", "graph")


class Case(NamedTuple):
    """One row: "attention" or "training step", its tokens, what the ranks share, and whether the
    step's gradients are a CUDA graph."""

    what: str
    tokens: int
    split: str
    graph: bool = False


@dataclass(frozen=True)
class Sizes:
    """What to measure.

    Attributes:
        tokens: of the sequences that are run in each way, most interesting first.
        longest: of the step that ranks only run together, which recomputes its activations.
        heads, kv_heads, head_dim, hidden_size, sparsity: of the attention layer.
        step: the training step's configuration, but for its tokens.
        calls: measured calls of a case at most; as few as take a second, but three.
    """

    tokens: tuple[int, ...]
    longest: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden_size: int
    sparsity: dict[str, Any]
    step: TrainConfig
    dtype: torch.dtype
    calls: int

    def cases(self, what: Sequence[str] = WHAT) -> list[Case]:
        """By worth: the attention layer, then the step; and heads last.

        Args:
            what: kinds of cases, and single ones by kind, tokens and split: "step/16384/context".
        """
        step = "training step"
        kinds = {"attention": ("attention", False), "step": (step, False), "graph": (step, True)}
        cases = [
            Case(kinds[kind][0], n, split, kinds[kind][1])
            for kind in kinds
            if kind in what
            for splits in (SPLITS[:2], SPLITS[2:])
            for n in self.tokens
            for split in splits
        ]
        single = (name.split("/") for name in what if "/" in name)
        cases += [Case(kinds[kind][0], int(n), split, kinds[kind][1]) for kind, n, split in single]
        return [*cases, Case(step, self.longest, "context")] if "longest" in what else cases

    def layer(self, tokens: int) -> ToyNSALlamaConfig:
        """A model that is the attention layer and next to nothing else, for the estimate."""
        return ToyNSALlamaConfig(
            **{**self.sparsity, "vocab_size": 1, "intermediate_size": 1, "num_hidden_layers": 1},
            hidden_size=self.hidden_size,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            rope_scaling=None,
            max_position_embeddings=tokens,
        )

    def training(self, tokens: int) -> TrainConfig:
        recompute = tokens == self.longest
        return replace(
            self.step, seq_len=tokens, batch_tokens=tokens, activation_checkpointing=recompute
        )

    def model(self, case: Case) -> ToyNSALlamaConfig:
        """What the estimate takes for a case."""
        if case.what == "attention":
            return self.layer(case.tokens)
        return self.training(case.tokens).nsa_config()


SPARSITY: dict[str, Any] = {
    **{"compress_type": "avgpool", "kernel_size": 32, "kernel_stride": 16, "block_size": 64},
    **{"topk": 16, "init_blocks": 1, "local_blocks": 2, "window_size": 512},
}
USUAL = Sizes(
    tokens=(131072, 16384),
    longest=524288,
    heads=64,
    kv_heads=4,
    head_dim=128,
    hidden_size=4096,
    sparsity=SPARSITY,
    step=PRESETS["gpu"]["text"],
    dtype=torch.bfloat16,
    calls=9,
)
TINY = Sizes(
    tokens=(64,),
    longest=128,
    heads=4,
    kv_heads=2,
    head_dim=16,
    hidden_size=32,
    sparsity={
        **SPARSITY,
        **{"kernel_size": 8, "kernel_stride": 4, "block_size": 8, "topk": 4, "window_size": 12},
    },
    step=replace(PRESETS["cpu"]["text"], layers=1, hidden_size=32, intermediate_size=48),
    dtype=torch.float32,
    calls=1,
)
