"""One layer's key/value cache: dense, and for Native Sparse Attention."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import Tensor

from nsagen.model.prefill import Context, Index, PrefillRows, WindowRows
from nsagen.model.sparsity import Sparsity
from nsagen.ops import CacheScales, load_rows
from nsagen.ops.reference import quantize

Pair = tuple[Tensor, Tensor]
"""Keys and values."""

QUANTIZED = ("k", "v", "ck", "cv")
"""The tensors that can have a narrow dtype, each with scales beside it."""


def layer_lengths(
    sparsity: Sparsity, tokens: int, windows: int, quantized: bool = False
) -> dict[str, int]:
    """The tensors of an `NSALayerCache` and their entries, for given tokens and windows."""
    size = sparsity.kernel_size
    lengths = {"k": tokens, "v": tokens, "ck": windows, "cv": windows, "k_raw": size}
    if sparsity.branch_kv == "separate":
        lengths["v_raw"] = size
        if "sliding" in sparsity.kv_branches:
            lengths["k_window"] = lengths["v_window"] = tokens
    if quantized:
        lengths["v_raw"] = size
        lengths |= {f"{name}_scale": lengths[name] for name in QUANTIZED}
    return lengths


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
        """Write the tokens of a pass: k after rope and v, [N, HK, D]."""
        self.k[rows.index] = k
        self.v[rows.index] = v


@dataclass(frozen=True)
class NSALayerCache:
    """One layer's cache for Native Sparse Attention.

    Attributes:
        k: [slots, max_length, HK, D], keys after rope; for the selected and sliding branches.
            In pages: [pages, page_size, HK, D], as is v.
        v: [slots, max_length, HK, Dv]; for these two, and the source of compressed values.
        ck: [slots, windows, HK, D], compressed keys; window i after rope at position i*stride.
            In pages: [pages, page_size // stride, HK, D], as is cv.
        cv: [slots, windows, HK, Dv], compressed values.
        k_raw: [slots, kernel_size, HK, D], the last keys before rope: token t at index
            t % kernel_size. Compression happens before rope, so the next window needs them.
        v_raw: [slots, kernel_size, HK, Dv], the compressed branch's last values, if it has its
            own, or the last values as they were; then k_raw has its keys.
        k_window, v_window: like k and v, if the sliding branch does not read these.
        k_scale, v_scale, ck_scale, cv_scale: float32, what the rows of k, v, ck and cv are
            multiplied by, of their shapes without the last dimension, if these have a narrow dtype;
            then there is v_raw, too. See `nsagen.ops.reference.quantize`.
        block_table: int32 [slots, pages_per_slot], the pages of each slot; None without pages.
    """

    k: Tensor
    v: Tensor
    ck: Tensor
    cv: Tensor
    k_raw: Tensor
    v_raw: Tensor | None = None
    k_window: Tensor | None = None
    v_window: Tensor | None = None
    block_table: Tensor | None = None
    k_scale: Tensor | None = None
    v_scale: Tensor | None = None
    ck_scale: Tensor | None = None
    cv_scale: Tensor | None = None

    @property
    def of_tokens(self) -> tuple[Pair, Pair]:
        """Keys and values that the selected and the sliding branch read."""
        selected = (self.k, self.v)
        if self.k_window is None or self.v_window is None:
            return selected, selected
        return selected, (self.k_window, self.v_window)

    @property
    def scales(self) -> CacheScales | None:
        """What `cache_append` takes beside tensors of a narrow dtype."""
        if self.k_scale is None:
            return None
        names = CacheScales.__annotations__
        return CacheScales(**{name: getattr(self, name) for name in names})

    def tensors(self) -> dict[str, Tensor]:
        """All tensors but the table, by name."""
        named = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {n: t for n, t in named.items() if t is not None and n != "block_table"}

    def tokens_before(self, windows: WindowRows, k: Tensor, v: Tensor) -> Pair:
        """What a pass compresses: its own tokens' keys before rope and values, after earlier ones.

        These read the rings before `fill` writes to them.
        """
        keys = windows.with_carried(k, self.k_raw, windows.carried)
        if self.v_raw is not None:
            return keys, windows.with_carried(v, self.v_raw, windows.carried)
        return keys, windows.with_carried(v, self.v, windows.carried_values)

    def fill(
        self,
        rows: PrefillRows,
        selected: Pair,
        sliding: Pair,
        raw: Pair,
        windows: Pair | None,
    ) -> tuple[Pair, Pair, Pair | None]:
        """Write the tokens of a pass, and the windows that they complete.

        Args:
            selected, sliding: these branches' keys after rope and values, [N, HK, dim].
            raw: the compressed branch's keys before rope and values.
            windows: [M, HK, dim]: compressed keys after rope and values; None where nothing
                reads them.

        Returns:
            selected, sliding and windows as later passes find them: rounded, if the cache has a
            narrow dtype. This pass attends to these, so that how many tokens come at once makes no
            difference.
        """
        assert rows.windows is not None
        if self.k_scale is not None:
            selected = sliding = self._quantize(("k", "v"), rows.index, selected)
            if windows is not None:
                windows = self._quantize(("ck", "cv"), rows.windows.index, windows)
        else:
            self.k[rows.index], self.v[rows.index] = selected
            if self.k_window is not None and self.v_window is not None:
                self.k_window[rows.index], self.v_window[rows.index] = sliding
            if windows is not None:
                self.ck[rows.windows.index], self.cv[rows.windows.index] = windows
        for ring, tensor in zip((self.k_raw, self.v_raw), raw, strict=True):
            if ring is not None:
                ring[rows.windows.raw] = tensor[rows.windows.kept]
        return selected, sliding, windows

    def _quantize(self, names: tuple[str, str], index: Index, pair: Pair) -> Pair:
        """Write keys and values in the cache's dtype; returns them as they are read back."""
        given: list[Tensor] = []
        for name, x in zip(names, pair, strict=True):
            cache = getattr(self, name)
            rows, scale = quantize(x, cache.dtype)
            _bits(cache)[index] = _bits(rows)
            getattr(self, f"{name}_scale")[index] = scale
            given.append(rows.to(x.dtype) * scale.to(x.dtype)[..., None])
        return given[0], given[1]

    def seen(self, context: Context, names: tuple[str, str]) -> Pair:
        """The keys and values of a context, [T, HK, dim], in the model's dtype.

        Of a narrow dtype, they are gathered and widened in one pass.
        """
        found: list[Tensor] = []
        for name in names:
            cache, scale = getattr(self, name), getattr(self, f"{name}_scale", None)
            if scale is None:
                found.append(context.of(cache))
            else:
                found.append(load_rows(cache, scale, *context.places, self.k_raw.dtype))
        return found[0], found[1]


def _bits(x: Tensor) -> Tensor:
    """Numbers of one byte as integers: PyTorch indexes these everywhere."""
    return x.view(torch.int8)
