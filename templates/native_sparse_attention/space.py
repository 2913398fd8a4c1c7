"""Schedules of Native Sparse Attention's decode pass: selected and sliding branches, and gates."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.spaces import split_kv
from nsagen.core.workload import Schedule, Workload


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Padded sizes, and the steps that each branch takes."""
    sizes = split_kv.blocks_of_steps(workload, schedule)
    selected_tiles = sizes.pop("tiles")
    window_tiles = -(-int(workload.window_size) // int(schedule.block_n))
    return {**sizes, "selected_tiles": selected_tiles, "window_tiles": window_tiles}


SPACES = (split_kv.space("native_sparse_attention", derive),)
