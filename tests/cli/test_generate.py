"""`nsagen generate`, and --quiet and --verbose by its notes."""

from __future__ import annotations

import io
import json
import logging
import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nsagen.cli import generate
from nsagen.cli.app import main
from nsagen.cli.verbosity import flags_first, is_quiet
from nsagen.core.errors import InvalidInputError
from nsagen.core.paths import specs_dir
from nsagen.model import InferenceConfig, ToyLlama, ToyNSALlama
from nsagen.serve.text import CHARACTERS, Stream, characters, checkpoint_tokenizer
from tests.model.tiny import SPARSITY, dense_config, nsa_config

PROMPT = "the quick brown fox"


@pytest.fixture(autouse=True)
def _same_logging() -> Iterator[None]:
    """Each run of the command line sets the level of `nsagen`; later tests find it as it was."""
    logger = logging.getLogger("nsagen")
    before, level = list(logger.handlers), logger.level
    yield
    logger.handlers, logger.level = before, level


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        main(arguments)
    return (int(end.value.code or 0), *capsys.readouterr())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkpoint whose tokenizer knows a few words."""
    tokenizers = pytest.importorskip("tokenizers")
    words = {word: i for i, word in enumerate(["<unk>", "<end>", *PROMPT.split()])}
    words |= {f"word{i}": i for i in range(len(words), 512)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    model = ToyLlama(dense_config(), generator=torch.Generator().manual_seed(1))
    model.save_pretrained(tmp_path)
    return tmp_path


class TestWithoutAModel:
    def test_it_says_what_it_is_doing(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, err = run(capsys, "generate", "--max-new-tokens", "12")
        assert code == 0
        assert len(out) == 13
        assert "random weights and the attention of specs/tiny.yaml" in err
        assert "on the CPU in float32" in err or "on a GPU in float16" in err
        assert "12 tokens after a prompt of 29" in err

    def test_a_character_comes_as_soon_as_it_is_there(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each token's text is written before the next token is asked for."""
        written: list[str] = []
        tokens = generate._tokens

        def watched(*arguments: Any) -> Iterator[int]:
            for token in tokens(*arguments):
                written.append(capsys.readouterr().out)
                yield token

        monkeypatch.setattr(generate, "_tokens", watched)
        _, rest, _ = run(capsys, "generate", "--max-new-tokens", "6")
        assert [len(text) for text in written] == [0, 1, 1, 1, 1, 1]
        assert len(rest) == 2  # the last one, and the end of the line

    def test_json_is_all_there_is(self, capsys: pytest.CaptureFixture[str]) -> None:
        arguments = ("--json", "--max-new-tokens", "5", "--prompt", PROMPT)
        _, out, _ = run(capsys, "generate", *arguments)
        content = json.loads(out)
        assert (content["prompt"], len(content["tokens"])) == (PROMPT, 5)
        assert content["text"] == "".join(CHARACTERS[t] for t in content["tokens"])

    def test_drafts_change_no_text(self, capsys: pytest.CaptureFixture[str]) -> None:
        usual = ("generate", "--prompt", "tick tock " * 4, "--max-new-tokens", "24")
        _, text, _ = run(capsys, *usual)
        assert run(capsys, *usual, "--drafts")[:2] == (0, text)

    def test_a_seed_repeats(self, capsys: pytest.CaptureFixture[str]) -> None:
        sampled = ("generate", "--max-new-tokens", "30", "--temperature", "1", "--seed")
        first, again, other = (run(capsys, *sampled, seed)[1] for seed in ("1", "1", "2"))
        assert first == again != other

    @pytest.mark.parametrize("flag", ["-q", "--quiet"])
    def test_quiet_leaves_the_text(self, capsys: pytest.CaptureFixture[str], flag: str) -> None:
        for arguments in ((flag, "generate"), ("generate", flag)):
            _, out, err = run(capsys, *arguments, "--max-new-tokens", "2")
            assert (len(out), err) == (3, "")
        assert is_quiet()

    def test_verbose_names_the_logger(self, capsys: pytest.CaptureFixture[str]) -> None:
        _, _, err = run(capsys, "generate", "-v", "--max-new-tokens", "2")
        assert " INFO nsagen.generate: no --model" in err
        code, _, err = run(capsys, "generate", "-v", "-q")
        assert code == 2
        assert "give one at most" in err


