"""One attention layer's NSA cache, as a layer of Transformers' `Cache`.

`generate` makes a `DynamicCache` or a `StaticCache`; an NSA module puts one of these in its own
place there before the first token. Rows are sequences; each has a length of its own, so that
padding takes no room.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from nsagen.integrations.transformers_layout import Call, State, refuse
from nsagen.model.heads import Heads
from nsagen.model.layer_cache import NSALayerCache, Pair, layer_lengths
from nsagen.model.sparsity import Sparsity

GROWTH = 1.5
"""A full cache grows by half, so that a token costs few copies and a cache little spare room."""

ROUND = 256
"""Tokens that a capacity is a multiple of."""

KEPT = 128
"""Tokens of a first pass that `crop` can take back."""

_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class NSALayer(CacheLayerMixin):
    """Keys, values, compressed keys and values, and the last keys before rope, of one layer.

    Args:
        sparsity: the settings.
        capacity: tokens that a row can hold; None: the layer grows.

    Attributes:
        store: the tensors; None before the first token.
        state: what they hold; None before the first token.
        trail: the last keys before rope, [rows, tokens, HK, D], and where the compressed branch
            has its own the values, of the last pass of several tokens; `crop` needs them.
    """

    is_compileable = False
    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(self, sparsity: Sparsity, capacity: int | None = None) -> None:
        super().__init__()
        self.sparsity, self.capacity = sparsity, capacity
        self.store: NSALayerCache | None = None
        self.state: State | None = None
        self.trail: list[Tensor] | None = None

    def reserve(self, call: Call, heads: Heads) -> NSALayerCache:
        """Room for the tokens of a call, keeping what is there.

        Raises:
            InvalidInputError: more tokens than the capacity; another dtype than the tokens held.
        """
        (k, v), tokens = heads.compressed, call.behind + call.tokens
        if self.capacity is not None and tokens > self.capacity:
            rule = f"has room for {self.capacity} tokens"
            refuse("cache", rule, f"{tokens}", "make it with a larger max_cache_len")
        store, held = self.store, 0
        if store is not None:
            held = store.k.shape[1]
            if store.k.dtype != k.dtype:
                rule = f"holds {store.k.dtype}, and what goes on behind it must have that dtype"
                refuse("cache", rule, str(k.dtype), "use the same autocast for all calls")
            if store.k.is_inference() and not torch.is_inference_mode_enabled():
                copies = {name: tensor.clone() for name, tensor in store.tensors().items()}
                store = self.store = NSALayerCache(**copies)
            if tokens <= held:
                return store
        capacity = self.capacity or -(-max(tokens, int(held * GROWTH)) // ROUND) * ROUND
        size, stride = self.sparsity.kernel_size, self.sparsity.kernel_stride
        windows = max(1, (capacity - size) // stride + 1)
        grown = {
            name: (v if "v" in name else k).new_zeros(
                call.batch, entries, *(v if "v" in name else k).shape[-2:]
            )
            for name, entries in layer_lengths(self.sparsity, capacity, windows).items()
        }
        if store is not None:
            for name, old in store.tensors().items():
                grown[name][:, : old.shape[1]] = old
        self.store, self.is_initialized = NSALayerCache(**grown), True
        return self.store

    def remember(self, call: Call, raw: Pair) -> None:
        """Keep what `crop` needs to take tokens of this pass back; called before it is written.

        Args:
            raw: the compressed branch's new keys before rope and values, [N, HK, dim], packed.
        """
        self.trail = None
        if call.places is not None or self.store is None:
            return  # rows of several lengths are not cropped
        new = [t.detach().unflatten(0, (call.batch, call.tokens)) for t in self._of_ring(raw)]
        if not call.behind:
            self.trail = [t[:, -(self.sparsity.kernel_size + KEPT) :].clone() for t in new]
            return
        held = min(call.behind, self.sparsity.kernel_size)
        tokens = torch.arange(call.behind - held, call.behind, device=new[0].device)
        earlier = [t[:, tokens % self.sparsity.kernel_size] for t in self._rings()]
        self.trail = [torch.cat(both, 1) for both in zip(earlier, new, strict=True)]

    def _of_ring(self, raw: Pair) -> Pair | tuple[Tensor]:
        return raw if self.store is not None and self.store.v_raw is not None else raw[:1]

    def _rings(self) -> list[Tensor]:
        assert self.store is not None
        return [t for t in (self.store.k_raw, self.store.v_raw) if t is not None]

    def _rows(self, index: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.store is None or self.state is None:
            return
        index = index.to(self.state.lengths.device)
        kept = {n: tensor.index_select(0, index) for n, tensor in self.store.tensors().items()}
        self.store, self.state = NSALayerCache(**kept), self.state.rows(index)
        if self.trail is not None:
            self.trail = [tensor.index_select(0, index) for tensor in self.trail]

    # What Transformers calls.

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:
        """Nothing: `reserve` allocates."""

    def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        refuse(
            "cache",
            "an NSA module writes its cache itself",
            "an update from another module",
            "give that module a cache of its own",
        )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> int:
        return 0 if self.state is None else self.state.seen

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    def get_max_cache_shape(self) -> int:  # its name before Transformers 5.18
        return self.get_max_length()

    def reset(self) -> None:
        self.store = self.state = self.trail = None
        self.is_initialized = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._rows(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._rows(indices.nonzero().squeeze(1) if indices.dtype == torch.bool else indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.state is not None:
            rows = torch.arange(self.state.lengths.shape[0], device=self.state.lengths.device)
            self._rows(rows.repeat_interleave(repeats))

    @torch.no_grad()
    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of each row, as assisted generation does with a draft's.

        Args:
            tokens_to_remove: minus their number; above 0, as in Transformers before 5.18, the
                number that is left.

        Raises:
            InvalidInputError: the cache holds padding; more tokens than the last pass had, so that
                keys which the next window needs are gone.
        """
        state, count = self.state, int(tokens_to_remove)
        if state is None or self.store is None:
            return
        count = -count if count <= 0 else max(0, state.seen - count)
        if not count:
            return
        if state.real is not None and not bool(state.real.all()):
            refuse("cache", "cannot be cropped while it holds padding", f"crop({-count})", _UNPAD)
        left, size = max(0, state.seen - count), self.sparsity.kernel_size
        windows = max(0, (left - size) // self.sparsity.kernel_stride + 1)
        needed = min(left, windows * self.sparsity.kernel_stride)
        intact = max(0, state.seen - size)
        kept = state.seen - (0 if self.trail is None else self.trail[0].shape[1])
        if needed < intact:
            if self.trail is None or kept > needed:
                rule = "can forget no more than the last pass added, and some tokens of a first one"
                refuse("cache", rule, f"crop({-count})", "start from an empty cache")
            tokens = torch.arange(max(kept, left - size), left, device=state.lengths.device)
            for ring, trail in zip(self._rings(), self.trail, strict=True):
                ring[:, tokens % size] = trail[:, tokens - kept]
        if self.trail is not None:
            rest = self.trail[0].shape[1] - count
            self.trail = [tensor[:, :rest] for tensor in self.trail] if rest > 0 else None
        self.state = replace(state, lengths=state.lengths - count, seen=left, real=None)

    def offload(self) -> None:
        advice = 'leave out cache_implementation="offloaded"'
        refuse("cache", "stays on its device", "a cache that offloads its layers", advice)

    prefetch = offload


_UNPAD = "crop caches of one sequence, or of sequences of one length"


def check_replaceable(layer: Any) -> None:
    """Check that NSA can take a layer's place in a cache.

    Raises:
        InvalidInputError: the layer is of a kind that NSA cannot replace, or holds tokens.
    """
    if isinstance(layer, NSALayer):
        return
    used = type(layer) in _REPLACEABLE and int(layer.get_seq_length()) > 0
    if used or type(layer) not in _REPLACEABLE:
        held = f"a {type(layer).__name__}{' that holds tokens' if used else ''}"
        rule = "must have new layers of a DynamicCache or a StaticCache"
        refuse("cache", rule, held, "leave out cache_implementation; start from an empty cache")


def layer_of(cache: Cache, index: int, sparsity: Sparsity) -> NSALayer:
    """The NSA layer at a place of a cache, put there if only an empty layer is."""
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, NSALayer):
        return layer
    check_replaceable(layer)
    # A sliding layer has room for its window, and NSA keeps every token.
    capacity = layer.max_cache_len if type(layer) is StaticLayer else None
    cache.layers[index] = made = NSALayer(sparsity, capacity)
    return made
