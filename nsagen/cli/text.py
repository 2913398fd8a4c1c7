"""Between text and tokens: a checkpoint's tokenizer.json, or single characters."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsagen.core.errors import InvalidInputError

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The vocabulary of a model that has no tokenizer: printable ASCII."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Stream:
    """Turns tokens into text one by one; a character of several tokens comes with the last."""

    decode: Callable[[Sequence[int]], str]
    _tokens: list[int] = field(default_factory=list)
    _shown: int = 0
    _read: int = 0

    def add(self, token: int) -> str:
        """The text that a token adds; "" while a character is incomplete."""
        self._tokens.append(token)
        known, whole = self._texts()
        if whole.endswith(_INCOMPLETE):
            return ""
        self._shown, self._read = self._read, len(self._tokens)
        return whole[len(known) :]

    def end(self) -> str:
        """What is left once no token follows."""
        known, whole = self._texts()
        return whole[len(known) :]

    def _texts(self) -> tuple[str, str]:
        # A token's text can depend on the one before it (a leading space), so decode from there.
        known = self.decode(self._tokens[self._shown : self._read])
        return known, self.decode(self._tokens[self._shown :])


@dataclass(frozen=True)
class Tokenizer:
    """Attributes:
    encode, decode: text to token numbers and back.
    stop: tokens that end a text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop: frozenset[int] = frozenset()

    def stream(self) -> Stream:
        return Stream(self.decode)


def characters() -> Tokenizer:
    """Each character of `CHARACTERS` is a token; others become a question mark."""
    unknown = CHARACTERS.index("?")

    def encode(text: str) -> list[int]:
        return [CHARACTERS.index(c) if c in CHARACTERS else unknown for c in text]

    return Tokenizer(encode, lambda tokens: "".join(CHARACTERS[t] for t in tokens))


def checkpoint_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        InvalidInputError: no tokenizer.json, or the package `tokenizers` is missing.
    """
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidInputError(
            f"{path}: generate needs the checkpoint's tokenizer.json; there is none; fetch it, "
            "or save it with Transformers' tokenizer.save_pretrained"
        )
    try:
        from tokenizers import Tokenizer as Fast
    except ImportError:
        raise InvalidInputError(
            "generate: reading tokenizer.json needs the package tokenizers; it is missing; "
            "run: pip install 'nsagen[transformers]'"
        ) from None
    try:
        fast = Fast.from_file(str(path))
    except Exception as error:
        raise InvalidInputError(
            f"{path}: must be a tokenizer's file; got {error}; fetch it again"
        ) from None
    return Tokenizer(
        encode=lambda text: fast.encode(text).ids,
        decode=lambda tokens: fast.decode(list(tokens), skip_special_tokens=True),
        stop=frozenset(_stop_tokens(folder)),
    )


def _stop_tokens(folder: Path) -> list[int]:
    """eos_token_id of generation_config.json, else of config.json: one number or several."""
    for name in ("generation_config.json", "config.json"):
        try:
            content: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        found = content.get("eos_token_id")
        if found is not None:
            return found if isinstance(found, list) else [found]
    return []
