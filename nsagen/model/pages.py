"""Which pages of a paged cache belong to which slot: a pool on the host, a table on the device."""

from __future__ import annotations

import torch

from nsagen.core.errors import CapacityError
from nsagen.model.configs import InferenceConfig


class PagePool:
    """Hands the pages of a cache to slots, whole sequences at a time.

    A sequence gets at once all pages that it can ever need. So it never runs out halfway, and the
    table changes only when a sequence comes or goes.

    Args:
        limits: the cache's; they fix its pages.
        device: of the table.

    Attributes:
        table: int32 [slots, pages_per_slot] on the device; token t of a slot lies in page
            table[slot, t // page_size]. Its memory never moves: captured graphs read it. Entries
            past a sequence's pages name page 0, which any kernel may read but none may use.
    """

    def __init__(self, limits: InferenceConfig, device: torch.device) -> None:
        self.limits = limits
        shape = (limits.max_batch_size, limits.pages_per_slot)
        self.table = torch.zeros(shape, dtype=torch.int32, device=device)
        self._free = list(range(limits.total_pages))[::-1]
        self._taken: dict[int, list[int]] = {}

    @property
    def free_pages(self) -> int:
        """Pages that no slot owns."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold a number of tokens."""
        return -(-tokens // self.limits.page_size)

    def capacity(self, slot: int) -> int:
        """Tokens that the slot's pages hold."""
        return len(self._taken.get(slot, ())) * self.limits.page_size

    def reserve(self, slot: int, tokens: int, who: str) -> None:
        """Give a slot enough pages for `tokens` tokens, in addition to those that it has.

        Raises:
            CapacityError: names `who`; nothing has changed.
        """
        taken = self._taken.get(slot, [])
        needed = self.pages_for(tokens) - len(taken)
        if needed <= 0:
            return
        if needed > len(self._free):
            size = self.limits.page_size
            raise CapacityError(
                f"{who}: its {tokens} tokens need {needed} free pages of {size} tokens, got "
                f"{len(self._free)} of {self.limits.total_pages}; wait until other sequences "
                "end, or raise InferenceConfig.num_pages"
            )
        new = self._free[: -needed - 1 : -1]
        places = slice(len(taken), len(taken) + needed)
        self.table[slot, places] = torch.tensor(new, dtype=torch.int32, device=self.table.device)
        self._taken[slot] = taken + new  # last, so that an earlier failure takes nothing
        del self._free[-needed:]

    def release(self, slot: int) -> None:
        """Take a slot's pages back; their content stays until they are written again."""
        self._free += self._taken.pop(slot, [])[::-1]
