"""The schedule spaces of selected attention's backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace, next_power_of_2
from nsagen.codegen.spaces.padding import (
    LEAST_TILE,
    SCRATCH,
    ds_scale,
    element_bytes,
    few_bytes,
    group_tile,
    padded_heads,
    plain_keys,
    raw_peak,
)
from nsagen.codegen.spaces.warp_specialized import GLUON, runs_on
from nsagen.core.target import Target
from nsagen.core.workload import Param, Schedule, Workload

PIPELINE_ROWS = 64
"""Rows, tokens times heads, of a step of the pipeline."""

PIPELINE_KEYS = 64
"""Keys of its tiles: a longer block is several."""

WGMMA_ROWS = 64
"""Rows of a warp group's product; with fewer, other instructions are used."""


def key_tile(workload: Workload, schedule: Schedule) -> int:
    """Keys of a program of the key blocks' pass: a block unless the schedule says otherwise."""
    return int(dict(schedule.knobs).get("key_tile", block_b(workload)))


def within_block(workload: Workload, schedule: Schedule, target: Target) -> bool:
    """A step is no longer than a block takes."""
    return int(schedule.block_n) <= block_b(workload)


def holds_group(workload: Workload, schedule: Schedule, target: Target) -> bool:
    """A step of the key blocks' pass takes at least one token's whole group."""
    return int(schedule.block_m) >= int(workload.gqa_ratio)


def block_b(workload: Workload) -> int:
    """block_size padded to a tile's side."""
    return max(LEAST_TILE, next_power_of_2(int(workload.block_size)))


MOST_KEYS = 128
"""Keys of a default's program: scores and their gradients of more do not fit the registers."""

FOUR_WARPS = 64 * 256
"""Elements of a block's dk and dv that four warps hold, in half of their registers."""


def gradient_elements(workload: Workload, keys: int | None = None) -> int:
    """Elements of dk and dv for `keys` keys, or for a block's, padded."""
    sizes = padded_heads(workload)
    return (keys or block_b(workload)) * (sizes["block_d"] + sizes["block_dv"])


