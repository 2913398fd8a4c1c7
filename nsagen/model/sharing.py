"""Where a batch's sequences lie in a cache, and which pages they share."""

from __future__ import annotations

from typing import Any

from nsagen.model.fused import content_of
from nsagen.model.prefixes import extend_names
from nsagen.model.sequences import RunningSequence


class Sharing:
    """Gives sequences their pages: those of others as far as they begin alike, then their own.

    Pages are shared whole, and only once nothing writes to them again: `settled` of the cache. The
    tokens after them are computed as those of a chunk. With `InferenceConfig.share_prefixes` pages
    are found by their tokens; a fork finds those of its sequence in any cache.
    """

    def __init__(self, cache: Any) -> None:
        self.cache, self._size = cache, cache.limits.page_size
        self._finds = cache.limits.share_prefixes
        kernel_size, kernel_stride = cache.windows or (0, 0)
        self._reach = kernel_size - kernel_stride
        self._content: tuple[Any, ...] = ()
        self._epoch = 0

    def follow(self, model: Any) -> None:
        """Forget all pages if what the model computes may have changed."""
        content = content_of(model) if self._finds else ()
        if content != self._content:
            self.forget()
            self._content = content

    def forget(self) -> None:
        """Forget all pages. Sequences that run keep theirs, and share no more of them."""
        if self._finds:
            self.cache.pages.forget()
            self._epoch += 1

    def place(self, one: RunningSequence, where: str, of: RunningSequence | None = None) -> None:
        """Give a sequence that has computed nothing its pages.

        Args:
            of: another with whose tokens it begins.

        Raises:
            CapacityError: too few pages are free; nothing has changed.
        """
        if of is not None:
            self._fork(of, one, where)
        elif self._finds:
            self._find(one, where)
        else:
            self.cache.reserve(one.slot, one.request.tokens, where)

    def _fork(self, old: RunningSequence, new: RunningSequence, where: str) -> None:
        start, pages = self.cache.settled(old.cached), self.cache.pages
        whole = 0 if pages is None else start // self._size
        prefix = () if pages is None else pages.of(old.slot)[:whole]
        self.cache.reserve(new.slot, new.request.tokens, where, prefix)
        self.cache.copy(old.slot, new.slot, whole * self._size, start)
        new.computed = new.reused = start
        new.recorded, new.epoch = whole, old.epoch
        # A restart must not write to pages that are shared now.
        old.reused = max(old.reused, whole * self._size)

    def _find(self, one: RunningSequence, where: str) -> None:
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

    def waits(self, one: RunningSequence, coming: set[bytes]) -> bool:
        """Whether a prompt had better wait, because another's next pass computes its next page.

        Args:
            coming: names of the pages that prompts of this pass are about to fill; changed.
        """
        if not self._finds:
            return False
        begins = one.computed == one.reused
        if begins:  # others may have got further since it was added
            self._find(one, "ContinuousBatch")
        names = one.names[one.computed // self._size :]
        if begins and names and names[0] in coming:
            return True
        coming.update(names)
        return False

    def record(self, one: RunningSequence) -> None:
        """Name the pages that a sequence has filled, so that others find them."""
        if not self._finds:
            return
        filled = self.cache.settled(one.cached) // self._size
        if filled <= one.recorded or one.epoch != self._epoch:
            return
        extend_names(one.names, one.text, self._size, self._reach)
        pages = self.cache.pages
        for page in range(one.recorded, filled):
            pages.index.add(one.names[page], pages.of(one.slot)[page])
        one.recorded = filled
