"""Shapes, names, layouts and refusals of the two toy models."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.model import (
    InferenceConfig,
    NativeSparseAttention,
    RopeConfig,
    ToyLlama,
    ToyNSALlama,
)
from tests.model.tiny import SPARSITY, dense_config, nsa_config, nsa_model, packed_batch

LIMITS = InferenceConfig(max_batch_size=4, max_length=64, max_new_tokens=3)

LLAMA_LAYER = {
    "self_attn.q_proj.weight": (128, 64),
    "self_attn.k_proj.weight": (64, 64),
    "self_attn.v_proj.weight": (64, 64),
    "self_attn.o_proj.weight": (64, 128),
    "mlp.gate_proj.weight": (128, 64),
    "mlp.up_proj.weight": (128, 64),
    "mlp.down_proj.weight": (64, 128),
    "input_layernorm.weight": (64,),
    "post_attention_layernorm.weight": (64,),
}

NSA_LAYER = {
    "self_attn.gate.weight": (12, 64),
    "self_attn.compress_key": (2, 8),
    "self_attn.compress_value": (2, 8),
    "self_attn.intra_block_pe": (2, 8, 32),
}


def names(layer: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    return {
        "model.embed_tokens.weight": (512, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (512, 64),
        **{f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()},
    }


def test_weights_have_the_names_of_transformers_llama() -> None:
    dense = {k: tuple(v.shape) for k, v in ToyLlama(dense_config()).state_dict().items()}
    assert dense == names(LLAMA_LAYER)
    sparse = {k: tuple(v.shape) for k, v in ToyNSALlama(nsa_config()).state_dict().items()}
    assert sparse == names({**LLAMA_LAYER, **NSA_LAYER})


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_compression_starts_as_the_mean(compress_type: str) -> None:
    """An mlp needs two hidden units for each component of a head."""
    model = ToyNSALlama(nsa_config(compress_type=compress_type, mlp_hidden=2 * 32)).double()
    mean = ToyNSALlama(nsa_config(compress_type="avgpool")).double()
    mean.load_state_dict(
        {k: v for k, v in model.state_dict().items() if "compress_" not in k}, strict=True
    )
    ids, cu_seqlens = packed_batch([70, 9])
    torch.testing.assert_close(model(ids, cu_seqlens), mean(ids, cu_seqlens))


def test_initial_weights_repeat_with_the_generator_and_spread_as_configured() -> None:
    one, two = (
        ToyNSALlama(nsa_config(), generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.lm_head.weight.std().item() == pytest.approx(0.2, rel=0.05)


@pytest.mark.parametrize("make", [lambda: nsa_model(), lambda: ToyLlama(dense_config()).double()])
def test_ragged_batches_equal_one_by_one(make: Callable[[], ToyNSALlama]) -> None:
    model = make()
    lengths = [0, 1, 7, 8, 8, 8, 0, 0, 9, 16, 100, 33, 0]
    ids, cu_seqlens = packed_batch(lengths)
    logits = model(ids, cu_seqlens)
    assert logits.shape == (sum(lengths), 512)
    assert logits.dtype == torch.float32
    for piece, one in zip(logits.split(lengths), ids.split(lengths), strict=True):
        alone = model(one, torch.tensor([0, one.shape[0]], dtype=torch.int32))
        torch.testing.assert_close(piece, alone, rtol=1e-5, atol=1e-5)


def test_no_tokens_at_all() -> None:
    ids, cu_seqlens = packed_batch([0, 0])
    assert nsa_model()(ids, cu_seqlens).shape == (0, 512)
    assert ToyLlama(dense_config())(ids, cu_seqlens).shape == (0, 512)


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_every_parameter_gets_a_gradient(compress_type: str) -> None:
    model = nsa_model(compress_type=compress_type)
    model(*packed_batch([40, 3])).square().mean().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.filterwarnings("ignore")
def test_the_compiler_sees_through_forward() -> None:
    model = nsa_model(dtype=torch.float32, num_hidden_layers=1)
    batch = packed_batch([40, 0, 3])
    expected = model(*batch)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(*batch)
    torch.testing.assert_close(compiled, expected)
    compiled.sum().backward()
    with torch.no_grad():
        exported = torch.export.export(model, batch)
        torch.testing.assert_close(exported.module()(*batch), expected)


def test_casting_the_model_keeps_rope_exact() -> None:
    model = ToyNSALlama(nsa_config())
    exact = model.model.rotary_emb.cos.clone()
    model = model.to(torch.bfloat16)
    assert model.lm_head.weight.dtype == torch.bfloat16
    for layer in model.model.layers:
        assert layer.self_attn.rotary_emb is model.model.rotary_emb
    assert torch.equal(model.model.rotary_emb.cos, exact)


def test_the_attention_module_stands_alone() -> None:
    module = NativeSparseAttention(
        compress_type="linear",
        hidden_size=48,
        num_q_heads=6,
        num_kv_heads=2,
        head_dim=16,
        rope_config=RopeConfig(256, head_dim=16),
        **SPARSITY,
    )
    _, cu_seqlens = packed_batch([30, 0, 50])
    assert module(torch.randn(80, 48), cu_seqlens).shape == (80, 48)


@pytest.mark.parametrize(
    ("lengths", "changes", "text"),
    [
        ([5, 62], {}, r"sequence 1: .*max_length=64, got 62 \+ 3 = 65; shorten the prompt"),
        ([5, 0, 4], {}, "sequence 1: a prompt must have at least one token"),
        ([1] * 5, {}, "max_batch_size=4 sequences, got 5"),
        ([5], {"max_new_tokens": 60}, r"sequence 0: .*got 5 \+ 60 = 65"),
        ([5], {"max_new_tokens": -2}, "max_new_tokens must be -1 or at least 0, got -2"),
    ],
)
def test_generate_refuses_before_it_works(
    lengths: list[int], changes: dict[str, int], text: str
) -> None:
    for model in (nsa_model(LIMITS), ToyLlama(dense_config(), LIMITS)):
        with pytest.raises(InvalidInputError, match=text):
            model.generate(*packed_batch(lengths), **changes)
        assert not model._idle_batches, "nothing may be allocated before the checks"


def test_generate_at_the_limit_and_with_nothing_to_do() -> None:
    model = nsa_model(LIMITS)
    assert model.generate(*packed_batch([61])).shape == (1, 3)
    assert model.generate(*packed_batch([5, 6]), max_new_tokens=0).shape == (2, 0)
    assert model.generate(*packed_batch([])).shape == (0, 3)


def test_refusals_of_a_wrong_batch() -> None:
    model = nsa_model(LIMITS)
    ids, cu_seqlens = packed_batch([5, 6])
    with pytest.raises(InvalidInputError, match=r"from 0 to N=11 .* got \[0, 5, 12\]"):
        model(ids, torch.tensor([0, 5, 12], dtype=torch.int32))
    with pytest.raises(InvalidInputError, match="without decreasing"):
        model.generate(ids, torch.tensor([0, 12, 11], dtype=torch.int32))
    with pytest.raises(InvalidInputError, match=r"shape \[N\].*got shape \[1, 11\]"):
        model(ids[None], cu_seqlens)
    with pytest.raises(InvalidInputError, match="from 0 to vocab_size-1=511, got values"):
        model.generate(ids + 600, cu_seqlens)
    with pytest.raises(InvalidInputError, match="max_position_embeddings=1024 tokens, got 1025"):
        model(*packed_batch([3, 1025]))
    with pytest.raises(InvalidInputError, match="cu_seqlens must be int32"):
        model(ids, cu_seqlens.float())


def test_refusals_of_wrong_limits() -> None:
    with pytest.raises(InvalidInputError, match="max_position_embeddings=1024, got 2048"):
        ToyNSALlama(nsa_config(), InferenceConfig(max_length=2048))
    with pytest.raises(InvalidInputError, match=r"build it with ToyNSALlama\(config, Inference"):
        ToyNSALlama(nsa_config()).generate(*packed_batch([5]))


def test_attention_of_ones_own_serves_whole_sequences() -> None:
    model = ToyLlama(dense_config(), InferenceConfig(1, 64)).double()
    ids, cu_seqlens = packed_batch([5, 3])
    dense = model(ids, cu_seqlens)
    for layer in model.model.layers:
        layer.self_attn.attend = lambda q, k, v, *_: v.repeat_interleave(2, 1)  # each to itself
    own = model(ids, cu_seqlens)
    assert not torch.allclose(own, dense)
    assert torch.allclose(own[:5], model(ids[:5], cu_seqlens[:2]))
    with pytest.raises(InvalidInputError, match="behind a cache need attend=attend_causally"):
        model.generate(ids[:5], cu_seqlens[:2], 2)
