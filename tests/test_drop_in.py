"""A user of the guide's package changes the import line and nothing else.

Names, arguments and the order of calls are the guide's; sizes are small.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn as nn

from nsagen.model import InferenceConfig, ToyNSALlama, ToyNSALlamaConfig
from nsagen.ops import (
    avgpool_compress,
    compressed_attention,
    linear_compress,
    topk_sparse_attention,
    weightedpool_compress,
)

COMPRESS = {
    "avgpool": avgpool_compress,
    "weightedpool": weightedpool_compress,
    "linear": linear_compress,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("compress_type", COMPRESS)
def test_the_guide_step_by_step(compress_type: str) -> None:
    config = ToyNSALlamaConfig(
        hidden_size=128,
        intermediate_size=224,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=512,
        max_position_embeddings=4096,
        rope_theta=500000.0,
        rope_scaling={
            "factor": 8.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 512,
            "rope_type": "llama3",
        },
        compress_type=compress_type,
        kernel_size=8,
        kernel_stride=4,
        block_size=16,
        topk=4,
        init_blocks=1,
        local_blocks=2,
        window_size=32,
    )
    inference_config = InferenceConfig(
        max_batch_size=4,
        max_length=256,
        max_new_tokens=6,
    )
    model = ToyNSALlama(config, inference_config).to(torch.bfloat16)
    assert isinstance(model, nn.Module)

    batch_size = 4
    seqlens = torch.randint(1, 128, (batch_size,), dtype=torch.int32)
    cu_seqlens = torch.zeros(batch_size + 1, dtype=torch.int32)
    cu_seqlens[1:] = torch.cumsum(seqlens, dim=0)
    input_ids = torch.randint(0, 512, (int(cu_seqlens[-1]),), dtype=torch.int64)

    logits = model(input_ids, cu_seqlens)
    assert logits.shape == (input_ids.shape[0], config.vocab_size)
    assert logits.isfinite().all()
    logits.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())

    output_tokens = model.generate(input_ids, cu_seqlens)
    assert output_tokens.shape == (batch_size, inference_config.max_new_tokens)
    last = cu_seqlens[1:] - 1
    near = logits[last].topk(2).values
    clear = near[:, 0] - near[:, 1] > 0.1  # bfloat16 may decide a near tie either way
    assert torch.equal(output_tokens[clear, 0], logits[last].argmax(-1)[clear])


@pytest.mark.parametrize("compress_type", COMPRESS)
def test_the_ops_by_position(compress_type: str) -> None:
    """As code calls them that names none of the arguments."""
    tokens, q_heads, kv_heads, dim, size, stride = 150, 8, 2, 16, 8, 4
    seqlens = torch.tensor([100, 50], dtype=torch.int32)
    cu_seqlens = torch.nn.functional.pad(seqlens.cumsum(0), (1, 0)).to(torch.int32)
    q = torch.randn(tokens, q_heads, dim, requires_grad=True)
    k, v = (torch.randn(tokens, kv_heads, dim, requires_grad=True) for _ in range(2))
    weight = {
        "avgpool": None,
        "weightedpool": torch.full((kv_heads, size), 1 / size),
        "linear": torch.randn(kv_heads, size * dim, dim) / size,
    }[compress_type]
    pe = torch.randn(kv_heads, size, dim)
    compress = COMPRESS[compress_type]
    ck, ck_cu_seqlens = compress(k, weight, cu_seqlens, size, stride, pe)  # type: ignore[arg-type]
    cv, _ = compress(v, weight, cu_seqlens, size, stride, None)  # type: ignore[arg-type]
    windows = [(n - size) // stride + 1 for n in seqlens.tolist()]
    assert ck.shape == (sum(windows), kv_heads, dim)
    assert ck_cu_seqlens.tolist() == [0, windows[0], sum(windows)]
    longest = (int(seqlens.max()), max(windows))
    o, topk_idx = compressed_attention(
        q, ck, cv, size, stride, 16, 4, cu_seqlens, ck_cu_seqlens, *longest, None, 1, 2
    )
    assert o.shape == q.shape
    assert topk_idx.shape == (kv_heads, tokens, 4)
    o = topk_sparse_attention(q, k, v, topk_idx, 16, cu_seqlens, None)
    assert o.shape == q.shape
    o.sum().backward()
    assert q.grad is not None
