"""Context parallel: each rank has a part of every sequence, and attends to all of it."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh

from nsagen.distributed.block_attention import attend_blocks
from nsagen.distributed.dense_attention import attend_densely
from nsagen.distributed.inputs import takes_shards, watch_shards
from nsagen.distributed.shard import Shard
from nsagen.distributed.sparse_attention import attend_sparsely
from nsagen.model.checks import require
from nsagen.model.heads import Heads
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.packing import check_offsets, host_lengths
from nsagen.model.rope import Tables
from nsagen.model.self_attention import SelfAttention

_WHERE = "context_parallel"


def context_parallel(
    model: nn.Module, mesh: DeviceMesh | ProcessGroup | None = None
) -> ContextParallel:
    """Check that a model can share sequences between ranks, and return what shares them out.

        parallel = context_parallel(model, mesh["cp"])
        shard = parallel.shard(cu_seqlens)                    # once a batch
        logits = model(shard.take(input_ids), shard)          # of this rank's tokens
        loss = cross_entropy(logits, shard.take(targets), reduction="sum") / scored_tokens
        loss.backward()

    Nothing in the model changes, but that one of Transformers gets hooks: calls with a shard have
    its positions, and no labels. Each rank computes a part of the loss, and of the
    gradient of every parameter; sum them over the ranks as data parallel training does, by
    `fully_shard` or `DistributedDataParallel` over a mesh that contains these ranks. Both average,
    so scale the loss by their number.

    Args:
        model: a `NativeSparseAttention`, `ToyNSALlama`, `ToyLlama`, or a Transformers model all of
            whose layers `apply_nsa` has swapped, or one with `attn_implementation="nsagen"`, such
            as MiniMax-M3, MiniCPM, or any dense model with a form of the family.
        mesh: of one dimension, the ranks that share sequences; None for all.

    Raises:
        InvalidInputError: no process group, a mesh of several dimensions, a model with attention
            that knows no other ranks, or parameters on another kind of device than the mesh's.
    """
    require(
        dist.is_available() and dist.is_initialized(),
        _WHERE,
        "needs a process group",
        "none",
        "call torch.distributed.init_process_group first, under torchrun",
    )
    if isinstance(mesh, DeviceMesh):
        require(
            mesh.ndim == 1,
            _WHERE,
            "mesh must have one dimension, the ranks that share sequences",
            f"{mesh.ndim} dimensions, {mesh.mesh_dim_names}",
            'pass one of them, e.g. mesh["cp"]',
        )
        _check_device(model, mesh.device_type)
    group = mesh.get_group() if isinstance(mesh, DeviceMesh) else mesh or dist.group.WORLD
    require(
        isinstance(group, ProcessGroup),
        _WHERE,
        "mesh must be a DeviceMesh or a process group that this rank is in",
        repr(mesh),
        "pass the mesh of init_device_mesh",
    )
    assert isinstance(group, ProcessGroup)
    _check_attention(model)
    watch_shards(model)
    return ContextParallel(group)


def _check_device(model: nn.Module, kind: str) -> None:
    for name, parameter in model.named_parameters():
        require(
            parameter.device.type in (kind, "meta"),
            _WHERE,
            f"parameters must be on the mesh's kind of device, {kind}",
            f"{name} on {parameter.device}",
            "move the model first",
        )


def _check_attention(model: nn.Module) -> None:
    known = 0
    for name, module in model.named_modules():
        if isinstance(module, NSAOps | SelfAttention):
            known += 1
        elif type(module).__name__.endswith("Attention"):
            known += 1
            require(
                takes_shards(module),
                _WHERE,
                "every attention module must be one that can gather keys from other ranks: "
                "NativeSparseAttention, SelfAttention, one that apply_nsa has put there, or of a "
                'model with attn_implementation="nsagen"',
                f"{name} of class {type(module).__name__}",
                "swap all layers, or use tensor parallel, which any layer takes",
            )
    require(known > 0, _WHERE, "the model must have attention", "none", "pass the model itself")


KEPT = 8
"""Batches whose layout is kept for others of the same lengths."""


class ContextParallel:
    """Shares batches out over a group's ranks; made by `context_parallel`.

    No dataclass: FSDP looks into those among a layer's inputs, and would go in circles between a
    shard and what made it.
    """

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self._kept: dict[Any, Shard] = {}

    def shard(self, cu_seqlens: Tensor, device: torch.device | str | None = None) -> Shard:
        """This rank's share of a packed batch. Every rank passes the same.

        Reads the lengths on the host, once a batch: from a tensor on the CPU without waiting for
        the device. A batch of the same lengths as one of the last few is laid out already.

        Args:
            cu_seqlens: int32 [batch + 1], where each sequence of the whole batch starts.
            device: the model's; by default cu_seqlens is there.

        Raises:
            InvalidInputError: it does not start at 0, or decreases.
        """
        where = "ContextParallel.shard"
        check_offsets(where, cu_seqlens)
        lengths = host_lengths(where, cu_seqlens, int(cu_seqlens[-1]), None)
        there = torch.device(cu_seqlens.device if device is None else device)
        key = (there, *lengths)
        found = self._kept.pop(key, None)
        if found is None:
            found = Shard.of_batch(lengths, there, self.group, self)
        self._kept[key] = found  # the newest comes last
        while len(self._kept) > KEPT:
            del self._kept[next(iter(self._kept))]
        return found

    def sparse(
        self, module: NSAOps, heads: Heads, gate: Tensor, packed: Any, tables: Tables
    ) -> Tensor:
        """See `Remote`."""
        return attend_sparsely(module, heads, gate, packed, tables)

    def dense(self, attend: Any, q: Tensor, k: Tensor, v: Tensor, packed: Any) -> Tensor:
        """See `Remote`."""
        return attend_densely(attend, q, k, v, packed)

    def blocks(
        self, ranking: Any, q: Tensor, k: Tensor, v: Tensor, packed: Any, scale: float
    ) -> Tensor:
        """See `Remote`."""
        return attend_blocks(ranking, q, k, v, packed, scale)

    def only(self, kept: Any, packed: Any) -> tuple[Any, Tensor]:
        """See `Remote`."""
        return packed.only(kept)
