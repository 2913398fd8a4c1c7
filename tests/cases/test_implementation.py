"""The suite for foreign implementations passes ours and finds the usual mistakes of others."""

from __future__ import annotations

import dataclasses
import importlib
import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.cases.implementation.apart import verify_apart
from nsagen.cases.implementation.setting import Setting, setting_of
from nsagen.cases.implementation.verify import verify_implementation
from nsagen.cli.app import main
from nsagen.core.errors import InvalidInputError

SMALL = Setting("float32", 16, 2, 2, 8, 4, 8, 4, 9)
SIZES = ("head_dim=16", "gqa_ratio=2", "block_size=8", "topk=4")
SIZES += ("kernel_size=8", "kernel_stride=4", "window_size=9", "dtype=float32")


def results(function: Callable[..., Any], op: str, setting: Setting = SMALL) -> dict[str, set[str]]:
    """The results that each case had."""
    found: dict[str, set[str]] = {}
    for row in verify_implementation(function, op, setting, "cpu"):
        found.setdefault(row["case"], set()).add(row["result"])
    return found


def wrong(function: Callable[..., Any], op: str, setting: Setting = SMALL) -> list[str]:
    """The cases with anything but ok and skipped."""
    found = results(function, op, setting)
    return [case for case, had in found.items() if not had <= {"ok", "skipped"}]


@pytest.mark.parametrize(
    "op", ["topk_sparse_attention", "sliding_window_attention", "compressed_attention"]
)
def test_our_ops_pass(op: str) -> None:
    assert wrong(getattr(ops, op), op) == []
    assert "ok" in results(getattr(ops, op), op)["one sequence"]


def test_a_repeated_block_that_counts_twice() -> None:
    def adds_repeats(q: Tensor, k: Tensor, v: Tensor, topk_idx: Tensor, *rest: Any) -> Tensor:
        o = ops.topk_sparse_attention(q, k, v, topk_idx, *rest)
        ordered = topk_idx.sort(-1).values
        repeats = ((ordered.diff(dim=-1) == 0) & (ordered[..., 1:] >= 0)).any(-1)  # [HK, N]
        return o * torch.where(repeats, 1.5, 1.0).T.repeat_interleave(2, 1)[..., None]

    assert wrong(adds_repeats, "topk_sparse_attention") == ["blocks in any order"]


def test_the_documented_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/verify.md's first function fails, and only by its numbers."""
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text("utf-8")
    source = re.search(r'```python title="mine.py"\n(.*?)```', text, re.DOTALL)
    assert source
    (tmp_path / "mine.py").write_text(source[1])
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    function = importlib.import_module("mine").sliding_window_attention
    found = results(function, "sliding_window_attention")
    assert "failed" in found["one sequence"]
    assert found["same bits twice"] == found["inputs left alone"] == {"ok"}


def test_a_window_of_one_key_more() -> None:
    def counts_the_query_twice(q, k, v, window_size, cu_seqlens, scale):  # type: ignore[no-untyped-def]
        return ops.sliding_window_attention(q, k, v, window_size + 1, cu_seqlens, scale)

    assert "one sequence" in wrong(counts_the_query_twice, "sliding_window_attention")


def test_blocks_that_are_not_the_best() -> None:
    def takes_the_second_best(*args: Any) -> tuple[Tensor, Tensor]:
        o, topk_idx = ops.compressed_attention(*args)
        return o, torch.where(topk_idx == 1, 2, topk_idx)

    assert wrong(takes_the_second_best, "compressed_attention") == ["the best blocks"]


