"""What the index's loss refuses, and which kernels it takes."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, relative_error
from nsagen.core.errors import InvalidInputError
from nsagen.ops import _op, index_loss, reference


@pytest.mark.parametrize("warm_up", [False, True])
def test_a_chunk_of_a_sequence_is_refused_by_name(warm_up: bool) -> None:
    """Fewer queries than keys: with or without selected blocks."""
    q, k = torch.randn(6, 4, 16), torch.randn(10, 2, 16)
    index_q, index_k = torch.randn(6, 2, 16), torch.randn(10, 1, 16)
    topk_idx = None if warm_up else torch.zeros(2, 6, 1, dtype=torch.int32)
    ends = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(InvalidInputError, match=r"a chunk \(q_start, cu_seqlens_k\) has"):
        index_loss(q, k, index_q, index_k, topk_idx, ends, block_size=8)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="needs the interpreter")
@pytest.mark.parametrize("warm_up", [False, True])
def test_both_passes_take_the_kernels_of_the_queries_dtype(
    warm_up: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss and its gradient are float32; the dense warm-up has kernels of its own."""
    usual, found = _op.find_kernel, []

    def find(dispatcher: str, op: str, pass_: str, params: Any, x: torch.Tensor, *more: Any) -> Any:
        found.append((op, pass_, x.dtype))
        return usual(dispatcher, op, pass_, params, x, *more)

    monkeypatch.setattr(_op, "find_kernel", find)
    tensors = [torch.randn(5, heads, 16, dtype=torch.float16) for heads in (2, 1, 1, 1)]
    for x in tensors[2:]:
        x.requires_grad_()
    topk_idx, ends = torch.zeros(1, 5, 1, dtype=torch.int32), torch.tensor([0, 5]).int()
    blocks, op = (None, "dense_index_loss") if warm_up else (topk_idx, "index_loss")
    index_loss(*tensors, blocks, ends, block_size=8).sum().backward()
    assert found == [(op, pass_, torch.float16) for pass_ in ("forward", "backward")]
    for x in tensors[2:]:
        expected = x.detach().double().requires_grad_()
        others = [y.detach().double() if y is not x else expected for y in tensors]
        reference.index_loss(*others, blocks, ends, block_size=8).sum().backward()
        assert relative_error(x.grad, expected.grad) < THRESHOLDS[torch.float16]
