"""Conversations: the tokenizer's own chat template makes the prompt."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nsagen.core.errors import InvalidInputError
from nsagen.serve.text import characters, checkpoint_tokenizer, numbers

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<s> {{ m.role }} {{ m.content }} {% endfor %}"
    "{% if add_generation_prompt %}<s> assistant{% endif %}"
)
WORDS = ["<unk>", "<s>", "user", "assistant", "hello", "there"]


def folder_with(tmp_path: Path, template: str | None) -> Path:
    words = {word: number for number, word in enumerate(WORDS)}
    fast = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    fast.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=fast, unk_token="<unk>", bos_token="<s>"
    )
    wrapped.chat_template = template
    wrapped.save_pretrained(tmp_path)
    return tmp_path


def text_of(tokens: list[int]) -> str:
    return " ".join(WORDS[token] for token in tokens)


def test_a_chat_is_what_the_template_makes_of_it(tmp_path: Path) -> None:
    tokenizer = checkpoint_tokenizer(folder_with(tmp_path, TEMPLATE))
    said = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    made = tokenizer.chat([*said, {"role": "user", "content": "hello there"}])
    assert text_of(made) == (
        "<s> user hello <s> assistant there <s> user hello there <s> assistant"
    )


@pytest.mark.parametrize("model_type", ["nsagen_toy_llama", "unknown"])
def test_a_chat_does_not_ask_what_the_model_is(tmp_path: Path, model_type: str) -> None:
    """A `ToyNSALlama`'s folder has a model type, and a rope, that Transformers cannot build."""
    folder = folder_with(tmp_path, TEMPLATE)
    config = {"model_type": model_type, "rope_scaling": {"rope_type": "llama3", "factor": 8.0}}
    (folder / "config.json").write_text(json.dumps(config))
    made = checkpoint_tokenizer(folder).chat([{"role": "user", "content": "hello"}])
    assert text_of(made) == "<s> user hello <s> assistant"


def test_a_tokenizer_that_transformers_cannot_read_is_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, TEMPLATE)
    (folder / "tokenizer_config.json").write_text("[]")
    tokenizer = checkpoint_tokenizer(folder)
    with pytest.raises(InvalidInputError, match="must have a tokenizer that Transformers reads"):
        tokenizer.chat([{"role": "user", "content": "hello"}])


def test_what_a_template_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    tokenizer = checkpoint_tokenizer(folder_with(tmp_path, TEMPLATE))
    with pytest.raises(
        InvalidInputError, match="must fit the model's chat template; got no system"
    ):
        tokenizer.chat([{"role": "system", "content": "hello"}])


def test_without_a_template_there_are_completions_only(tmp_path: Path) -> None:
    tokenizer = checkpoint_tokenizer(folder_with(tmp_path, None))
    with pytest.raises(
        InvalidInputError, match="must have a chat template; got none; use /v1/comp"
    ):
        tokenizer.chat([{"role": "user", "content": "hello"}])


def test_models_without_a_tokenizer_take_characters_or_numbers() -> None:
    letters = characters()
    assert letters.decode(letters.encode("a chat\n")) == "a chat\n"
    assert letters.decode(letters.chat([{"role": "user", "content": "hi"}])) == (
        "user: hi\nassistant: "
    )
    counted = numbers()
    assert counted.encode("17 4") == [17, 4]
    assert counted.decode([17, 4]) == " 17 4"
    with pytest.raises(InvalidInputError, match="must be token numbers"):
        counted.encode("seventeen")


def test_a_missing_folder_is_named_with_the_command(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"^serve: --model must be .*/none', which is no"):
        checkpoint_tokenizer(tmp_path / "none", "serve")
    with pytest.raises(InvalidInputError, match=r"tokenizer.json: serve needs the checkpoint's"):
        checkpoint_tokenizer(tmp_path, "serve")
