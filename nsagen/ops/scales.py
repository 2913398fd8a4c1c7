"""Caches of a narrow dtype: the scales beside their rows."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class CacheScales:
    """What `cache_append` takes beside caches of a narrow dtype; see `reference.quantize`.

    Each scale is float32, of the shape of its cache without the last dimension.

    Attributes:
        k_scale: [slots, max_length, HK] or [pages, page_size, HK], of k_cache. Changed, as are
            all of these.
        v_scale: of v_cache.
        ck_scale: of ck_cache.
        cv_scale: of cv_cache.
        v_raw: [slots, kernel_size, HK, Dv], the last values in their own dtype, token t at
            t % kernel_size: compressed rows are made of these, not of quantized ones.
    """

    k_scale: Tensor
    v_scale: Tensor
    ck_scale: Tensor
    cv_scale: Tensor
    v_raw: Tensor
