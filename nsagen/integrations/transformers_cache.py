"""One attention layer's NSA cache, as a layer of Transformers' `Cache`.

`generate` makes a `DynamicCache`; an NSA module puts one of these in its own place there before
the first token. Rows are sequences; each has a length of its own, so that padding takes no room.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer

from nsagen.core.errors import InvalidInputError
from nsagen.integrations.transformers_layout import Layout
from nsagen.model.layer_cache import NSALayerCache, Pair, layer_lengths
from nsagen.model.sparsity import Sparsity

GROWTH = 1.5
"""A full cache grows by half, so that a token costs few copies and a cache little spare room."""

ROUND = 256
"""Tokens that a capacity is a multiple of."""


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

    def __init__(self, sparsity: Sparsity) -> None:
        super().__init__()
        self.sparsity = sparsity
        self.store: NSALayerCache | None = None
        self.lengths = torch.zeros(0, dtype=torch.int32)
        self.seen = 0

    def reserve(self, rows: int, tokens: int, like: Pair) -> NSALayerCache:
        """Room for `tokens` in each row, keeping what is there. `like`: [..., HK, dim] each, a key
        and a value."""
        held = 0 if self.store is None else self.store.k.shape[1]
        if self.store is None:
            self.lengths = torch.zeros(rows, dtype=torch.int32, device=like[0].device)
        if self.store is not None and tokens <= held:
            return self.store
        capacity = -(-max(tokens, int(held * GROWTH)) // ROUND) * ROUND
        size, stride = self.sparsity.kernel_size, self.sparsity.kernel_stride
        windows = max(1, (capacity - size) // stride + 1)
        grown = {
            name: like["v" in name].new_zeros(rows, entries, *like["v" in name].shape[-2:])
            for name, entries in layer_lengths(self.sparsity, capacity, windows).items()
        }
        if self.store is not None:
            for name, old in self.store.tensors().items():
                grown[name][:, : old.shape[1]] = old
        self.store, self.is_initialized = NSALayerCache(**grown), True
        return self.store

    @torch.no_grad()
    def fill(
        self, layout: Layout, selected: Pair, sliding: Pair, raw: Pair, made: Pair | None
    ) -> None:
        """Write the first tokens of all rows.

        Args:
            selected, sliding: keys after rope and values of these branches, [N, HK, D], packed.
            raw: the compressed branch's keys before rope and values.
            made: [>= sum M, HK, D], the windows' keys after rope and values; rows past the last
                window are ignored. None where nothing reads them.
        """
        store = self.reserve(layout.batch, layout.tokens, raw)
        here = (layout.row, layout.positions)
        store.k[here], store.v[here] = selected
        if store.k_window is not None and store.v_window is not None:
            store.k_window[here], store.v_window[here] = sliding
        if made is not None:
            size, stride = self.sparsity.kernel_size, self.sparsity.kernel_stride
            windows = layout.windows(size, stride)
            for cache, tensor in zip((store.ck, store.cv), made, strict=True):
                cache[windows.row, windows.index] = tensor[: windows.row.shape[0]]
        for ring, tensor in zip((store.k_raw, store.v_raw), raw, strict=True):
            if ring is not None and tensor.shape[0]:
                ring.copy_(tensor[layout.last_tokens(self.sparsity.kernel_size)])
        self.lengths, self.seen = layout.cu_seqlens.diff(), layout.tokens

    def _rows(self, index: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.store is None:
            return
        index = index.to(self.lengths.device)
        kept = {n: tensor.index_select(0, index) for n, tensor in self.store.tensors().items()}
        self.store = NSALayerCache(**kept)
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


def layer_of(cache: Cache, index: int, sparsity: Sparsity) -> NSALayer:
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
    cache.layers[index] = made = NSALayer(sparsity)
    return made
