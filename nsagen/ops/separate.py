"""Separate keys and values for each branch, as in the paper's model."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class SeparateKV:
    """What `cache_append` takes beside its own tensors where each branch has its own k and v.

    Then k, v, k_cache and v_cache are the selected branch's, and k_raw holds the compressed
    branch's keys.

    Attributes:
        k_compress: [R, HK, D], the compressed branch's new keys, before rope; its windows are
            made of these.
        v_compress: [R, HK, Dv], its new values.
        k_window: [R, HK, D], the sliding branch's new keys, before rope.
        v_window: [R, HK, Dv], its new values.
        v_raw: [slots, kernel_size, HK, Dv], the compressed branch's last values, token t at
            t % kernel_size. Changed, as are the caches.
        k_window_cache: like k_cache, the sliding branch's keys after rope.
        v_window_cache: like v_cache, the sliding branch's values.
    """

    k_compress: Tensor
    v_compress: Tensor
    k_window: Tensor
    v_window: Tensor
    v_raw: Tensor
    k_window_cache: Tensor
    v_window_cache: Tensor

    @property
    def rows(self) -> tuple[Tensor, ...]:
        """What is new: k_compress, v_compress, k_window, v_window."""
        return self.k_compress, self.v_compress, self.k_window, self.v_window

    @property
    def caches(self) -> tuple[Tensor, ...]:
        """What changes: v_raw, k_window_cache, v_window_cache."""
        return self.v_raw, self.k_window_cache, self.v_window_cache
