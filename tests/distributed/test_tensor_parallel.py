"""Tensor parallel by key/value heads, alone and with context parallel and FSDP in one mesh."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.debug import CommDebugMode
from torch.utils._python_dispatch import TorchDispatchMode

from nsagen.core.errors import InvalidInputError
from nsagen.distributed import context_parallel, tensor_parallel, tensor_parallel_plan
from nsagen.model import InferenceConfig, ToyLlama, ToyNSALlama
from nsagen.model.sampling import SamplingConfig
from tests.distributed.ranks import on_ranks
from tests.distributed.test_context_parallel import (
    BATCHES,
    Found,
    assert_equal,
    attention,
    numbers,
    offsets_of,
    passed,
)
from tests.model.forms import EVERY, PAPER
from tests.model.tiny import dense_config, nsa_config
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

MODULE: Any = sys.modules["nsagen.distributed.tensor_parallel"]  # whose name is its function's
IDS = torch.randint(512, (142,), generator=torch.Generator().manual_seed(0))
ENDS = offsets_of([9, 0, 130, 3])


def model_of(kind: str, **changes: Any) -> Any:
    random, limits = torch.Generator().manual_seed(1), InferenceConfig(4, 160)
    if kind == "nsa":
        return ToyNSALlama(nsa_config(**changes), limits, generator=random)
    return ToyLlama(dense_config(**changes), limits, generator=random)


def whole(x: Any) -> Tensor | None:
    return x.full_tensor() if isinstance(x, DTensor) else x


def whole_gradients(module: nn.Module) -> Found:
    found = {}
    for name, parameter in module.named_parameters():
        gradient: Any = parameter.grad
        if isinstance(gradient, DTensor):
            assert not any(place.is_partial() for place in gradient.placements), name
        found[name] = whole(gradient)
    return found


def test_outputs_and_gradients_are_one_process_s() -> None:
    """For forms that have each kind of parameter, spread by their heads."""
    lengths = BATCHES["ragged"]
    forms = ("weightedpool", "the paper's", "no compressed branch")
    expected = {name: passed(attention(**EVERY[name]), lengths) for name in forms}

    def run(rank: int) -> dict[str, Found]:
        mesh = init_device_mesh("cpu", (2,))
        found = {}
        for name in forms:
            module = attention(**EVERY[name])
            kept = {n: p.detach().clone() for n, p in module.named_parameters()}
            tensor_parallel(module, mesh)
            for n, parameter in module.named_parameters():
                assert torch.equal(whole(parameter), kept[n])  # type: ignore[arg-type]
            x = numbers(169, 48).requires_grad_()
            y = module(x, offsets_of(lengths))
            (y * numbers(*x.shape, seed=1)).sum().backward()
            found[name] = {"output": y.detach(), "input": x.grad, **whole_gradients(module)}
        return found

    for found in on_ranks(2, run):
        for name, one in expected.items():
            assert_equal(found[name], one, name)


def test_a_product_is_as_large_as_its_numbers() -> None:
    x, weight = torch.zeros(3, 5, 8), torch.zeros(7, 8)
    assert MODULE._product_bytes(x, weight) == 3 * 5 * 7 * 4
    assert MODULE._product_bytes(x.double(), weight.double()) == 3 * 5 * 7 * 8
    with torch.autocast("cpu", torch.bfloat16):
        assert MODULE._product_bytes(x, weight) == 3 * 5 * 7 * 2


@pytest.mark.parametrize("amp", [False, True])
def test_large_products_are_summed_in_halves(amp: bool) -> None:
    """The first half while the other one is computed; results are those of one sum, and repeat to
    the bit."""

    def run(rank: int) -> list[tuple[int, list[Tensor]]]:
        mesh, found = init_device_mesh("cpu", (2,)), []
        for least in (MODULE.LARGE_BYTES, 0, 0):
            MODULE.LARGE_BYTES = least
            model = model_of("nsa").to(torch.float32 if amp else torch.float64)
            tensor_parallel(model, mesh)
            with CommDebugMode() as sums, torch.autocast("cpu", torch.bfloat16, enabled=amp):
                y = model(IDS, ENDS)
            y.square().sum().backward()
            gradients = [x for x in whole_gradients(model).values() if x is not None]
            found.append((sums.get_total_counts(), [y.detach(), *gradients]))
        return found

    for (sums, one), (parts, halves), (_, again) in on_ranks(2, run):
        assert parts == sums + 2 * nsa_config().num_hidden_layers
        assert all(torch.equal(a, b) for a, b in zip(halves, again, strict=True))
        for a, b in zip(one, halves, strict=True):
            assert float((a - b).norm()) <= (2e-2 if amp else 1e-12) * float(a.norm())


@pytest.mark.parametrize(("kind", "changes"), [("nsa", {}), ("nsa", PAPER), ("dense", {})])
def test_generation_is_one_process_s(kind: str, changes: dict[str, Any]) -> None:
    """Greedy and sampled, from caches of a rank's own heads."""
    sampling = SamplingConfig(temperature=0.8, seed=3)

    def generated(model: Any) -> list[Tensor]:
        return [
            model.generate(IDS, ENDS[[0, 1, 3, 4]], 3),
            model.generate(IDS, ENDS[[0, 1, 3, 4]], 3, sampling=sampling),
        ]

    expected = generated(model_of(kind, **changes).double())

    def run(rank: int) -> list[Tensor]:
        model = model_of(kind, **changes).double()
        alone = model.new_cache().nbytes
        tensor_parallel(model, init_device_mesh("cpu", (2,)))
        assert model.new_cache().nbytes == alone // 2
        return generated(model)

    for found in on_ranks(2, run):
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_layers_that_fsdp_splits_generate_with_all_heads(kind: str) -> None:
    """Between its calls, a layer's weights have some of their rows; its caches have all heads."""
    batch = IDS, ENDS[[0, 1, 3, 4]], 3
    expected = model_of(kind).double().generate(*batch)

    def run(rank: int) -> Tensor:
        model = model_of(kind).double()
        for layer in model.model.layers:
            fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
        return model.generate(*batch)

    assert all(torch.equal(found, expected) for found in on_ranks(2, run))


