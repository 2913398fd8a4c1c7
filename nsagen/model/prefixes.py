"""Pages by the tokens that they hold, so that sequences which begin alike can share them."""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


def extend_names(names: list[bytes], tokens: Sequence[int], page_size: int, reach: int) -> None:
    """Append the names of a sequence's next pages to those that it has.

    A page holds keys and values of its own tokens, and the windows that start in it; the last of
    these reach into the next page. Its name is a hash of all tokens that determine it: those of
    the page, of all pages before it, and `reach` more. Equal names mean equal contents.

    Args:
        names: changed; one for each page that the tokens determine.
        tokens: the sequence from its beginning.
        reach: how far windows that start in a page reach past it, kernel_size - kernel_stride.
    """
    for page in range(len(names), max(0, len(tokens) - reach) // page_size):
        first, last = page * page_size + (reach if page else 0), (page + 1) * page_size + reach
        before = names[-1] if names else b""
        new = array("q", tokens[first:last]).tobytes()
        names.append(hashlib.blake2b(before + new, digest_size=32).digest())


class PrefixIndex:
    """Pages by name; see `extend_names`. Those that nothing holds leave in the order of last use.

    A name stays with the first page that got it: a second page with the same content is an
    ordinary one.
    """

    def __init__(self) -> None:
        self._pages: dict[bytes, int] = {}
        self._names: dict[int, bytes] = {}
        self._unused: OrderedDict[int, None] = OrderedDict()

    @property
    def unused(self) -> int:
        """Pages that nothing holds."""
        return len(self._unused)

    def match(self, names: Sequence[bytes]) -> list[int]:
        """The pages of a sequence's beginning, as far as all of them are here."""
        found: list[int] = []
        for name in names:
            page = self._pages.get(name)
            if page is None:
                break
            found.append(page)
        return found

    def add(self, name: bytes, page: int) -> None:
        """Name a page that something holds."""
        if name not in self._pages and page not in self._names:
            self._pages[name], self._names[page] = page, name

    def use(self, page: int) -> None:
        """Something holds the page now."""
        self._unused.pop(page, None)

    def keep(self, page: int) -> bool:
        """Nothing holds the page any more; returns whether it stays here."""
        if page in self._names:
            self._unused[page] = None
        return page in self._names

    def evict(self) -> int:
        """Give up the page that has been unused for longest."""
        page, _ = self._unused.popitem(last=False)
        del self._pages[self._names.pop(page)]
        return page

    def clear(self) -> list[int]:
        """Forget all names; returns the pages that nothing holds."""
        unused = list(self._unused)
        self._pages.clear()
        self._names.clear()
        self._unused.clear()
        return unused
