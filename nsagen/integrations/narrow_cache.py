"""Layers of Transformers' caches in one byte an element: keys, values, index keys and windows.

`config.nsagen["cache_dtype"]`, or a MiniCPM's `sparse_config["cache_dtype"]`, makes
`attention_cache.give_cache` put these in the place of a `DynamicCache`'s empty layers. Each head of
a token has a scale of its own, so what is stored of it doesn't depend on what it came with: a
prompt at once, in chunks or token by token leaves the same cache, and attends to the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from nsagen.integrations.attention_layout import Layout, refuse
from nsagen.integrations.narrow_rows import NarrowRows, places_of
from nsagen.model.cache import check_narrow_cache
from nsagen.model.forms import Form, form_of
from nsagen.model.sparsity import Sparsity
from nsagen.ops import pool_append, store_rows

GROWTH = 1.125
"""Full rows grow by an eighth: few copies per token, and little unused memory."""


class GrowingRows:
    """Rows [B, H, T, D] of a narrow dtype that grow by tokens.

    Attributes:
        length: tokens, or windows, that are there.
    """

    def __init__(self, dtype: torch.dtype, like: Tensor, room: int) -> None:
        batch, heads, _, dim = like.shape
        numbers = like.new_zeros(batch, heads, room, dim, dtype=torch.int8)
        self._numbers, self._dtype, self.length = numbers, dtype, 0
        self._scale = like.new_zeros(batch, heads, room, dtype=torch.float32)

    @property
    def nbytes(self) -> int:
        return self._numbers.nbytes + self._scale.nbytes

    @property
    def rows(self) -> NarrowRows:
        """Those that are there."""
        return self.whole.first(self.length)

    @property
    def whole(self) -> NarrowRows:
        """Those that there is room for."""
        return NarrowRows(self._numbers.view(self._dtype), self._scale)

    def reserve(self, length: int) -> None:
        """Make room for so many tokens, keeping those that are there."""
        old = (self._numbers, self._scale)
        stale = old[0].is_inference() and not torch.is_inference_mode_enabled()
        room = old[0].shape[2]
        if length <= room and not stale:
            return
        room = max(room, length if not self.length else max(length, int(room * GROWTH)))
        new = [x.new_zeros(*x.shape[:2], room, *x.shape[3:]) for x in old]
        for one, other in zip(new, old, strict=True):
            one[:, :, : self.length] = other[:, :, : self.length]
        self._numbers, self._scale = new

    def append(self, x: Tensor) -> None:
        """Store the rows [B, H, S, D] of each sequence's next S tokens."""
        count = x.shape[2]
        self.reserve(self.length + count)
        cache, scale = self.whole.as_cache
        places = places_of(
            x.shape[0], self.length, count, x.device, torch.is_inference_mode_enabled()
        )
        store_rows(x.transpose(1, 2).flatten(0, 1), cache, scale, *places)
        self.length += count

    def crop(self, length: int) -> None:
        """Drop what comes after so many tokens."""
        self.length = min(self.length, length)

    def take(self, index: Tensor) -> None:
        """Keep these sequences, in this order."""
        index = index.to(self._numbers.device)
        self._numbers, self._scale = self._numbers[index], self._scale[index]


