"""`nsagen plan`: its counts against the models themselves, and against counting one by one."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nsagen.cli.app import main
from nsagen.core.errors import InvalidInputError
from nsagen.estimate import model as capacity
from nsagen.estimate.attention import (
    MemberConfig,
    Pairs,
    attended_pairs,
    keys_read,
    learned_pairs,
)
from nsagen.estimate.efficiency import ROOFLINE, between, efficiencies
from nsagen.estimate.model import GPUS, Load, Split
from nsagen.model import InferenceConfig, ToyLlama, ToyLlamaConfig, ToyNSALlama, ToyNSALlamaConfig
from nsagen.spec import load_spec
from tests.model.forms import EVERY
from tests.model.tiny import dense_config, nsa_config

H200 = GPUS["h200"]
ONE = Split(1, 1)
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "nvidia-h200"


@pytest.mark.parametrize("changes", EVERY.values(), ids=EVERY)
def test_weights_and_cache_are_those_of_the_model(changes: dict[str, Any]) -> None:
    config = nsa_config(**changes, num_hidden_layers=3)
    model = ToyNSALlama(config, InferenceConfig(3, 100)).to(torch.bfloat16)
    weights = sum(p.nbytes for p in model.parameters())
    assert capacity.weight_bytes(config) == weights
    assert capacity.cache_bytes(config, 100, 3, ONE) == model.new_cache().nbytes
    dense = ToyLlama(dense_config()).to(torch.bfloat16)
    assert capacity.weight_bytes(dense_config()) == sum(p.nbytes for p in dense.parameters())


def test_a_narrow_cache_halves_memory_and_what_a_step_reads() -> None:
    """Dense attention beside it keeps 16 bits."""
    config = ToyNSALlamaConfig(num_hidden_layers=4)
    load = Load(131072, 32, 1, 8192)
    plain, narrow = (
        capacity.needs(config, H200, replace(load, cache_dtype=dtype)) for dtype in (None, "int8")
    )
    assert 132 / 256 <= narrow.cache / plain.cache < 0.53
    assert narrow.decode < plain.decode
    assert narrow.largest_batch > 1.8 * plain.largest_batch
    dense = capacity.needs(dense_config(), H200, replace(load, cache_dtype="int8"))
    assert dense == capacity.needs(dense_config(), H200, load)
    by_products = replace(config, compress_type="linear")
    assert capacity.needs(by_products, H200, replace(load, cache_dtype="int8")).cache < plain.cache


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


@pytest.mark.parametrize("tokens", [1, 31, 200, 700])
def test_pairs_and_keys_of_the_familys_other_members(tokens: int) -> None:
    """Counted one by one: what ranks blocks, then the tokens of topk blocks."""

    def config_of(name: str, **changes: Any) -> MemberConfig:
        shape = replace(load_spec(name).shapes[0], topk=4, block_size=16, **changes)
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
        return MemberConfig(**heads, shape=shape)

    blocks = sum(min(t + 1, 64) for t in range(tokens))
    causal = tokens * (tokens + 1) / 2
    m3 = config_of("minimax_m3", index_head_dim=64)
    ranked = causal * (2 * 64) / (8 * 128)  # two index heads of 64 beside eight of 128
    assert attended_pairs(m3, tokens) == Pairs(blocks + ranked, blocks)
    assert learned_pairs(m3, tokens) == Pairs(blocks, blocks)
    read = -(-tokens * 64 // (2 * 256))  # one index key of 64 beside two keys and values
    assert keys_read(m3, tokens) == read + min(tokens, 64)

    minicpm = config_of("minicpm4", dense_len=100)
    if tokens < 100:
        assert attended_pairs(minicpm, tokens) == Pairs(causal, causal)
        assert keys_read(minicpm, tokens) == tokens
    else:
        ends = range(31, tokens, 16)
        seen = sum(end <= t for t in range(tokens) for end in ends)  # scores, and their normalizer
        assert attended_pairs(minicpm, tokens) == Pairs(blocks + 2 * seen, blocks)
        assert keys_read(minicpm, tokens) == -(-len(ends) // 2) + 64  # keys without values
    assert keys_read(replace(minicpm, dense_decode=True), tokens) == tokens


def test_weights_and_cache_of_the_familys_other_members() -> None:
    """M3's index beside a Llama's weights and cache; SALA's gate and means of keys."""
    llama = ToyLlamaConfig(num_attention_heads=64, num_key_value_heads=4, num_hidden_layers=2)
    sizes = asdict(llama)
    dense = (capacity.weight_bytes(llama), capacity.cache_bytes(llama, 1000, 3, ONE))
    m3 = MemberConfig(**sizes, shape=load_spec("minimax_m3").shapes[0])
    index = 2 * (4096 * 5 * 128 + 2 * 128)  # four heads of queries, one of keys, two norms
    assert capacity.weight_bytes(m3) == dense[0] + 2 * index
    assert capacity.cache_bytes(m3, 1000, 3, ONE) == dense[1] + 2 * 2 * 3 * 1000 * 128
    sala = MemberConfig(**sizes, shape=load_spec("minicpm_sala").shapes[0])
    assert capacity.weight_bytes(sala) == dense[0] + 2 * 2 * 4096 * 64 * 128
    assert capacity.cache_bytes(sala, 1000, 3, ONE) == dense[1] + 2 * 2 * 3 * 61 * 4 * 128


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