def test_padding_that_reaches_a_row() -> None:
    def multiplies_by_zero(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        o = ops.topk_sparse_attention(q, k, v, *rest)
        return o + 0 * v.sum()

    assert wrong(multiplies_by_zero, "topk_sparse_attention") == ["poisoned memory"]


def test_a_scale_that_is_ignored() -> None:
    def scales_by_itself(q, k, v, window_size, cu_seqlens, scale):  # type: ignore[no-untyped-def]
        return ops.sliding_window_attention(q, k, v, window_size, cu_seqlens)

    assert "one sequence" in wrong(scales_by_itself, "sliding_window_attention")


def test_one_wrong_row_among_many() -> None:
    """By less than what rounding does to all of them together."""

    def forgets_a_little(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
        o = ops.topk_sparse_attention(q, k, v, *rest)
        off = torch.ones_like(o)
        off[-1, 0] -= 2e-4
        return o * off

    rows = verify_implementation(forgets_a_little, "topk_sparse_attention", SMALL, "cpu")
    row = next(row for row in rows if row["output"] == "o")
    assert row["error"] < row["threshold"]
    assert row["result"] == "failed"
    assert row["note"].startswith("token 52, head 0: relative error 1.2e-04")


def test_another_dtype_is_named() -> None:
    def answers_in_float64(*args: Any) -> Tensor:
        return ops.sliding_window_attention(*args).double()

    row = next(verify_implementation(answers_in_float64, "sliding_window_attention", SMALL, "cpu"))
    assert row["result"] == "failed"
    assert "torch.float64 of shape" in row["note"]
    assert ", not torch.float32 of shape" in row["note"]


def test_a_function_without_gradients_is_judged_by_its_output() -> None:
    def infers(*args: Any) -> Tensor:
        with torch.no_grad():
            return ops.sliding_window_attention(*args)

    rows = list(verify_implementation(infers, "sliding_window_attention", SMALL, "cpu"))
    assert [(row["output"], row["result"]) for row in rows[:2]] == [
        ("o", "ok"),
        ("dq, dk, dv", "refused"),
    ]
    assert "not differentiable" in rows[1]["note"]
    assert not any(row["result"] == "failed" for row in rows)


def test_rows_that_are_never_written() -> None:
    """Where an allocator hands out zeros they look right."""

    class WritesWhatSees(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, o: Tensor, sees: Tensor) -> Tensor:
            out = torch.empty_like(o)
            out[sees] = o[sees]
            return out

        @staticmethod
        def backward(ctx: Any, do: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
            return do, None

    def skips(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        o, topk_idx = ops.compressed_attention(q, k, v, *rest)
        return WritesWhatSees.apply(o, (o != 0).any(-1)), topk_idx  # type: ignore[return-value]

    assert "poisoned memory" in wrong(skips, "compressed_attention")


def test_forced_blocks_that_are_always_the_same() -> None:
    def takes_one_and_two(*args: Any) -> tuple[Tensor, Tensor]:
        return ops.compressed_attention(*args[:-2], 1, 2)

    assert wrong(takes_one_and_two, "compressed_attention") == ["the best blocks"]


def test_changed_inputs_and_changing_bits() -> None:
    noise = iter(range(1, 1000))

    def writes(q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        o = ops.topk_sparse_attention(q, k, *rest) * (1 + next(noise) * 1e-7)
        k.detach()[0, 0, 0] += 1e-7
        return o

    assert {"inputs left alone", "same bits twice"} <= set(wrong(writes, "topk_sparse_attention"))


def test_a_refusal_is_no_pass() -> None:
    def only_long(q: Tensor, *rest: Any) -> Tensor:
        if len(q) < 30:
            raise ValueError("needs 30 tokens")
        return ops.topk_sparse_attention(q, *rest)

    assert results(only_long, "topk_sparse_attention")["short tails"] <= {"refused", "ok"}
    assert results(only_long, "topk_sparse_attention")["empty sequences"] == {"refused"}


PARALLEL = """
import torch
from nsagen.ops import topk_sparse_attention

def parallel_nsa(q, k, v, g_cmp=None, g_slc=None, g_swa=None, block_indices=None, block_counts=16,
                 block_size=64, window_size=0, scale=None, cu_seqlens=None):
    assert q.shape[0] == 1 and q.shape[2] % (k.shape[2] * 16) == 0
    assert block_indices.shape == (*k.shape[:3], block_counts)
    assert g_cmp is g_slc is g_swa is None and window_size == 0
    blocks = block_indices[0].transpose(0, 1)
    return topk_sparse_attention(q[0], k[0], v[0], blocks, block_size, cu_seqlens, scale)[None]

def parallel_nsa_topk(): ...
def parallel_nsa_compression(): ...
def naive_nsa_selection(): ...
"""
"""fla-core's functions: the parameters of the first, and what it checks of them."""


def test_the_documented_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An example's adapter, with a stub of the package's parameters over our ops."""
    folder = tmp_path / "fla" / "ops" / "nsa"
    folder.mkdir(parents=True)
    for name in ("parallel", "compression", "naive"):
        (folder / f"{name}.py").write_text(PARALLEL)
    examples = Path(__file__).parents[2] / "examples" / "implementations"
    text = (Path(__file__).parents[2] / "docs" / "verify.md").read_text("utf-8")
    named = re.findall(r"--implementation (\w+):(\w+) ", text)
    assert {(module, op) for module, op in named if (examples / f"{module}.py").exists()} >= {
        ("fla_core", "topk_sparse_attention"),
        ("fla_core", "compressed_attention"),
        ("nsa_pytorch", "topk_sparse_attention"),
        ("nsa_pytorch", "sliding_window_attention"),
    }
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.syspath_prepend(examples)
    for loaded in [x for x in sys.modules if x.partition(".")[0] in ("fla", "fla_core")]:
        monkeypatch.delitem(sys.modules, loaded)
    wide = dataclasses.replace(SMALL, gqa_ratio=16, kv_heads=1)
    function = importlib.import_module("fla_core").topk_sparse_attention
    assert wrong(function, "topk_sparse_attention", wide) == []


def test_the_documented_results() -> None:
    """docs/verify.md's table counts the rows of the committed run."""
    root = Path(__file__).parents[2]
    results = root / "benchmarks" / "results" / "nvidia-h200" / "implementations.json"
    text = (root / "docs" / "verify.md").read_text("utf-8")
    for run in json.loads(results.read_text("utf-8"))["runs"]:
        found = Counter(row["result"] for row in run["rows"])
        cells = (run["implementation"], run["dtype"])
        cells += tuple(str(found[result]) for result in ("ok", "failed", "refused"))
        assert f"| {' | '.join(cells)} |" in text


CRASHES = """
import os
from nsagen import ops

def sliding_window_attention(q, k, v, window_size, cu_seqlens, softmax_scale):
    if 0 in cu_seqlens.diff():
        os.abort()
    return ops.sliding_window_attention(q, k, v, window_size, cu_seqlens, softmax_scale)
"""


def test_a_crash_fails_its_case_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "crashes.py").write_text(CRASHES)
    monkeypatch.syspath_prepend(tmp_path)
    op = "sliding_window_attention"
    cases = ("empty sequences", "one sequence")
    aborted, *rest = verify_apart(f"crashes:{op}", op, SMALL, cases)
    assert (aborted["case"], aborted["result"]) == ("empty sequences", "failed")
    assert "SIGABRT" in aborted["note"]
    assert [row["result"] for row in rest] == ["ok"] * 4


ILLEGAL = """
import torch
import triton
import triton.language as tl
from nsagen import ops

@triton.jit
def write_far(x):
    tl.store(x + (1 << 40), 1.0)

def sliding_window_attention(q, k, v, window_size, cu_seqlens, softmax_scale):
    if len(cu_seqlens) == 6:
        write_far[(1,)](torch.zeros(1, device="cuda"))
    return ops.sliding_window_attention(q, k, v, window_size, cu_seqlens, softmax_scale)
"""


@pytest.mark.gpu
def test_an_illegal_access_fails_its_case_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "illegal.py").write_text(ILLEGAL)
    monkeypatch.syspath_prepend(tmp_path)
    op = "sliding_window_attention"
    setting = dataclasses.replace(SMALL, dtype="bfloat16")
    cases = ("short tails", "one sequence")
    illegal, *rest = verify_apart(f"illegal:{op}", op, setting, cases)
    assert (illegal["case"], illegal["result"]) == ("short tails", "failed")
    assert "illegal memory access" in illegal["note"]
    assert [row["result"] for row in rest] == ["ok"] * 4


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = [text for size in SIZES for text in ("--size", size)]
    command = ["verify", "--implementation", "nsagen.ops:sliding_window_attention", "--json"]
    with pytest.raises(SystemExit) as ended:
        main([*command, *sizes])
    assert not ended.value.code
    rows = json.loads(capsys.readouterr().out)
    assert {row["result"] for row in rows} == {"ok", "skipped"}
    assert {row["case"] for row in rows} >= {
        "short tails",
        "poisoned memory",
        "replayed CUDA graph",
    }


@pytest.mark.parametrize("text", ["gqa_ratio=two", "rows=3", "head_dim"])
def test_a_wrong_size_is_refused(text: str) -> None:
    with pytest.raises(InvalidInputError, match="--size must be NAME=VALUE"):
        setting_of([text], 0)