class NarrowLayer(DynamicLayer):
    """Keys and values in one byte an element, and windows of the keys.

    Args:
        cache_dtype: one of `CACHE_DTYPES`.
    """

    def __init__(self, cache_dtype: str) -> None:
        super().__init__()
        self.cache_dtype: torch.dtype = getattr(torch, cache_dtype)
        self._forget()

    def _forget(self) -> None:
        self._rows: dict[str, GrowingRows] = {}
        self.counts: tuple[int, ...] = ()
        self.lengths: tuple[int, ...] = ()
        self.sizes, self.padded = (0, 0), False
        self.keys = self.values = None
        self.is_initialized = False

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(rows.nbytes for rows in self._rows.values())

    def rows(self, name: str) -> NarrowRows:
        """The "keys", "values", "index" keys or "windows" that are there."""
        return self._rows[name].rows

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.device = key_states.device
        self.is_initialized = True

    def _append(self, name: str, x: Tensor) -> NarrowRows:
        if torch.is_grad_enabled() and x.requires_grad:
            rule = "of one byte an element has no gradients"
            advice = "call the model under torch.no_grad(), or with use_cache=False"
            refuse("a cache", rule, "keys or values that have", advice)
        if name not in self._rows:
            dtype = str(self.cache_dtype).removeprefix("torch.")
            check_narrow_cache("nsagen attention: cache", dtype, x.device, x.dtype)
            self._rows[name] = GrowingRows(self.cache_dtype, x, x.shape[2])
        self._rows[name].append(x)
        return self._rows[name].rows

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append tokens; returns the numbers of all keys and values without their scales."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        new = ("keys", key_states), ("values", value_states)
        self.keys, self.values = (self._append(name, x).numbers for name, x in new)
        return self.keys, self.values

    def update_index(self, idx_k: Tensor) -> NarrowRows:
        """Append a MiniMax-M3's index keys [B, 1, S, D]; returns all of them."""
        return self._append("index", idx_k)

    def windows_of(self, form: Form, keys: Any, layout: Layout) -> NarrowRows:
        """The means of all windows of each row's tokens, new ones made, of the stored keys.

        Args:
            keys: not read.
        """
        sizes = (form.kernel_size, form.kernel_stride)
        same = self.sizes == sizes and len(self.counts) == layout.batch
        counts = list(self.counts if same else (0,) * layout.batch)
        kept, lengths = list(counts), list(self.lengths) if same and self.lengths else []
        each = zip(layout.rows, layout.key_lengths, layout.query_lengths, strict=True)
        for row, tokens, new in each:
            # All are new in a row whose mask changed for cached tokens.
            right = not lengths or lengths[row] == tokens - new
            kept[row] = min(counts[row], form.windows(tokens - new)) if right else 0
            counts[row] = form.windows(tokens)
        lengths = lengths or [-1] * layout.batch  # unknown
        for row, tokens in zip(layout.rows, layout.key_lengths, strict=True):
            lengths[row] = tokens
        self.sizes, self.padded = sizes, layout.key_index is not None
        self.counts, self.lengths = tuple(counts), tuple(lengths)
        self._make_windows(form, tuple(kept), layout)
        return self._rows["windows"].rows

    def _make_windows(self, form: Form, kept: tuple[int, ...], layout: Layout) -> None:
        """Those past the first `kept` of each row."""
        keys = self._rows["keys"]
        if "windows" not in self._rows:
            room = max(1, *self.counts)  # an op takes no empty tensor
            self._rows["windows"] = GrowingRows(self.cache_dtype, keys.rows.numbers, room)
        windows = self._rows["windows"]
        windows.reserve(max(1, *self.counts))
        windows.length = max(1, *self.counts)
        if layout.key_index is None:
            if self.counts[0] > kept[0]:
                _pool(form, keys.rows, windows.whole, self.lengths[0], kept[0])
            return
        pieces = layout.key_index.split(layout.key_lengths)
        for row, piece in zip(layout.rows, pieces, strict=True):
            first, count = kept[row], self.counts[row]
            if count > first:
                # The tokens without padding, from the first new window's on.
                places = piece[first * form.kernel_stride :] - row * layout.keys
                one = NarrowRows(*(_of_row(x, row, places) for x in _parts(keys.rows)))
                part = (slice(row, row + 1), slice(None), slice(first, count))
                target = NarrowRows(*(x[part] for x in _parts(windows.whole)))
                _pool(form, one, target, one.shape[2], 0)

    # What Transformers calls.

    def get_seq_length(self) -> int:
        return self._rows["keys"].length if "keys" in self._rows else 0

    def reset(self) -> None:
        self._forget()

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens, a negative number; before Transformers 5.18, how many to keep."""
        length = self.get_seq_length()
        left = tokens_to_remove if tokens_to_remove > 0 else length + tokens_to_remove
        if left >= length or not self._rows:
            return
        for name, rows in self._rows.items():
            if name != "windows":
                rows.crop(max(0, left))
        self.keys, self.values = self.rows("keys").numbers, self.rows("values").numbers
        if self.padded:
            self.counts = self.lengths = ()  # which tokens are left, only the next mask says
            return
        size, stride = self.sizes
        whole = max(0, (left - size) // stride + 1) if stride else 0
        self.counts, self.lengths = tuple(min(n, whole) for n in self.counts), ()

    def _take(self, index: Tensor) -> None:
        if not self._rows:
            return
        order = torch.arange(self.rows("keys").shape[0])[index.cpu()].tolist()
        for rows in self._rows.values():
            rows.take(index)
        for name in ("counts", "lengths"):
            held = getattr(self, name)
            setattr(self, name, tuple(held[row] for row in order) if held else ())
        self.keys, self.values = self.rows("keys").numbers, self.rows("values").numbers

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._rows:
            self._take(torch.arange(self.rows("keys").shape[0]).repeat_interleave(repeats))

    def offload(self) -> None:
        advice = 'leave out cache_implementation="offloaded"'
        refuse("a cache of one byte an element", "stays on its device", "one that offloads", advice)

    prefetch = offload


def cache_bytes(
    config: Any, tokens: int, batch: int = 1, dtype: torch.dtype = torch.bfloat16
) -> int:
    """Bytes that the cache of a model of Transformers with nsagen's attention takes.

    Those of tokens that came at once: a layer that grows has room for up to an eighth more, for a
    half with NSA.

    Args:
        config: of the text model, one that `apply_nsa` swapped or not; a `cache_dtype` is counted.
        tokens: of each of `batch` sequences.
        dtype: the model's.
    """
    settings, heads = getattr(config, "nsagen", None) or {}, config.num_key_value_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    narrow = settings.get("cache_dtype") is not None

    def rows(count: int, size: int) -> int:
        return count * (size + 4 if narrow else size * dtype.itemsize)

    nsa = getattr(config, "nsa", None)
    if nsa is not None:
        from nsagen.integrations.transformers_cache import NSALayer, row_bytes
        from nsagen.integrations.transformers_swap import SLIDING, keeps_sliding_layers

        layer = NSALayer(Sparsity(**nsa), None, settings.get("cache_dtype"))
        kinds = getattr(config, "layer_types", None) or []
        dense = kinds.count(SLIDING) if keeps_sliding_layers(config) else 0
        sparse = row_bytes(layer, tokens, heads, dim, dtype)
        window = getattr(config, "sliding_window", None) or 1
        sliding = heads * 2 * min(tokens, window - 1) * dim * dtype.itemsize
        return batch * ((config.num_hidden_layers - dense) * sparse + dense * sliding)
    windows = form_of("config.nsagen", settings).windows(tokens) if "form" in settings else 0
    layers = config.num_hidden_layers
    total = layers * rows(heads * (2 * tokens + windows), dim)
    indexed = (getattr(config, "layer_types", None) or []).count("minimax_m3_sparse")
    return batch * (total + indexed * rows(tokens, getattr(config, "index_head_dim", 0)))


def _parts(rows: NarrowRows) -> tuple[Tensor, Tensor]:
    return rows.numbers, rows.scale


def _of_row(x: Tensor, row: int, places: Tensor) -> Tensor:
    """[1, H, len(places), ...] of one sequence; PyTorch indexes integers everywhere."""
    bits = x.view(torch.int8) if x.element_size() == 1 else x
    return bits[row : row + 1].index_select(2, places).view(x.dtype)


def _pool(form: Form, keys: NarrowRows, windows: NarrowRows, tokens: int, first: int) -> None:
    """The windows of each row's first tokens, from number `first` on."""
    done = (first - 1) * form.kernel_stride + form.kernel_size if first else 0
    (cache, scale), (means, of_means) = keys.as_cache, windows.as_cache
    batch, inference = keys.shape[0], torch.is_inference_mode_enabled()
    pool_append(
        cache,
        means,
        *places_of(batch, tokens - 1, 1, cache.device, inference),
        **form.window_sizes,
        new_tokens=tokens - done,
        k_scale=scale,
        ck_scale=of_means,
        dispatcher=form.dispatcher,
    )
