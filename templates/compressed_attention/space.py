"""The schedule spaces of compressed attention: forward and backward."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import PowerOfTwo, ScheduleSpace
from nsagen.codegen.spaces import attention_tiles
from nsagen.core.workload import Schedule, Workload

LEAST_STEPS = 16
"""Steps of rows that repay a program for loading a tile of windows and storing two."""


def derive_backward(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """What all two-pass gradients derive, and how short a chunk of tokens may be."""
    rows = LEAST_STEPS * int(schedule.row_step)
    return {
        **attention_tiles.derive_two_passes(workload, schedule),
        "least_chunk": max(1, rows // int(workload.gqa_ratio)),
    }


SPACES = (
    ScheduleSpace(
        op="compressed_attention",
        pass_="forward",
        algorithm="row_tiles",
        knobs=attention_tiles.ROW_TILES_KNOBS,
        rules=attention_tiles.ROW_TILES_RULES,
        derive=attention_tiles.derive,
        shared_memory=attention_tiles.row_tiles_memory,
        scratch=attention_tiles.row_tiles_scratch,
        default=attention_tiles.row_tiles_default,
    ),
    ScheduleSpace(
        op="compressed_attention",
        pass_="backward",
        algorithm="two_passes",
        knobs=(
            *attention_tiles.TWO_PASSES_KNOBS,
            PowerOfTwo("programs", 1024, 8192, "dk, dv: even work against parts to add up"),
        ),
        rules=attention_tiles.TWO_PASSES_RULES,
        derive=derive_backward,
        shared_memory=attention_tiles.two_passes_memory,
        scratch=attention_tiles.two_passes_scratch,
        default=lambda w, t: {"programs": 4096, **attention_tiles.two_passes_default(w, t)},
    ),
)
