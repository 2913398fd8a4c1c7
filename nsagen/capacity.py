"""What a model needs on given GPUs: memory by counting, time by the roofline.

Memory is exact for weights and cache: their sizes come from the model's own code. Time is a
floor: the longer of its operations at a GPU's matrix rate and its bytes at its memory rate,
plus what the GPUs exchange. `docs/scaling.md` has the formulas and the layout over GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nsagen.errors import InvalidInputError
from nsagen.model import InferenceConfig, ToyLlama, ToyLlamaConfig, ToyNSALlama, ToyNSALlamaConfig

USABLE = 0.94
"""Share of a GPU's memory that tensors may take; the rest is for the driver, kernels and gaps."""


@dataclass(frozen=True)
class Gpu:
    """Rates and memory of one GPU.

    Attributes:
        memory: bytes.
        flops: 16-bit matrix operations a second, without sparsity.
        bandwidth: bytes a second of its memory.
        link: bytes a second to the other GPUs of a host, each way.
        source: where the rates are from.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    source: str


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 312e12, 2.04e12, 300e9, "data sheet, A100 80 GB SXM"),
        Gpu("h100", 80e9, 989e12, 3.35e12, 450e9, "data sheet, H100 SXM"),
        Gpu("h200", 141e9, 790e12, 4.27e12, 450e9, "measured: 8192^3 product, device copy"),
        Gpu("b200", 180e9, 2250e12, 7.7e12, 900e9, "data sheet, B200"),
    )
}


@dataclass(frozen=True)
class Load:
    """What to run.

    Attributes:
        context: tokens of a sequence, prompt and new ones together.
        batch: sequences at once, on all GPUs together.
        gpus: GPUs of one host.
        prefill_tokens: tokens that one prefill pass computes.
    """

    context: int
    batch: int
    gpus: int
    prefill_tokens: int


@dataclass(frozen=True)
class Split:
    """How a model lies on GPUs: `tensor` of them share each layer's heads, in `data` groups."""

    tensor: int
    data: int


@dataclass(frozen=True)
class Needs:
    """Of one GPU: bytes, seconds, and the largest loads that fit.

    Attributes:
        weights, cache, workspace: bytes; workspace is a prefill pass's intermediate results.
        prefill: seconds to prefill one sequence of the whole context.
        decode: seconds of a step that adds a token to each sequence of the batch.
        fits: whether weights, cache and workspace fit into the GPU.
        largest_batch: for the context, on all GPUs together; 0: not even one.
        largest_context: for the batch; 0: none.
    """

    split: Split
    weights: int
    cache: int
    workspace: int
    prefill: float
    decode: float
    fits: bool
    largest_batch: int
    largest_context: int


