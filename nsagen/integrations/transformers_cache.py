"""One attention layer's NSA cache, as a layer of Transformers' `Cache`.

`generate` makes a `DynamicCache`; an NSA module puts one of these in its own place there before
the first token. Rows are sequences; each has a length of its own, so that padding takes no room.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from nsagen.errors import InvalidInputError
from nsagen.integrations.transformers_layout import Layout

GROWTH = 1.5
"""A full cache grows by half, so that a token costs few copies and a cache little spare room."""

ROUND = 256
"""Tokens that a capacity is a multiple of."""


@dataclass(frozen=True)
class Store:
    """The tensors of one layer.

    Attributes:
        k: [rows, capacity, HK, D], keys after rope; v: [rows, capacity, HK, D].
        ck, cv: [rows, windows, HK, D], compressed keys after rope, and compressed values.
        k_raw: [rows, kernel_size, HK, D], the last keys before rope: token t at
            t % kernel_size. Compression happens before rope, so the next window needs them.
    """

    k: Tensor
    v: Tensor
    ck: Tensor
    cv: Tensor
    k_raw: Tensor

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """In the order in which `cache_append` takes them."""
        return self.k, self.v, self.ck, self.cv, self.k_raw


class NSALayer(CacheLayerMixin):
    """Keys, values, compressed keys and values, and the last keys before rope, of one layer.

    Attributes:
        store: the tensors; None before the first token.
        lengths: int32 [rows], tokens that each row holds.
        seen: tokens that went through the model, padding included: Transformers counts these.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False
    layer_type = "nsa"

    def __init__(self, kernel_size: int, kernel_stride: int) -> None:
        super().__init__()
        self.kernel_size, self.kernel_stride = kernel_size, kernel_stride
        self.store: Store | None = None
        self.lengths = torch.zeros(0, dtype=torch.int32)
        self.seen = 0

    def reserve(self, rows: int, tokens: int, like: Tensor) -> Store:
        """Room for `tokens` in each row, keeping what is there. `like` [..., HK, D] is a key."""
        held = 0 if self.store is None else self.store.k.shape[1]
        if self.store is None:
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=like.device)
        if self.store is not None and tokens <= held:
            return self.store
        capacity = -(-max(tokens, int(held * GROWTH)) // ROUND) * ROUND
        heads = tuple(like.shape[-2:])
        windows = max(1, (capacity - self.kernel_size) // self.kernel_stride + 1)
        sizes = {"k": capacity, "v": capacity, "ck": windows, "cv": windows}
        sizes["k_raw"] = self.kernel_size
        grown = {name: like.new_zeros(rows, size, *heads) for name, size in sizes.items()}
        if self.store is not None:
            for name, tensor in grown.items():
                old = getattr(self.store, name)
                tensor[:, : old.shape[1]] = old
        self.store, self.is_initialized = Store(**grown), True
        return self.store

    def fill(
        self, layout: Layout, k: Tensor, v: Tensor, ck: Tensor, cv: Tensor, k_raw: Tensor
    ) -> None:
        """Write the first tokens of all rows.

        Args:
            k, v, k_raw: [N, HK, D], packed: keys after rope, values, keys before rope.
            ck, cv: [>= sum M, HK, D], the windows' keys after rope and values; rows past the
                last window are ignored.
        """
        store = self.reserve(layout.batch, layout.tokens, k)
        windows = layout.windows(self.kernel_size, self.kernel_stride)
        count = windows.row.shape[0]
        store.k[layout.row, layout.positions] = k
        store.v[layout.row, layout.positions] = v
        store.ck[windows.row, windows.index] = ck[:count]
        store.cv[windows.row, windows.index] = cv[:count]
        if k_raw.shape[0]:
            store.k_raw.copy_(k_raw[layout.last_tokens(self.kernel_size)])
        self.lengths, self.seen = layout.cu_seqlens.diff(), layout.tokens

    def _rows(self, index: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.store is None:
            return
        index = index.to(self.lengths.device)
        self.store = Store(*(tensor.index_select(0, index) for tensor in self.store.tensors()))
        self.lengths = self.lengths.index_select(0, index)

    # What Transformers calls.

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `reserve` allocates."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        raise InvalidInputError(
            "NSALayer: an NSA module writes its cache itself; got an update from another module; "
            "give that module a cache of its own"
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:  # its name before Transformers 5.18
        return -1

    def reset(self) -> None:
        self.store, self.seen, self.is_initialized = None, 0, False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        rows = torch.arange(self.lengths.shape[0], device=self.lengths.device)
        self._rows(rows.repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        """Only 0: the keys that an earlier window ends with are gone."""
        if tokens_to_remove:
            raise InvalidInputError(
                "NSALayer: an NSA cache cannot forget its last tokens, as assisted generation "
                f"asks; got crop({tokens_to_remove}); generate without an assistant model"
            )

    def offload(self) -> None:
        raise InvalidInputError(
            "NSALayer: an NSA cache stays on its device; got a cache that offloads its layers; "
            'leave out cache_implementation="offloaded"'
        )

    prefetch = offload


def layer_of(cache: Cache, index: int, kernel_size: int, kernel_stride: int) -> NSALayer:
    """The NSA layer at a place of a cache, put there if only an empty dynamic layer is.

    Raises:
        InvalidInputError: the layer is of a kind that NSA cannot replace, or holds tokens.
    """
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, NSALayer):
        return layer
    used = isinstance(layer, CacheLayerMixin) and layer.get_seq_length() > 0
    if not isinstance(layer, DynamicLayer) or used:
        held = f"{type(layer).__name__}{' that holds tokens' if used else ''}"
        raise InvalidInputError(
            f"apply_nsa: cache layer {index} must be new and of a DynamicCache; got a {held}; "
            "leave out cache_implementation, and start from an empty cache"
        )
    cache.layers[index] = made = NSALayer(kernel_size, kernel_stride)
    return made
