"""What the schedule spaces of compression and of appending to caches share."""

from __future__ import annotations

from nsagen.core.workload import Workload

PRODUCTS = ("linear", "mlp")
"""The compress types that are matrix products; the others weight a window's tokens."""


def out_dim(workload: Workload) -> int:
    """Elements of a window's result in compression's kernels; for an mlp, after its first layer."""
    return int(workload.mlp_hidden or workload.head_dim)