class TestCheckpoint:
    def test_it_continues_as_the_model_does(
        self, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        arguments = ("--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "6")
        code, out, err = run(capsys, "generate", *arguments)
        assert code == 0
        assert f"{folder} with dense attention" in err
        model = ToyLlama.from_pretrained(folder, InferenceConfig(1, 16))
        ids, ends = torch.arange(2, 6), torch.tensor([0, 4], dtype=torch.int32)
        tokens = model.generate(ids, ends, 6)[0].tolist()
        words = ["<unk>", "<end>", *PROMPT.split()]
        assert out.split() == [words[t] if t < 6 else f"word{t}" for t in tokens]

    def test_its_end_token_ends_the_text(
        self, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        arguments = ("--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "6", "--json")
        whole = json.loads(run(capsys, "generate", *arguments)[1])["tokens"]
        stop = json.dumps({"eos_token_id": [whole[2], 511]})
        (folder / "generation_config.json").write_text(stop)
        cut = json.loads(run(capsys, "generate", *arguments)[1])["tokens"]
        assert cut == whole[: whole.index(whole[2])]

    def test_dense_weights_may_run_sparse(
        self, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        arguments = ("--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "6")
        dense = run(capsys, "generate", *arguments)[1]
        _, sparse, err = run(capsys, "generate", *arguments, "--attention", "nsa")
        assert sparse == dense  # all of so short a text is in the window and the blocks
        assert "starts untrained" in err

    def test_a_sparse_checkpoint_runs_sparse(
        self, capsys: pytest.CaptureFixture[str], folder: Path
    ) -> None:
        ToyNSALlama(nsa_config(**SPARSITY)).save_pretrained(folder)
        arguments = ("--model", str(folder), "--prompt", PROMPT, "--max-new-tokens", "2")
        _, _, err = run(capsys, "generate", *arguments)
        assert "native sparse attention" in err
        assert "untrained" not in err

    def test_a_prompt_may_come_from_stdin(
        self,
        capsys: pytest.CaptureFixture[str],
        folder: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        arguments = ("--model", str(folder), "--prompt", "-", "--max-new-tokens", "2", "--json")
        for mark in ("", "\ufeff"):  # which editors write before UTF-8
            monkeypatch.setattr("sys.stdin", io.StringIO(mark + PROMPT))
            assert json.loads(run(capsys, "generate", *arguments)[1])["prompt"] == PROMPT


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--attention", "flash"], "must be nsa or dense; got 'flash'"),
        (["--prompt", ""], "the prompt must have a token"),
        (["--device", "tpu9"], "must be cuda or cpu; got 'tpu9'"),
        (["--device", "mps"], "must be cuda or cpu; got 'mps'"),
        (["--device", "xpu"], "must be cuda or cpu; got 'xpu'"),
        (["--device", "meta"], "must be cuda or cpu; got 'meta'"),
        (
            ["--kernels", "never_built"],
            "give nsagen build the path of its spec: no never_built.yaml is in ./specs",
        ),
        (
            ["--model", "no/such/folder", "--prompt", "x"],
            "generate: --model must be a checkpoint's folder; got 'no/such/folder', which is no",
        ),
        (["--model", "docs", "--prompt", "x"], "generate needs the checkpoint's tokenizer.json"),
        (
            ["--kernels", "tiny", "--attention", "dense"],
            "got 'tiny' with dense attention; leave it",
        ),
        (
            ["--max-new-tokens", "1000000000000"],
            "together must be at most 1048576; got 10000000000",
        ),
        (["--cache-dtype", "fp8"], "--cache-dtype must be one of float8_e4m3fn, int8; got 'fp8'"),
        (["--cache-dtype", "int8", "--attention", "dense"], "is for Native Sparse Attention"),
        (["--max-new-tokens", str(10**30)], "lower --max-new-tokens"),
    ],
)
def test_wrong_usage(capsys: pytest.CaptureFixture[str], arguments: list[str], text: str) -> None:
    code, out, err = run(capsys, "generate", *arguments)
    assert (code, out) == (2, "")
    assert text in err


def test_a_projects_own_tiny_does_not_change_the_model_without_a_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("generate", "--max-new-tokens", "3", "--json")
    shipped = json.loads(run(capsys, *arguments)[1])
    text = (specs_dir() / "tiny.yaml").read_text().replace("[1, 2, 4]", "4")
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "tiny.yaml").write_text(text.replace("window_size: 32", "window_size: 8"))
    monkeypatch.chdir(tmp_path)
    code, out, _ = run(capsys, *arguments)
    assert code == 0
    assert json.loads(out)["tokens"] == shipped["tokens"]


def test_a_character_of_several_tokens_comes_whole() -> None:
    """Tokens are bytes here; a broken character decodes to a replacement character."""
    text = "a€é→b"
    stream = Stream(lambda tokens: bytes(tokens).decode("utf-8", "replace"))
    parts = [stream.add(byte) for byte in text.encode()]
    assert "".join(parts) + stream.end() == text
    assert parts[1:4] == ["", "", "€"]
    cut = Stream(lambda tokens: bytes(tokens).decode("utf-8", "replace"))
    assert cut.add("€".encode()[0]) + cut.end() == "\N{REPLACEMENT CHARACTER}"


def byte_level() -> Any:
    """Tokens of bytes and of some pairs of them, as GPT-2 and Llama 3 have them."""
    tokenizers = pytest.importorskip("tokenizers")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    pairs = [(a, b) for a in alphabet[60:70] for b in alphabet[160:170]]
    vocabulary = {text: i for i, text in enumerate([*alphabet, *(a + b for a, b in pairs)])}
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, pairs))
    made.decoder = tokenizers.decoders.ByteLevel()
    return made


def sentence_piece(metaspace: bool = False) -> Any:
    """Pieces with a mark for a leading space, and a byte for what has no piece, as Llama 2."""
    tokenizers = pytest.importorskip("tokenizers")
    decoders = tokenizers.decoders
    pieces = [f"<0x{byte:02X}>" for byte in b"\xe2\x82\xac\xc3\xa9ab"]
    pieces += [
        "\u2581",
        "\u2581\u2581",
        "\u2581the",
        "\u2581a",
        "a",
        "ing",
        "\u00e9",
        ".",
        "\u2581.",
    ]
    made = tokenizers.Tokenizer(tokenizers.models.BPE({p: i for i, p in enumerate(pieces)}, []))
    parts = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    parts.append(decoders.Strip(" ", 1, 0))
    made.decoder = decoders.Metaspace() if metaspace else decoders.Sequence(parts)
    return made


@pytest.mark.parametrize(
    "make", [byte_level, sentence_piece, lambda: sentence_piece(metaspace=True)]
)
def test_a_stream_is_the_text_of_all_its_tokens(make: Callable[[], Any], tmp_path: Path) -> None:
    """Whatever the tokens: broken characters, runs of bytes, and special tokens left out."""
    fast = make()
    fast.add_special_tokens(["<s>", "</s>", "<|user|>"])
    fast.add_tokens(["<word>"])
    fast.save(str(tmp_path / "tokenizer.json"))
    tokenizer, draw = checkpoint_tokenizer(tmp_path), random.Random(0)
    special = range(fast.get_vocab_size() - 4, fast.get_vocab_size())
    late = 0
    for _ in range(400):
        tokens = [
            draw.choice(special) if draw.random() < 0.25 else draw.randrange(special.stop)
            for _ in range(draw.randrange(16))
        ]
        stream = tokenizer.stream()
        parts = [stream.add(token) for token in tokens]
        assert "".join(parts) + stream.end() == tokenizer.decode(tokens), tokens
        late += "" == "".join(parts) != tokenizer.decode(tokens)
    assert late < 200, "text comes as it is known, not at the end"


@pytest.mark.parametrize(
    "make", [byte_level, sentence_piece, lambda: sentence_piece(metaspace=True)]
)
def test_a_long_text_that_is_broken_everywhere_takes_time_in_proportion(
    make: Callable[[], Any], tmp_path: Path
) -> None:
    make().save(str(tmp_path / "tokenizer.json"))
    tokenizer, draw, decoded = checkpoint_tokenizer(tmp_path), random.Random(1), 0

    def decode(tokens: Sequence[int]) -> str:
        nonlocal decoded
        decoded += len(tokens)
        return tokenizer.decode(tokens)

    size = make().get_vocab_size()
    for alphabet in (range(size), range(1), [1, 0], draw.choices(range(size), k=3)):
        tokens = draw.choices(alphabet, k=1000)
        stream = Stream(decode, tokenizer.is_byte)
        said = "".join(stream.add(token) for token in tokens)
        assert said + stream.end() == tokenizer.decode(tokens)
    assert decoded < 4 * 1000 * 60
    broken = Stream(lambda tokens: bytes(tokens).decode("utf-8", "replace"))
    assert "".join(broken.add(0xFF) for _ in range(500)) == "\N{REPLACEMENT CHARACTER}" * 499
    assert broken.end() == "\N{REPLACEMENT CHARACTER}"


def test_a_tokenizers_own_padding_and_truncation_do_not_touch_the_prompt(folder: Path) -> None:
    fast = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.enable_padding(length=16)
    fast.enable_truncation(2)
    fast.save(str(folder / "tokenizer.json"))
    assert len(checkpoint_tokenizer(folder).encode(PROMPT)) == 4


@pytest.mark.parametrize(
    ("content", "expected"),
    [("null", []), ("3", [3]), ("[3, 4]", [3, 4]), ('"</s>"', "'</s>' among"), ("[null]", "None")],
)
def test_stop_tokens_of_a_folder(folder: Path, content: str, expected: Any) -> None:
    (folder / "generation_config.json").write_text(f'{{"eos_token_id": {content}}}')
    if isinstance(expected, list):
        assert checkpoint_tokenizer(folder).stop == frozenset(expected)
        return
    with pytest.raises(InvalidInputError, match=f"eos_token_id: .*{expected}"):
        checkpoint_tokenizer(folder)
    (folder / "generation_config.json").write_text("[1]")
    assert checkpoint_tokenizer(folder).stop == frozenset()


@pytest.mark.parametrize("content", ["", '{"eos_token_id": 3', "[" * 100_000, "\udcff"], ids=len)
def test_a_half_written_generation_config_is_refused(folder: Path, content: str) -> None:
    """Without it the text might run past its end."""
    path = folder / "generation_config.json"
    path.write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(InvalidInputError, match=r"generation_config\.json: must be a JSON file"):
        checkpoint_tokenizer(folder)


def test_kernels_for_a_dense_checkpoint_are_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("--model", str(folder), "--prompt", PROMPT, "--kernels", "tiny")
    code, _, err = run(capsys, "generate", *arguments)
    assert code == 2
    assert "--kernels is for native sparse attention; got 'tiny' with dense attention" in err


def test_a_tokenizer_with_more_tokens_than_the_model(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fast = pytest.importorskip("tokenizers").Tokenizer.from_file(str(folder / "tokenizer.json"))
    fast.add_special_tokens(["<|user|>"])
    fast.save(str(folder / "tokenizer.json"))
    code, out, err = run(capsys, "generate", "--model", str(folder), "--prompt", "<|user|> the")
    assert (code, out) == (2, "")
    assert "input_ids must be from 0 to vocab_size-1=511, got values from 2 to 512" in err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--temperature", "inf"], "temperature must be a number at least 0, got inf"),
        (["--temperature", "1", "--seed", "-1"], "seed must be an integer of at least 0, got -1"),
        (["--prompt", "a\udcff"], "the prompt must be text in UTF-8; got 'a"),
    ],
)
def test_sampling_and_text_are_checked_as_in_the_library(
    capsys: pytest.CaptureFixture[str], arguments: list[str], text: str
) -> None:
    code, out, err = run(capsys, "generate", *arguments)
    assert (code, out) == (2, "")
    assert text in err


@pytest.mark.parametrize("temperature", ["1e-45", "1e-320", "1e-9"])
def test_a_tiny_temperature_is_greedy(capsys: pytest.CaptureFixture[str], temperature: str) -> None:
    greedy = run(capsys, "generate", "--max-new-tokens", "4")[1]
    assert (
        run(capsys, "generate", "--max-new-tokens", "4", "--temperature", temperature)[1] == greedy
    )


def test_input_that_is_no_text(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff\xfe"), encoding="utf-8"))
    code, out, err = run(capsys, "generate", "--prompt", "-")
    assert (code, out) == (2, "")
    assert "the prompt must be text in UTF-8; got" in err
    monkeypatch.setattr("sys.stdin", None)
    assert "the prompt must have a token" in run(capsys, "generate", "--prompt", "-")[2]


def test_characters_that_are_unknown_become_question_marks() -> None:
    tokenizer = characters()
    assert tokenizer.decode(tokenizer.encode("naïve\ttext\n")) == "na?ve?text\n"


def test_flags_may_stand_anywhere_before_a_double_dash() -> None:
    assert flags_first(["build", "-q", "tiny"]) == ["-q", "build", "tiny"]
    assert flags_first(["build", "--", "-q"]) == ["build", "--", "-q"]
