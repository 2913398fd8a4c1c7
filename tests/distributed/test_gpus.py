"""Shared sequences and heads on two GPUs over NCCL, beside one of them."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from nsagen.cases.base import THRESHOLDS
from nsagen.distributed import context_parallel, gathering, tensor_parallel
from tests.distributed.test_context_parallel import Found, attention, numbers, offsets_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs"),
]

RANKS, LENGTHS = 2, [300, 0, 5, 77, 1]
SPLITS = ("sequences", "sequences, tokens and windows apart", "heads")


def passed(device: torch.device, split: str = "") -> Found:
    """Output and gradients of a layer for random input, whole, on the CPU."""
    module: nn.Module = attention(compress_type="avgpool").to(device, torch.float32)
    ends, layout = offsets_of(LENGTHS).to(device), None
    x, weight = (numbers(sum(LENGTHS), 48, seed=i).to(device, torch.float32) for i in range(2))
    if split == "heads":
        tensor_parallel(module, init_device_mesh("cuda", (RANKS,)))
    elif split:
        layout: Any = context_parallel(module).shard(ends)
        x, weight = layout.take(x), layout.take(weight)
    x.requires_grad_()
    y = module(x, ends if layout is None else layout)
    (y * weight).sum().backward()
    found: Found = {"output": y.detach(), "input": x.grad}
    if layout is not None:
        found = {name: layout.whole(one) for name, one in found.items()}
    for name, parameter in module.named_parameters():
        gradient = parameter.grad
        if isinstance(gradient, DTensor):
            gradient = gradient.full_tensor()
        elif gradient is not None and layout is not None:
            dist.all_reduce(gradient)
        found[name] = gradient
    return {name: None if one is None else one.cpu() for name, one in found.items()}


def run(rank: int, port: int, place: Path) -> None:
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    where = f"tcp://localhost:{port}"
    dist.init_process_group("nccl", where, rank=rank, world_size=RANKS, device_id=device)
    found = {}
    for split in SPLITS:
        gathering.SMALL_BYTES = 0 if "apart" in split else 1 << 23
        found[split] = [passed(device, split) for _ in range(2)]
    torch.save(found, place / str(rank))
    dist.barrier()
    dist.destroy_process_group()


def test_outputs_and_gradients_are_one_gpu_s_and_repeat_to_the_bit(tmp_path: Path) -> None:
    expected = passed(torch.device("cuda", 0))
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port: int = free.getsockname()[1]
    torch.multiprocessing.spawn(run, (port, tmp_path), nprocs=RANKS)
    for rank in range(RANKS):
        for split, (first, again) in torch.load(tmp_path / str(rank)).items():
            for name, one in expected.items():
                other: Tensor | None = first[name]
                if one is None or other is None:
                    assert one is None, (split, name)
                    assert other is None or not other.any(), (split, name)
                    continue
                error = float((other.double() - one.double()).norm() / one.double().norm())
                assert error < THRESHOLDS[torch.float32], (split, name, error)
                assert torch.equal(other, again[name]), (split, name)
