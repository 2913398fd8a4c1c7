"""What a model needs on given GPUs: memory by counting, time by the roofline.

Memory is exact for weights and cache: their sizes come from the model's own code. Time is the
longer of its operations at a GPU's matrix rate and its bytes at its memory rate, with attention
as near to these as was measured, plus what the GPUs exchange. `docs/scaling.md` has the formulas
and the layout over GPUs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from nsagen.core.errors import InvalidInputError
from nsagen.estimate.attention import (
    MemberConfig,
    Pairs,
    attended_pairs,
    head_dims,
    keys_read,
)
from nsagen.estimate.efficiency import ROOFLINE, Efficiency
from nsagen.model import InferenceConfig, ToyLlama, ToyLlamaConfig, ToyNSALlama, ToyNSALlamaConfig
from nsagen.model.configs import check_cache_dtype

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
        source: where the rates come from.
        network: bytes a second of a GPU's own adapter, to other hosts, each way.
    """

    name: str
    memory: float
    flops: float
    bandwidth: float
    link: float
    source: str
    network: float


_MEASURED = "measured: 8192^3 product, device copy, all-gather between two GPUs"

GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 80e9, 312e12, 2.04e12, 300e9, "data sheet, A100 80 GB SXM", 25e9),
        Gpu("h100", 80e9, 989e12, 3.35e12, 450e9, "data sheet, H100 SXM", 50e9),
        Gpu("h200", 141e9, 790e12, 4.27e12, 268e9, _MEASURED, 50e9),
        Gpu("b200", 180e9, 2250e12, 7.7e12, 900e9, "data sheet, B200", 50e9),
    )
}
"""Networks are those of NVIDIA's DGX systems by data sheet: for each GPU an adapter of 200 Gb/s
(A100) or 400 Gb/s (H100, H200, B200)."""

HOST_GPUS = 8
"""GPUs of a host, linked to each other."""


@dataclass(frozen=True)
class Load:
    """What to run.

    Attributes:
        context: tokens of a sequence, prompt and new ones together.
        batch: concurrent sequences, on all GPUs together.
        gpus: in all, on hosts of HOST_GPUS.
        prefill_tokens: tokens that one prefill pass computes.
        cache_dtype: of NSA's caches, as in `InferenceConfig`; None: 16 bits.
    """

    context: int
    batch: int
    gpus: int
    prefill_tokens: int
    cache_dtype: str | None = None


@dataclass(frozen=True)
class Split:
    """How GPUs share a model: `tensor` of them share each layer's heads, `context` such groups each
    sequence, and `data` groups of both the batch."""

    tensor: int
    data: int
    context: int = 1


@dataclass(frozen=True)
class Needs:
    """Needs of one GPU: bytes, seconds, and the largest loads that fit.

    Attributes:
        weights, cache, workspace: bytes; workspace is a prefill pass's intermediate results.
        prefill: seconds to prefill one sequence of the whole context.
        decode: seconds of a step that adds a token to each sequence of the batch.
        fits: whether weights, cache and workspace fit into the GPU.
        largest_batch: for the context, on all GPUs together; 0 if not even one fits.
        largest_context: for the batch; 0 if no context fits.
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
    """The largest group size that divides both the GPUs and the key/value heads, on one host."""
    tensor = tensor_sizes(config, gpus)[-1]
    return Split(tensor, gpus // tensor)


def tensor_sizes(config: ToyLlamaConfig, gpus: int) -> list[int]:
    """The numbers of GPUs that may share a layer's heads, ascending."""
    heads, sizes = config.num_key_value_heads, range(1, min(gpus, HOST_GPUS) + 1)
    return [n for n in sizes if gpus % n == heads % n == 0]


