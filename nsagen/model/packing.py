"""Where each row of a packed batch belongs: computed once per forward, shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor

from nsagen.model.checks import is_dense, kind_of, require
from nsagen.ops._checks import values_are_read
from nsagen.ops.layout import positions_in_sequence
from nsagen.ops.lengths import Lengths


def to_device(
    values: Sequence[int] | Sequence[float], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Host values on a device, without making the host wait."""
    return torch.tensor(values, dtype=dtype, device="cpu").to(device, non_blocking=True)


SHARD = "nsa_shard"
"""The name of a shard among the inputs of a model of Transformers."""


class Remote(Protocol):
    """Attends to tokens that other processes hold; see `nsagen.distributed`."""

    def sparse(self, module: Any, heads: Any, gate: Tensor, packed: Any, tables: Any) -> Tensor:
        """`NSAOps.attend` of this process's heads and gates to all tokens: [N, HQ * Dv]."""
        ...

    def dense(self, attend: Any, q: Tensor, k: Tensor, v: Tensor, packed: Any) -> Tensor:
        """`SelfAttention`'s of this process's queries, with its own way to attend."""
        ...

    def blocks(
        self, ranking: Any, q: Tensor, k: Tensor, v: Tensor, packed: Any, scale: float
    ) -> Tensor:
        """Attention [N, HQ, D] of this process's queries to the blocks that a `Form` or `Index` of
        `nsagen.model.forms` selects."""
        ...

    def only(self, kept: Any, packed: Any) -> tuple[Any, Tensor]:
        """The layout without the tokens of some sequences, and which of this process's stay."""
        ...


@dataclass(frozen=True)
class Packed:
    """The layout of a packed batch; nothing in it needs the host to know a length.

    Attributes:
        cu_seqlens: int32 [batch+1], where each sequence starts; the last entry is N.
        sequence: int64 [N], the sequence of each token.
        positions: int32 [N], each token's position within its sequence.
        lengths: the sequences' lengths, if the host knows them; dense attention needs them.
        prepared: what the ops of sparse attention need of the lengths.
        remote: attends where this is only a part of the batch; see `nsagen.distributed`.
    """

    cu_seqlens: Tensor
    sequence: Tensor
    positions: Tensor
    lengths: tuple[int, ...] | None = None
    prepared: Lengths | None = None
    remote: Remote | None = None

    @classmethod
    def of(
        cls,
        cu_seqlens: Tensor,
        num_tokens: int,
        lengths: Sequence[int] | None = None,
        windows: tuple[int, int] | None = None,
    ) -> Packed:
        """Lay out a batch of `num_tokens` tokens.

        Args:
            windows: kernel_size and kernel_stride of the layers' attention, for `prepared`.
        """
        rows = torch.arange(num_tokens, dtype=torch.int32, device=cu_seqlens.device)
        sequence = torch.searchsorted(cu_seqlens[1:], rows, right=True)
        known = None if lengths is None else tuple(lengths)
        if windows is None:
            return cls(cu_seqlens, sequence, positions_in_sequence(cu_seqlens, num_tokens), known)
        prepared = Lengths.of(cu_seqlens, num_tokens, *windows)
        return cls(cu_seqlens, sequence, prepared.positions, known, prepared)

    def lengths_for(self, kernel_size: int, kernel_stride: int) -> Lengths:
        """The prepared lengths for windows of these sizes; made here if missing."""
        sizes = (kernel_size, kernel_stride)
        made = self.prepared
        if made is not None and (made.kernel_size, made.kernel_stride) == sizes:
            return made
        return Lengths.of(self.cu_seqlens, self.positions.shape[0], *sizes)


def check_packed(
    where: str, input_ids: Tensor, cu_seqlens: Tensor, max_positions: int | None
) -> Tensor:
    """Check a packed batch as far as that is free; returns cu_seqlens as int32.

    The lengths are read only for a batch on the CPU, or one so large that a sequence may pass
    `max_positions`; never if that is None.

    Raises:
        InvalidInputError: wrong shapes, dtypes or devices; cu_seqlens that does not run from 0
            to N without decreasing; a sequence longer than the model has positions.
    """
    check_ids(where, input_ids)
    check_offsets(where, cu_seqlens)
    require(
        cu_seqlens.device == input_ids.device,
        where,
        "input_ids and cu_seqlens must be on one device",
        f"{input_ids.device} and {cu_seqlens.device}",
        "move one of them",
    )
    tokens = input_ids.shape[0]
    if max_positions is None or torch.compiler.is_compiling():
        return cu_seqlens.to(torch.int32)
    if values_are_read(cu_seqlens) or tokens > max_positions:
        host_lengths(where, cu_seqlens, tokens, max_positions)  # int32 would wrap larger numbers
    return cu_seqlens.to(torch.int32)


