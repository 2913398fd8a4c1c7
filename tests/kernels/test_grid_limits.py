"""Whole calls with more than 65535 rows, sequences or heads fit the axes of a GPU's grids.

Launches are recorded instead of run. PyTorch computes the lengths, which later checks read.
tests/aot/test_grid_limits.py does the same with each algorithm's own `launch`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from triton.runtime import interpreter

from nsagen import ops
from nsagen.core.errors import InvalidInputError

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") != "1" or torch.cuda.is_available(),
    reason="records launches of the interpreter",
)

MANY, PLACES = 70_000, 65535
NSA: dict[str, Any] = {"kernel_size": 4, "kernel_stride": 2, "block_size": 4, "topk": 3}
GROUP, DIM = 2, 16
BRANCHES = ("compressed_attention", "selected_attention", "sliding_window_attention")


@pytest.fixture
def grids(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[int, ...]]]:
    """The name and grid of each launch that a test makes."""
    found = []

    def record(self: Any, *args: Any, **kwargs: Any) -> None:
        grid = self.grid(kwargs) if callable(self.grid) else self.grid
        found.append((self.fn.__name__, tuple(int(n) for n in grid)))

    monkeypatch.setattr(interpreter.GridExecutor, "__call__", record)
    return found


@contextmanager
def within_limits(grids: list[tuple[str, tuple[int, ...]]], *ops: str) -> Iterator[None]:
    """The calls made inside launch kernels of these ops at least, each within a grid's axes."""
    grids.clear()
    yield
    assert {*ops} <= {name.partition("__")[0] for name, _ in grids}
    for name, grid in grids:
        assert max(grid[1:], default=1) <= PLACES, f"{name}: {grid}"
        assert grid[0] < 1 << 31


def tensors(tokens: int, kv_heads: int) -> list[torch.Tensor]:
    """q, k, v and gates of a packed batch."""
    q = torch.zeros(tokens, kv_heads * GROUP, DIM)
    k, v = torch.zeros(2, tokens, kv_heads, DIM)
    return [q, k, v, torch.ones(tokens, kv_heads * GROUP, 3)]


@pytest.mark.parametrize(
    ("cu_seqlens", "name"),
    [
        (torch.arange(MANY + 1, dtype=torch.int32), "sequences"),
        (torch.tensor([0, MANY], dtype=torch.int32), "tokens"),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_training_and_prefill(
    cu_seqlens: torch.Tensor, name: str, grids: list[tuple[str, tuple[int, ...]]]
) -> None:
    q, k, v, gate = tensors(MANY, 1)
    sizes = {**NSA, "window_size": 3, "compress_type": "avgpool", "cu_seqlens": cu_seqlens}
    with within_limits(grids, "compress_forward", *(f"{op}_forward" for op in BRANCHES)):
        ops.native_sparse_attention(q, k, v, gate, **sizes)
    leaves = [x.requires_grad_() for x in (q, k, v, gate)]
    with within_limits(grids, "compress_backward", *(f"{op}_backward" for op in BRANCHES)):
        ops.native_sparse_attention(*leaves, **sizes).sum().backward()
    assert q.grad is not None


@torch.no_grad()
def test_a_decoding_step(grids: list[tuple[str, tuple[int, ...]]]) -> None:
    """Each sequence appends a token, attends to compressed keys, selects and attends."""
    rows, at = torch.arange(MANY, dtype=torch.int32), torch.full((MANY,), 6, dtype=torch.int32)
    q, new_k, new_v, gate = tensors(MANY, 1)
    k, v, ck, cv = (torch.zeros(MANY, n, 1, DIM) for n in (8, 8, 3, 3))
    cos, sin = torch.zeros(2, 16, DIM // 2)
    windows = {name: NSA[name] for name in ("kernel_size", "kernel_stride")}
    tail = torch.zeros(MANY, NSA["kernel_size"], 1, DIM)
    with within_limits(
        grids,
        "cache_append_decode",
        "compressed_attention_decode",
        "native_sparse_attention_decode",
    ):
        ops.cache_append(
            *(q, new_k, new_v, cos, sin, None, None, None, at, rows, k, v, ck, cv, tail),
            compress_type="avgpool",
            **windows,
        )
        o, _ = ops.compressed_attention_decode(
            q, ck, cv, at, rows, **NSA, init_blocks=1, local_blocks=2
        )
        topk_idx = torch.zeros(1, MANY, NSA["topk"], dtype=torch.int32)
        ops.native_sparse_attention_decode(
            q, k, v, topk_idx, at, rows, o, gate, block_size=NSA["block_size"], window_size=3
        )


def test_more_heads_than_places_are_refused(grids: list[tuple[str, tuple[int, ...]]]) -> None:
    q, k, v, gate = tensors(4, PLACES + 1)
    cu_seqlens = torch.tensor([0, 4], dtype=torch.int32)
    sizes = {**NSA, "window_size": 3, "compress_type": "avgpool", "cu_seqlens": cu_seqlens}
    with pytest.raises(InvalidInputError, match="at most 65535 key/value heads; got 65536"):
        ops.native_sparse_attention(q, k, v, gate, **sizes)
    assert not grids
