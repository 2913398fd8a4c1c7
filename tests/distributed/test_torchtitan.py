"""A Llama of torchtitan with NSA layers, under torchtitan's mesh and FSDP, as docs/scaling.md says.

`make setup` installs torchtitan, which is not among this project's dependencies.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from nsagen.distributed import context_parallel
from nsagen.model import NativeSparseAttention, RopeConfig
from tests.distributed.ranks import on_ranks
from tests.distributed.test_context_parallel import offsets_of
from tests.support import one_thread

pytest.importorskip("torchtitan.models.llama3", reason="needs torchtitan")

from torchtitan.distributed import parallel_dims
from torchtitan.distributed.fsdp import apply_fsdp_to_decoder
from torchtitan.distributed.parallel_dims import ParallelDims
from torchtitan.models.llama3 import llama3_configs

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

IDS = torch.randint(2048, (96,), generator=torch.Generator().manual_seed(0))
ENDS = offsets_of([61, 35])


class TitanNSA(nn.Module):
    """In the place of a block's attention; `attention_masks` brings the layout of the tokens."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.nsa = NativeSparseAttention(
            "avgpool",
            *(dim, 4, 2, 32),
            *(8, 4, 8, 4, 1, 2, 12),
            rope_config=RopeConfig(1024, 32, rope_scaling=None),
            generator=torch.Generator().manual_seed(1),
        )

    def forward(self, x: Tensor, attention_masks: Any, positions: Any = None) -> Tensor:
        return self.nsa(x[0], attention_masks)[None]


def llama() -> Any:
    torch.manual_seed(0)
    config = llama3_configs["debugmodel"]("varlen")
    config.layers = config.layers[:2]
    model: Any = config.build()
    model.init_states()
    for block in model.layers.values():
        block.attention = TitanNSA(config.dim)
    return model


def steps(model: Any, ids: Tensor, targets: Tensor, layout: Any) -> list[float]:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for _ in range(2):
        logits = model(ids[None], attention_masks=layout)
        loss = F.cross_entropy(logits[0].float(), targets, reduction="sum") / IDS.shape[0]
        loss.backward()  # torchtitan's FSDP sums gradients, and divides by nothing
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    return losses


def test_two_steps_are_one_process_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parallel_dims, "device_type", "cpu")  # without a GPU it would say cuda
    targets = IDS.roll(-1)
    expected = steps(llama(), IDS, targets, ENDS)

    def run(rank: int) -> list[float]:
        dims = ParallelDims(1, 1, 2, 1, 1, 1, 2, "partial_dtensor")
        dims.build_mesh()
        model = llama()
        context = context_parallel(model, dims.get_mesh("cp"))
        dtypes = {"param_dtype": torch.float32, "reduce_dtype": torch.float32}
        apply_fsdp_to_decoder(model, dims.get_mesh(["fsdp"]), pp_enabled=False, **dtypes)
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_force_sum_reduction_for_comms(True)  # gloo has no other
        shard = context.shard(ENDS)
        return steps(model, shard.take(IDS), shard.take(targets), shard)

    first, second = on_ranks(2, run)
    assert [a + b for a, b in zip(first, second, strict=True)] == pytest.approx(expected, rel=1e-5)
