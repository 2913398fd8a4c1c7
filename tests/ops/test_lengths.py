"""Prepared lengths: one launch for all that depends on a batch's lengths alone."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.errors import InvalidInputError
from nsagen.ops.layout import compressed_cu_seqlens, positions_in_sequence

from .fixed_kernels import compile_fixed
from .inputs import Packed

BATCHES = {
    "one": (40,),
    "ragged": (0, 5, 30, 25),
    "empty": (0, 0),
    "none": (),
    "shorter than a window": (7, 1, 7, 3),
    "many": (3, 9, 0, 17) * 300,  # more sequences than a program looks at in one go, many tiles
    "over tiles": (513, 0, 1030, 7, 8),
}


def offsets(seqlens: tuple[int, ...]) -> Tensor:
    return torch.tensor((0, *seqlens)).cumsum(0).to(torch.int32)


@pytest.mark.kernel
@pytest.mark.parametrize("spare", [0, 9])
@pytest.mark.parametrize("name", BATCHES)
def test_they_are_what_each_op_would_make(
    name: str, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of rows past the last sequence and the last window, 0. By the kernel on the CPU, too."""
    monkeypatch.setattr("nsagen.ops.lengths.interpreting", lambda: False)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    cu_seqlens, tokens = offsets(BATCHES[name]), sum(BATCHES[name]) + spare
    found = ops.Lengths.of(cu_seqlens.to(device), tokens, 8, 4)
    ends = compressed_cu_seqlens(cu_seqlens, 8, 4)
    expected = (
        positions_in_sequence(cu_seqlens, tokens),
        ends,
        positions_in_sequence(ends, tokens // 4) * 4,
    )
    for ours, theirs in zip(found.tensors, expected, strict=True):
        assert ours.dtype == torch.int32
        assert torch.equal(ours.cpu(), theirs)


def test_the_op_meets_its_contract() -> None:
    args = (offsets((0, 5, 30)), 40, 8, 4)
    torch.library.opcheck(torch.ops.nsagen.lengths_forward.default, args)


def test_layers_may_share_them() -> None:
    args, keywords = Packed().block()
    lengths = ops.Lengths.of(keywords["cu_seqlens"], 60, 8, 4)
    expected = ops.native_sparse_attention(*args, **keywords)
    for _ in range(2):
        o = ops.native_sparse_attention(*args, **keywords, lengths=lengths)
        assert torch.equal(o, expected)
    sizes = {"compress_type": "avgpool", "kernel_size": 8, "kernel_stride": 4}
    y, ends = ops.compress(args[1], None, None, keywords["cu_seqlens"], **sizes, lengths=lengths)
    assert ends is lengths.window_cu_seqlens
    assert torch.equal(y, ops.compress(args[1], None, None, keywords["cu_seqlens"], **sizes)[0])


def test_those_of_another_batch_are_refused() -> None:
    args, keywords = Packed().block()
    cu_seqlens = keywords["cu_seqlens"]
    for other, text in (
        (ops.Lengths.of(cu_seqlens, 61, 8, 4), r"lengths must be of 60 tokens"),
        (ops.Lengths.of(cu_seqlens, 60, 8, 8), r"windows of \(8, 4\)"),
        (ops.Lengths.of(cu_seqlens.clone(), 60, 8, 4), "of the cu_seqlens that is passed"),
    ):
        with pytest.raises(InvalidInputError, match=text):
            ops.native_sparse_attention(*args, **keywords, lengths=other)


@pytest.mark.parametrize(
    ("cu_seqlens", "sizes", "text"),
    [
        (torch.zeros(2), (8, 4), "cu_seqlens must be int32"),
        (torch.zeros(2, 2, dtype=torch.int32), (8, 4), r"shape \[batch \+ 1\]"),
        (torch.zeros(4, dtype=torch.int32)[::2], (8, 4), "must be contiguous"),
        (torch.zeros(2, dtype=torch.int32), (8, 3), "kernel_size"),
    ],
)
def test_wrong_lengths_are_refused(cu_seqlens: Tensor, sizes: tuple[int, int], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        ops.Lengths.of(cu_seqlens, 8, *sizes)


@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is compiled there")
@pytest.mark.parametrize(("backend", "arch"), [("cuda", 80), ("cuda", 100), ("hip", "gfx942")])
def test_its_kernel_compiles(backend: str, arch: Any) -> None:
    constants = {"STEPS": 3, "TILE": 512, "CHUNK": 8}
    places = ("cu_seqlens", "positions", "window_cu_seqlens", "window_positions")
    assert compile_fixed(
        "lengths_kernel", dict.fromkeys(places, "*i32"), constants, backend, arch
    ).asm
