"""Key/value caches for generation: dense, and for Native Sparse Attention.

A slot holds one sequence: in max_length tokens of its own, or in pages that it takes as needed.
Tensors are allocated once; `cache_shapes` gives their sizes beforehand, and
`InferenceConfig.cache_bytes` reports them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from nsagen.core.errors import CapacityError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.model.checks import checked_device, require, require_kind
from nsagen.model.configs import (
    InferenceConfig,
    ToyLlamaConfig,
    ToyNSALlamaConfig,
    cache_shapes,
    check_inference_config,
)
from nsagen.model.layer_cache import KVLayerCache, NSALayerCache
from nsagen.model.pages import PagePool
from nsagen.model.prefill import Index, settled
from nsagen.runtime.device import target_of

Layer = TypeVar("Layer")


@dataclasses.dataclass(frozen=True)
class Overwritten:
    """Entries of a cache as they were before tokens were appended.

    Attributes:
        rings: [layers, slots, kernel_size, HK, dim] each.
        index: int64 [n, R] twice, slots and places in them.
        entries: [layers, n, R, HK, dim] each.
    """

    rings: tuple[Tensor, ...]
    index: Index | None
    entries: tuple[Tensor, ...]

    def restore(self, taken_back: Tensor) -> None:
        """Put back what tokens overwrote: bool [n, R], those that are taken back."""
        if self.index is None:
            return
        for ring, entries in zip(self.rings, self.entries, strict=True):
            now = ring[:, *self.index]
            ring[:, *self.index] = torch.where(taken_back[:, :, None, None], entries, now)


class _Cache(Generic[Layer]):
    """All layers' caches; indexing gives one layer's."""

    config_type: type[ToyLlamaConfig]
    windows: tuple[int, int] | None = None

    def __init__(
        self,
        layer_type: type[Layer],
        config: ToyLlamaConfig,
        limits: InferenceConfig,
        device: torch.device | str,
        dtype: torch.dtype,
    ) -> None:
        where = type(self).__name__
        require_kind(where, "config", config, self.config_type, "pass the model's")
        require_kind(where, "limits", limits, InferenceConfig, "build one")
        require_kind(where, "dtype", dtype, torch.dtype, "such as torch.bfloat16")
        check_inference_config(config, limits)
        self.limits = limits
        self.device = checked_device(where, device)
        self.dtype = dtype
        check_narrow_cache(where, limits.cache_dtype, self.device, dtype)
        try:
            # Zeros, not garbage: kernels may load rows past a sequence's end before masking them.
            self._tensors = {
                name: _zeros(name, shape, device, limits.dtype_of(name, dtype))
                for name, shape in cache_shapes(config, limits).items()
            }
            self.pages = PagePool(limits, self.device) if limits.paged else None
        except (RuntimeError, MemoryError) as error:
            needed = limits.cache_bytes(config, dtype)
            raise CapacityError(
                f"{where}: the cache must fit into the memory of {self.device}, got {needed} bytes "
                "to allocate; lower max_batch_size or max_length of InferenceConfig"
            ) from error
        shared: dict[str, Any] = {} if self.pages is None else {"block_table": self.pages.table}
        self._layers = [
            layer_type(**{name: tensor[layer] for name, tensor in self._tensors.items()}, **shared)
            for layer in range(config.num_hidden_layers)
        ]

    def __getitem__(self, layer: int) -> Layer:
        return self._layers[layer]

    def __iter__(self) -> Iterator[Layer]:
        return iter(self._layers)

    @property
    def paged(self) -> bool:
        """Whether sequences lie in pages."""
        return self.pages is not None

    def tensors(self) -> Iterator[Tensor]:
        """All layers' keys, values and everything else kept of them."""
        return iter(self._tensors.values())

    @property
    def nbytes(self) -> int:
        """Bytes allocated; equals `InferenceConfig.cache_bytes` for the same dtype."""
        table = 0 if self.pages is None else self.pages.table.nbytes
        return table + sum(tensor.nbytes for tensor in self._tensors.values())

    def reserve(
        self, slot: int, tokens: int, who: str = "cache", prefix: Sequence[int] = ()
    ) -> None:
        """Ensure that a slot can hold `tokens` tokens; only pages can run out.

        Args:
            prefix: pages that hold the sequence's first tokens already, which it then shares.

        Raises:
            CapacityError: too few pages are free; nothing has changed.
        """
        if self.pages is not None:
            self.pages.reserve(slot, tokens, who, prefix)

    def settled(self, cached: int) -> int:
        """How many tokens' entries never change again once `cached` tokens are here."""
        return settled(cached, self.windows)

    def copy(self, source: int, target: int, first: int, last: int) -> None:
        """Copy what a slot holds of the tokens in [first, last), and of windows that start there.

        In pages, both positions lie in one page, and all of that page is copied.
        """
        if first == last:
            return
        for name, tensor in self._tensors.items():
            if name.endswith("_raw"):  # the newest tokens' keys before rope; see `settled`
                continue
            if self.pages is None:
                tensor[:, target] = tensor[:, source]
            else:
                place = first // self.limits.page_size
                old, new = self.pages.of(source)[place], self.pages.of(target)[place]
                tensor[:, new] = tensor[:, old]

    def release(self, slot: int) -> None:
        """Give up a slot's sequence. Nothing is cleared, and other slots continue."""
        if self.pages is not None:
            self.pages.release(slot)

    def capacity(self, slot: int) -> int:
        """Tokens that a slot can hold now."""
        return self.limits.max_length if self.pages is None else self.pages.capacity(slot)

    @property
    def most_together(self) -> int:
        """How many new tokens of a sequence may be appended at once."""
        return self.limits.max_length if self.windows is None else self.windows[0]

    def overwritten(self, positions: Tensor, slots: Tensor, tokens: int) -> Overwritten:
        """What appending overwrites that is needed again where tokens are taken back.

        That is the oldest keys before rope. Everything else of a token lies where its successor
        will, and is not seen before.

        Args:
            positions: int32 [R], of the first token of each sequence; any for idle rows.
            slots: int32 [R], all different.
            tokens: of each sequence, at most `most_together`.
        """
        rings = [tensor for name, tensor in self._tensors.items() if name.endswith("_raw")]
        if self.windows is None or not rings:
            return Overwritten((), None, ())
        offsets = torch.arange(tokens, dtype=positions.dtype, device=positions.device)
        place = (positions + offsets[:, None]).to(torch.int64) % self.windows[0]
        index = (slots.to(torch.int64).expand_as(place), place)
        return Overwritten(tuple(rings), index, tuple(ring[:, *index] for ring in rings))

    def token_index(self, slot: Tensor, position: Tensor) -> Index:
        """Where tokens lie in k and v."""
        return self._index(slot, position, self.limits.page_size)

    def window_index(self, slot: Tensor, window: Tensor) -> Index:
        """Where windows lie in ck and cv."""
        assert self.windows is not None
        return self._index(slot, window, self.limits.page_size // self.windows[1])

    def _index(self, slot: Tensor, entry: Tensor, entries_a_page: int) -> Index:
        if self.pages is None:
            return slot, entry
        page = self.pages.table[slot, entry // entries_a_page]
        return page.to(torch.int64), entry % entries_a_page


def _zeros(
    name: str, shape: tuple[int, ...], device: torch.device | str, dtype: torch.dtype
) -> Tensor:
    """A tensor of a cache. Scales lie with heads before entries: a kernel reads one head's."""
    if not name.endswith("_scale"):
        return torch.zeros(shape, device=device, dtype=dtype)
    *rows, entries, heads = shape
    return torch.zeros((*rows, heads, entries), device=device, dtype=dtype).transpose(-1, -2)


def check_narrow_cache(
    where: str, cache_dtype: str | None, device: torch.device, dtype: torch.dtype
) -> None:
    """Whether a cache of a narrow dtype can hold the model's values, and the device convert it."""
    if cache_dtype is None:
        return
    require(
        dtype != torch.float16,
        where,
        "cache_dtype needs a model in bfloat16 or float32, whose range holds the cache's values",
        str(dtype),
        "convert the model, or leave cache_dtype out",
    )
    if device.type == "cuda" and cache_dtype == "float8_e4m3fn":
        target = target_of(device)
        known = KNOWN_TARGETS.get(target)
        require(
            known is None or known.holds(cache_dtype),
            where,
            "a cache of float8_e4m3fn needs an NVIDIA GPU of compute capability 8.9 or newer",
            target,
            "use int8",
        )


class KVCache(_Cache[KVLayerCache]):
    """Keys after rope and values of every token, of all layers of a `ToyLlama`."""

    config_type = ToyLlamaConfig

    def __init__(
        self,
        config: ToyLlamaConfig,
        limits: InferenceConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        super().__init__(KVLayerCache, config, limits, device, dtype)


class NSACache(_Cache[NSALayerCache]):
    """What Native Sparse Attention reads while decoding, of all layers of a `ToyNSALlama`.

    Args:
        paged, page_size: as in `InferenceConfig`, whose values are the default.
    """

    config_type = ToyNSALlamaConfig

    def __init__(
        self,
        config: ToyNSALlamaConfig,
        limits: InferenceConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.bfloat16,
        *,
        paged: bool | None = None,
        page_size: int | None = None,
    ) -> None:
        given = {"paged": paged, "page_size": page_size}
        changes: dict[str, Any] = {n: value for n, value in given.items() if value is not None}
        limits = dataclasses.replace(limits, **changes) if changes else limits
        super().__init__(NSALayerCache, config, limits, device, dtype)
        self.windows = (config.kernel_size, config.kernel_stride)
