"""The command's errors name what was typed, and what it does before it takes requests."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")

from nsagen.aot import launches
from nsagen.cli import serve as command
from nsagen.cli.app import main
from nsagen.cli.models import checkpoint_model
from nsagen.core.errors import WorkerError
from nsagen.model import ContinuousBatch, InferenceConfig, ToyLlama, ToyNSALlama
from nsagen.runtime import device
from tests.model.tiny import dense_config, nsa_config, nsa_model


def saved(model: Any, folder: Path) -> Path:
    tokenizers = pytest.importorskip("tokenizers")
    words = {f"word{i}": i for i in range(512)}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="word0"))
    folder.mkdir()
    made.save(str(folder / "tokenizer.json"))
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(ToyLlama(dense_config()), tmp_path_factory.mktemp("models") / "dense")


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = ToyNSALlama(nsa_config(block_size=48))
    return saved(made, tmp_path_factory.mktemp("models") / "sparse")


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*words, "--device", "cpu"])
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "InferenceConfig" not in said
    assert "max_length" not in said
    return said


def test_a_length_beyond_the_models_positions(
    dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "serve", "--port", "0", "--model", str(dense), "--max-length", "5000")
    assert "serve: --max-length must be at most max_position_embeddings=1024" in said
    assert "lower --max-length" in said
    said = refused(
        capsys, "generate", "--model", str(dense), "--prompt", "a", "--max-new-tokens", "5000"
    )
    assert "generate: the prompt with --max-new-tokens must be at most max_position" in said


def test_a_cache_that_no_memory_holds(capsys: pytest.CaptureFixture[str]) -> None:
    words = ("serve", "--port", "0", "--max-batch-size", "1000000000", "--max-length", "1000000")
    with pytest.raises(SystemExit):
        main([*words, "--device", "cpu"])
    said = capsys.readouterr().err
    assert "lower --max-batch-size or --max-length" in said
    assert "InferenceConfig" not in said


@pytest.mark.parametrize("option", [("--pages", "9"), ("--cache-dtype", "int8")], ids=str)
def test_what_dense_checkpoints_lack(
    option: tuple[str, str], dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = refused(capsys, "serve", "--port", "0", "--model", str(dense), *option)
    assert f"serve: {option[0]} is for Native Sparse Attention" in said
    assert "add --attention nsa" in said


def test_pages_hold_whole_blocks_of_a_checkpoint(sparse: Path) -> None:
    """Of 64 tokens where these are whole blocks, or of one."""
    limits = InferenceConfig(2, 128, paged=True, num_pages=9)
    cpu = torch.device("cpu")
    made = checkpoint_model("serve", sparse, limits, cpu, None, None)
    assert made.inference_config is not None
    assert made.inference_config.page_size == 48
    assert ContinuousBatch(made).limits.total_pages == 9


class TestKernelsBeforehand:
    """What requests launch is compiled side by side; on a CPU there is nothing to launch."""

    @pytest.fixture
    def batch(self, monkeypatch: pytest.MonkeyPatch) -> ContinuousBatch:
        monkeypatch.setattr(device, "target_of", lambda device: "cuda:90")
        return ContinuousBatch(nsa_model(InferenceConfig(2, 64)))

    def test_progress_and_time_are_told(
        self,
        batch: ContinuousBatch,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        given: list[Any] = []

        def compiled(*args: Any, progress: Any) -> list[str]:
            given.append(args)
            progress("rope_forward", 1, 1)
            return ["rope must compile"]

        monkeypatch.setattr(launches, "compile_launches", compiled)
        with caplog.at_level(logging.INFO, "nsagen"):
            command._compile_kernels(batch, False, torch.device("cpu"))
        assert given == [({}, "cuda:90")]
        assert "compiling the kernels of 0 files" in caplog.text
        assert "compiled when a request needs it: rope must compile" in caplog.text
        assert batch.idle

    @pytest.mark.parametrize("error", [WorkerError("no worker"), RuntimeError("no memory")])
    def test_what_fails_there_stops_no_server(
        self,
        error: Exception,
        batch: ContinuousBatch,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        def failing(*_: Any, **__: Any) -> list[str]:
            raise error

        monkeypatch.setattr(launches, "compile_launches", failing)
        command._compile_kernels(batch, False, torch.device("cpu"))
        assert str(error) in caplog.text