def derive_keys(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes of the key blocks' pass."""
    group, block_m = int(workload.gqa_ratio), int(schedule.block_m)
    keys = key_tile(workload, schedule)
    key_tiles = -(-int(workload.block_size) // keys)
    return {
        **padded_heads(workload),
        "raw_peak": raw_peak(workload),
        "ds_scale": ds_scale(workload),
        "block_b": keys,
        "key_tiles": key_tiles,
        "sum_warps": 16 if gradient_elements(workload, keys) > FOUR_WARPS else 8,
        "pad_b": keys * key_tiles != int(workload.block_size),
        "tile_tokens": block_m // group,
        "pad_m": block_m % group != 0,
        "split_group": block_m < group,
    }


def derive_two_pass(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes of both passes, and which axis of the first one's scores is which."""
    block_g, group_tiles = group_tile(workload)
    return {
        **derive_keys(workload, schedule),
        "dq_partials": False,
        "block_g": block_g,
        "group_tiles": group_tiles,
        "pad_g": block_g * group_tiles != int(workload.gqa_ratio),
        "steps_per_block": -(-int(workload.block_size) // int(schedule.block_n)),
    }


def key_pass_memory(workload: Workload, schedule: Schedule, *, shares: bool = False) -> int:
    """Bytes of a block's keys and values, of queries in use and in flight, and of p and ds.

    Found by compiling for Ampere and Hopper, using the larger result. Tiles with fewer rows
    than a warp group's product are read in two layouts, and are stored in both.

    Args:
        shares: whether a step also has its share of dq, which goes through shared memory.
    """
    sizes, width = derive_keys(workload, schedule), element_bytes(workload)
    block_b, block_m = sizes["block_b"], int(schedule.block_m)
    both, stages = sizes["block_d"] + sizes["block_dv"], int(schedule.key_stages)
    by_key, exact = schedule.key_orientation == "keys", width == 4
    small = not exact and min(block_b, block_m) < WGMMA_ROWS
    if small:
        buffers = 2
    elif by_key and not shares:  # a step's products are in flight while the next step's start
        buffers = stages
    else:  # queries are found through a list that is loaded before them: one stage is the list's
        buffers = min(2, stages)
    in_registers = by_key and not shares and not exact
    turned = 0 if in_registers else width * block_b * block_m  # p and ds
    copies = 0
    if shares:
        share_bytes = 2 if share_dtype(workload) == "bfloat16" else 4
        turned = max(turned, share_bytes * block_m * sizes["block_d"])
        copies = block_b * sizes["block_d"] if small else 0  # keys, for the product with ds
    elements = (block_b + buffers * block_m) * both + copies
    return width * elements + turned + 6 * 4 * block_m  # lse, delta and tokens


def key_pass_scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes of p and ds, in float32, on Blackwell, whose products take them from shared memory.

    On AMD's GPUs plain products keep in registers what a program keeps.
    """
    if target.backend == "hip" and workload.dtype == "float32":
        return plain_memory_on_hip(workload, schedule) - two_pass_memory(workload, schedule)
    turned = 2 * 4 * key_tile(workload, schedule) * int(schedule.block_m)
    return turned + SCRATCH if target.arch == "100" else 0


def results_scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes of dk or dv where their rows change their layout to be stored."""
    if target.backend == "hip":
        return 0
    sizes, keys = padded_heads(workload), key_tile(workload, schedule)
    return 4 * keys * max(sizes["block_d"], sizes["block_dv"])


def two_pass_scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes beside the tiles of two_pass."""
    results = results_scratch(workload, schedule, target) - two_pass_memory(workload, schedule)
    return max(results, key_pass_scratch(workload, schedule, target))


def key_major_scratch(workload: Workload, schedule: Schedule, target: Target) -> int:
    """Bytes beside the tiles of key_major."""
    results = results_scratch(workload, schedule, target) - key_major_memory(workload, schedule)
    return max(results, few_bytes(workload, schedule, target))


def key_major_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the key blocks' pass when it also makes shares of dq."""
    return key_pass_memory(workload, schedule, shares=True)


def query_pass_memory(workload: Workload, block_n: int, num_stages: int) -> int:
    """Bytes of the keys and values in flight, and of the group's rows of q and do."""
    sizes = padded_heads(workload)
    block_g, _ = group_tile(workload)
    rows = max(1, num_stages - 1) * block_n + block_g
    return element_bytes(workload) * (sizes["block_d"] + sizes["block_dv"]) * rows


def two_pass_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes needed by the pass that uses more."""
    first = query_pass_memory(workload, int(schedule.block_n), int(schedule.num_stages))
    return max(first, key_pass_memory(workload, schedule))


def plain_memory_on_hip(workload: Workload, schedule: Schedule) -> int:
    """Bytes of a step's rows or of a key tile's keys, and of its scores. Found by compiling."""
    sizes, block_n, block_m = padded_heads(workload), int(schedule.block_n), int(schedule.block_m)
    keys, (heads, _) = key_tile(workload, schedule), group_tile(workload)
    both, widest = sizes["block_d"] + sizes["block_dv"], max(sizes["block_d"], sizes["block_dv"])
    queries = block_n * max(1, int(schedule.num_stages) - 1) * both + heads * block_n
    tiles = max(block_m * int(schedule.key_stages) * both, keys * widest) + keys * block_m
    return 4 * max(queries, tiles) + SCRATCH


def default_part_tokens(workload: Workload) -> int:
    """About 16 thousand rows per part, in 1024 to 4096 tokens.

    Programs share long blocks as it is: longer parts leave fewer sums, each of a whole block.
    """
    tokens = min(4096, max(1024, next_power_of_2(16384 // int(workload.gqa_ratio))))
    return max(tokens, min(8192, 4 * block_b(workload)))


def default_key_tile(workload: Workload) -> int:
    """A block, or as much of it as eight warps can hold dk and dv for in registers.

    float32 has no exact matrix instruction, and plain products hold operands in registers.
    """
    most = 2 * FOUR_WARPS
    if workload.dtype == "float32":
        sizes = padded_heads(workload)
        wide = max(sizes["block_d"], sizes["block_dv"]) > 128
        most = FOUR_WARPS // 2 if wide or sizes["pad_d"] or sizes["pad_dv"] else FOUR_WARPS
    keys = block_b(workload)
    while keys > MOST_KEYS or (keys > LEAST_TILE and gradient_elements(workload, keys) > most):
        keys //= 2
    return keys


def wide_heads(workload: Workload) -> bool:
    """Heads whose dk and dv fill the registers of four warps."""
    sizes = padded_heads(workload)
    return sizes["block_d"] + sizes["block_dv"] > 256


def default_keys(
    workload: Workload,
    target: Target,
    wanted: tuple[tuple[str, int, int, int], ...],
    memory: Callable[[Workload, Schedule], int],
    tile: dict[str, Param] | None = None,
) -> dict[str, Param]:
    """The first (key_orientation, block_m, key_warps, key_stages) that fits the target.

    Steps have whole groups; with `tile`, the key tile's knob, parts of them where those do not fit.
    """
    if workload.dtype == "float32":  # no matrix instruction is exact: plain FMA
        # On AMD's GPUs, whose warps have twice the threads, wide heads spill in eight.
        eight = not wide_heads(workload) or target.backend == "cuda"
        wanted = (("keys", 16, 8 if eight else 4, 1),)
    group = next_power_of_2(int(workload.gqa_ratio))
    most = LEAST_TILE if workload.dtype == "float32" else 32
    if tile and wide_heads(workload) and group > most:  # steps of as many rows spill
        group = LEAST_TILE
    fallbacks = (*wanted, ("keys", 32, 4, 2), ("keys", 16, 4, 1))
    rows = (group, LEAST_TILE) if tile else (group,)
    tried = [(least, other) for least in rows for other in fallbacks]
    if wide_heads(workload):  # the others spill: rather parts of groups
        tried = [(least, other) for other in fallbacks for least in rows]
    for least, (orientation, block_m, warps, stages) in tried:
        knobs: dict[str, Param] = {
            "key_orientation": orientation,
            "block_m": max(block_m, least),
            "key_warps": warps,
            "key_stages": stages,
            "part_tokens": default_part_tokens(workload),
            **(tile or {}),
        }
        if memory(workload, Schedule.of("", knobs)) <= target.shared_memory:
            return knobs
    return knobs


def default_queries(workload: Workload, target: Target) -> dict[str, Param]:
    """The first pass's part of a schedule: the fastest for the forward pass's similar loop.

    Small programs, so that many run at a time: steps of 8 KiB, 64 results per thread.
    """
    exact = workload.dtype == "float32"  # no matrix instruction is exact: plain FMA
    sizes = padded_heads(workload)
    bytes_a_key = element_bytes(workload) * (sizes["block_d"] + sizes["block_dv"])
    keys = max(LEAST_TILE, (32 if exact else 8) * 1024 // bytes_a_key)
    rows, _ = group_tile(workload)
    widest = max(sizes["block_d"], sizes["block_dv"])
    if exact:
        keys = plain_keys(rows, keys, widest)
    warps = 8 if exact else min(8, max(1, rows * widest // 2048))
    padded = sizes["pad_d"] or sizes["pad_dv"]
    if target.arch == "120" or (warps == 1 and padded):  # one warp spills with twice as many
        keys = LEAST_TILE
    block_size = int(workload.block_size)
    steps = [n for n in (64, 32, 16) if n <= min(keys, block_b(workload))]
    block_n = next((n for n in steps if block_size % n == 0), steps[0])
    narrow = sizes["block_d"] <= 64 and target.has_wgmma  # one warp spills there with three stages
    # With 4 warps or one stage, operands of float32's plain products go through the stack.
    stages = (2, 1) if exact or narrow else (3, 2, 1)
    fitting = [n for n in stages if query_pass_memory(workload, block_n, n) <= target.shared_memory]
    return {
        "orientation": "rows",
        "block_n": block_n,
        "num_warps": warps,
        "num_stages": fitting[0] if fitting else 1,
    }


def default_two_pass(workload: Workload, target: Target) -> dict[str, Param]:
    """For dk and dv, no spills; if four warps can hold them, two programs per multiprocessor."""
    # With little shared memory, a third stage of queries spills; with longer blocks, a second.
    keys = default_key_tile(workload)
    few = target.shared_memory < 128 * 1024 and keys <= 64
    wanted = (("keys", 32, 4, 2 if few else 3),)
    if wide_heads(workload):  # of what eight warps hold without spills, on every target
        few = not target.has_wgmma or int(workload.gqa_ratio) > 32
        wanted = (("queries", 16 if few else 32, 8, 2),)
        sizes = padded_heads(workload)
        if (sizes["pad_d"] or sizes["pad_dv"]) and not target.has_wgmma:  # masks take registers
            keys = min(keys, 32)
    elif gradient_elements(workload, keys) > FOUR_WARPS:
        wanted = (("keys", 16, 8, 2),)
    elif target.arch in ("100", "120") and keys > 64:
        wanted = (("keys", 32, 8, 3),)
    return {
        **default_queries(workload, target),
        **default_keys(workload, target, wanted, key_pass_memory, {"key_tile": keys}),
    }


def share_dtype(workload: Workload) -> str:
    """The dtype of a key block's share of dq: bfloat16 has float32's range, float16 does not."""
    return "bfloat16" if workload.dtype == "bfloat16" else "float32"


def derive_key_major(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """Sizes of the one pass."""
    shares = {"dq_partials": True, "share_dtype": share_dtype(workload)}
    return {**derive_keys(workload, schedule), **shares}


def default_key_major(workload: Workload, target: Target) -> dict[str, Param]:
    """Steps that leave registers for dk, dv and a step's share of dq; about 2048 rows per part."""
    wanted: tuple[tuple[str, int, int, int], ...] = ()
    group, held = int(workload.gqa_ratio), gradient_elements(workload)
    crowded = wide_heads(workload) or held > FOUR_WARPS
    odd = group != next_power_of_2(group)
    if target.has_wgmma and block_b(workload) >= 64:  # a block is the rows of dk and dv
        few = 32 if odd or block_b(workload) > 64 else 128
        wanted = (("queries", 16 if crowded else few, 8, 2),)
    elif crowded and odd:  # which spill by keys, if shared memory allows the other
        wanted = (("queries", 16, 8, 2), ("keys", 16, 8, 2))
    elif held >= FOUR_WARPS:
        wanted = (("keys", 16 if crowded else 32, 8, 2),)
    part_tokens = max(128, next_power_of_2(2048 // group))
    return default_keys(workload, target, wanted, key_major_memory) | {"part_tokens": part_tokens}


def prefers_key_major(workload: Workload, target: Target) -> bool:
    """Small groups, whose shares of dq cost less than the blocks two passes would read for them.

    Not measured: a token's shares are 2 topk G D elements, its blocks 2 topk B D. A whole block
    must fit the target's shared memory, and its scores the registers.
    """
    sizes = padded_heads(workload)
    crowded = wide_heads(workload) or sizes["pad_d"] or sizes["pad_dv"]
    if workload.dtype == "float32" and crowded:  # plain products of a block spill
        return False
    schedule = Schedule.of("key_major", default_key_major(workload, target))
    fits = key_major_memory(workload, schedule) <= target.shared_memory
    held = block_b(workload) <= MOST_KEYS and gradient_elements(workload) <= 2 * FOUR_WARPS
    return int(workload.gqa_ratio) < 8 and fits and held


def supports_pipeline(workload: Workload) -> bool:
    """16-bit heads of 64 or 128, and groups and tiles that fill a warp group's products exactly.

    Triton lays out no tile of fewer than 8 rows as products read it, so a copy has 8 heads or more.
    """
    sizes = {int(workload.head_dim), int(workload.v_head_dim)}
    return (
        workload.dtype != "float32"
        and sizes <= {64, 128}
        and int(workload.gqa_ratio) in (8, 16, 32, 64)
        and int(workload.block_size) % PIPELINE_KEYS == 0
    )


def derive_pipeline(workload: Workload, schedule: Schedule) -> dict[str, Any]:
    """The rows of a step, which are whole groups, and how shares of dq leave.

    Float32 shares take twice the room, so that a group's columns leave one tile after another.
    """
    dtype = share_dtype(workload)
    wide = dtype == "float32"
    step_tokens = PIPELINE_ROWS // int(workload.gqa_ratio)
    return {
        "key_tile": PIPELINE_KEYS,
        "splits": int(workload.block_size) // PIPELINE_KEYS,
        "row_step": PIPELINE_ROWS,
        "step_tokens": step_tokens,
        "copy_tokens": min(4, step_tokens),
        "raw_peak": raw_peak(workload),
        "ds_scale": ds_scale(workload),
        "share_dtype": dtype,
        "share_columns": 32 if wide else 64,
        "share_places": 1 if wide else min(2, int(workload.head_dim) // 64),
    }


def pipeline_memory(workload: Workload, schedule: Schedule) -> int:
    """Bytes of the block, of the steps in flight, of p and ds, and of shares on their way out."""
    sizes = derive_pipeline(workload, schedule)
    both, rows = int(workload.head_dim) + int(workload.v_head_dim), PIPELINE_ROWS
    tiles = 2 * both * (64 + rows * int(schedule.row_stages))
    share = 64 * rows * 64 // sizes["share_columns"] * 2
    return (
        tiles + 2 * 2 * 2 * 64 * rows + 2 * sizes["share_places"] * share + 2304
    )  # statistics, barriers


def default_pipeline(workload: Workload, target: Target) -> dict[str, Param]:
    """A GiB of shares: two make it 2 to 7% faster. Parts of at most 32 thousand rows.

    At groups of 64 on an H200 parts of 512 tokens took 19.6 ms where 1024 took 26.9.
    """
    part_tokens = min(default_part_tokens(workload), 2 * 16384 // int(workload.gqa_ratio))
    return {"row_stages": 4, "part_tokens": part_tokens, "shares": 1024}


def prefers_pipeline(workload: Workload, target: Target) -> bool:
    """bfloat16: on an H200, groups of 8 to 64 take 0.48 to 0.75 of two_pass's time.

    float16's shares are of float32, and the time is two_pass's (31.6 for 31.1 ms at 65536 tokens).
    Blocks of 128 take half of two_pass's time (groups of 16); longer ones have not been timed.
    """
    return workload.dtype == "bfloat16" and int(workload.block_size) <= 2 * PIPELINE_KEYS


KEY_KNOBS = (
    Knob(
        "key_orientation",
        ("keys", "queries"),
        'rows of the scores: "keys" keep them in registers, "queries" let more warps share',
    ),
    PowerOfTwo("block_m", 16, 512, "rows a step: reuse of the block's keys against registers"),
    Knob("key_warps", (4, 8), "threads for the same key block"),
    Knob("key_stages", (1, 2, 3), "steps of queries that are loading, against shared memory"),
    PowerOfTwo("part_tokens", 16, 8192, "balance of long lists against sums of their parts"),
)

SPACES = (
    ScheduleSpace(
        op="selected_attention",
        pass_="backward",
        algorithm="key_major",
        knobs=KEY_KNOBS,
        rules=(Rule("block_m holds a group of query heads", holds_group),),
        derive=derive_key_major,
        shared_memory=key_major_memory,
        scratch=key_major_scratch,
        default=default_key_major,
        preferred=prefers_key_major,
    ),
    ScheduleSpace(
        op="selected_attention",
        pass_="backward",
        algorithm="two_pass",
        knobs=(
            Knob(
                "orientation",
                ("rows", "columns"),
                '"rows" suit mma.sync, "columns" wgmma',
            ),
            PowerOfTwo("block_n", 16, 256, "keys a step: fewer steps against programs at a time"),
            Knob("num_warps", (1, 2, 4, 8), "threads for the same tile"),
            Knob("num_stages", (1, 2, 3, 4), "steps that are loading, against shared memory"),
            *KEY_KNOBS,
            PowerOfTwo("key_tile", 16, 1024, "reuse of each row against registers"),
        ),
        rules=(
            Rule("block_n is a block's padded size or less", within_block),
            Rule(
                "columns need two stages: of a loop that is not pipelined Triton 3.6's assembler "
                "makes an operand from a stale register (tests/aot/test_descriptors.py)",
                lambda w, s, t: not t.has_wgmma or s.orientation == "rows" or int(s.num_stages) > 1,
            ),
            Rule(
                "key_tile is a block's padded size or less",
                lambda w, s, t: int(s.key_tile) <= block_b(w),
            ),
        ),
        derive=derive_two_pass,
        shared_memory=two_pass_memory,
        scratch=two_pass_scratch,
        default=default_two_pass,
    ),
    ScheduleSpace(
        op="selected_attention",
        pass_="backward",
        algorithm="warp_specialized",
        knobs=(
            Knob(
                "row_stages", (2, 4, 6), "steps that are loading, in pairs, against shared memory"
            ),
            PowerOfTwo(
                "part_tokens", 16, 8192, "balance of long lists against sums of their parts"
            ),
            PowerOfTwo("shares", 64, 4096, "MiB of shares of dq against launches"),
        ),
        derive=derive_pipeline,
        shared_memory=pipeline_memory,
        default=default_pipeline,
        supports=supports_pipeline,
        runs_on=runs_on,
        triton=GLUON,
        preferred=prefers_pipeline,
    ),
)
