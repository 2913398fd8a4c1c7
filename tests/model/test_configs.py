"""Configurations: what they accept, what they refuse and how they say so."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nsagen.core.errors import InvalidInputError
from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    KVCache,
    NativeSparseAttention,
    NSACache,
    RopeConfig,
    ToyLlama,
    ToyLlamaConfig,
    ToyNSALlama,
    ToyNSALlamaConfig,
)
from tests.model.tiny import SPARSITY, dense_config, nsa_config

GUIDE = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 8,
    "num_attention_heads": 32,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "vocab_size": 128288,
    "max_position_embeddings": 131072,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "factor": 8.0,
        "high_freq_factor": 4.0,
        "low_freq_factor": 1.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "compress_type": "weightedpool",
    "kernel_size": 32,
    "kernel_stride": 16,
    "block_size": 64,
    "topk": 8,
    "init_blocks": 1,
    "local_blocks": 2,
    "window_size": 512,
}


def test_the_guides_configuration_is_valid() -> None:
    config = ToyNSALlamaConfig(**GUIDE)
    assert config.topk == 8
    assert config.rope.rope_type == "llama3"


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"kernel_size": 4, "kernel_stride": 8}, "did you mean kernel_size=8, kernel_stride=4"),
        ({"kernel_size": 8, "kernel_stride": 3}, "not the other way round.*try kernel_stride=2"),
        ({"block_size": 18}, "block_size must be divisible by kernel_stride.*such as 20"),
        ({"topk": 2}, "topk=2, init_blocks=1, local_blocks=2; raise topk to 3"),
        ({"compress_type": "mean"}, "avgpool, weightedpool, linear, .*, got 'mean'"),
        ({"window_size": -1}, "window_size must be an integer of at least 0, got -1"),
        ({"local_blocks": -1}, "local_blocks must be an integer of at least 0, got -1"),
        ({"topk": True}, "topk must be an integer"),
        ({"num_attention_heads": 5}, "multiple of num_key_value_heads, got 5 and 2"),
        ({"head_dim": 20}, "head_dim must be a multiple of 8 from 16 to 256, got 20"),
        ({"max_position_embeddings": 2**31}, "must be below 2.31, as positions are int32, got 21"),
        ({"rope_theta": 0}, "rope_theta must be a positive number, got 0"),
        ({"rope_scaling": {"rope_type": "yarn"}}, "one of default, llama3, got 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "original_max_position_emb"),
        ({"rope_scaling": {"rope_type": "default", "factor": 2.0}}, r"keys \(none\), got factor"),
    ],
)
def test_refusals_name_the_rule_and_the_values(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        nsa_config(**changes)


def attention(**changes: Any) -> NativeSparseAttention:
    sizes: dict[str, Any] = {"hidden_size": 64, "num_q_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    return NativeSparseAttention(**{"compress_type": "avgpool", **SPARSITY, **sizes, **changes})


DENSE = dense_config()
SPARSE = nsa_config()
WRAPPED = torch.nn.DataParallel(torch.nn.Linear(2, 2))
LIMITS = InferenceConfig(1, 64, 4)

WRONG: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any], str]] = [
    (ToyNSALlama, (SPARSE,), {"dispatcher": 3}, "ToyNSALlama: dispatcher must be .*got 3; pass"),
    (
        ToyNSALlama,
        (SPARSE,),
        {"dispatcher": "llama8b"},
        "got 'llama8b'; pass one, such as nsagen.l",
    ),
    (
        ToyNSALlama,
        (SPARSE,),
        {"generator": 7},
        "generator must be a torch.Generator or None, got 7",
    ),
    (ToyNSALlama, (SPARSE, {"max_length": 8}), {}, "inference_config must be an InferenceConfig"),
    (ToyNSALlama, (DENSE,), {}, "ToyNSALlama: config must be a ToyNSALlamaConfig, got ToyLlamaC"),
    (ToyNSALlama, ({"hidden_size": 64},), {}, "config must be a ToyNSALlamaConfig, got {'hidden"),
    (ToyNSALlama, (None,), {}, "config must be a ToyNSALlamaConfig, got None"),
    (ToyLlama, (SPARSE,), {}, "config must be that of a dense model, got a ToyNSALlamaConfig"),
    (ToyLlama, ("llama",), {}, "ToyLlama: config must be a ToyLlamaConfig, got 'llama'"),
    (ToyLlama, (DENSE,), {"generator": 7}, "ToyLlama: generator must be a torch.Generator"),
    (attention, (), {"dispatcher": 3}, "NativeSparseAttention: dispatcher must be"),
    (attention, (), {"generator": 3}, "NativeSparseAttention: generator must be"),
    (attention, (), {"rope_config": 3}, "rope_config must be a RopeConfig, got 3"),
    (attention, (), {"rope": RopeConfig(head_dim=32)}, "rope must be a RotaryEmbedding, got Rope"),
    (attention, (), {"num_kv_heads": 0}, "num_kv_heads must be a positive integer, got 0"),
    (attention, (), {"num_q_heads": "4"}, "num_q_heads must be a positive integer, got '4'"),
    (attention, (), {"hidden_size": 64.0}, "hidden_size must be a positive integer, got 64.0"),
    (attention, (), {"head_dim": 20}, "head_dim must be a multiple of 8 from 16 to 256, got 20"),
    (attention, (), {"v_head_dim": 8}, "v_head_dim must be a multiple of 8 from 16 to 256, got 8"),
    (NSACache, (DENSE, LIMITS), {}, "NSACache: config must be a ToyNSALlamaConfig"),
    (NSACache, (SPARSE, None), {}, "NSACache: limits must be an InferenceConfig, got None"),
    (NSACache, (SPARSE, LIMITS, "foo"), {}, "NSACache: device must be one .*got 'foo'; such as"),
    (NSACache, (SPARSE, LIMITS, "cpu", "bf16"), {}, "NSACache: dtype must be a dtype, got 'bf16'"),
    (KVCache, (DENSE, LIMITS, "cuda:64"), {}, "KVCache: device .*got 'cuda:64', and PyTorch sees"),
    (ToyLlama.from_pretrained, ("x",), {"device": "foo"}, "from_pretrained: device must be one"),
    (ToyLlama.from_pretrained, ("x",), {"device": "meta"}, "must be one that keeps the weights"),
    (ToyLlama.from_pretrained, ("",), {}, "from_pretrained: folder must be a path, got ''; such"),
    (ToyLlama.from_pretrained, (None,), {}, "from_pretrained: folder must be a path, got None"),
    (ToyLlama(DENSE).save_pretrained, ("",), {}, "save_pretrained: folder must be a path, got ''"),
    (ContinuousBatch, (None,), {}, "the model must be a ToyNSALlama or ToyLlama, got a NoneType"),
    (ContinuousBatch, (WRAPPED,), {}, "got a DataParallel; pass the model itself, not what wraps"),
    (ToyLlama.from_pretrained, ("x",), {"device": 3.5}, "from_pretrained: device .*got 3.5"),
]


@pytest.mark.parametrize(("make", "args", "keywords", "text"), WRONG)
def test_arguments_of_another_kind_are_refused_by_name(
    make: Callable[..., object], args: tuple[Any, ...], keywords: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidInputError, match=text):
        make(*args, **keywords)


def test_unknown_keywords_are_not_swallowed() -> None:
    with pytest.raises(TypeError, match="kernelsize"):
        ToyNSALlamaConfig(kernelsize=32)  # type: ignore[call-arg]


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        nsa_config().topk = 5  # type: ignore[misc]


def test_rope_type_may_have_its_old_name() -> None:
    assert RopeConfig(rope_scaling={"type": "default"}).rope_type == "default"
    assert RopeConfig(rope_scaling=None).rope_type == "default"


@pytest.mark.parametrize("name", ["max_batch_size", "max_length", "max_new_tokens"])
def test_inference_limits_are_positive(name: str) -> None:
    with pytest.raises(InvalidInputError, match=f"InferenceConfig: {name} .* got 0"):
        InferenceConfig(**{name: 0})


def test_cache_bytes_of_the_guides_model() -> None:
    limits = InferenceConfig(max_batch_size=4, max_length=8192, max_new_tokens=128)
    config = ToyNSALlamaConfig(**GUIDE)
    shared = {f.name: getattr(config, f.name) for f in dataclasses.fields(ToyLlamaConfig)}
    full = limits.cache_bytes(ToyLlamaConfig(**shared))
    assert full == 4 * 8192 * 2 * 128 * 8 * 2 * 2
    assert full < limits.cache_bytes(config) <= 1.09 * full


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_cache_bytes_are_what_is_allocated(dtype: torch.dtype) -> None:
    limits = InferenceConfig(max_batch_size=3, max_length=100)
    config = nsa_config()
    assert NSACache(config, limits, dtype=dtype).nbytes == limits.cache_bytes(config, dtype)
    guide = ToyNSALlamaConfig(**GUIDE)
    assert NSACache(guide, limits, "meta", dtype).nbytes == limits.cache_bytes(guide, dtype)


def test_sizes_of_numpy_are_taken_as_pythons(tmp_path: Path) -> None:
    config = nsa_config(
        **{name: np.int64(size) for name, size in SPARSITY.items()},
        hidden_size=np.int32(64),
        v_head_dim=np.int64(16),
        rope_theta=np.float32(10000),
        rms_norm_eps=np.float32(2**-16),
    )
    assert config == nsa_config(v_head_dim=16, rope_theta=10000.0, rms_norm_eps=2**-16)
    kinds = {type(value) for value in vars(config).values()}
    assert not [kind for kind in kinds if kind.__module__ == "numpy"]
    limits = InferenceConfig(np.int64(2), np.int64(64))  # pyright: ignore[reportArgumentType]
    model = ToyNSALlama(config, limits)
    model.save_pretrained(tmp_path)
    assert ToyNSALlama.from_pretrained(tmp_path).config == config
    with pytest.raises(InvalidInputError, match=r"hidden_size must be an integer .*got np\.True_"):
        nsa_config(hidden_size=np.bool_(True))
    attention = NativeSparseAttention(
        "avgpool",
        *map(np.int64, (64, 4, 2, 32)),
        **SPARSITY,
        rope_config=RopeConfig(np.int64(64), np.int64(32)),  # pyright: ignore[reportArgumentType]
    )
    assert type(attention.head_dim) is int
