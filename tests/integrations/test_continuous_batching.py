"""Why `nsagen serve` exists: what Transformers' continuous batching does not take.

Each test states one limit of the installed release. Where one fails, the limit is gone: then serve
that member of the family through Transformers, and say so in docs/serving.md.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")
batching = pytest.importorskip("transformers.generation.continuous_batching.cache")
continuous = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")

import nsagen.integrations.transformers  # noqa: E402, F401  # registers "nsagen"
from nsagen.model import InferenceConfig  # noqa: E402
from nsagen.model.configs import cache_shapes  # noqa: E402
from tests.model.tiny import nsa_config  # noqa: E402


@pytest.mark.parametrize("name", ["nsagen", "paged|nsagen"])
def test_it_takes_no_attention_but_its_own(name: str) -> None:
    """So InfLLM-V2 and MoBA, which its cache could hold, cannot run in it."""
    switch: Any = getattr(continuous.ContinuousBatchingManager, "switch_to_cb_friendly_attn", None)
    if switch is None:
        pytest.skip("this release chooses attention elsewhere")
    model = SimpleNamespace(
        config=SimpleNamespace(_attn_implementation=name), _supports_flash_attn=False
    )
    with pytest.raises(ValueError, match="is not supported for continuous batching"):
        switch(SimpleNamespace(), model)


def test_its_cache_knows_two_kinds_of_layers_and_no_index_keys() -> None:
    """MiniMax-M3's sparse layers keep index keys beside keys and values."""
    config = transformers.LlamaConfig(num_hidden_layers=2)
    config.layer_types = ["full_attention", "minimax_m3_sparse"]
    group = getattr(batching, "group_layers_by_attn_type", None)
    if group is None:
        pytest.skip("this release groups layers elsewhere")
    with pytest.raises(ValueError, match="Invalid layer type: minimax_m3_sparse"):
        group(config)
    kinds = getattr(batching, "ATTN_TYPE_TO_ALLOCATOR", None)
    assert kinds is None or set(kinds) == {"full_attention", "sliding_attention"}


def test_native_sparse_attention_keeps_more_than_keys_and_values() -> None:
    """Compressed keys and values, and the last keys before rope, which make the next window."""
    shapes = cache_shapes(nsa_config(), InferenceConfig(max_batch_size=1, max_length=64))
    assert {"k", "v"} < set(shapes)
    assert len(shapes) > 2
    assert torch.Size(shapes["k"]).numel() > 0