_INTEGERS = (torch.int32, torch.int64)


def _check_tensor(where: str, name: str, value: Any) -> None:
    kind = type(value).__name__
    advice = "make it one with torch.tensor"
    require(isinstance(value, Tensor), where, f"{name} must be a tensor", kind, advice)
    advice = "call its to_dense(), or join its sequences"
    require(is_dense(value), where, f"{name} must be dense", kind_of(value), advice)


def check_ids(where: str, input_ids: Any) -> None:
    """Check the shape and dtype of tokens, not their values.

    Raises:
        InvalidInputError: not a dense vector of integers.
    """
    _check_tensor(where, "input_ids", input_ids)
    require(
        input_ids.dim() == 1,
        where,
        "input_ids must have shape [N], all sequences concatenated",
        f"shape {list(input_ids.shape)}",
        "flatten the batch and describe it with cu_seqlens",
    )
    require(
        input_ids.dtype in _INTEGERS,
        where,
        "input_ids must be int64",
        str(input_ids.dtype),
        "pass token numbers",
    )


def check_offsets(where: str, cu_seqlens: Any) -> None:
    """Check the shape and dtype of cu_seqlens, not its values.

    Raises:
        InvalidInputError: not a dense vector of integers.
    """
    _check_tensor(where, "cu_seqlens", cu_seqlens)
    require(
        cu_seqlens.dim() == 1 and cu_seqlens.shape[0] >= 1 and cu_seqlens.dtype in _INTEGERS,
        where,
        "cu_seqlens must be int32 with shape [batch+1]",
        kind_of(cu_seqlens),
        "start it with 0 and append the running sum of the lengths",
    )


def check_layout(where: str, input_ids: Tensor, layout: Packed, max_positions: int) -> None:
    """Check that a layout, which a caller has made itself, is of these tokens.

    Raises:
        InvalidInputError: it is of other tokens, on another device, or of a sequence longer than
            the model has positions.
    """
    rows, device = layout.positions.shape[0], layout.positions.device
    check_ids(where, input_ids)
    require(
        input_ids.shape == (rows,),
        where,
        f"input_ids must have shape [{rows}], the tokens of the layout",
        str(list(input_ids.shape)),
        "pass shard.take(input_ids) with a shard",
    )
    require(
        input_ids.device == device,
        where,
        "input_ids and the layout must be on one device",
        f"{input_ids.device} and {device}",
        "move one of them",
    )
    longest = max(layout.lengths or (), default=0)
    require(
        longest <= max_positions,
        where,
        f"a sequence must have at most max_position_embeddings={max_positions} tokens",
        str(longest),
        "shorten it or raise max_position_embeddings",
    )


def host_lengths(
    where: str, cu_seqlens: Tensor, tokens: int, max_positions: int | None
) -> list[int]:
    """The lengths of all sequences, read from the device and checked.

    Raises:
        InvalidInputError: as in `check_packed`.
    """
    require(
        not cu_seqlens.is_meta,
        where,
        "cu_seqlens must have values where the lengths are needed",
        "a meta tensor",
        "pass the lengths on a device",
    )
    ends = cu_seqlens.tolist()
    lengths = [b - a for a, b in pairwise(ends)]
    require(
        ends[0] == 0 and ends[-1] == tokens and min(lengths, default=0) >= 0,
        where,
        f"cu_seqlens must run from 0 to N={tokens} without decreasing",
        str(ends[:9]) + (" ..." if len(ends) > 9 else ""),
        "start it with 0 and append the running sum of the lengths",
    )
    for index, length in enumerate(lengths if max_positions is not None else ()):
        require(
            max_positions is None or length <= max_positions,
            f"{where}: sequence {index}",
            f"a sequence must have at most max_position_embeddings={max_positions} tokens",
            str(length),
            "shorten it or raise max_position_embeddings",
        )
    return lengths