def test_shares_between_measured_sizes() -> None:
    points = ((1.0, 0.2), (4.0, 0.4), (64.0, 0.6))
    sizes = [0.5, 1, 2, 4, 16, 64, 1000]
    shares = [between(points, size) for size in sizes]
    assert shares == pytest.approx([0.2, 0.2, 0.3, 0.4, 0.5, 0.6, 0.6])
    assert between((), 3.0) == 1.0


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

    def test_json_has_nsa_and_dense_side_by_side(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        load = ("--context", "131072", "--batch", "32", "--gpus", "8")
        load = (*load, "--results", str(tmp_path))
        code, out, _ = self.run(capsys, "llama8b", *load, "--json")
        content = json.loads(out)
        assert code == 0
        assert {row["time"] for row in content["models"]} == {"roofline"}
        by_name = {row["attention"]: row for row in content["models"]}
        assert set(by_name) == {
            *(f"NSA, gqa_ratio {g}, topk {k}" for g in (4, 16) for k in (8, 16)),
            *(f"dense, gqa_ratio {g}" for g in (4, 16)),
        }
        nsa, dense = by_name["NSA, gqa_ratio 4, topk 16"], by_name["dense, gqa_ratio 4"]
        assert nsa["split"] == {"tensor": 8, "data": 1, "context": 1}
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

    def test_committed_measurements_take_the_place_of_the_roofline(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path
    ) -> None:
        """Where the very attention was measured, and in the table by name."""
        load = ("llama8b", "--gpu", "h200", "--context", "65536", "--batch", "32")
        floors = json.loads(self.run(capsys, *load, "--results", str(tmp_path), "--json")[1])
        found = json.loads(self.run(capsys, *load, "--results", str(RESULTS), "--json")[1])
        for row, floor in zip(found["models"], floors["models"], strict=True):
            dense = row["attention"].startswith("dense")
            measured = dense or row["attention"] == "NSA, gqa_ratio 16, topk 16"
            assert row["time"] == (
                f"measured on NVIDIA H200: {RESULTS}" if measured else "roofline"
            )
            assert (row["prefill"] > floor["prefill"]) is measured
            if not measured:
                assert row == floor
        out = self.run(capsys, *load, "--results", str(RESULTS))[1]
        assert "Measured on NVIDIA H200" in " ".join(out.split())

    def test_a_measured_length_takes_the_measured_time(self) -> None:
        """64 heads over 4, of which the attention's part of the prefill is what was measured."""
        rows = json.loads((RESULTS / "prefill.json").read_text())["rows"]
        nsa, dense = efficiencies(RESULTS, H200.flops, H200.bandwidth)
        load = Load(65536, 1, 1, 65536)
        for config, efficiency, name in (
            (ToyNSALlamaConfig(num_attention_heads=64, num_key_value_heads=4), nsa, "attention"),
            (ToyLlamaConfig(num_attention_heads=64, num_key_value_heads=4), dense, "dense"),
        ):
            of = [r for r in rows if r["what"].startswith(name) and r["tokens"] == 65536]
            (ms,) = [row["ms"] for row in of]
            with_it = capacity.needs(config, H200, load, efficiency).prefill
            work = 64 * capacity.attended_pairs(config, 65536).operations(config)
            floor = work / H200.flops * config.num_hidden_layers
            rest = capacity.needs(config, H200, load).prefill - floor
            assert with_it - rest == pytest.approx(ms / 1e3 * config.num_hidden_layers, rel=0.03)

    @pytest.mark.parametrize("text", ["", "{}", "[]", '{"provenance": 3}'])
    def test_what_no_benchmark_wrote(
        self, capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str
    ) -> None:
        (tmp_path / "prefill.json").write_text(text)
        code, _, err = self.run(capsys, "llama8b", "--results", str(tmp_path))
        assert (code, "prefill.json: must be what nsagen bench wrote" in err) == (2, True)
        assert self.run(capsys, "llama8b", "--results", str(tmp_path / "none"))[0] == 2

    def test_measurements_of_other_shapes_are_not_taken(self, tmp_path: Path) -> None:
        content = json.loads((RESULTS / "prefill.json").read_text())
        content["provenance"]["command"] += " --set topk=8"
        (tmp_path / "prefill.json").write_text(json.dumps(content))
        assert efficiencies(tmp_path, 1.0, 1.0) == (ROOFLINE, ROOFLINE)

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
