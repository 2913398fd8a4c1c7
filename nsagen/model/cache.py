"""Key/value caches for generation: dense, and for Native Sparse Attention.

A slot holds one sequence. Tensors are allocated once; their sizes are known beforehand from
`cache_shapes`, which `InferenceConfig.cache_bytes` reports.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from nsagen.model.configs import InferenceConfig, ToyLlamaConfig, ToyNSALlamaConfig
from nsagen.model.packing import Packed

Layer = TypeVar("Layer")


def cache_shapes(config: ToyLlamaConfig, limits: InferenceConfig) -> dict[str, tuple[int, ...]]:
    """Shapes of all tensors in a model's cache; the first dimension is the layer."""
    layers, slots = config.num_hidden_layers, limits.max_batch_size
    heads = (config.num_key_value_heads, config.head_dim)
    full = (layers, slots, limits.max_length, *heads)
    shapes = {"k": full, "v": full}
    if isinstance(config, ToyNSALlamaConfig):
        size, stride = config.kernel_size, config.kernel_stride
        # One window at least, so that kernels never see an empty tensor.
        windows = max(1, (limits.max_length - size) // stride + 1)
        shapes["ck"] = shapes["cv"] = (layers, slots, windows, *heads)
        shapes["k_raw"] = (layers, slots, size, *heads)
    return shapes


@dataclass(frozen=True)
class PrefillRows:
    """Which rows of a packed prompt batch go where in a cache. Built once a prefill.

    Attributes:
        slot: int64 [N], slot of each token's sequence.
        position: int64 [N], the token's position.
        window_slot: int64 [sum M], slot of each compression window's sequence.
        window: int64 [sum M], the window's index within its sequence.
        tail: int64 [...], rows of the last kernel_size tokens of each sequence.
    """

    slot: Tensor
    position: Tensor
    window_slot: Tensor
    window: Tensor
    tail: Tensor

    @classmethod
    def of(
        cls,
        packed: Packed,
        slots: Tensor,
        lengths: Sequence[int],
        kernel_size: int = 1,
        kernel_stride: int = 1,
    ) -> PrefillRows:
        """Lay out a prefill; `lengths` are the sequences' lengths, known on the host."""
        device = slots.device
        counts = [max(0, (n - kernel_size) // kernel_stride + 1) for n in lengths]
        repeats = torch.tensor(counts, dtype=torch.int64, device=device)
        window = [torch.arange(count, device=device) for count in counts]
        length = torch.tensor(lengths, dtype=torch.int64, device=device)
        position = packed.positions.to(torch.int64)
        return cls(
            slot=slots.to(torch.int64)[packed.sequence],
            position=position,
            window_slot=slots.to(torch.int64).repeat_interleave(repeats, output_size=sum(counts)),
            window=torch.cat(window) if window else repeats,
            tail=(position >= length[packed.sequence] - kernel_size).nonzero().squeeze(1),
        )


@dataclass(frozen=True)
class KVLayerCache:
    """One layer's dense cache.

    Attributes:
        k: [slots, max_length, HK, D], keys after rope.
        v: [slots, max_length, HK, D].
    """

    k: Tensor
    v: Tensor

    def fill(self, rows: PrefillRows, k: Tensor, v: Tensor) -> None:
        """Write a packed prompt batch: k after rope and v, [N, HK, D]."""
        self.k[rows.slot, rows.position] = k
        self.v[rows.slot, rows.position] = v


@dataclass(frozen=True)
class NSALayerCache:
    """One layer's cache for Native Sparse Attention.

    Attributes:
        k: [slots, max_length, HK, D], keys after rope; for the selected and sliding branches.
        v: [slots, max_length, HK, D]; for these two, and the source of compressed values.
        ck: [slots, windows, HK, D], compressed keys; window i after rope at position i*stride.
        cv: [slots, windows, HK, D], compressed values.
        k_raw: [slots, kernel_size, HK, D], the last keys before rope: token t at index
            t % kernel_size. Compression happens before rope, so the next window needs them.
    """

    k: Tensor
    v: Tensor
    ck: Tensor
    cv: Tensor
    k_raw: Tensor

    def fill(
        self, rows: PrefillRows, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, k_raw: Tensor
    ) -> None:
        """Write a packed prompt batch.

        Args:
            k, v, k_raw: [N, HK, D]: keys after rope, values, keys before rope.
            ck, cv: [>= sum M, HK, D]: compressed keys after rope, compressed values; rows past
                the last window are ignored.
        """
        self.k[rows.slot, rows.position] = k
        self.v[rows.slot, rows.position] = v
        windows = rows.window.shape[0]
        self.ck[rows.window_slot, rows.window] = ck[:windows]
        self.cv[rows.window_slot, rows.window] = cv[:windows]
        place = rows.position[rows.tail] % self.k_raw.shape[1]
        self.k_raw[rows.slot[rows.tail], place] = k_raw[rows.tail]


class _Cache(Generic[Layer]):
    """All layers' caches; indexing gives one layer's."""

    def __init__(
        self,
        layer_type: type[Layer],
        config: ToyLlamaConfig,
        limits: InferenceConfig,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        self.limits = limits
        self.device = torch.device(device)
        self.dtype = dtype
        # Zeros, not garbage: kernels may load rows past a sequence's end before masking them.
        self._tensors = {
            name: torch.zeros(shape, device=device, dtype=dtype)
            for name, shape in cache_shapes(config, limits).items()
        }
        self._layers = [
            layer_type(**{name: tensor[layer] for name, tensor in self._tensors.items()})
            for layer in range(config.num_hidden_layers)
        ]

    def __getitem__(self, layer: int) -> Layer:
        return self._layers[layer]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    @property
    def nbytes(self) -> int:
        """Bytes allocated; equals `InferenceConfig.cache_bytes` for the same dtype."""
        return sum(tensor.nbytes for tensor in self._tensors.values())


class KVCache(_Cache[KVLayerCache]):
    """Keys after rope and values of every token, of all layers of a `ToyLlama`."""

    def __init__(
        self,
        config: ToyLlamaConfig,
        limits: InferenceConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(KVLayerCache, config, limits, device, dtype)


class NSACache(_Cache[NSALayerCache]):
    """What Native Sparse Attention reads while decoding, of all layers of a `ToyNSALlama`."""

    def __init__(
        self,
        config: ToyNSALlamaConfig,
        limits: InferenceConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(NSALayerCache, config, limits, device, dtype)
