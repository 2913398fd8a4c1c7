"""The schedule space of block selection by the largest product of a block."""

from __future__ import annotations

from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import SCRATCH, element_bytes
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload


def step(workload: Workload) -> int:
    """Windows of a block."""
    return int(workload.block_size) // int(workload.kernel_stride)


def supports(workload: Workload) -> bool:
    """Raw products of heads apart, and windows that each lie in one block."""
    form = (workload.score_norm, workload.score_pool) == ("none", "max")
    apart = workload.score_heads == "each" or workload.gqa_ratio == 1
    group, windows = int(workload.gqa_ratio), step(workload)
    powers = group == next_power_of_2(group) and windows == next_power_of_2(windows)
    whole = workload.kernel_size == workload.kernel_stride
    return form and apart and powers and whole and group <= 16 and windows <= 128


def derive(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The padded head size, the tokens of a tile, and the blocks of a step."""
    block_n = int(schedule.block_n)
    return {
        "block_d": next_power_of_2(int(workload.head_dim)),
        "tile_tokens": int(schedule.block_m) // int(workload.gqa_ratio),
        "step": step(workload),
        "step_blocks": block_n // step(workload),
    }


def shared_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the query tile and of the key tiles in flight."""
    rows = int(schedule.block_m) + int(schedule.num_stages) * int(schedule.block_n)
    return element_bytes(workload) * rows * next_power_of_2(int(workload.head_dim))


def scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes of the blocks' largest products, which change their layout."""
    blocks = int(schedule.block_n) // step(workload)
    return 4 * int(schedule.block_m) * blocks + SCRATCH


def registers(schedule: Schedule) -> int:
    """Registers a thread for the products, float32."""
    return int(schedule.block_m) * int(schedule.block_n) // (32 * int(schedule.num_warps))


def default(workload: Workload, target: Target) -> dict[str, Param]:
    """Large tiles, and copies that keep ahead of the products."""
    wide = int(workload.head_dim) > 128
    roomy = target.shared_memory >= 128 * 1024
    loads = "pointers"
    if workload.dtype == "float32":  # no matrix instruction is exact: small tiles of plain FMA
        few = 32 if int(workload.head_dim) <= 64 else 16  # operands of more go through the stack
        block_m, block_n, warps, stages = few, few, 4, 1
    elif target.has_wgmma:
        block_m, block_n, warps, stages, loads = 128, 128, 8, 3, "descriptors"
    elif roomy:
        block_m, block_n, warps, stages = 128, 64, 8, 2
    else:
        block_m, block_n, warps, stages = 64, 64, 4, 1 if wide else 2
    return {
        "block_m": block_m,
        "block_n": max(block_n, step(workload)),
        "num_warps": 8 if step(workload) > block_n else warps,
        "num_stages": stages,
        "loads": loads,
        "workspace": 512,
    }


SPACES = (
    ScheduleSpace(
        op="block_selection",
        pass_="forward",
        algorithm="largest_products",
        knobs=(
            PowerOfTwo("block_m", 16, 256, "rows a program: reuse of each key against registers"),
            PowerOfTwo("block_n", 16, 256, "windows a step: fewer steps against registers"),
            Knob("num_warps", (1, 2, 4, 8), "threads a tile against programs a multiprocessor"),
            Knob("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
            Knob(
                "loads",
                ("pointers", "descriptors"),
                '"descriptors" copy in bulk with few registers',
            ),
            Knob("workspace", (64, 128, 256, 512, 1024), "launches against memory, in MiB"),
        ),
        rules=(
            Rule(
                "a step must hold the windows of a block",
                lambda w, s, t: int(s.block_n) >= step(w),
            ),
            Rule(
                "a tile must hold the heads of a key head",
                lambda w, s, t: int(s.block_m) >= int(w.gqa_ratio),
            ),
            Rule(
                "a tile must give each warp 8 rows or more: two warps share those of a matrix "
                "instruction",
                lambda w, s, t: w.dtype == "float32" or int(s.block_m) >= 8 * int(s.num_warps),
            ),
            Rule(
                "products must fit the registers: at most 128 a thread",
                lambda w, s, t: registers(s) <= 128,
            ),
            Rule(
                "descriptors need a target with bulk tensor copies",
                lambda w, s, t: s.loads == "pointers" or t.has_tma,
            ),
        ),
        derive=derive,
        shared_memory=shared_memory,
        scratch=scratch,
        default=default,
        supports=supports,
    ),
)
