"""Decoding: compressed keys from a cache of keys, for the windows that new tokens complete."""

from __future__ import annotations

from torch import Tensor

from nsagen.ops import reference
from nsagen.ops._cache_checks import check_pages_of_windows, check_places
from nsagen.ops._checks import check_tensors, fail
from nsagen.ops._derive import op_of
from nsagen.ops._launch import key_of
from nsagen.ops.reference._checks import check_windows
from nsagen.runtime import Dispatcher


def pool_append(
    k_cache: Tensor,
    ck_cache: Tensor,
    positions: Tensor,
    slots: Tensor,
    *,
    kernel_size: int,
    kernel_stride: int,
    new_tokens: int = 1,
    block_table: Tensor | None = None,
    k_scale: Tensor | None = None,
    ck_scale: Tensor | None = None,
    dispatcher: Dispatcher | None = None,
) -> None:
    """Write the means of the windows that end at each row's newest tokens to ck_cache.

    ck_cache[slot, i] = the mean of k_cache[slot, i s : i s + l], in float32. Keys are read from the
    cache as attention reads them: after rope in InfLLM-V2 and MoBA. A window that ck_cache has no
    room for is left out.

    Args:
        k_cache: [slots, max_length, HK, D].
        ck_cache: [slots, max_windows, HK, D], of its dtype; changed.
        positions: int32 [R], position of each row's newest token, already in k_cache; -1: an idle
            row.
        slots: int32 [R], each row's place in the caches.
        kernel_size: tokens of a window, l; kernel_stride: tokens between two windows' starts, s.
        new_tokens: at least the number of tokens that were appended to each row; the whole length
            recomputes all windows.
        block_table: int32 [slots, max_pages], or None. With it the caches are in pages, [pages,
            page_size, HK, D] and [pages, page_size // kernel_stride, HK, D].
        k_scale: float32 [slots, max_length, HK], the scales of k_cache's rows, if the caches are of
            torch.float8_e4m3fn or torch.int8; ck_scale: [slots, max_windows, HK], of ck_cache's;
            changed. A mean is that of the keys that k_cache gives back, and rounded once. See
            `reference.quantize`.
        dispatcher: the generated kernels to use; by default they are built when missing.

    Raises:
        InvalidInputError: a tensor or parameter breaks the contract above.
    """
    statics = (kernel_size, kernel_stride, new_tokens)
    more = (block_table, k_scale, ck_scale, key_of(dispatcher))
    _pool_append(k_cache, ck_cache, positions, slots, *statics, *more)


def _check_new_tokens(op: str, new_tokens: int) -> None:
    if new_tokens < 1:
        fail(op, "new_tokens must be positive", new_tokens, "pass 1 for one new token")


_pool_append = op_of(
    "pool_append",
    reference.pool_append,
    returns="",
    allocate=lambda: None,
    check=(
        *(check_tensors, check_windows, check_pages_of_windows),
        *(_check_new_tokens, check_places),
    ),
    kernel="pool_append decode",
    launch="k_cache ck_cache positions slots new_tokens block_table k_scale? ck_scale?",
    mutates="ck_cache ck_scale",
)
