"""What a server's requests will launch is compiled side by side, before the first of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from nsagen.aot import launches as module
from nsagen.aot.compile import compile_launch, recording
from nsagen.aot.launches import Launches, compile_launches, planned_launches
from nsagen.core.importing import import_file
from nsagen.core.target import parse_target
from nsagen.model import ContinuousBatch, InferenceConfig
from nsagen.ops import _fixed_kernels
from nsagen.serve.short_calls import make_short_calls
from tests.model.tiny import nsa_model

TARGET = "cuda:90"


def rows(dtype: torch.dtype = torch.float16, count: int = 8) -> Launches:
    """A launch of the smallest kernel there is."""
    x = torch.empty(count, 2, 16, dtype=dtype, device="meta")
    table = torch.empty(64, 8, device="meta")
    positions = torch.empty(count, dtype=torch.int32, device="meta")
    place = Path(_fixed_kernels.__file__), "launch_turn_back"
    return {place: [(x, table, table, positions)]}


@pytest.mark.interpreter
def test_a_plan_has_the_launches_of_requests_and_runs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    limits = InferenceConfig(2, 64, prefill_chunk_size=32, cache_dtype="int8")
    batch = ContinuousBatch(nsa_model(limits, torch.float32, num_hidden_layers=1))
    planned = planned_launches(lambda: make_short_calls(batch))
    ops = {path.stem.partition("__")[0] for path, _ in planned}
    assert {"block_selection_forward", "compressed_attention_decode", "_fixed_kernels"} <= ops
    assert all(
        not isinstance(x, torch.Tensor) or x.is_meta
        for several in planned.values()
        for args in several
        for x in args
    )
    seen = set[str]()

    def noted(self: Any, launch: Any, args: Any) -> None:
        seen.add(launch.__code__.co_filename)
        launch(*args)

    monkeypatch.setattr(module._Plan, "run", noted)
    other = ContinuousBatch(nsa_model(limits, torch.float32, num_hidden_layers=1))

    def requests() -> None:
        other.add([1] * 45, max_new_tokens=3)
        other.add([2] * 7, max_new_tokens=3)
        for _ in other.run():
            pass

    planned_launches(requests)
    assert seen <= {str(path) for path, _ in planned}, "no request launches what was not planned"


def test_a_later_launch_finds_what_was_compiled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    told: list[Any] = []
    assert compile_launches(rows(), TARGET, 1, lambda *one: told.append(one)) == []
    assert told == [("_fixed_kernels", 1, 1)]
    compiled = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    ((path, name), (args,)) = next(iter(rows().items()))
    with recording(kernels := import_file(path)) as calls:
        getattr(kernels, name)(*args)
    compile_launch(calls[0], parse_target(TARGET), "")
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == compiled

    monkeypatch.setattr(module, "map_in_workers", lambda *_: pytest.fail("compiled again"))
    assert compile_launches(rows(), TARGET) == []
    assert compile_launches({}, TARGET) == []


def test_one_that_does_not_compile_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    (problem,) = compile_launches(rows(torch.complex64), TARGET, 1)
    assert "turn_back_kernel must compile for cuda:90" in problem
    assert not list(tmp_path.glob("nsagen-*")), "so that the next start tries again"
