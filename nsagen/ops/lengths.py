"""What depends only on a batch's lengths: made once per batch, for all ops and layers.

`Lengths.of` takes one launch. Nothing of it is read on the host, so a call neither synchronizes a
GPU nor breaks a graph under capture.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from nsagen.ops._checks import check_forms, check_tensors, fail
from nsagen.ops._launch import Launch, fixed_kernel
from nsagen.ops._op import define_op
from nsagen.ops.layout import compressed_cu_seqlens, positions_in_sequence
from nsagen.ops.reference._checks import check_windows
from nsagen.runtime.device import interpreting


@dataclass(frozen=True)
class Lengths:
    """The prepared lengths of a packed batch. Make it with `Lengths.of`.

    Attributes:
        cu_seqlens: int32 [batch + 1], first token of each sequence and N.
        positions: int32 [N], each token's place in its sequence.
        window_cu_seqlens: int32 [batch + 1], first window of each sequence and their number.
        window_positions: int32 [N // kernel_stride], each window's first token in its sequence; 0
            in spare rows.
        kernel_size: tokens of a window; kernel_stride: tokens between two windows' starts.
    """

    cu_seqlens: Tensor
    positions: Tensor
    window_cu_seqlens: Tensor
    window_positions: Tensor
    kernel_size: int
    kernel_stride: int

    @classmethod
    def of(cls, cu_seqlens: Tensor, tokens: int, kernel_size: int, kernel_stride: int) -> Lengths:
        """Prepare the lengths of a batch.

        Args:
            cu_seqlens: int32 [batch + 1].
            tokens: rows of the packed tensors, N; more than cu_seqlens[-1] are allowed.
            kernel_size: tokens of a window; kernel_stride: tokens between two windows' starts.

        Raises:
            InvalidInputError: cu_seqlens isn't an int32 vector, or the window sizes are invalid.
        """
        sizes = (kernel_size, kernel_stride)
        return cls(cu_seqlens, *lengths_forward(cu_seqlens, tokens, *sizes), *sizes)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """positions, window_cu_seqlens, window_positions."""
        return self.positions, self.window_cu_seqlens, self.window_positions

    def check(self, op: str, cu_seqlens: Tensor, tokens: int, windows: tuple[int, int]) -> None:
        """Raise InvalidInputError unless these are the lengths of a call of `op`."""
        mine = (self.positions.shape[0], self.kernel_size, self.kernel_stride)
        if mine != (tokens, *windows):
            rule = f"lengths must be of {tokens} tokens and windows of {windows}"
            fail(op, rule, f"{mine[0]} and {mine[1:]}", "make them with Lengths.of for this batch")
        if self.cu_seqlens is not cu_seqlens:
            rule = "lengths must be made of the cu_seqlens that is passed"
            fail(op, rule, "another tensor", "pass lengths.cu_seqlens")


def lengths_of(
    op: str,
    cu_seqlens: Tensor,
    sizes: tuple[int, int],
    lengths: Lengths | None,
    **packed: Tensor,
) -> Lengths:
    """The lengths that a call of `op` on one packed tensor was given, or new ones."""
    check_forms(op, {**packed, "cu_seqlens": cu_seqlens})
    (x,) = packed.values()
    if lengths is not None:
        lengths.check(op, cu_seqlens, x.shape[0], sizes)
        return lengths
    return Lengths.of(cu_seqlens, x.shape[0], *sizes)


def _allocate(cu_seqlens: Tensor, tokens: int, kernel_stride: int) -> tuple[Tensor, Tensor, Tensor]:
    offsets = cu_seqlens.new_empty(cu_seqlens.shape)
    return cu_seqlens.new_empty(tokens), offsets, cu_seqlens.new_empty(tokens // kernel_stride)


def _kernel(cu_seqlens: Tensor) -> Launch | None:
    """None in the interpreter, where PyTorch is faster."""
    return None if interpreting() else fixed_kernel("launch_lengths", cu_seqlens)


@define_op(
    returns="positions window_cu_seqlens window_positions",
    allocate=_allocate,
    check=(check_windows, check_tensors),
    kernel=_kernel,
    launch="cu_seqlens positions window_cu_seqlens window_positions"
    " tokens kernel_size kernel_stride",
)
def lengths_forward(
    cu_seqlens: Tensor, tokens: int, kernel_size: int, kernel_stride: int
) -> tuple[Tensor, Tensor, Tensor]:
    """(positions, window_cu_seqlens, window_positions); see `Lengths`."""
    offsets = compressed_cu_seqlens(cu_seqlens, kernel_size, kernel_stride)
    starts = positions_in_sequence(offsets, tokens // kernel_stride) * kernel_stride
    return positions_in_sequence(cu_seqlens, tokens), offsets, starts