def split_of(config: ToyLlamaConfig, gpus: int) -> Split:
    """As many GPUs a group as divide both the GPUs and the key/value heads."""
    tensor = max(n for n in range(1, gpus + 1) if gpus % n == config.num_key_value_heads % n == 0)
    return Split(tensor, gpus // tensor)


def needs(config: ToyLlamaConfig, gpu: Gpu, load: Load) -> Needs:
    """What `load` takes of each GPU.

    Raises:
        InvalidInputError: a number of the load is not positive.
    """
    if min(load.context, load.batch, load.gpus, load.prefill_tokens) < 1:
        raise InvalidInputError(
            f"plan: context, batch, gpus and prefill-tokens must be positive; got {load}; "
            "raise them to 1 or more"
        )
    split = split_of(config, load.gpus)
    weights = weight_bytes(config) // split.tensor

    def fits(context: int, batch: int) -> bool:
        taken = cache_bytes(config, context, batch, split)
        taken += workspace_bytes(config, min(load.prefill_tokens, context), batch, split)
        return weights + taken <= USABLE * gpu.memory

    return Needs(
        split,
        weights,
        cache_bytes(config, load.context, load.batch, split),
        workspace_bytes(config, min(load.prefill_tokens, load.context), load.batch, split),
        _prefill_seconds(config, gpu, load.context, split),
        _decode_seconds(config, gpu, load, split),
        fits(load.context, load.batch),
        _largest(lambda batch: fits(load.context, batch * split.data)) * split.data,
        _largest(lambda context: fits(context, load.batch)),
    )


def weight_bytes(config: ToyLlamaConfig) -> int:
    """16-bit weights of the whole model; counted on one and on two layers, for all are alike."""
    one, two = (_parameters(replace(config, num_hidden_layers=n)) for n in (1, 2))
    return 2 * (one + (config.num_hidden_layers - 1) * (two - one))


def _parameters(config: ToyLlamaConfig) -> int:
    short = replace(config, max_position_embeddings=1)  # rope tables are no weights
    kind = ToyNSALlama if isinstance(config, ToyNSALlamaConfig) else ToyLlama
    with torch.device("meta"):
        model = kind(short)  # type: ignore[arg-type]
    return sum(parameter.numel() for parameter in model.parameters())


def cache_bytes(config: ToyLlamaConfig, context: int, batch: int, split: Split) -> int:
    """A GPU's part of the cache of `batch` sequences."""
    rows = -(-batch // split.data)
    return InferenceConfig(rows, context).cache_bytes(config) // split.tensor


def workspace_bytes(config: ToyLlamaConfig, tokens: int, batch: int, split: Split) -> int:
    """Intermediate results of a prefill pass on one GPU, and the logits of its sequences.

    The larger of a layer's two halves, beside the residual stream and the norm's output: the
    attention's q, k, v, output (three outputs, gates, statistics and indices for NSA), or the
    feed-forward's two inner rows and their product.
    """
    q = config.num_attention_heads * config.head_dim
    kv = config.num_key_value_heads * config.head_dim
    attention = 2 * (2 * q + 3 * kv)  # q twice: before and after rope; k likewise
    if isinstance(config, ToyNSALlamaConfig):
        attention += 2 * 3 * q + 2 * 4 * kv // config.kernel_stride
        attention += config.num_attention_heads * (4 + 2 * 3)
        attention += config.num_key_value_heads * config.topk * 4
    else:
        attention += 2 * q
    inner = 2 * 3 * config.intermediate_size
    row = 2 * 2 * config.hidden_size + max(attention, inner) // split.tensor
    return tokens * row + 4 * -(-batch // split.data) * config.vocab_size


def attended_pairs(config: ToyLlamaConfig, tokens: int) -> float:
    """Products of a query and a key in a sequence of `tokens`, in units of 4 * head_dim operations.

    NSA: windows, half as much again for the selection's scores, blocks, and the sliding window.
    """

    def capped(limit: int) -> float:
        """Sum of min(t + 1, limit) over all tokens."""
        full = max(0, tokens - limit)
        short = min(tokens, limit)
        return full * limit + short * (short + 1) / 2

    if not isinstance(config, ToyNSALlamaConfig):
        return capped(tokens)
    size, stride = config.kernel_size, config.kernel_stride
    windows = max(0, (tokens - size) // stride + 1)
    rest = max(0, tokens - size + 1) - stride * max(0, windows - 1)
    seen = stride * windows * (windows - 1) / 2 + rest * windows
    return 1.5 * seen + capped(config.topk * config.block_size) + capped(config.window_size)


def keys_read(config: ToyLlamaConfig, context: int) -> int:
    """Keys, and as many values, that a decoding step reads of one sequence and head."""
    if not isinstance(config, ToyNSALlamaConfig):
        return context
    windows = max(0, (context - config.kernel_size) // config.kernel_stride + 1)
    blocks = min(context, config.topk * config.block_size)
    return windows + blocks + min(context, config.window_size)


def _matrix_parameters(config: ToyLlamaConfig) -> int:
    """Parameters that every token is multiplied with: all but the embedding and the head."""
    return weight_bytes(config) // 2 - 2 * config.vocab_size * config.hidden_size


def _prefill_seconds(config: ToyLlamaConfig, gpu: Gpu, tokens: int, split: Split) -> float:
    per_pair = 4 * config.head_dim * config.num_attention_heads * config.num_hidden_layers
    work = 2 * _matrix_parameters(config) * tokens + per_pair * attended_pairs(config, tokens)
    work += 2 * config.vocab_size * config.hidden_size
    read = weight_bytes(config) / split.tensor
    time = max(work / split.tensor / gpu.flops, read / gpu.bandwidth)
    return time + _exchange_seconds(config, gpu, tokens, split)


def _decode_seconds(config: ToyLlamaConfig, gpu: Gpu, load: Load, split: Split) -> float:
    rows = -(-load.batch // split.data)
    keys = keys_read(config, load.context)
    heads = config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    read = weight_bytes(config) - 2 * config.vocab_size * config.hidden_size  # one row of these
    read += rows * keys * heads * 2 * 2
    queries = config.num_attention_heads * config.head_dim * config.num_hidden_layers
    work = 2 * (_matrix_parameters(config) + config.vocab_size * config.hidden_size) * rows
    work += 4 * queries * keys * rows
    time = max(work / gpu.flops, read / gpu.bandwidth) / split.tensor
    return time + _exchange_seconds(config, gpu, rows, split)


def _exchange_seconds(config: ToyLlamaConfig, gpu: Gpu, tokens: int, split: Split) -> float:
    """Two sums a layer over the GPUs of a group: each sends and gets 2 (n-1)/n of the rows."""
    share = 2 * (split.tensor - 1) / split.tensor
    return 2 * config.num_hidden_layers * tokens * config.hidden_size * 2 * share / gpu.link


def _largest(fits: Callable[[int], bool], limit: int = 1 << 40) -> int:
    """The largest number from 1 that fits, 0 if none does; what fits must be an unbroken range."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