@pytest.mark.parametrize("kind", ["nsa", "dense"])
def test_heads_sequences_and_batches_compose(kind: str) -> None:
    """Two ranks for heads, two for sequences with FSDP over them: one process's training steps."""
    targets = IDS.roll(-1)

    def steps(model: Any, optimizer: torch.optim.Optimizer, part: Any, scale: float) -> list[float]:
        losses = []
        for _ in range(2):
            ids, goal, layout = part
            loss = F.cross_entropy(model(ids, layout), goal, reduction="sum") / IDS.shape[0]
            (loss * scale).backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
        return losses

    def trained(model: Any) -> Found:
        return {n: whole(p.detach()) for n, p in model.named_parameters()}

    alone = model_of(kind).double()
    optimizer = torch.optim.SGD(alone.parameters(), lr=0.5)
    expected = steps(alone, optimizer, (IDS, targets, ENDS), 1.0)

    def run(rank: int) -> tuple[list[float], Found]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("cp", "tp"))
        model = model_of(kind).double()
        tensor_parallel(model, mesh["tp"])
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh["cp"])
        fully_shard(model, mesh=mesh["cp"])
        shard = context_parallel(model, mesh["cp"]).shard(ENDS)
        part = (shard.take(IDS), shard.take(targets), shard)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        return steps(model, optimizer, part, 2.0), trained(model)

    results = on_ranks(4, run)
    for step, loss in enumerate(expected):
        # ranks are (cp, tp): the losses of one of each pair for heads make the whole
        assert results[0][0][step] + results[2][0][step] == pytest.approx(loss, rel=1e-6)
        assert results[0][0][step] == results[1][0][step]
    for _, found in results:
        for name, one in trained(alone).items():
            other = found[name]
            assert one is not None
            assert other is not None
            assert torch.allclose(other, one, rtol=1e-5, atol=1e-6), name