def needs(config: ToyLlamaConfig, gpu: Gpu, load: Load, efficiency: Efficiency = ROOFLINE) -> Needs:
    """What `load` takes of each GPU, with attention at `efficiency`'s share of the roofline.

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
        taken = cache_bytes(config, context, batch, split, load.cache_dtype)
        taken += workspace_bytes(config, min(load.prefill_tokens, context), batch, split)
        return weights + taken <= USABLE * gpu.memory

    return Needs(
        split,
        weights,
        cache_bytes(config, load.context, load.batch, split, load.cache_dtype),
        workspace_bytes(config, min(load.prefill_tokens, load.context), load.batch, split),
        _prefill_seconds(config, gpu, load.context, split, efficiency),
        _decode_seconds(config, gpu, load, split, efficiency),
        fits(load.context, load.batch),
        _largest(lambda batch: fits(load.context, batch * split.data)) * split.data,
        _largest(lambda context: fits(context, load.batch)),
    )


def weight_bytes(config: ToyLlamaConfig) -> int:
    """16-bit weights of the whole model; counted on one and two layers, as all are alike."""
    short = replace(config, max_position_embeddings=1, rope_scaling=None)  # rope has no weights
    one, two = (_parameters(replace(short, num_hidden_layers=n)) for n in (1, 2))
    return 2 * (one + (config.num_hidden_layers - 1) * (two - one))


@functools.lru_cache(maxsize=64)  # each estimate asks several times, for each split
def _parameters(config: ToyLlamaConfig) -> int:
    kind = ToyNSALlama if isinstance(config, ToyNSALlamaConfig) else ToyLlama
    with torch.device("meta"):
        model = kind(config)  # type: ignore[arg-type]
    own = config.own_weights * config.num_hidden_layers if isinstance(config, MemberConfig) else 0
    return own + sum(parameter.numel() for parameter in model.parameters())


def cache_bytes(
    config: ToyLlamaConfig, context: int, batch: int, split: Split, cache_dtype: str | None = None
) -> int:
    """A GPU's part of the cache of `batch` sequences; dense attention's has 16 bits always."""
    rows = -(-batch // split.data)
    narrow = cache_dtype if isinstance(config, ToyNSALlamaConfig) else None
    limits = InferenceConfig(rows, context, cache_dtype=narrow)
    check_cache_dtype(config, limits)
    if isinstance(config, MemberConfig):
        heads, dims = config.num_key_value_heads // split.tensor, head_dims(config)
        token = heads * sum(_row_bytes(dim, cache_dtype) for dim in dims) * context
        if config.index_dim:  # each GPU has the index keys of all heads
            token += _row_bytes(config.index_dim, cache_dtype) * context
        elif not config.dense_decode:
            token += heads * _row_bytes(dims[0], cache_dtype) * config.windows(context)
        return rows * config.num_hidden_layers * token
    return limits.cache_bytes(config) // split.tensor


def _row_bytes(dim: int, cache_dtype: str | None) -> int:
    """A head of a token or window in a cache; a narrow one has a float32 scale beside it."""
    return 2 * dim if cache_dtype is None else dim + 4


def workspace_bytes(config: ToyLlamaConfig, tokens: int, batch: int, split: Split) -> int:
    """Intermediate results of a prefill pass on one GPU, and the logits of its sequences.

    The larger of a layer's two halves, plus the residual stream and the norm's output: the
    attention's q, k, v, output (for NSA an output of each branch, gates, statistics, indices and
    keys and values of each branch that has its own), or the feed-forward's two inner rows and
    their product.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    k_dim, v_dim = head_dims(config)
    q, o = heads * k_dim, heads * v_dim
    k, v = kv_heads * k_dim, kv_heads * v_dim
    attention = 2 * (2 * q + 2 * k + v)  # q and k twice: before and after rope
    if isinstance(config, ToyNSALlamaConfig):
        branches = len(config.on)
        attention += 2 * (len(config.kv_branches) - 1) * (2 * k + v)
        attention += 2 * branches * o + 2 * 2 * (k + v) // config.kernel_stride
        attention += heads * (4 + 2 * branches)
        attention += kv_heads * config.topk * 4
    else:
        attention += 2 * o
    if isinstance(config, MemberConfig):
        shape = config.attention
        selections = heads if shape.score_heads == "each" and not config.index_dim else kv_heads
        attention += selections * shape.topk * 4 + heads * (4 + 4)
        attention += 2 * k // shape.kernel_stride
        attention += 2 * 2 * (kv_heads + 1) * config.index_dim
    inner = 2 * 3 * config.intermediate_size
    row = 2 * 2 * config.hidden_size + max(attention, inner) // split.tensor
    return tokens * row + 4 * -(-batch // split.data) * config.vocab_size


def matrix_parameters(config: ToyLlamaConfig) -> int:
    """Parameters that multiply every token: all but the embedding and the head."""
    return weight_bytes(config) // 2 - 2 * config.vocab_size * config.hidden_size


def _prefill_seconds(
    config: ToyLlamaConfig, gpu: Gpu, tokens: int, split: Split, efficiency: Efficiency
) -> float:
    heads = config.num_attention_heads * config.num_hidden_layers
    attention = attended_pairs(config, tokens).operations(config) / efficiency.of_prefill(tokens)
    work = 2 * matrix_parameters(config) * tokens + heads * attention
    work += 2 * config.vocab_size * config.hidden_size
    read = weight_bytes(config) / split.tensor
    time = max(work / split.tensor / gpu.flops, read / gpu.bandwidth)
    return time + _exchange_seconds(config, gpu, tokens, split)


def _decode_seconds(
    config: ToyLlamaConfig, gpu: Gpu, load: Load, split: Split, efficiency: Efficiency
) -> float:
    rows = -(-load.batch // split.data)
    keys = keys_read(config, load.context)
    sparse = isinstance(config, ToyNSALlamaConfig | MemberConfig)
    narrow = load.cache_dtype if sparse else None
    entry = sum(_row_bytes(dim, narrow) for dim in head_dims(config))
    layer = rows * keys * config.num_key_value_heads * entry  # of the cache
    share = efficiency.of_decode(layer / split.tensor)
    read = weight_bytes(config) - 2 * config.vocab_size * config.hidden_size  # one row of these
    read += layer * config.num_hidden_layers / share
    heads = config.num_attention_heads * config.num_hidden_layers
    work = 2 * (matrix_parameters(config) + config.vocab_size * config.hidden_size) * rows
    work += heads * Pairs(keys, keys).operations(config) * rows
    time = max(work / gpu.flops, read / gpu.bandwidth) / split.tensor
    return time + _exchange_seconds(config, gpu, rows, split)


def _exchange_seconds(config: ToyLlamaConfig, gpu: Gpu, tokens: int, split: Split) -> float:
    """Two sums per layer over the GPUs of a group: each sends and gets 2 (n-1)/n of the rows."""
    share = 2 * (split.tensor - 1) / split.tensor
    return 2 * config.num_hidden_layers * tokens * config.hidden_size * 2 * share / gpu.link


def _largest(fits: Callable[[int], bool], limit: int = 1 << 40) -> int:
    """The largest fitting number from 1, or 0; what fits must be an unbroken range."""
    low, high = 0, 1
    while high < limit and fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
