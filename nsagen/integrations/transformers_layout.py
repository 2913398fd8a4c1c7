"""The layout of one call's tokens, which all NSA layers of a Transformers model share.

`transformers_inputs` makes a `Call` from a model's inputs, and the model passes it to its layers.
No module keeps any of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, NoReturn, TypeVar

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.integrations.transformers_rope import Checked, Rope
from nsagen.model.packing import Packed
from nsagen.model.prefill import Index, Piece, PrefillRows
from nsagen.model.sparsity import Sparsity

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class State:
    """What the NSA layers of a cache hold.

    With a fixed capacity, all of it is in tensors of fixed shapes, so that one compiled decoding
    step serves every length: see `fixed` and `plain`.

    Attributes:
        lengths: int32 [rows], tokens of each row, padding not counted.
        seen: tokens that the model has processed, including padding, as Transformers counts.
            Fixed: int64 [].
        real: bool [rows, seen], False at padding; None without padding. Fixed: [rows, capacity].
        shift: int64 [rows], how far position_ids are ahead of positions in the row; None for 0.
        given: whether the caller passed position_ids.
        waiting: whether some row may have no token yet: its first one sets its shift.
        recorded: whether autograd recorded the calls that filled the cache.
        rope: the tables that rotated the keys.
        checked: the model's own frequencies that the last call compared with the config's.
    """

    lengths: Tensor
    seen: int | Tensor
    real: Tensor | None
    shift: Tensor | None
    given: bool
    recorded: bool
    rope: Rope
    waiting: bool = False
    checked: Checked | None = None

    def rows(self, index: Tensor) -> State:
        """These rows, in this order."""
        kept = {
            name: None if tensor is None else tensor.index_select(0, index)
            for name, tensor in (("real", self.real), ("shift", self.shift))
        }
        return replace(self, lengths=self.lengths.index_select(0, index), **kept)

    def fixed(self, capacity: int) -> State:
        """The same in tensors of fixed shapes."""
        rows, device = self.lengths.shape[0], self.lengths.device
        real = torch.zeros(rows, capacity, dtype=torch.bool, device=device)
        real[:, : self.seen] = True if self.real is None else self.real
        shift = torch.zeros(rows, dtype=torch.int64, device=device)
        shift = shift if self.shift is None else self.shift
        seen = torch.as_tensor(self.seen, device=device)
        return replace(self, seen=seen, real=real, shift=shift)

    def plain(self) -> State:
        """The same with the numbers on the host."""
        if not isinstance(self.seen, Tensor):
            return self
        seen = int(self.seen)
        real = None if self.real is None else self.real[:, :seen]
        return replace(
            self,
            seen=seen,
            real=None if real is None or bool(real.all()) else real,
            shift=None if self.shift is None or not bool(self.shift.any()) else self.shift,
        )

    def overwrite(self, new: State) -> State:
        """`new`, copied into the tensors of this fixed state."""
        kept = {}
        for name in ("lengths", "seen", "real", "shift"):
            kept[name] = getattr(self, name)
            kept[name].copy_(getattr(new, name))
        return replace(new, **kept)


@dataclass(frozen=True)
class Call:
    """The layout of a batch [B, T], padded or packed.

    Attributes:
        batch, tokens: B and T.
        packed: the tokens without padding, as sequences one after another.
        places: int64 [N], their indices in the flattened batch; None for all, in order.
        rope: the tables.
        recording: whether autograd records.
        continues: whether the cache holds tokens already.
        room: tokens per row that the cache must have room for.
        after: the cache's state after the call; None if the call may not write to a cache.
        last: place in a cache of the last layer with NSA.
        pieces: where the tokens go in a cache; None without a cache and in decoding steps.
        positions: int32 [B], in decoding steps: where the row's token goes, -1 at padding.
        recent: where the tokens go in `NSALayer.recent`.
        cache: Transformers' `Cache`; None if the call may not write to one.
        cache_dtype: of its new layers; None for that of the tokens.
    """

    batch: int
    tokens: int
    packed: Packed | None
    rope: Rope
    recording: bool
    places: Tensor | None = None
    continues: bool = False
    room: int = 0
    after: State | None = None
    last: int = 0
    pieces: PrefillRows | None = None
    positions: Tensor | None = None
    recent: Recent | None = None
    cache: Any = None
    cache_dtype: str | None = None
    _elsewhere: dict[torch.device, Call] = field(default_factory=dict, compare=False, repr=False)

    def to(self, device: torch.device | str | int, non_blocking: bool = False) -> Call:
        """The same on another device, for models on several devices."""
        del non_blocking
        device = torch.device(device)
        if device == self.rope.tables.cos.device:
            return self
        if device not in self._elsewhere:
            self._elsewhere[device] = replace(moved(self, device), _elsewhere={})
        return self._elsewhere[device]

    def pack(self, x: Tensor) -> Tensor:
        """[B, T, hidden] to [N, hidden]."""
        flat = x.flatten(0, 1)
        return flat if self.places is None else flat[self.places]

    def unpack(self, packed: Tensor) -> Tensor:
        """[N, hidden] to [B, T, hidden], 0 at padding."""
        shape = (self.batch, self.tokens, packed.shape[-1])
        if self.places is None:
            return packed.view(shape)
        flat = packed.new_zeros(shape).flatten(0, 1)
        return flat.index_copy(0, self.places, packed).view(shape)


KEPT = 128
"""How many of a row's last tokens `crop` can remove."""


