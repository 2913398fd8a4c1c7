"""The gated sum of the three branches."""

from __future__ import annotations

from torch import Tensor

from nsagen.ops.reference._attend import upcast


def gated_sum(o_compressed: Tensor, o_selected: Tensor, o_sliding: Tensor, gate: Tensor) -> Tensor:
    """o = gate[..., 0] o_compressed + gate[..., 1] o_selected + gate[..., 2] o_sliding.

    Args:
        o_compressed: [N, HQ, Dv], as the other two branches.
        o_selected: [N, HQ, Dv].
        o_sliding: [N, HQ, Dv].
        gate: [N, HQ, 3], after the sigmoid.

    Returns:
        [N, HQ, Dv] in o_compressed's dtype.
    """
    compressed, selected, sliding, weights = upcast(o_compressed, o_selected, o_sliding, gate)
    first, second, third = weights.unsqueeze(-1).unbind(-2)
    o = first * compressed + second * selected + third * sliding
    return o.to(o_compressed.dtype).contiguous()
