"""The schedule spaces of sliding-window attention: forward and backward."""

from __future__ import annotations

from nsagen.codegen.space import ScheduleSpace
from nsagen.codegen.spaces import attention_tiles
from nsagen.core.target import Target
from nsagen.core.workload import Param, Workload


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """A window is few steps: short ones waste less at its edges, and a second program on the same
    multiprocessor hides where one starts and ends."""
    knobs = attention_tiles.row_tiles_default(workload, target)
    if target.has_wgmma and workload.dtype != "float32":
        wide = attention_tiles.padded_sizes(workload)[1] > 128  # four warps spill
        warps = 8 if wide else 4
        return {**knobs, "block_m": 64, "block_n": 32, "num_warps": warps, "num_stages": 3}
    return {**knobs, "block_n": min(int(knobs["block_n"]), 32)}


SPACES = (
    ScheduleSpace(
        op="sliding_window_attention",
        pass_="forward",
        algorithm="row_tiles",
        knobs=attention_tiles.ROW_TILES_KNOBS,
        rules=attention_tiles.ROW_TILES_RULES,
        derive=attention_tiles.derive,
        shared_memory=attention_tiles.row_tiles_memory,
        scratch=attention_tiles.row_tiles_scratch,
        default=default,
        supports=lambda workload: not workload.local_blocks,
    ),
    ScheduleSpace(
        op="sliding_window_attention",
        pass_="backward",
        algorithm="two_passes",
        knobs=attention_tiles.TWO_PASSES_KNOBS,
        rules=attention_tiles.TWO_PASSES_RULES,
        derive=attention_tiles.derive_two_passes,
        shared_memory=attention_tiles.two_passes_memory,
        scratch=attention_tiles.two_passes_scratch,
        default=attention_tiles.two_passes_default,
    ),
)
