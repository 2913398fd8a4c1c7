"""Models whose weights come one by one: rope tables follow, and what is missing is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

from nsagen.core.errors import InvalidInputError
from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    NativeSparseAttention,
    RopeConfig,
    ToyLlama,
    ToyNSALlama,
)
from tests.model.tiny import SPARSITY, dense_config, nsa_config, packed_batch

LIMITS = InferenceConfig(2, 64, 4)
BATCH = packed_batch([9, 30])
Model = ToyNSALlama | ToyLlama
MODELS = pytest.mark.parametrize(
    "make", [lambda: ToyNSALlama(nsa_config(), LIMITS), lambda: ToyLlama(dense_config(), LIMITS)]
)


def without_weights(make: Callable[[], Model]) -> Model:
    with torch.device("meta"):
        return make()


def set_weights(empty: Model, model: Model, but: str = "") -> None:
    """Put parameters into their modules one by one, as loaders do that know no state dict."""
    for name, weight in model.state_dict().items():
        path, _, last = name.rpartition(".")
        if name != but:
            setattr(empty.get_submodule(path), last, nn.Parameter(weight))


@MODELS
def test_weights_that_are_set_one_by_one_find_rope_tables(make: Callable[[], Model]) -> None:
    model, empty = make(), without_weights(make)
    set_weights(empty, model)
    with torch.inference_mode():
        assert torch.equal(empty(*BATCH), model(*BATCH))
    empty(*BATCH).sum().backward()
    fresh = without_weights(make)
    set_weights(fresh, model)
    assert torch.equal(fresh.generate(*BATCH), model.generate(*BATCH))
    moved = without_weights(make)
    set_weights(moved, model)
    assert torch.equal(moved.to("cpu").double()(*BATCH), model.double()(*BATCH))


@MODELS
def test_accelerate_loads_a_model_that_was_built_on_meta(
    make: Callable[[], Model], tmp_path: Path
) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, empty = make(), without_weights(make)
    model.save_pretrained(tmp_path)
    accelerate.load_checkpoint_and_dispatch(empty, str(tmp_path), device_map={"": "cpu"})
    assert torch.equal(empty(*BATCH), model(*BATCH))
    assert torch.equal(empty.generate(*BATCH), model.generate(*BATCH))


@MODELS
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.weight", "lm_head.weight"])
def test_a_weight_that_is_missing_is_refused_by_name(make: Callable[[], Model], name: str) -> None:
    """PyTorch multiplies by it without an error, and returns what was in the memory."""
    model, empty = make(), without_weights(make)
    set_weights(empty, model, but=name)
    text = f"the weights must be in memory, got {name} on the meta device; load them first"
    for call, where in ((empty, r"Toy.*Llama\.forward"), (empty.generate, "generate")):
        with pytest.raises(InvalidInputError, match=f"{where}: {text}"):
            call(*BATCH)
    with pytest.raises(InvalidInputError, match=f"ContinuousBatch: {text}"):
        ContinuousBatch(empty)


def test_an_attention_without_weights_is_refused_by_name() -> None:
    with torch.device("meta"):
        attention = NativeSparseAttention(
            "avgpool", 64, 4, 2, 32, **SPARSITY, rope_config=RopeConfig(64, 32)
        )
    ends = torch.tensor([0, 20])
    text = "NativeSparseAttention.forward: .*in memory, got intra_block_pe on the meta device"
    with pytest.raises(InvalidInputError, match=text):
        attention(torch.ones(20, 64), ends)
    assert attention(torch.ones(20, 64, device="meta"), ends.int().to("meta")).shape == (20, 64)


@MODELS
def test_a_model_without_weights_says_shapes(make: Callable[[], Model]) -> None:
    empty = without_weights(make)
    if isinstance(empty, ToyNSALlama):  # dense attention reads the lengths
        assert empty(*(tensor.to("meta") for tensor in BATCH)).shape == (39, 512)


@MODELS
def test_an_inner_model_may_be_offloaded_whole(make: Callable[[], Model]) -> None:
    """No weight is in memory between calls, so another tensor says where the model computes."""
    accelerate = pytest.importorskip("accelerate")
    model = make()
    tokens = model.generate(*BATCH)
    for part in (model.model, model.lm_head):
        accelerate.cpu_offload(part, torch.device("cpu"))
    assert all(weight.is_meta for weight in model.parameters())
    assert torch.equal(model.generate(*BATCH), tokens)


@MODELS
def test_a_model_whose_offloading_ended_generates_again(make: Callable[[], Model]) -> None:
    """accelerate leaves each module's forward in the module, as its own."""
    accelerate = pytest.importorskip("accelerate")
    model = make()
    tokens = model.generate(*BATCH)
    accelerate.cpu_offload(model, torch.device("cpu"))
    with pytest.raises(InvalidInputError, match=r"put the hook on model\.model or model\.lm_head"):
        model.generate(*BATCH)
    accelerate.hooks.remove_hook_from_submodules(model)
    assert "forward" in vars(model)
    assert torch.equal(model.generate(*BATCH), tokens)
    model.model.layers[1].mlp.to("meta")
    with pytest.raises(InvalidInputError, match=r"got model\.layers\.1\.mlp\.gate_proj\.weight on"):
        model(*BATCH)


@MODELS
def test_an_input_without_values_needs_a_model_without_weights(make: Callable[[], Model]) -> None:
    """PyTorch looks up tokens on the meta device in weights that it has, and returns numbers."""
    model, empty = make(), [tensor.to("meta") for tensor in BATCH]
    text = r"forward: (an input on the meta device needs a model .*, got weights on cpu|cu_seqlens)"
    with pytest.raises(InvalidInputError, match=text):
        model(*empty)
    if isinstance(model, ToyLlama):
        text = "cu_seqlens must have values where the lengths are needed, got a meta tensor"
        with pytest.raises(InvalidInputError, match=text):
            model.to("meta")(*empty)


@MODELS
def test_a_weight_that_goes_later_is_refused_too(make: Callable[[], Model]) -> None:
    model = make()
    model(*BATCH)
    model.model.layers[1].self_attn.o_proj.to("meta")
    with pytest.raises(InvalidInputError, match=r"got model\.layers\.1\.self_attn\.o_proj\.weight"):
        model(*BATCH)


@MODELS
def test_offloaded_weights_are_not_missing(make: Callable[[], Model]) -> None:
    """They are on the meta device until a hook brings them."""
    accelerate = pytest.importorskip("accelerate")
    model = make()
    expected, tokens = model(*BATCH), model.generate(*BATCH)
    for layer in model.model.layers:
        accelerate.cpu_offload(layer.mlp, torch.device("cpu"))
    assert model.model.layers[0].mlp.up_proj.weight.is_meta
    assert torch.equal(model(*BATCH), expected)
    assert torch.equal(model.generate(*BATCH), tokens)
