"""`nsagen plan`: its counts against the models themselves, and against counting one by one."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsagen import capacity
from nsagen.attention_work import Pairs, attended_pairs, keys_read
from nsagen.capacity import GPUS, Load, Split
from nsagen.cli import main
from nsagen.errors import InvalidInputError
from nsagen.model import InferenceConfig, ToyLlama, ToyLlamaConfig, ToyNSALlama, ToyNSALlamaConfig
from tests.model.forms import EVERY
from tests.model.tiny import dense_config, nsa_config

H200 = GPUS["h200"]
ONE = Split(1, 1)


@pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)
def test_weights_and_cache_are_those_of_the_model(changes: dict[str, Any]) -> None:
    config = nsa_config(**changes, num_hidden_layers=3)
    model = ToyNSALlama(config, InferenceConfig(3, 100)).to(torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters())
    assert capacity.weight_bytes(config) == weights
    assert capacity.cache_bytes(config, 100, 3, ONE) == model.new_cache().nbytes
    dense = ToyLlama(dense_config()).to(torch.bfloat16)
    assert capacity.weight_bytes(dense_config()) == sum(p.nbytes for p in dense.parameters())


@pytest.mark.parametrize("tokens", [1, 7, 8, 9, 31, 64, 65, 200])
def test_pairs_and_keys_are_what_counting_gives(tokens: int) -> None:
    config = nsa_config()
    windows = [
        i * config.kernel_stride + config.kernel_size - 1
        for i in range(max(0, (tokens - config.kernel_size) // config.kernel_stride + 1))
    ]
    seen = sum(end <= t for t in range(tokens) for end in windows)
    near = sum(min(t + 1, config.window_size) for t in range(tokens))
    blocks = sum(min(t + 1, config.topk * config.block_size) for t in range(tokens))
    pairs = attended_pairs(config, tokens)
    assert pairs == Pairs(2 * seen + near + blocks, seen + near + blocks)
    assert attended_pairs(dense_config(), tokens).scores == tokens * (tokens + 1) / 2
    last = sum(end <= tokens - 1 for end in windows)
    last += min(tokens, config.window_size) + min(tokens, config.topk * config.block_size)
    assert keys_read(config, tokens) == last
    assert keys_read(dense_config(), tokens) == tokens
    for branch, of_branch in (("compressed", seen), ("sliding", near)):
        only = replace(config, branches=(branch,))
        assert attended_pairs(only, tokens) == Pairs(of_branch, of_branch)


def test_operations_count_both_head_sizes() -> None:
    assert Pairs(10, 7).operations(nsa_config(v_head_dim=16)) == 2 * (32 * 10 + 16 * 7)
    assert Pairs(10, 7).operations(dense_config()) == 2 * 32 * 17


def test_the_roofline_of_one_attention_at_65536_tokens() -> None:
    """64 heads of 128, 32/16/64, topk 16, window 512: 12.5 ms at 790 TFLOP/s in all."""
    config = ToyNSALlamaConfig(num_attention_heads=64, num_key_value_heads=4)
    work = 64 * attended_pairs(config, 65536).operations(config)
    assert work == pytest.approx(9.9e12, rel=0.01)
    assert work / H200.flops == pytest.approx(12.5e-3, rel=0.01)


@pytest.mark.parametrize(
    ("heads", "gpus", "split"),
    [(8, 8, (8, 1)), (2, 8, (2, 4)), (8, 6, (2, 3)), (3, 2, (1, 2)), (6, 4, (2, 2))],
)
def test_the_split_divides_heads_and_gpus(heads: int, gpus: int, split: tuple[int, int]) -> None:
    config = dense_config(num_attention_heads=4 * heads, num_key_value_heads=heads)
    assert capacity.split_of(config, gpus) == Split(*split)


@pytest.mark.parametrize("gpus", [1, 4])
def test_the_largest_loads_fit_and_one_more_does_not(gpus: int) -> None:
    config = ToyNSALlamaConfig(num_hidden_layers=32, num_key_value_heads=2)
    load = Load(32768, 16, gpus, 8192)
    found = capacity.needs(config, H200, load)
    step = found.split.data
    for batch, fits in ((found.largest_batch, True), (found.largest_batch + step, False)):
        assert capacity.needs(config, H200, replace(load, batch=batch)).fits is fits
    for context, fits in ((found.largest_context, True), (found.largest_context + 1, False)):
        assert capacity.needs(config, H200, replace(load, context=context)).fits is fits


def test_what_never_fits_has_no_largest_load() -> None:
    huge = ToyLlamaConfig(num_hidden_layers=2000)
    found = capacity.needs(huge, H200, Load(8192, 1, 1, 8192))
    assert (found.fits, found.largest_batch, found.largest_context) == (False, 0, 0)
    with pytest.raises(InvalidInputError, match="must be positive"):
        capacity.needs(huge, H200, Load(0, 1, 1, 1))


class TestCommand:
    def run(self, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as end:
            main(["plan", *arguments])
        return (int(end.value.code or 0), *capsys.readouterr())

    def test_json_has_nsa_and_dense_side_by_side(self, capsys: pytest.CaptureFixture[str]) -> None:
        load = ("--context", "131072", "--batch", "32", "--gpus", "8")
        code, out, _ = self.run(capsys, "llama8b", *load, "--json")
        content = json.loads(out)
        assert (code, content["time"]) == (0, "roofline")
        by_name = {row["attention"]: row for row in content["models"]}
        assert set(by_name) == {
            *(f"NSA, gqa_ratio {g}, topk {k}" for g in (4, 16) for k in (8, 16)),
            *(f"dense, gqa_ratio {g}" for g in (4, 16)),
        }
        nsa, dense = by_name["NSA, gqa_ratio 4, topk 16"], by_name["dense, gqa_ratio 4"]
        assert nsa["split"] == {"tensor": 8, "data": 1}
        assert nsa["decode"] < dense["decode"] / 5
        assert nsa["cache"] > dense["cache"]

    def test_the_papers_head_sizes_are_the_specs(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = self.run(capsys, "deepseek_nsa", "--context", "4096", "--json")
        nsa = json.loads(out)["models"][0]
        assert (code, nsa["config"]["head_dim"], nsa["config"]["v_head_dim"]) == (0, 192, 128)

    def test_the_table_says_where_times_come_from(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, out, _ = self.run(capsys, "llama8b", "--gpu", "a100")
        assert code == 0
        assert "roofline" in out
        assert "data sheet, A100" in out
        assert "does not fit" in out

    def test_a_folder_gives_the_sizes(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        ToyLlama(dense_config()).save_pretrained(tmp_path)
        _, out, _ = self.run(capsys, "tiny", "--model", str(tmp_path), "--json")
        models = json.loads(out)["models"]
        assert {row["config"]["vocab_size"] for row in models} == {512}
        assert {row["attention"].split(", ")[1] for row in models} == {"gqa_ratio 2"}
        code, _, err = self.run(capsys, "llama8b", "--model", str(tmp_path))
        assert code == 2
        assert "it has gqa_ratio 4, 16" in err

    def test_an_unknown_gpu(self, capsys: pytest.CaptureFixture[str]) -> None:
        code, _, err = self.run(capsys, "tiny", "--gpu", "h10")
        assert (code, "a100, h100, h200, b200; got 'h10'" in err) == (2, True)
