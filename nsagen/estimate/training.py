"""One training step on many GPUs: how to split it, and a GPU's memory and time.

The split is tensor x context x data: of those that fit, the one with the shortest step. Matrix
products run at the roofline, attention as near to it as was measured, and every exchange at the
rate of links or adapters. What `nsagen.distributed` overlaps counts only where it is longer than
what it overlaps with. `docs/scaling.md` has the formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from nsagen.core.errors import InvalidInputError
from nsagen.distributed.gathering import SMALL_BYTES
from nsagen.estimate.attention import MemberConfig, attended_pairs, head_dims, learned_pairs
from nsagen.estimate.efficiency import ROOFLINE, Efficiency
from nsagen.estimate.model import (
    HOST_GPUS,
    USABLE,
    Gpu,
    Split,
    matrix_parameters,
    tensor_sizes,
    weight_bytes,
)
from nsagen.model import ToyLlamaConfig, ToyNSALlamaConfig

STATE_BYTES = 16
"""Of a parameter, spread over all GPUs: 16-bit weight and gradient, and in float32 the weight and
the two moments of Adam."""


# Of two H200s of one host; tests/distributed/test_benchmark.py says from which rows.
EXCHANGE_SECONDS = 1.7e-4
"""What an exchange of a shared sequence or of heads, with the kernels that order its rows, takes on
the GPU besides moving bytes. Of these constants the only one that is fitted, to the rows' times."""

AROUND_SECONDS = 2e-3
"""What every process does for itself around a step's passes: it prepares the batch, clips, and
starts the optimizer's update. Measured by itself."""

HOST_SECONDS = 1.4e-3
HOST_EXCHANGE_SECONDS = 4.2e-4
"""A layer's forward or backward pass on the host, which starts operations one by one, and an
exchange of a shared sequence with what surrounds it. From the host's time alone, of a step of 16384
tokens on one GPU and on two."""


@dataclass(frozen=True)
class Step:
    """Needs of one GPU for one training step.

    Attributes:
        recompute: whether each layer's activations are computed again in the backward pass.
        state, activations: bytes; state is weights, gradients and the optimizer's.
        seconds: of the step, which the longer of the next two takes, and what is around its passes.
        busy: seconds in which the GPU computes or waits for data; exchange: how many of them only
            exchange data.
        host: seconds in which the host starts the passes' operations, unless it launches a graph.
        moving: seconds in which data move, also while the GPU computes.
        tokens_per_second: of each GPU.
        fits: whether both fit into the GPU.
    """

    split: Split
    recompute: bool
    state: int
    activations: int
    seconds: float
    busy: float
    exchange: float
    host: float
    moving: float
    tokens_per_second: float
    fits: bool


def best_step(
    config: ToyLlamaConfig,
    gpu: Gpu,
    context: int,
    batch: int,
    gpus: int,
    efficiency: Efficiency = ROOFLINE,
) -> Step:
    """The fastest step that fits; if none does, the one that needs the least memory.

    Args:
        context: tokens of a sequence.
        batch: sequences of a step, on all GPUs together.
        gpus: in all, on hosts of HOST_GPUS.

    Raises:
        InvalidInputError: a number is not positive.
    """
    if min(context, batch, gpus) < 1:
        raise InvalidInputError(
            f"plan: context, batch and gpus must be positive; got {context}, {batch} and {gpus}; "
            "raise them to 1 or more"
        )
    steps = [
        step_of(config, gpu, context, batch, split, recompute, efficiency)
        for split in splits(config, gpus, batch)
        for recompute in (False, True)
    ]
    fitting = [step for step in steps if step.fits]
    if fitting:
        return min(fitting, key=lambda step: (step.seconds, step.moving))
    return min(steps, key=lambda step: step.state + step.activations)


