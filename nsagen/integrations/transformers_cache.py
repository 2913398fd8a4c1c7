"""One attention layer's NSA cache, as a layer of Transformers' `Cache`.

`generate` makes a `DynamicCache` or a `StaticCache`; before the first token, an NSA module replaces
its layer there by one of these. Rows are sequences of different lengths: padding takes no room.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    CacheLayerMixin,
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticCache,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from nsagen.integrations.transformers_layout import (
    KEPT,
    Call,
    Recent,
    State,
    moved,
    on_host,
    refuse,
)
from nsagen.model.cache import check_narrow_cache
from nsagen.model.heads import Heads
from nsagen.model.layer_cache import QUANTIZED, NSALayerCache, Pair, layer_lengths
from nsagen.model.sparsity import Sparsity

GROWTH = 1.5
"""A full cache grows by half: few copies per token, and little unused memory."""

ROUND = 256
"""Capacities are multiples of this many tokens."""

_REPLACEABLE = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


class NSALayer(CacheLayerMixin):
    """Keys, values, compressed keys and values, and the last keys before rope, of one layer.

    Args:
        sparsity: the settings.
        capacity: tokens that a row can hold; None: the layer grows.
        cache_dtype: of keys, values and compressed ones, one of `CACHE_DTYPES`; None for that of
            the tokens.

    Attributes:
        store: the tensors; None before the first token.
        state: what they hold; None before the first token.
        recent: the last keys before rope, [rows, Recent.length + 1, HK, D], token t at index
            t % Recent.length, and where the compressed branch has its own the values: `crop`
            restores the store's from them.
        unfinished: whether a pass of several tokens started writing and did not end.
        recorded: whether autograd recorded what the last call wrote.
    """

    is_croppable = True
    is_sliding = False
    supports_early_init = False

    def __init__(
        self, sparsity: Sparsity, capacity: int | None = None, cache_dtype: str | None = None
    ) -> None:
        super().__init__()
        self.sparsity, self.capacity, self.cache_dtype = sparsity, capacity, cache_dtype
        self.reset()

    def reset(self) -> None:
        self.store: NSALayerCache | None = None
        self.state: State | None = None
        self.recent: list[Tensor] = []
        self._written: Tensor | None = None
        self.is_initialized = self.unfinished = self.recorded = False

    @property
    def is_compileable(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.capacity is not None

    def reserve(self, call: Call, heads: Heads) -> NSALayerCache:
        """Make room for the tokens of a call, keeping the cached ones.

        Raises:
            InvalidInputError: another dtype than the tokens held.
        """
        if self.state is None:  # what a failed call or `crop` left may be of other rows
            self.store, self.recent = None, []
        k, v = heads.compressed
        store, held = self.store, 0
        if store is not None:
            held = store.k.shape[1]
            if store.k_raw.dtype != k.dtype:
                rule = f"holds {store.k_raw.dtype}, and tokens added to it must have that dtype"
                refuse("cache", rule, str(k.dtype), "use the same autocast for all calls")
            if not torch.compiler.is_compiling() and _stale(store.k):
                copies = {name: tensor.clone() for name, tensor in store.tensors().items()}
                store = self.store = NSALayerCache(**copies)
                self.recent = [tensor.clone() for tensor in self.recent]
            if call.room <= held:
                return store
        if store is None:
            check_narrow_cache("cache", self.cache_dtype, k.device, k.dtype)
        capacity = self.capacity or -(-max(call.room, int(held * GROWTH)) // ROUND) * ROUND
        grown = self.zeros(call.batch, capacity, k, v)
        if store is not None:
            for name, old in store.tensors().items():
                grown[name][:, : old.shape[1]] = old
        self.store, self.is_initialized = NSALayerCache(**grown), True
        if not self.recent:
            self.recent = self.last_tokens(call.batch, k, v)
        if self.capacity is not None:
            _stay([*grown.values(), *self.recent])
        return self.store

    def zeros(self, batch: int, capacity: int, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """The store's tensors with room for so many tokens like k and v, [N, HK, dim]."""
        size, stride = self.sparsity.kernel_size, self.sparsity.kernel_stride
        windows = max(1, (capacity - size) // stride + 1)
        narrow, made = self.cache_dtype is not None, {}
        for name, entries in layer_lengths(self.sparsity, capacity, windows, narrow).items():
            like = v if "v" in name else k
            if name.endswith("_scale"):
                rows = like.new_zeros(batch, like.shape[-2], entries, dtype=torch.float32)
                made[name] = rows.transpose(1, 2)  # a kernel reads one head's
            elif narrow and name in QUANTIZED:
                numbers = like.new_zeros(batch, entries, *like.shape[-2:], dtype=torch.int8)
                made[name] = numbers.view(getattr(torch, str(self.cache_dtype)))
            else:
                made[name] = like.new_zeros(batch, entries, *like.shape[-2:])
        return made

    def last_tokens(self, batch: int, k: Tensor, v: Tensor) -> list[Tensor]:
        """Room for the last keys, and values where the store has them, like k and v."""
        length = Recent.length(self.sparsity) + 1
        both = self.cache_dtype is not None or self.sparsity.branch_kv == "separate"
        return [t.new_zeros(batch, length, *t.shape[-2:]) for t in ((k, v) if both else (k,))]

    def remember(self, call: Call, raw: Pair) -> None:
        """Store what `crop` may need of the call's tokens.

        Args:
            raw: the compressed branch's new keys before rope and values, [N, HK, dim], packed.
        """
        to = call.recent
        assert to is not None
        for ring, new in zip(self.recent, raw, strict=False):
            ring[to.row, to.place] = (new if to.kept is None else new[to.kept]).detach()

    def _rows(self, index: Tensor) -> None:
        """Keep these rows, in this order."""
        if self.store is None or self.state is None:
            return
        index = index.to(self.state.lengths.device)
        index = torch.where(index < 0, index + len(self.state.lengths), index)
        kept = {n: _rows_of(tensor, index) for n, tensor in self.store.tensors().items()}
        self.store, self.state = NSALayerCache(**kept), self.state.rows(index)
        self.recent = [tensor.index_select(0, index) for tensor in self.recent]
        if self._written is not None:
            self._written = self._written.index_select(0, index)

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

    def get_mask_sizes(self, query_length: int) -> tuple[Any, int]:
        return self.capacity or self.get_seq_length() + query_length, 0

    def get_seq_length(self) -> Any:
        """Tokens; with a fixed capacity, a tensor, as in Transformers' `StaticLayer`."""
        return 0 if self.state is None else self.state.seen

    def get_max_length(self) -> int:
        return -1 if self.capacity is None else self.capacity

    def get_max_cache_shape(self) -> int:  # its name before Transformers 5.18
        return self.get_max_length()

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
        """Remove the last tokens of each row, as assisted generation does with rejected drafts.

        Args:
            tokens_to_remove: minus their number, including padding; a positive number, as in
                Transformers before 5.18, is how many to keep.

        Raises:
            InvalidInputError: more than `KEPT` tokens, but not all: the keys that the next window
                needs are gone.
        """
        count = int(tokens_to_remove)
        if self.state is None or self.store is None:
            return
        state = self.state.plain()
        assert isinstance(state.seen, int)
        left = max(0, state.seen + count) if count <= 0 else min(count, state.seen)
        if left == state.seen:
            return
        if not left:
            self.state = self._written = None
            return
        real = state.real
        gone = state.seen - left if real is None else real[:, left:].sum(1)
        lengths, size = (state.lengths - gone).to(torch.int32), self.sparsity.kernel_size
        written = state.lengths if self._written is None else self._written.max(state.lengths)
        back = torch.arange(size, device=lengths.device) - size
        row, position = torch.where(lengths[:, None] + back >= 0)
        position = position + back[0] + lengths[row]
        length = Recent.length(self.sparsity)
        if bool((position <= written[row] - length).any()):
            rule = f"can drop its last {KEPT} tokens, or all"
            refuse("cache", rule, f"crop({count})", "start from an empty cache")
        rings = [ring for ring in (self.store.k_raw, self.store.v_raw) if ring is not None]
        for ring, recent in zip(rings, self.recent, strict=True):
            ring[row, position % size] = recent[row, position % length]
        state = replace(
            state, lengths=lengths, seen=left, real=None if real is None else real[:, :left]
        )
        self._written = written
        self.state = state if self.capacity is None else state.fixed(self.capacity)

    def offload(self) -> None:
        advice = 'leave out cache_implementation="offloaded"'
        refuse("cache", "stays on its device", "a cache that offloads its layers", advice)

    prefetch = offload


def row_bytes(layer: NSALayer, tokens: int, kv_heads: int, dim: int, dtype: torch.dtype) -> int:
    """Bytes that a new layer takes for a row of so many tokens."""
    like = torch.empty(1, kv_heads, dim, dtype=dtype, device="meta")
    held = layer.zeros(1, -(-tokens // ROUND) * ROUND, like, like).values()
    return sum(t.nbytes for t in (*held, *layer.last_tokens(1, like, like)))


def _rows_of(tensor: Tensor, index: Tensor) -> Tensor:
    """Some rows; PyTorch indexes integers everywhere, numbers of one byte not."""
    bits = tensor.view(torch.int8) if tensor.element_size() == 1 else tensor
    return bits.index_select(0, index).view(tensor.dtype)


def _stale(tensor: Tensor) -> bool:
    """Whether a tensor was made in inference mode and can't be written to here."""
    return tensor.is_inference() and not torch.is_inference_mode_enabled()


def _stay(tensors: Sequence[Tensor]) -> None:
    """Tell torch.compile that tensors keep their addresses: CUDA graphs need not copy them."""
    if not torch.compiler.is_compiling():
        for tensor in tensors:
            torch._dynamo.mark_static_address(tensor)


def check_replaceable(layer: Any) -> None:
    """Check that NSA can replace a cache's layer.

    Raises:
        InvalidInputError: the layer is of a kind that NSA cannot replace, or holds tokens.
    """
    if isinstance(layer, NSALayer):
        return
    length = layer.get_seq_length() if type(layer) in _REPLACEABLE else 0
    used = _any(length) if isinstance(length, Tensor) else length > 0
    if used or type(layer) not in _REPLACEABLE:
        held = f"a {type(layer).__name__}{' that holds tokens' if used else ''}"
        rule = "must have new layers of a DynamicCache or a StaticCache"
        refuse("cache", rule, held, "leave out cache_implementation; start from an empty cache")


@on_host
def _any(number: Tensor) -> bool:
    return bool(number)


def capacity_of(layer: Any) -> int | None:
    """Tokens that an NSA layer in the place of this one has room for; None if it grows."""
    if isinstance(layer, NSALayer):
        return layer.capacity
    # A sliding layer has room for its window, and NSA keeps every token.
    return layer.max_cache_len if type(layer) is StaticLayer else None


def layer_of(cache: Cache, index: int, sparsity: Sparsity, cache_dtype: str | None) -> NSALayer:
    """A cache's NSA layer at an index; made if the layer there is empty."""
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer = cache.layers[index]
    if isinstance(layer, NSALayer) and (layer.state or layer.cache_dtype == cache_dtype):
        return layer
    check_replaceable(layer)
    cache.layers[index] = made = NSALayer(sparsity, capacity_of(layer), cache_dtype)
    return made


def state_of(
    cache: Any,
    indices: Sequence[int],
    sparsity: Sparsity,
    batch: int,
    device: torch.device,
    cache_dtype: str | None = None,
) -> tuple[State | None, int | None]:
    """What a cache holds for the layers with NSA.

    Returns:
        the state, None if the cache is empty; and the layers' capacity, None if they grow.

    Raises:
        InvalidInputError: an unknown kind of cache; a cache of another model or of other rows; one
            that a failed call left half written; tokens held in another dtype than cache_dtype.
    """
    offloads = getattr(cache, "offloading", False)
    if type(cache) not in (Cache, DynamicCache, StaticCache) or offloads:
        kind = f"a {type(cache).__name__}{' that offloads' if offloads else ''}"
        advice = "leave out cache_implementation, or say static"
        refuse("cache", "must be a DynamicCache or a StaticCache", kind, advice)
    layers = [cache.layers[i] for i in indices if i < len(cache.layers)]
    for layer in layers:
        check_replaceable(layer)
        if isinstance(layer, NSALayer) and layer.sparsity != sparsity:
            rule = "must be one that a model with the same settings of attention filled"
            refuse("cache", rule, str(layer.sparsity), "start from an empty cache")
        if isinstance(layer, NSALayer) and layer.state and layer.cache_dtype != cache_dtype:
            rule = f"must hold tokens that came with cache_dtype {cache_dtype}"
            refuse("cache", rule, str(layer.cache_dtype), "start from an empty cache")
    capacity = capacity_of(layers[0]) if layers else None
    states = [layer.state if isinstance(layer, NSALayer) else None for layer in layers]
    state = states[0] if states else None
    if all(other is None for other in states):
        return None, capacity
    if any(one.unfinished for one in layers if isinstance(one, NSALayer)):
        rule = "must not be half written by a call that failed"
        refuse("cache", rule, "one that is", "start from an empty one")
    if len(states) < len(indices) or not _even(states):
        seen = sorted({0 if one is None else int(one.seen) for one in states})
        rule = "must hold as many tokens in every layer"
        refuse("cache", rule, f"{seen}", "start from an empty one")
    assert state is not None
    if state.lengths.shape[0] != batch:
        rule = f"must have as many rows as the batch, {batch}"
        refuse("cache", rule, str(state.lengths.shape[0]), "start from an empty one")
    return moved(state, device), capacity


def _even(states: Sequence[State | None]) -> bool:
    """Whether all layers hold the same number of tokens, as far as the host knows them."""
    first = states[0]
    if first is None or any(one is None for one in states):
        return False
    if isinstance(first.seen, Tensor):
        return True
    return all(one is not None and one.seen == first.seen for one in states)


def begin(cache: Any, last: int) -> None:
    """Mark the layers that a pass of several tokens will write to: if it fails, keys that the next
    window needs may be overwritten. A single token overwrites none of them."""
    for layer in () if cache is None else cache.layers[: last + 1]:
        if isinstance(layer, NSALayer) and layer.state is not None:
            layer.unfinished = True


def end(cache: Cache, call: Call) -> None:
    """Add a call's tokens to a cache's state, after the base model: a call that fails earlier
    leaves the cache as it was, or marked."""
    run = cache.layers[: call.last + 1]  # assistants may leave out the last layers
    layers = [layer for layer in run if isinstance(layer, NSALayer)]
    after, old = call.after, layers[0].state
    assert after is not None
    if not after.recorded and any(layer.recorded for layer in layers):
        after = replace(after, recorded=True)
    if isinstance(after.seen, Tensor):
        compiled = torch.compiler.is_compiling()
        if old is not None and (compiled or not _stale(old.lengths)):
            after = old.overwrite(after)
        else:
            parts = (after.lengths, after.seen, after.real, after.shift, *after.rope.tables)
            _stay([part for part in parts if part is not None])
    for layer in layers:
        layer.state, layer.unfinished = after, False
