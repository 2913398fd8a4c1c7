"""Joined weights: one product for several layers, whose parameters stay what they were."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F

from nsagen import ops
from nsagen.model import InferenceConfig, ToyNSALlama
from nsagen.model.layers import RMSNorm, joined_weight, linear, project
from tests.model.tiny import nsa_config, nsa_model, packed_batch

LIMITS = InferenceConfig(2, 64, 4)
BATCH = packed_batch([9, 30])


def joined_model() -> ToyNSALlama:
    model = nsa_model(LIMITS)
    model.generate(*BATCH)
    return model


def fresh(model: ToyNSALlama) -> ToyNSALlama:
    """The same weights in a model whose parameters were never joined."""
    other = ToyNSALlama(nsa_config(), LIMITS).double()
    with torch.no_grad():
        for ours, theirs in zip(other.parameters(), model.parameters(), strict=True):
            ours.copy_(theirs)
    return other


def check(model: ToyNSALlama) -> None:
    expected = fresh(model).generate(*BATCH)
    assert torch.equal(model.generate(*BATCH), expected)


def test_parameters_become_views_and_stay_parameters() -> None:
    layers = [linear(8, n, 1.0) for n in (6, 2, 4)]
    parameters = [layer.weight for layer in layers]
    values = [weight.detach().clone() for weight in parameters]
    joined = joined_weight(*layers)
    assert torch.equal(joined, torch.cat(values))
    for layer, weight, value in zip(layers, parameters, values, strict=True):
        assert layer.weight is weight
        assert weight.is_contiguous()
        assert torch.equal(weight, value)
    with torch.no_grad():
        parameters[1].fill_(3.0)
    again = joined_weight(*layers)
    assert again.data_ptr() == joined.data_ptr(), "joined once, not at every call"
    assert (again[6:8] == 3.0).all()
    assert not joined_weight(*layers).requires_grad


def test_a_training_step_reaches_generation() -> None:
    model = joined_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    for _ in range(2):
        model(*BATCH).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        check(model)


@pytest.mark.parametrize("assign", [False, True])
def test_a_loaded_checkpoint_reaches_generation(assign: bool) -> None:
    model, other = joined_model(), nsa_model(LIMITS, compress_type="weightedpool")
    with torch.no_grad():
        for weight in other.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)
    model.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(model.generate(*BATCH), other.generate(*BATCH))
    check(model)


def test_copies_and_casts_do_not_share() -> None:
    model = joined_model()
    twin = copy.deepcopy(model)
    assert model._idle_batches
    assert not twin._idle_batches, "a copy starts without a cache"
    with torch.no_grad():
        twin.model.layers[0].mlp.gate_proj.weight.zero_()
    check(model)
    check(twin)
    check(model.float().double())


def test_checkpoints_hold_each_weight_once(tmp_path: Path) -> None:
    model = joined_model()
    size = sum(weight.nbytes for weight in model.parameters())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)
    assert buffer.tell() < 1.1 * size
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    loaded = safetensors.torch.load_file(tmp_path / "model.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@torch.no_grad()
def test_project_does_what_the_layers_do(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(5, n, generator=generator).to(dtype) for n in (16, 8))
    norm, layer = RMSNorm(16, 1e-5), linear(16, 16, 1.0, generator)
    norm.weight.copy_(torch.rand(16, generator=generator))
    norm, weight = norm.to(dtype), layer.to(dtype).weight.detach()
    kwargs = {"norm": norm, "residual": residual, "swiglu": True}
    gate, up = F.linear(norm(x), weight).chunk(2, -1)
    torch.testing.assert_close(project(x, weight, **kwargs), residual + F.silu(gate) * up)
    op = ops.linear_decode(
        x, weight, norm_weight=norm.weight, eps=1e-5, residual=residual, swiglu=True
    )
    bound = 1e-2 if dtype == torch.bfloat16 else 1e-6
    assert (op - project(x, weight, **kwargs)).norm() <= bound * op.norm()
    gated = project(x, weight, sigmoid_from=10)
    plain = F.linear(x, weight)
    torch.testing.assert_close(gated, torch.cat([plain[:, :10], plain[:, 10:].sigmoid()], 1))
