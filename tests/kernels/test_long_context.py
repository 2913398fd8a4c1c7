"""More than 262144 tokens in one sequence: outputs and inputs of more than 2^31 elements.

The last tokens' rows are compared with the reference, computed in float64 for these alone.
"""

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Sizes, cu_seqlens_of, relative_error
from nsagen.cases.selected_attention import random_blocks
from nsagen.ops import (
    compressed_attention,
    reference,
    sliding_window_attention,
    topk_sparse_attention,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU with 40 GB"),
]

TOKENS, HEADS, KV_HEADS, DIM = 270_336, 64, 4, 128
LAST = 3
"""Tokens at the sequence's end whose rows are compared."""


def normal(*shape, seed):
    random = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(shape, dtype=torch.bfloat16, device="cuda", generator=random)


@pytest.fixture(scope="module")
def call():
    """q, k, v and the offsets of one sequence and of its last tokens."""
    assert TOKENS * HEADS * DIM > 2**31
    q = normal(TOKENS, HEADS, DIM, seed=0)
    k, v = (normal(TOKENS, KV_HEADS, DIM, seed=seed) for seed in (1, 2))
    return q, k, v, cu_seqlens_of((TOKENS,), "cuda")


def chunk(offsets):
    """What tells the reference that it gets the last queries only."""
    start = torch.tensor([TOKENS - LAST], dtype=torch.int32, device="cuda")
    return {"cu_seqlens_k": offsets, "q_start": start}


def agree(out, right):
    error = relative_error(out[-LAST:], right)
    assert error <= THRESHOLDS[out.dtype], f"relative error {error:.2e}"
    assert bool(torch.isfinite(out[:: TOKENS // 64]).all())


def test_sliding_window_attention(call):
    q, k, v, offsets = call
    out = sliding_window_attention(q, k, v, 512, offsets)
    few = cu_seqlens_of((LAST,), "cuda")
    wide = (x.double() for x in (q[-LAST:], k, v))
    right, _ = reference.sliding_window_attention_forward(
        *wide, few, window_size=512, **chunk(offsets)
    )
    agree(out, right)


def test_selected_attention(call):
    q, k, v, offsets = call
    random = torch.Generator("cuda").manual_seed(3)
    blocks = random_blocks(Sizes((TOKENS,), KV_HEADS), 64, "cuda", random)
    out = topk_sparse_attention(q, k, v, blocks, 64, offsets)
    few = cu_seqlens_of((LAST,), "cuda")
    wide = (x.double() for x in (q[-LAST:], k, v))
    last = blocks[:, -LAST:].contiguous()
    right, _ = reference.selected_attention(*wide, last, few, block_size=64, **chunk(offsets))
    agree(out, right)


def test_compressed_attention_and_selection(call):
    q, k, v, offsets = call
    ck, cv = (x[: TOKENS // 16 * 16].view(-1, 16, KV_HEADS, DIM).float().mean(1) for x in (k, v))
    windows = (TOKENS - 32) // 16 + 1
    ck, cv = (x[:windows].bfloat16() for x in (ck, cv))
    window_offsets = cu_seqlens_of((windows,), "cuda")
    out, blocks = compressed_attention(q, ck, cv, 32, 16, 64, 16, offsets, window_offsets)
    wide = (x.double() for x in (q[-LAST:], ck, cv))
    few = cu_seqlens_of((LAST,), "cuda")
    right, _ = reference.compressed_attention_forward(
        *wide,
        few,
        window_offsets,
        kernel_size=32,
        kernel_stride=16,
        q_start=chunk(offsets)["q_start"],
    )
    agree(out, right)
    last = blocks[:, -1]
    assert bool((last.diff(dim=-1) > 0).all())
    assert bool((last[:, 0] == 0).all())
    assert bool((last[:, -2:] == torch.tensor([4222, 4223], device="cuda")).all())


def test_gradients(call):
    """Of the last tokens' queries: only these have an output that the loss sees."""
    q, k, v, offsets = call
    q = q.detach().requires_grad_()
    out = sliding_window_attention(q, k, v, 512, offsets)
    do = normal(LAST, HEADS, DIM, seed=4)
    out[-LAST:].backward(do)
    few = cu_seqlens_of((LAST,), "cuda")
    last = q[-LAST:].detach().double().requires_grad_()
    right, _ = reference.sliding_window_attention_forward(
        last, k.double(), v.double(), few, window_size=512, **chunk(offsets)
    )
    right.backward(do.double())
    assert q.grad is not None
    assert last.grad is not None
    agree(q.grad, last.grad)
    assert not q.grad[0].any()
