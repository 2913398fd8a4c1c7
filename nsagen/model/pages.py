"""Which pages of a paged cache belong to which slots: a pool on the host, a table on the device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from nsagen.core.errors import CapacityError
from nsagen.model.configs import InferenceConfig
from nsagen.model.prefixes import PrefixIndex


class PagePool:
    """Hands the pages of a cache to slots, whole sequences at a time.

    A sequence gets at once all pages that it can ever need. So it never runs out halfway, and the
    table changes only when a sequence comes or goes. Slots whose sequences begin alike may hold
    the same pages; no slot writes to those.

    Args:
        limits: the cache's; they fix its pages.
        device: of the table.

    Attributes:
        table: int32 [slots, pages_per_slot] on the device; token t of a slot lies in page
            table[slot, t // page_size]. Its memory never moves: captured graphs read it. Entries
            past a sequence's pages name page 0, which any kernel may read but none may use.
        index: the pages whose content is known by its tokens. Those that no slot holds stay
            there until another slot needs them.
    """

    def __init__(self, limits: InferenceConfig, device: torch.device) -> None:
        self.limits = limits
        shape = (limits.max_batch_size, limits.pages_per_slot)
        self.table = torch.zeros(shape, dtype=torch.int32, device=device)
        self.index = PrefixIndex()
        self._free = list(range(limits.total_pages))[::-1]
        self._held: dict[int, list[int]] = {}
        self._holders = [0] * limits.total_pages

    @property
    def free_pages(self) -> int:
        """Pages that no slot holds."""
        return len(self._free) + self.index.unused

    def of(self, slot: int) -> Sequence[int]:
        """A slot's pages, in the order of their tokens."""
        return self._held.get(slot, ())

    def pages_for(self, tokens: int) -> int:
        """Pages that hold a number of tokens."""
        return -(-tokens // self.limits.page_size)

    def capacity(self, slot: int) -> int:
        """Tokens that the slot's pages hold."""
        return len(self.of(slot)) * self.limits.page_size

    def reserve(self, slot: int, tokens: int, who: str, prefix: Sequence[int] = ()) -> None:
        """Give a slot enough pages for `tokens` tokens.

        Args:
            prefix: pages to share, which other slots or the index hold. They become the slot's
                first ones, in place of those that it has.

        Raises:
            CapacityError: names `who`; nothing has changed.
        """
        held = self.of(slot)
        kept = held[len(prefix) :]
        needed = self.pages_for(tokens) - len(prefix) - len(kept)
        if needed <= 0 and not prefix:
            return
        self._hold(prefix)  # first, so that they are not among those that can be taken
        if needed > self.free_pages:
            free = self.free_pages
            self._drop(prefix)
            size = self.limits.page_size
            raise CapacityError(
                f"{who}: its {tokens} tokens need {needed} free pages of {size} tokens, got "
                f"{free} of {self.limits.total_pages}; wait until other sequences "
                "end, or raise InferenceConfig.num_pages"
            )
        new = [self._take() for _ in range(needed)]
        pages = [*prefix, *kept, *new]
        try:
            row = torch.tensor(pages, dtype=torch.int32, device=self.table.device)
            self.table[slot, : len(pages)] = row
        except BaseException:
            self._drop([*prefix, *new])
            raise
        self._drop(held[: len(prefix)])
        self._held[slot] = pages

    def release(self, slot: int) -> None:
        """Take a slot's pages back; their content stays until they are written again."""
        self._drop(self._held.pop(slot, [])[::-1])  # a beginning is of more use than its end

    def forget(self) -> None:
        """Forget what is in which page; pages that no slot holds are free."""
        self._free += self.index.clear()

    def _take(self) -> int:
        page = self._free.pop() if self._free else self.index.evict()
        self._holders[page] = 1
        return page

    def _hold(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._holders[page] += 1
            self.index.use(page)

    def _drop(self, pages: Iterable[int]) -> None:
        for page in pages:
            self._holders[page] -= 1
            if self._holders[page] == 0 and not self.index.keep(page):
                self._free.append(page)
