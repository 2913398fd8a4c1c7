"""Between text and tokens: a checkpoint's tokenizer.json, or single characters."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nsagen.core.errors import InvalidInputError
from nsagen.core.installed import require_extra
from nsagen.model.requests import check_stop_tokens

CHARACTERS = "\n" + "".join(map(chr, range(32, 127)))
"""The vocabulary of a model that has no tokenizer: printable ASCII."""

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"

_FEW, _MANY = 8, 32
"""Tokens that surely hold a whole character, of four bytes at most; and more than are decoded again
and again where no character is whole."""

_BYTE = re.compile("<0x[0-9A-Fa-f]{2}>")
"""A token that stands for a byte where a vocabulary has no other. A run of these becomes text as
one, and as nothing but replacement characters if it is broken anywhere."""


@dataclass
class Stream:
    """Turns tokens into text one by one: together the text of all of them.

    A character of several tokens comes with the last, and a run of bytes with what follows it.

    Args:
        decode: the text of tokens.
        is_byte: whether a token is one of those bytes.
    """

    decode: Callable[[Sequence[int]], str]
    is_byte: Callable[[int], bool] = lambda token: False
    _tokens: list[int] = field(default_factory=list)
    _read: int = 0
    _given: int = 0

    def add(self, token: int) -> str:
        """The text that a token adds; "" while what it belongs to is incomplete."""
        self._tokens.append(token)
        if self.is_byte(token) or not self.decode([token]):
            return ""  # or a special token, which the text leaves out
        whole = self.decode(self._tokens)
        sure = len(whole) - whole.endswith(_INCOMPLETE)  # the last may become another
        new, self._given = whole[self._given : sure], sure
        if sure < len(whole):
            if len(self._tokens) > _MANY:
                self._forget(len(self._tokens) - _FEW, unsure=1)
            return new
        # A token's text can depend on the one before it (a leading space), so these tokens stay,
        # unless nothing is seen of them.
        self._forget(self._read, unsure=0)
        self._read = len(self._tokens)
        return new

    def _forget(self, count: int, unsure: int) -> None:
        """Drop the first tokens, unless those after them have no text."""
        left = len(self.decode(self._tokens[count:]))
        if left:
            self._tokens, self._given = self._tokens[count:], left - unsure
            self._read = max(0, self._read - count)

    def end(self) -> str:
        """What is left once no token follows."""
        return self.decode(self._tokens)[self._given :]


Chat = Sequence[Mapping[str, str]]
"""Messages with `role` and `content`."""


def _no_chat(messages: Chat) -> list[int]:
    raise InvalidInputError(
        "messages: the model's tokenizer must have a chat template; got none; use /v1/completions"
    )


@dataclass(frozen=True)
class Tokenizer:
    """Attributes:
    encode, decode: text to token numbers and back.
    stop: tokens that end a text.
    is_byte: whether a token stands for a byte of a character that has none.
    chat: the tokens of a conversation, up to where the assistant answers.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop: frozenset[int] = frozenset()
    is_byte: Callable[[int], bool] = lambda token: False
    chat: Callable[[Chat], list[int]] = _no_chat

    def stream(self) -> Stream:
        return Stream(self.decode, self.is_byte)


def characters() -> Tokenizer:
    """Each character of `CHARACTERS` is a token; others become a question mark."""
    numbers = {character: number for number, character in enumerate(CHARACTERS)}

    def encode(text: str) -> list[int]:
        return [numbers.get(character, numbers["?"]) for character in text]

    def chat(messages: Chat) -> list[int]:
        said = [f"{message['role']}: {message['content']}\n" for message in messages]
        return encode("".join([*said, "assistant: "]))

    return Tokenizer(encode, lambda tokens: "".join(CHARACTERS[t] for t in tokens), chat=chat)


def numbers() -> Tokenizer:
    """Each token is its number, for models with random weights and a large vocabulary."""

    def encode(text: str) -> list[int]:
        words = text.split()
        if not all(word.isdecimal() for word in words):
            raise InvalidInputError(
                "prompt: must be token numbers for a model without a tokenizer; "
                f"got {text[:60]!r}; such as '17 4'"
            )
        return [int(word) for word in words]

    return Tokenizer(encode, lambda tokens: "".join(f" {token}" for token in tokens))


def checkpoint_tokenizer(folder: Path, command: str = "generate") -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises:
        InvalidInputError: names the command: no such folder, no tokenizer.json, or the package
            `tokenizers` is missing.
    """
    if not folder.is_dir():
        raise InvalidInputError(
            f"{command}: --model must be a checkpoint's folder; got {str(folder)!r}, which is no "
            "folder; fix the path"
        )
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InvalidInputError(
            f"{path}: {command} needs the checkpoint's tokenizer.json; it is missing; fetch it, "
            "or save it with Transformers' tokenizer.save_pretrained"
        )
    require_extra(command, "transformers", "tokenizers")
    from tokenizers import Tokenizer as Fast

    try:
        fast = Fast.from_file(str(path))
    except Exception as error:
        raise InvalidInputError(
            f"{path}: must be a tokenizer's file; got {error}; fetch it again"
        ) from None
    fast.no_truncation()  # which a file may ask for, and which would cut or fill the prompt
    fast.no_padding()
    return Tokenizer(
        encode=lambda text: fast.encode(text).ids,
        decode=lambda tokens: fast.decode(list(tokens), skip_special_tokens=True),
        stop=_stop_tokens(folder),
        is_byte=lambda token: _BYTE.fullmatch(fast.id_to_token(token) or "") is not None,
        chat=functools.partial(_chat, folder, fast),
    )


@functools.cache
def _template(folder: Path) -> Any:
    """Transformers' tokenizer of a checkpoint, which knows its chat template.

    Raises:
        InvalidInputError: Transformers cannot read the tokenizer's files.
    """
    from transformers import PreTrainedTokenizerFast

    try:  # not AutoTokenizer, which reads config.json too and fails on a model that is not its own
        return PreTrainedTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InvalidInputError(
            f"messages: {folder} must have a tokenizer that Transformers reads; got {error!r}; "
            "save it again with its save_pretrained, or use /v1/completions"
        ) from None


def _chat(folder: Path, fast: Any, messages: Chat) -> list[int]:
    require_extra("serve", "transformers", "transformers")
    template = _template(folder)
    if not template.chat_template:
        return _no_chat(messages)
    try:
        text = template.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
    except Exception as error:  # a template refuses roles in its own words
        raise InvalidInputError(
            f"messages: must fit the model's chat template; got {error}; change them"
        ) from None
    return fast.encode(text, add_special_tokens=False).ids  # the template has written them


def _stop_tokens(folder: Path) -> frozenset[int]:
    """eos_token_id of generation_config.json, else of config.json: one number or several.

    Raises:
        InvalidInputError: it is something else, or a file cannot be read.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            content: Any = json.loads((folder / name).read_text(encoding="utf-8"))
        except FileNotFoundError:
            continue
        except (OSError, ValueError, RecursionError) as error:
            raise InvalidInputError(
                f"{folder / name}: must be a JSON file, which says where a text ends; got {error}; "
                "fetch it again, or remove it"
            ) from None
        found = content.get("eos_token_id") if isinstance(content, dict) else None
        if found is not None:
            listed = found if isinstance(found, list) else [found]
            return check_stop_tokens(f"{folder / name}: eos_token_id", listed)
    return frozenset()