def splits(config: ToyLlamaConfig, gpus: int, batch: int) -> Iterator[Split]:
    """Every tensor x context x data that leaves no GPU without a sequence."""
    for tensor in tensor_sizes(config, gpus):
        rest = gpus // tensor
        for data in range(1, min(rest, batch) + 1):
            if rest % data == 0:
                yield Split(tensor, data, rest // data)


def step_of(
    config: ToyLlamaConfig,
    gpu: Gpu,
    context: int,
    batch: int,
    split: Split,
    recompute: bool,
    efficiency: Efficiency = ROOFLINE,
) -> Step:
    """A step with one split."""
    rows = -(-batch // split.data)
    tokens = -(-context // split.context) * rows
    state = _state_bytes(config, split)
    activations = _activation_bytes(config, tokens, context * rows, split, recompute)
    forward, backward, window_passes = _compute_seconds(
        config, gpu, context, rows, split, efficiency
    )
    compute = forward + backward + (forward if recompute else 0.0)
    passes = 3 if recompute else 2  # over each layer's attention
    heads = _tensor_seconds(config, gpu, tokens, split, passes)
    sequences = _context_seconds(config, gpu, context * rows, split, passes + 1)
    weights = _data_seconds(config, gpu, split, passes + 1)
    hidden = window_passes * passes
    exchange = heads + max(0.0, sequences - hidden) + max(0.0, weights - compute)
    exchanges = _context_exchanges(config, context * rows, split, passes)
    sums = 2 * passes * config.num_hidden_layers if split.tensor > 1 else 0
    exchange += EXCHANGE_SECONDS * (exchanges + sums)
    host = HOST_SECONDS * config.num_hidden_layers * passes + HOST_EXCHANGE_SECONDS * exchanges
    busy = compute + exchange
    seconds = max(busy, host) + AROUND_SECONDS
    return Step(
        split,
        recompute,
        state,
        activations,
        seconds,
        busy,
        exchange,
        host,
        heads + sequences + weights,
        batch * context / seconds / (split.tensor * split.context * split.data),
        state + activations <= USABLE * gpu.memory,
    )


def _compute_seconds(
    config: ToyLlamaConfig,
    gpu: Gpu,
    context: int,
    rows: int,
    split: Split,
    efficiency: Efficiency,
) -> tuple[float, float, float]:
    """Forward pass, backward pass, and attention to windows in one pass, which needs no gathered
    keys and values."""
    share = rows / (split.tensor * split.context * gpu.flops)
    heads = config.num_attention_heads * config.num_hidden_layers
    head = 2 * config.vocab_size * config.hidden_size * context
    matrices = 2 * matrix_parameters(config) * context + head
    attention = heads * attended_pairs(config, context).operations(config)
    forward = matrices + attention / efficiency.of_prefill(context)
    learned = heads * learned_pairs(config, context).operations(config)
    backward = 2 * matrices + 2.5 * learned / efficiency.of_backward(context)
    windows = 0.0
    if isinstance(config, ToyNSALlamaConfig) and config.needs_windows:
        seen = context * context / (2 * config.kernel_stride)
        windows = heads * 2 * sum(head_dims(config)) * seen / efficiency.of_prefill(context)
    return forward * share, backward * share, windows * share


def link_rate(gpu: Gpu, ranks: int, apart: int) -> float:
    """Bytes a second that a GPU receives when `ranks` of them, `apart` places from each other,
    gather: within a host by its links, else each host's adapters together bring what all of its
    GPUs need."""
    within = max(1, min(ranks, HOST_GPUS // apart))
    return gpu.link if ranks <= within else min(gpu.link, gpu.network * within)


def _tensor_seconds(
    config: ToyLlamaConfig, gpu: Gpu, tokens: int, split: Split, passes: int
) -> float:
    """Two sums a layer and pass: each sends and gets 2 (n-1)/n of the rows."""
    share = 2 * (split.tensor - 1) / split.tensor
    layers = 2 * config.num_hidden_layers * passes
    return layers * tokens * config.hidden_size * 2 * share / gpu.link


def _context_seconds(
    config: ToyLlamaConfig, gpu: Gpu, tokens: int, split: Split, exchanges: int
) -> float:
    """Gathers of keys, values and windows in each pass, and one sum of their gradients."""
    share = (split.context - 1) / split.context
    moved = _gathered_bytes(config, tokens, split) * share * config.num_hidden_layers
    return exchanges * moved / link_rate(gpu, split.context, split.tensor)


def _context_exchanges(config: ToyLlamaConfig, tokens: int, split: Split, passes: int) -> int:
    """How many a step has: in each pass over a layer gathers of tokens, and of what ranks blocks;
    one sum of each's gradients; and the few tokens that windows read of other ranks, with theirs.
    Small windows travel with tokens.
    """
    if split.context == 1:
        return 0
    each = passes + 1
    if isinstance(config, ToyNSALlamaConfig) and config.needs_windows:
        small = _gathered_bytes(config, tokens, split) / split.context < SMALL_BYTES
        each = 2 * passes + 1 if small else 3 * passes + 2
    elif isinstance(config, MemberConfig):  # blocks are ranked in forward passes alone
        each += 2 * (passes - 1)
    return each * config.num_hidden_layers


def _data_seconds(config: ToyLlamaConfig, gpu: Gpu, split: Split, exchanges: int) -> float:
    """Gathers of the layers' weights in each pass, and one sum of gradients, over the GPUs with the
    same heads."""
    ranks = split.context * split.data
    moved = weight_bytes(config) / split.tensor * (ranks - 1) / ranks
    return exchanges * moved / link_rate(gpu, ranks, split.tensor)


def _gathered_bytes(config: ToyLlamaConfig, tokens: int, split: Split) -> int:
    """A layer's keys, values and windows of whole sequences, of one GPU's heads."""
    row = config.num_key_value_heads // split.tensor * sum(head_dims(config)) * 2
    if isinstance(config, MemberConfig):
        row += 2 * config.index_dim
    if not isinstance(config, ToyNSALlamaConfig):
        return tokens * row
    return tokens * row + (tokens // config.kernel_stride * row if config.needs_windows else 0)


def _state_bytes(config: ToyLlamaConfig, split: Split) -> int:
    """Parameters' own, spread over all GPUs, and two layers' gathered weights with one's
    gradient."""
    parameters = weight_bytes(config) // 2
    layer = matrix_parameters(config) // config.num_hidden_layers
    largest = max(layer, config.vocab_size * config.hidden_size)
    spread = STATE_BYTES * parameters // (split.tensor * split.context * split.data)
    return spread + 3 * 2 * largest // split.tensor


def _activation_bytes(
    config: ToyLlamaConfig, tokens: int, whole: int, split: Split, recompute: bool
) -> int:
    """What the backward pass needs of a GPU's tokens: of every layer, or of one and each layer's
    input; float32 logits and their gradient; and the gathered keys and values with theirs.

    Args:
        tokens: of this GPU; whole: of the sequences that it has a part of.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    k_dim, v_dim = head_dims(config)
    own = 2 * (heads * (k_dim + v_dim) + 2 * kv_heads * (k_dim + v_dim))
    if isinstance(config, ToyNSALlamaConfig):
        own += 2 * len(config.on) * heads * v_dim + heads * len(config.on) * 6
        own += kv_heads * config.topk * 4
    else:
        own += heads * 4
    if isinstance(config, MemberConfig):
        own += kv_heads * config.attention.topk * 4 + 2 * (kv_heads + 1) * config.index_dim
    own += 2 * 3 * config.intermediate_size
    layer = 4 * 2 * config.hidden_size + own // split.tensor
    layers = config.num_hidden_layers
    kept = layers * 2 * config.hidden_size + layer if recompute else layers * layer
    logits = 2 * 4 * config.vocab_size
    gathered = 0.0
    if split.context > 1:  # what front pieces see comes twice
        gathered = 2 * _gathered_bytes(config, whole, split) * (1 + 0.5 / split.context)
    return tokens * (kept + logits) + int(gathered)