def test_a_checkpoint_of_one_mesh_loads_on_another(tmp_path: Path) -> None:
    """By torch.distributed.checkpoint, sharded: every rank writes and reads its own parts."""

    def on_mesh(cp: int, tp: int) -> Any:
        mesh = init_device_mesh("cpu", (cp, tp), mesh_dim_names=("cp", "tp"))
        model = model_of("nsa", **PAPER)
        if tp > 1:
            tensor_parallel(model, mesh["tp"])
        return fully_shard(model, mesh=mesh["cp"])

    def save(rank: int) -> None:
        dcp.save(on_mesh(2, 2).state_dict(), checkpoint_id=tmp_path)

    def load(rank: int) -> Found:
        model = on_mesh(2, 1)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        state = model.state_dict()
        dcp.load(state, checkpoint_id=tmp_path)
        model.load_state_dict(state)
        return {name: whole(p.detach()) for name, p in model.named_parameters()}

    on_ranks(4, save)
    expected = dict(model_of("nsa", **PAPER).named_parameters())
    for found in on_ranks(2, load):
        assert found.keys() == expected.keys()
        for name, one in expected.items():
            other = found[name]
            assert other is not None
            assert torch.equal(other, one), name


class DTensorOps(TorchDispatchMode):
    """Counts the operations that DTensors dispatch; their own collectives are not among them."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            self.names[str(func)] += 1
            return NotImplemented
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(("kind", "changes"), [("nsa", {}), ("nsa", PAPER), ("dense", {})])
def test_a_layer_adds_four_sums_and_no_operation_on_dtensors(
    kind: str, changes: dict[str, Any]
) -> None:
    """Each costs the host several times what a plain one does; a step has hundreds a layer."""

    def run(rank: int) -> tuple[int, Counter[str], int]:
        counts, names, spread = [], [], []
        for layers in (1, 2):
            model = model_of(kind, num_hidden_layers=layers, **changes)
            tensor_parallel(model, init_device_mesh("cpu", (2,)))
            with CommDebugMode() as sums:
                model(IDS, ENDS).sum().backward()
            model.zero_grad()
            with DTensorOps() as ops:
                model(IDS, ENDS).sum().backward()
            counts.append(sums.get_total_counts())
            names.append(ops.names)
            spread.append(sum(isinstance(p.grad, DTensor) for p in model.parameters()))
        return counts[1] - counts[0], names[1] - names[0], spread[1] - spread[0]

    for sums, names, gradients in on_ranks(2, run):
        # The paper's gate has a layer on every rank, whose gradient is a sum too.
        assert sums == (5 if changes else 4)
        assert names == {"aten.detach.default": gradients}  # where autograd stores it


def test_what_cannot_be_shared_is_refused() -> None:
    def run(rank: int) -> list[str]:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        flat = init_device_mesh("cpu", (4,))
        spread = tensor_parallel(attention(), mesh["tp"])
        odd = model_of("nsa", intermediate_size=129)
        other = model_of("nsa")
        other.model.layers[0].mlp.up_proj.__class__ = type(
            "Doubled", (nn.Linear,), {"forward": lambda self, x: x}
        )
        texts = []
        for model, over in (
            (model_of("nsa"), flat),
            (odd, mesh["tp"]),
            (attention(), mesh),
            (nn.Linear(2, 2), mesh["tp"]),
            (spread, mesh["tp"]),
            (other, mesh["tp"]),
        ):
            before = [*model.parameters()]
            with pytest.raises(InvalidInputError) as error:
                tensor_parallel_plan(model, over)
            texts.append(str(error.value))
            assert all(a is b for a, b in zip(before, model.parameters(), strict=True))
        return texts

    expected = [
        "model.layers.0.self_attn: num_kv_heads must be a multiple of the ranks, got 2 and 4",
        "model.layers.0.mlp: intermediate_size must be a multiple of the ranks, got 129 and 2",
        "mesh must be a DeviceMesh of one dimension",
        "or a Transformers model that apply_nsa has swapped, got Linear",
        "spread the model before FSDP and before quantizing it, and only once",
        "model.layers.0.mlp: layers that ranks share must compute what torch.nn.Linear does, "
        "got Doubled",
    ]
    for texts in on_ranks(4, run):
        for text, part in zip(texts, expected, strict=True):
            assert part in text
