"""Gradients of a whole model: by finite differences, compiled, and through kernels."""

from __future__ import annotations

import os
import shutil
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nsagen.cases.base import relative_error
from nsagen.core.paths import templates_dir
from nsagen.core.workload import COMPRESS_TYPES, STATIC_PARAMS
from nsagen.model import ToyNSALlama
from nsagen.model.packing import Packed
from tests.model.forms import EVERY
from tests.model.tiny import nsa_model, packed_batch
from tests.support import kernel_device, kernel_dtypes

MISSING = sorted(
    f"{op} {pass_}"
    for op, pass_ in STATIC_PARAMS
    if pass_ in ("forward", "backward") and not list((templates_dir() / op).glob(f"{pass_}_*.j2"))
)
"""Passes that training runs and that have no template."""

runs_kernels = torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"

THRESHOLDS = {"float32": 1e-4, "float16": 1e-2, "bfloat16": 6e-2}
"""Relative errors of a parameter's gradient: that of one kernel, with room for what a few
operations in a row, forward and back, make of it."""


def loss_of(model: nn.Module, lengths: list[int], device: str = "cpu") -> Tensor:
    """Cross entropy of random next tokens."""
    ids, cu_seqlens = packed_batch(lengths)
    logits = model(ids.to(device), cu_seqlens.to(device))
    return F.cross_entropy(logits, ids.roll(-1).to(device))


class Exact(nn.Module):
    """A model without the rounding of its logits to float32, which drowns small differences."""

    def __init__(self, model: ToyNSALlama) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: Tensor, cu_seqlens: Tensor) -> Tensor:
        packed = Packed.of(cu_seqlens, ids.shape[0])
        return self.inner.lm_head(self.inner.model(ids, packed))


def gradients(model: nn.Module, lengths: list[int], device: str = "cpu") -> dict[str, Tensor]:
    """The gradient of `loss_of` for each parameter."""
    model.zero_grad()
    loss_of(model, lengths, device).backward()
    return {name: p.grad.cpu() for name, p in model.named_parameters() if p.grad is not None}


def one_layer(dtype: torch.dtype = torch.float64, **changes: Any) -> ToyNSALlama:
    return nsa_model(dtype=dtype, **{"num_hidden_layers": 1, **changes})


def check_finite_differences(inner: ToyNSALlama) -> None:
    """Along a random direction for each parameter; no sequence has more blocks than topk."""
    lengths = [5, 0, 41, 18]
    model = Exact(inner)
    generator = torch.Generator().manual_seed(2)
    step = 1e-5
    found = gradients(model, lengths)
    for name, parameter in model.named_parameters():
        direction = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        losses = []
        with torch.no_grad():
            for move in (step, -2 * step):
                parameter += move * direction
                losses.append(loss_of(model, lengths).item())
            parameter += step * direction
        expected = (losses[0] - losses[1]) / (2 * step)
        assert (found[name] * direction).sum().item() == pytest.approx(expected, 1e-4, 1e-7), name


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_finite_differences(compress_type: str) -> None:
    check_finite_differences(one_layer(compress_type=compress_type))


@pytest.mark.parametrize(
    "backend",
    [
        "aot_eager",
        pytest.param(
            "inductor",
            marks=[
                pytest.mark.slow,
                pytest.mark.skipif(not shutil.which("g++"), reason="needs a C++ compiler"),
            ],
        ),
    ],
)
@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_compiled_gradients_are_the_same(compress_type: str, backend: str) -> None:
    lengths = [5, 0, 90, 18]
    model = one_layer(torch.float32, compress_type=compress_type)
    expected = gradients(model, lengths)
    torch.compiler.reset()
    found = gradients(torch.compile(model, backend=backend, fullgraph=True), lengths)
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name.removeprefix("_orig_mod.")])


@pytest.fixture
def _own_kernel_cache(
    tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "gradients"))


@pytest.mark.kernel
@pytest.mark.skipif(not runs_kernels, reason="needs a GPU, or TRITON_INTERPRET=1")
@pytest.mark.skipif(bool(MISSING), reason=f"no templates yet for {', '.join(MISSING)}")
@pytest.mark.usefixtures("_own_kernel_cache")
@pytest.mark.parametrize(
    ("form", "dtype"),
    [
        ("linear", "float32"),
        ("weightedpool", kernel_dtypes()[-1]),
        ("the paper's", "float32"),
        pytest.param("avgpool", "float32", marks=pytest.mark.slow),
        pytest.param("weightedpool", "float32", marks=pytest.mark.slow),
        pytest.param("gated values", "float32", marks=pytest.mark.slow),
        pytest.param("no window", "float32", marks=pytest.mark.slow),
        pytest.param("avgpool", "float16", marks=pytest.mark.slow),
        pytest.param("the paper's", kernel_dtypes()[-1], marks=pytest.mark.slow),
    ],
)
def test_kernels_give_the_references_gradients(form: str, dtype: str) -> None:
    """One sequence has more blocks than topk where rounding is too small to move a choice."""
    lengths = [5, 0, 66] if dtype == "float32" else [5, 0, 41]
    device = kernel_device()
    kernels = one_layer(getattr(torch, dtype), **EVERY[form]).to(device)
    reference = one_layer(**EVERY[form])  # float64 has no kernels
    with torch.no_grad():  # from the same, rounded weights
        for ours, theirs in zip(kernels.parameters(), reference.parameters(), strict=True):
            theirs.copy_(ours)
    found, expected = gradients(kernels, lengths, device), gradients(reference, lengths)
    for name, gradient in expected.items():
        error = relative_error(found[name], gradient)
        assert error <= THRESHOLDS[dtype], f"{name}: relative error {error:.1e}"


if torch.cuda.is_available():
    test_kernels_give_the_references_gradients = pytest.mark.gpu(
        test_kernels_give_the_references_gradients
    )


def test_torch_func_differentiates_a_model() -> None:
    """torch.func.grad of a functional call gives the gradients of backward()."""
    model = nsa_model()
    ids, cu_seqlens = packed_batch([11, 40])

    def loss(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(model, weights, (ids, cu_seqlens)).square().mean()

    loss(dict(model.named_parameters())).backward()
    found = torch.func.grad(loss)({n: p.detach() for n, p in model.named_parameters()})
    for name, weight in model.named_parameters():
        assert torch.allclose(found[name], weight.grad), name
