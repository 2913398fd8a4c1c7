"""benchmarks/host_time.py on a stand-in for a GPU, whose times are made up."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import host_time
import pytest
import torch

from nsagen.bench.measure import HostCost
from tests.stand_in import StandIn
from tests.stand_in import gpu as gpu


def test_every_eager_row_is_written(
    gpu: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(host_time, "DEVICE", "cpu")
    cost = HostCost(ms=0.5, launches=12)
    for name, value in (("gpu_ms", 0.4), ("host_cost", cost), ("launched", {"kernel": 12})):
        measured = mock.create_autospec(getattr(host_time, name), return_value=value)
        monkeypatch.setattr(host_time, name, measured)
    for name, found in (("get_device_name", "none"), ("synchronize", None)):
        monkeypatch.setattr(torch.cuda, name, lambda *_, found=found: found)
    out, modes = tmp_path / "rows.json", ["eager", "eager, lengths prepared", host_time.ONE_THREAD]
    arguments = ["host_time.py", "--seqlens", "256", "--modes", *modes, "--profile"]
    monkeypatch.setattr("sys.argv", [*arguments, "--out", str(out)])
    host_time.main()
    rows = json.loads(out.read_text())["rows"]
    assert not [row for row in rows if "error" in row]
    assert [(row["what"], row["mode"]) for row in rows[3:]] == [
        *(("forward", mode) for mode in modes[:2]),
        *(("forward and backward", mode) for mode in modes),
    ]
    assert rows[-1]["bound"] == "host"