@dataclass(frozen=True)
class Recent:
    """Where tokens go in a ring of each row's last tokens.

    The ring has one more place, for the tokens of padding.

    Attributes:
        row, place: int64 [M], the ring's index.
        kept: int64 [M], which of the call's tokens; None: all.
    """

    row: Tensor
    place: Tensor
    kept: Tensor | None = None

    @staticmethod
    def length(sparsity: Sparsity) -> int:
        """Tokens of a ring: those that the next window may need after `crop` removed `KEPT`, and
        one that a failed step may have overwritten."""
        return sparsity.kernel_size + KEPT + 1

    @classmethod
    def of_step(cls, positions: Tensor, sparsity: Sparsity) -> Recent:
        """One token a row: `Call.positions`."""
        length, row = cls.length(sparsity), torch.arange(len(positions), device=positions.device)
        return cls(row, torch.where(positions < 0, length, positions % length))

    @classmethod
    def of_pass(cls, rows: PrefillRows, ends: Tensor, sparsity: Sparsity) -> Recent:
        """Several tokens a row, to positions `ends` [B]."""
        length, (row, position) = cls.length(sparsity), rows.index
        kept = (position >= ends[row] - length).nonzero().squeeze(1)
        return cls(row[kept], position[kept] % length, kept)


@dataclass
class RowPlaces:
    """An NSA cache layer's places, for `PrefillRows`: row and position are the index."""

    device: torch.device
    windows: tuple[int, int] | None
    paged: bool = False

    def token_index(self, slot: Tensor, position: Tensor) -> Index:
        return slot, position

    def window_index(self, slot: Tensor, window: Tensor) -> Index:
        return slot, window


def on_host(function: Function) -> Function:
    """Keep a function out of compiled graphs: it reads numbers from the device."""
    return torch.compiler.disable(function)  # pyright: ignore


def moved(part: Any, device: torch.device) -> Any:
    """A structure of dataclasses and tuples with its tensors on a device."""
    if isinstance(part, Tensor):
        return part.to(device)
    if isinstance(part, tuple):
        parts = [moved(one, device) for one in part]
        return type(part)(*parts) if hasattr(part, "_fields") else type(part)(parts)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: moved(getattr(part, f.name), device) for f in fields(part)})
    return part


def pieces_of(
    starts: Sequence[int], lengths: Sequence[int], sparsity: Sparsity, device: torch.device
) -> PrefillRows:
    """Where new tokens of each row, after `starts` cached ones, go in a cache."""
    sizes = (sparsity.kernel_size, sparsity.kernel_stride)
    rows = [Piece(i, *row) for i, row in enumerate(zip(starts, lengths, strict=True))]
    return PrefillRows.of(rows, RowPlaces(device, sizes))


def refuse(what: str, rule: str, came: str, advice: str) -> NoReturn:
    """Raise InvalidInputError about an input of a swapped model."""
    raise InvalidInputError(f"NSA model: {what}: {rule}; got {came}; {advice}")


def refuse_unless(
    holds: Tensor, what: str, rule: str, came: str | Tensor, advice: str, *, wait: bool = True
) -> None:
    """Check what a device computed: a bool tensor of one element.

    Args:
        came: a tensor of one element, or text.
        wait: False to keep the host from waiting for a GPU, as in a decoding step: the GPU then
            asserts. It also asserts in compiled code.
    """
    if torch.compiler.is_compiling() or (holds.is_cuda and not wait):
        torch.ops.aten._assert_async.msg(holds, f"NSA model: {what}: {rule}; {advice}")
    elif not bool(holds):
        refuse(what, rule, str(came.item()) if isinstance(came, Tensor) else came, advice)
