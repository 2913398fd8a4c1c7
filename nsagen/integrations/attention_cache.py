"""Means of roped keys, kept on the layers of Transformers' caches.

A model's own cache holds roped keys and values. The forms of `nsagen.model.forms` rank blocks by
means of windows of these keys; `give_cache`, a hook on an attention module, turns the layer of a
cache into one that keeps them, so that a decoding step makes only those of its new tokens. With
`cache_dtype` the layer is a `narrow_cache.NarrowLayer`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, StaticLayer

from nsagen.integrations.attention_layout import Layout, refuse
from nsagen.integrations.block_attention import with_windows
from nsagen.integrations.narrow_cache import NarrowLayer
from nsagen.model.forms import Form, check_narrow

LAYER = "nsagen_layer"
"""The name under which `give_cache` hands an attention module its layer of the cache."""


class _Windows:
    """What a cache's layer adds: the means of whole windows of each row's tokens.

    Attributes:
        kept: [B, HK, M, D] or None; of row b the first `counts[b]` are right.
        counts: windows of each row.
        lengths: tokens of each row that the windows were made of; () where unknown.
        sizes: kernel_size and kernel_stride.
        padded: whether rows have padding, so that slots are not positions.
    """

    kept: Tensor | None = None
    counts: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    sizes: tuple[int, int] = (0, 0)
    padded: bool = False

    def windows_of(self, form: Form, keys: Tensor, layout: Layout) -> Tensor:
        """[B, HK, M, D], the means of all windows of each row's tokens, new ones made.

        Args:
            keys: [B, HK, T, D], the whole cache.
        """
        sizes = (form.kernel_size, form.kernel_stride)
        counts = self.counts if self.kept is not None and self.sizes == sizes else ()
        if len(counts) != keys.shape[0]:
            counts = (0,) * keys.shape[0]
        # Windows of tokens that this call brings are new, whatever was kept in their place. All are
        # new in a row whose mask changed for cached tokens.
        sizes_of_rows = zip(layout.key_lengths, layout.query_lengths, strict=True)
        rows = dict(zip(layout.rows, sizes_of_rows, strict=True))
        held = dict(enumerate(self.lengths if len(self.lengths) == len(counts) else ()))
        kept, lengths = list(counts), list(counts)
        for b, n in enumerate(counts):
            tokens, new = rows.get(b, (held.get(b, 0), 0))
            kept[b] = min(n, form.windows(tokens - new)) if b in rows else n
            if held.get(b, tokens - new) != tokens - new:
                kept[b] = 0
            lengths[b] = tokens
        counts, self.lengths = tuple(kept), tuple(lengths)
        old = self.kept if any(counts) else None
        self.kept, self.counts = with_windows(form, keys, layout, old, counts)
        self.sizes, self.padded = sizes, layout.key_index is not None
        return self.kept

    def _take(self, index: Any) -> None:
        if self.kept is not None:
            self.kept = self.kept[index]
            rows = torch.arange(len(self.counts), device=self.kept.device)[index].tolist()
            self.counts = tuple(self.counts[row] for row in rows)
            self.lengths = tuple(self.lengths[row] for row in rows) if self.lengths else ()

    def _forget(self) -> None:
        self.kept, self.counts, self.lengths = None, (), ()

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._take(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._take(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._take(torch.arange(len(self.counts)).repeat_interleave(repeats))

    def crop(self, tokens_to_remove: int) -> None:
        super().crop(tokens_to_remove)  # type: ignore[misc]
        if self.padded or self.kept is None:
            self._forget()  # which tokens are left, only the next mask says
            return
        size, stride = self.sizes
        left = int(self.get_seq_length())  # type: ignore[attr-defined]
        whole = max(0, (left - size) // stride + 1)
        self.counts = tuple(min(n, whole) for n in self.counts)
        self.lengths = ()


class WindowedLayer(_Windows, DynamicLayer):
    """A growing layer of a cache that keeps means of its keys."""


class WindowedStaticLayer(_Windows, StaticLayer):
    """A layer of fixed size that keeps means of its keys."""


_KINDS = {DynamicLayer: WindowedLayer, StaticLayer: WindowedStaticLayer}

_GROWING = {"DynamicLayer", "WindowedLayer", "MiniMaxM3VLSparseCacheLayer"}
"""Layers that a narrow one takes the place of."""


def give_cache(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A forward pre-hook of an attention module: hand its layer of the cache on.

    The attention interface gives a function the keys of a cache, but not the cache.
    """
    cache = kwargs.get("cache")
    if cache is None:
        cache = kwargs.get("past_key_values")  # its name before Transformers 5.20
    index = getattr(module, "layer_idx", None)
    ours = getattr(module.config, "_attn_implementation", None) == "nsagen"
    if not ours or not isinstance(cache, Cache) or index is None:
        return None
    if (narrow := narrow_dtype(module)) is not None:
        return (args, {**kwargs, LAYER: narrow_layer(cache, index, narrow)})
    if index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    kind = _KINDS.get(type(layer))
    if kind is not None:
        windowed = kind.__new__(kind)
        windowed.__dict__.update(layer.__dict__)
        cache.layers[index] = layer = windowed
    ours = isinstance(layer, _Windows | NarrowLayer)
    return (args, {**kwargs, LAYER: layer}) if ours else None


