"""Sequences of a running batch share the pages of tokens with which they begin."""

from __future__ import annotations

from typing import Any

from nsagen.model.fused import content_of
from nsagen.model.prefixes import extend_names
from nsagen.model.sequences import RunningSequence


class SharedPrefixes:
    """Finds pages that hold a sequence's beginning, and names those that sequences fill.

    Pages are shared whole, and only once nothing writes to them again: `settled` of the cache. The
    tokens after them are computed as those of a chunk.

    Args:
        cache: in pages.
    """

    def __init__(self, cache: Any) -> None:
        self.cache, self._size = cache, cache.limits.page_size
        kernel_size, kernel_stride = cache.windows
        self._reach = kernel_size - kernel_stride
        self._content: tuple[Any, ...] = ()
        self._epoch = 0

    def follow(self, model: Any) -> None:
        """Forget all pages if what the model computes may have changed."""
        content = content_of(model)
        if content != self._content:
            self.forget()
            self._content = content

    def forget(self) -> None:
        """Forget all pages. Sequences that run keep theirs, and share no more of them."""
        self.cache.pages.forget()
        self._epoch += 1

    def place(self, one: RunningSequence, where: str) -> None:
        """Give a sequence that has computed nothing its pages: shared ones as far as there are any.

        Raises:
            CapacityError: too few pages are free; nothing has changed.
        """
        extend_names(one.names, one.prompt, self._size, self._reach)
        most = (one.length - 1) // self._size  # one token at least is left to compute
        found = self.cache.pages.index.match(one.names[:most])
        shared = len(found) * self._size
        if self.cache.pages.of(one.slot) and shared <= one.reused:
            one.epoch = one.epoch if one.reused else self._epoch
            return
        self.cache.reserve(one.slot, one.request.tokens, where, found)
        one.computed = one.reused = shared
        one.recorded, one.epoch = len(found), self._epoch

    def coming(self, one: RunningSequence) -> list[bytes]:
        """The pages that a sequence's prompt is about to fill."""
        return one.names[one.computed // self._size :]

    def record(self, one: RunningSequence) -> None:
        """Name the pages that a sequence has filled."""
        filled = self.cache.settled(one.cached) // self._size
        if filled <= one.recorded or one.epoch != self._epoch:
            return
        extend_names(one.names, one.text, self._size, self._reach)
        pages = self.cache.pages
        for page in range(one.recorded, filled):
            pages.index.add(one.names[page], pages.of(one.slot)[page])
        one.recorded = filled
