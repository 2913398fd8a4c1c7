"""`nsagen plan` for training: memory and exchange by counting, and the choice of a split."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nsagen.cli.app import main
from nsagen.core.errors import InvalidInputError
from nsagen.estimate.model import GPUS, HOST_GPUS, Split, weight_bytes
from nsagen.estimate.training import (
    HOST_EXCHANGE_SECONDS,
    STATE_BYTES,
    best_step,
    link_rate,
    splits,
    step_of,
)
from nsagen.model import ToyLlamaConfig, ToyNSALlama, ToyNSALlamaConfig
from tests.model.tiny import nsa_config

H200 = GPUS["h200"]
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks" / "results" / "nvidia-h200"
DOCS = Path(__file__).resolve().parents[2] / "docs" / "scaling.md"
LLAMA = {"num_hidden_layers": 32, "num_key_value_heads": 8, "vocab_size": 128256}


def test_splits_use_every_gpu_and_leave_none_without_a_sequence() -> None:
    config = ToyNSALlamaConfig(num_key_value_heads=8)
    found = [*splits(config, 1024, 32)]
    assert all(s.tensor * s.context * s.data == 1024 for s in found)
    assert {s.tensor for s in found} == {1, 2, 4, 8}
    assert max(s.data for s in found) == 32
    assert Split(8, 4, 32) in found


def test_the_best_split_fits_and_no_other_is_faster() -> None:
    config = ToyNSALlamaConfig(**LLAMA)
    best = best_step(config, H200, 131072, 32, 64)
    assert best.fits
    for split in splits(config, 64, 32):
        for recompute in (False, True):
            other = step_of(config, H200, 131072, 32, split, recompute)
            assert not other.fits or other.seconds >= best.seconds


def test_what_never_fits_is_the_least_that_is_needed() -> None:
    huge = ToyLlamaConfig(num_hidden_layers=2000)
    step = best_step(huge, H200, 8192, 1, 1)
    assert (step.fits, step.split) == (False, Split(1, 1, 1))
    with pytest.raises(InvalidInputError, match="must be positive"):
        best_step(huge, H200, 0, 1, 1)


def test_links_within_a_host_and_adapters_between() -> None:
    """A group of 16 over two hosts: each host's adapters bring the other's part for all of its
    GPUs, and links limit them."""
    assert link_rate(H200, 8, 1) == H200.link
    assert link_rate(H200, 2, 4) == H200.link
    assert link_rate(H200, 16, 1) == min(H200.link, 8 * H200.network)
    assert link_rate(H200, 4, HOST_GPUS) == H200.network
    assert link_rate(H200, 16, 4) == 2 * H200.network


def test_state_is_spread_and_context_and_heads_divide_what_is_kept() -> None:
    config = ToyNSALlamaConfig(**LLAMA)
    one = step_of(config, H200, 32768, 1, Split(1, 1, 1), False)
    four = step_of(config, H200, 32768, 1, Split(1, 1, 4), False)
    assert one.state >= STATE_BYTES * weight_bytes(config) // 2
    assert four.state < one.state / 2
    assert one.activations / 4 < four.activations < one.activations / 3.5
    again = step_of(config, H200, 32768, 1, Split(1, 1, 1), True)
    assert again.activations < one.activations / 2
    assert again.seconds > one.seconds


@pytest.mark.parametrize(("recompute", "small", "large"), [(False, 5, 8), (True, 7, 11)])
def test_a_layer_exchanges_less_often_where_little_is_sent(
    recompute: bool, small: int, large: int
) -> None:
    """Tokens and windows go together below `SMALL_BYTES`, which is inside of these lengths."""
    config = ToyNSALlamaConfig(num_key_value_heads=2, head_dim=64)

    def exchanges(context: int) -> float:
        two, one = (
            step_of(config, H200, context, 1, Split(1, 1, n), recompute).host for n in (2, 1)
        )
        return (two - one) / HOST_EXCHANGE_SECONDS / config.num_hidden_layers

    assert exchanges(16384) == pytest.approx(small)
    assert exchanges(131072) == pytest.approx(large)


def test_kept_activations_are_near_what_autograd_keeps() -> None:
    """Of a small model's layers, in 16 bits on a CPU; exact it can't be: rope and norms differ."""
    config = nsa_config(num_attention_heads=16, num_hidden_layers=1)

    def kept(layers: int) -> int:
        model = ToyNSALlama(replace(config, num_hidden_layers=layers)).to(torch.bfloat16)
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        sizes: dict[int, int] = {}

        def pack(x: torch.Tensor) -> torch.Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in weights:
                sizes[storage.data_ptr()] = storage.nbytes()
            return x

        ids, ends = torch.zeros(256, dtype=torch.int64), torch.tensor([0, 256], dtype=torch.int32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            model(ids, ends)
        return sum(sizes.values())

    one, two = (
        step_of(replace(config, num_hidden_layers=n), H200, 256, 1, Split(1, 1), False).activations
        for n in (1, 2)
    )
    assert two - one == pytest.approx(kept(2) - kept(1), rel=0.25)


def test_a_thousand_gpus_and_a_million_tokens(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ("llama8b", "--gpus", "1024", "--context", "1048576", "--results", str(RESULTS))
    with pytest.raises(SystemExit):
        main(["plan", *arguments, "--json"])
    models = {row["attention"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    nsa, dense = models["NSA, gqa_ratio 16, topk 16"], models["dense, gqa_ratio 16"]
    for row in (nsa, dense):
        split = row["training"]["split"]
        assert split["tensor"] * split["context"] * split["data"] == 1024
        assert row["training"]["fits"]
        assert row["split"]["tensor"] <= 8
    assert nsa["training"]["seconds"] < dense["training"]["seconds"] / 3
    with pytest.raises(SystemExit):
        main(["plan", *arguments, "--network", "1"])
    out = " ".join(capsys.readouterr().out.split())
    assert "Training: 32 sequences of 1,048,576 tokens a step" in out
    assert "1 GB/s from a GPU to other hosts" in out


def test_the_documented_table_is_what_the_roofline_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("llama8b", "--gpus", "1024", "--context", "1048576", "--batch", "32")
    with pytest.raises(SystemExit):
        main(["plan", *arguments, "--results", str(tmp_path), "--json"])
    models = {row["attention"]: row for row in json.loads(capsys.readouterr().out)["models"]}
    shown = [line for line in DOCS.read_text().splitlines() if " x 32 |" in line]
    for line in shown:
        label = line.split("|")[1].strip()
        step = models[label]["training"]
        split = " x ".join(str(step["split"][name]) for name in ("tensor", "context", "data"))
        memory = f"{(step['state'] + step['activations']) / 1e9:.0f} GB"
        figures = (split, memory, f"{step['seconds']:.1f} s", f"{step['tokens_per_second']:.0f}")
        assert line == f"| {' | '.join((label, *figures))} |"
    assert len(shown) == 4