def remembers_cache(module: Any) -> bool:
    """Whether `give_cache` is on an attention module."""
    return give_cache in module._forward_pre_hooks.values()


def remember_cache(module: Any) -> None:
    """Put `give_cache` on an attention module, once."""
    if not remembers_cache(module) and not torch.compiler.is_compiling():
        module.register_forward_pre_hook(give_cache, with_kwargs=True)


def remember_caches(model: Any) -> None:
    """Put `give_cache` on all attention modules of a model's decoder.

    A form's `cache_dtype` needs it before the first call; a MiniCPM and a MiniMax-M3 do it
    themselves.
    """
    for module in model.modules():
        if hasattr(module, "layer_idx") and getattr(module, "is_causal", False):
            remember_cache(module)


def narrow_dtype(module: Any) -> str | None:
    """The dtype that an attention module's new caches have; None for that of its keys.

    Training with gradients keeps them as they come: nothing that is rounded passes them on.
    """
    settings = getattr(module.config, "nsagen", None)
    cache_dtype = settings.get("cache_dtype") if isinstance(settings, Mapping) else None
    window = getattr(module, "sliding_window", None)
    if cache_dtype is None or window or not getattr(module, "is_causal", True):
        return None
    check_narrow("config.nsagen", cache_dtype)
    return None if module.training and torch.is_grad_enabled() else cache_dtype


def narrow_layer(cache: Cache, index: int, cache_dtype: str) -> NarrowLayer:
    """A cache's layer of one byte an element; made if the layer there is empty.

    Raises:
        InvalidInputError: a kind of cache that such a layer does not fit into, or one that holds
            tokens in another dtype.
    """
    advice = "leave out cache_implementation, start from an empty cache, or leave out cache_dtype"
    if type(cache) not in (Cache, DynamicCache) or getattr(cache, "offloading", False):
        rule = "must be a DynamicCache, without offloading, where cache_dtype is set"
        refuse("cache", rule, f"a {type(cache).__name__}", advice)
    while len(cache.layers) <= index:
        cache.layers.append(DynamicLayer())
    layer: Any = cache.layers[index]
    used = not hasattr(layer, "max_cache_len") and layer.get_seq_length() > 0
    narrow = isinstance(layer, NarrowLayer) and layer.cache_dtype == getattr(torch, cache_dtype)
    if narrow:
        return layer
    if used or (type(layer).__name__ not in _GROWING and not isinstance(layer, NarrowLayer)):
        rule = f"must have new, growing layers for cache_dtype {cache_dtype}"
        refuse("cache", rule, f"a {type(layer).__name__}{' that holds tokens' * used}", advice)
    cache.layers[index] = made = NarrowLayer(cache_dtype)
    return made
