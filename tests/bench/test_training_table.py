"""benchmarks/training_table.py, with sizes for a CPU."""

from __future__ import annotations

import os
from dataclasses import replace

import pytest
import torch
from training_table import LAYERS, STEPS, Case, cases, measure, once

from nsagen.model import ToyLlamaConfig, ToyNSALlamaConfig

CPU = torch.device("cpu")
SIZES = {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 4, "head_dim": 16}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"hidden_size": 32, "intermediate_size": 32, "layers": 1, "query_heads": 4}
    for name, config in STEPS.items():
        tiny = replace(config, seq_len=64, batch_tokens=128, head_dim=16, amp=False, **small)
        monkeypatch.setitem(STEPS, name, tiny)
    monkeypatch.setenv("TRITON_CACHE_DIR", "")  # as it was, after the test
    monkeypatch.delenv("TRITON_CACHE_DIR")
    for name in LAYERS:
        monkeypatch.setitem(LAYERS, name, (ToyNSALlamaConfig(**SIZES), ToyLlamaConfig(**SIZES)))


@pytest.mark.parametrize(
    "case", [c for c in cases() if c.how == "eager" and c.name in ("4096", "the guide")][:4]
)
def test_each_kind_of_row(case: Case) -> None:
    if case.what == "layer":
        case = replace(case, tokens=64)
    row = measure(case, CPU, 1, once)
    assert row.items() >= case.row().items()
    key = "tokens_per_second" if case.what == "step" else "backward_ms"
    assert row[key] >= 0
    assert os.environ["TRITON_CACHE_DIR"]  # which torch.compile does not move, then
