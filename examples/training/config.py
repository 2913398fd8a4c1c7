"""What a run is: the models' shape, the batches and the optimizer, and presets of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal

from nsagen.model import ToyLlama, ToyLlamaConfig, ToyNSALlama, ToyNSALlamaConfig
from nsagen.model.forms import Form, form_of

ModelKind = Literal["nsa", "dense", "infllm_v2", "msa"]
Model = ToyNSALlama | ToyLlama

VOCAB_SIZE = 256
"""All tasks are about bytes."""


@dataclass(frozen=True)
class TrainConfig:
    """Everything that a loss curve depends on, but for the model's kind.

    Attributes:
        batch_tokens: tokens of a step, over all processes and accumulated parts.
        accumulate: parts that each process computes its share of a step in.
        dtype: of the parameters.
        amp: whether matrix products run in bfloat16 by autocast.
        activation_checkpointing: compute each layer's activations again in the backward pass.
        corpus_mib: mebibytes of text to train and validate on.
    """

    seq_len: int = 256
    batch_tokens: int = 4096
    steps: int = 300
    warmup_steps: int = 20
    learning_rate: float = 3e-3
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    accumulate: int = 1
    dtype: str = "float32"
    amp: bool = False
    activation_checkpointing: bool = False
    eval_every: int = 50
    eval_batches: int = 4
    save_every: int = 50
    seed: int = 0
    corpus_mib: int = 12
    hidden_size: int = 64
    intermediate_size: int = 192
    layers: int = 2
    query_heads: int = 4
    kv_heads: int = 2
    head_dim: int = 32
    initializer_range: float = 0.06
    rope_theta: float = 10000.0
    compress_type: str = "weightedpool"
    kernel_size: int = 8
    kernel_stride: int = 4
    block_size: int = 16
    topk: int = 6
    window_size: int = 32

    def __post_init__(self) -> None:
        if self.batch_tokens % (self.seq_len * self.accumulate):
            raise ValueError(
                "batch_tokens must be a multiple of seq_len * accumulate; got "
                f"{self.batch_tokens} and {self.seq_len} * {self.accumulate}; change any of them"
            )

    @property
    def rows(self) -> int:
        """Sequences of a step."""
        return self.batch_tokens // self.seq_len

    def dense_config(self) -> ToyLlamaConfig:
        return ToyLlamaConfig(**self._llama())

    def nsa_config(self) -> ToyNSALlamaConfig:
        names = ("compress_type", "kernel_size", "kernel_stride", "block_size", "topk")
        sparsity = {name: getattr(self, name) for name in (*names, "window_size")}
        return ToyNSALlamaConfig(**self._llama(), **sparsity, init_blocks=1, local_blocks=2)

    def infllm_v2_form(self) -> Form:
        """A query sees as many tokens as with NSA: its window's blocks, and topk more."""
        local = self.window_size // self.block_size
        names = ("kernel_size", "kernel_stride", "block_size")
        sizes = {name: getattr(self, name) for name in names}
        blocks = {"topk": self.topk + local, "init_blocks": 1, "local_blocks": local}
        return form_of("TrainConfig", {"form": "infllm_v2", **sizes, **blocks, "dense_len": 0})

    def msa_rule(self) -> dict[str, Any]:
        """What `block_selection` takes: as many blocks as InfLLM-V2's, of which MiniMax-M3 forces
        the query's own alone."""
        return {
            **{"kernel_size": 1, "kernel_stride": 1, "block_size": self.block_size},
            **{"topk": self.infllm_v2_form().topk, "init_blocks": 0, "local_blocks": 1},
            **{"score_norm": "none", "score_heads": "each", "score_pool": "max"},
        }

    def _llama(self) -> dict[str, Any]:
        return {
            "vocab_size": VOCAB_SIZE,
            # No step has a longer sequence, so that no step needs to read its lengths.
            "max_position_embeddings": self.batch_tokens,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.query_heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "initializer_range": self.initializer_range,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
        }


_CPU = TrainConfig()
_GPU = TrainConfig(  # 29 million parameters, and the paper's sparsity at 4096 tokens
    seq_len=4096,
    batch_tokens=65536,
    steps=300,
    warmup_steps=30,
    learning_rate=1e-3,
    amp=True,
    eval_every=100,
    eval_batches=4,
    save_every=150,
    corpus_mib=48,
    hidden_size=512,
    intermediate_size=1536,
    layers=8,
    query_heads=16,
    kv_heads=2,
    head_dim=64,
    initializer_range=0.02,
    kernel_size=32,
    kernel_stride=16,
    block_size=64,
    topk=16,
    window_size=512,
)

# Recall is learned by small models. Two layers: their windows together do not reach an answer. A
# large rope_theta: with 10000, all but 6 of 64 channels turn by more than a radian in 4096 tokens,
# and what turns cannot tell one class from another wherever it lies. Compression over 16 tokens:
# a needle is 4 of them, and weighs twice as much in their mean as in one over 32.
PRESETS: dict[str, dict[str, TrainConfig]] = {
    "cpu": {
        "text": _CPU,
        "recall": replace(
            _CPU,
            steps=200,
            eval_every=25,
            rope_theta=500000.0,
            hidden_size=128,
            intermediate_size=256,
            initializer_range=0.05,
        ),
    },
    "gpu": {
        "text": _GPU,
        "recall": replace(
            _GPU,
            batch_tokens=32768,
            steps=400,
            eval_every=50,
            rope_theta=500000.0,
            hidden_size=256,
            intermediate_size=512,
            layers=2,
            query_heads=8,
            initializer_range=0.04,
            kernel_size=16,
            kernel_stride=8,
        ),
    },
}
"""By name and task."""

# Six tasks at once; at 65536 tokens a step has one sequence.
PRESETS["cpu"]["retrieval"] = replace(PRESETS["cpu"]["recall"], steps=600, eval_batches=8)
PRESETS["gpu"]["retrieval"] = replace(
    PRESETS["gpu"]["recall"], batch_tokens=65536, steps=600, eval_batches=16, save_every=100
)


def continued(config: TrainConfig) -> TrainConfig:
    """A run that goes on from trained weights: a fifth of the steps at 0.3 of the rate."""
    steps, rate = max(1, config.steps // 5), 0.3 * config.learning_rate
    return replace(config, steps=steps, learning_rate=rate, warmup_steps=min(10, steps))


def config_of(preset: str, task: str, changes: Mapping[str, Any]) -> TrainConfig:
    """A preset for a task with some fields replaced; those that are None stay.

    Raises:
        ValueError: the preset or a field is unknown, or the sizes do not fit each other.
    """
    if preset not in PRESETS:
        raise ValueError(f"preset must be one of {', '.join(PRESETS)}; got {preset!r}")
    names = {field.name for field in fields(TrainConfig)}
    if unknown := sorted(changes.keys() - names):
        raise ValueError(f"a run has no {', '.join(unknown)}; it has {', '.join(sorted(names))}")
    given = {name: value for name, value in changes.items() if value is not None}
    return replace(PRESETS[preset][task], **given)


def as_dict(config: TrainConfig) -> dict[str, Any]:
    """The fields by name, for JSON."""
    return asdict(config)
