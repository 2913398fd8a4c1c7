"""Threads that hold the same sum hold the same bits of it.

A sum over elements of several threads goes through shuffles: a thread adds what it gets to what
it has. If that is a product, a compiler makes one fused operation of both, which rounds the other
thread's product and not its own; the other thread does the opposite. Whose sum counts is chance.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from nsagen.aot.compile import compile_launch, recorded_launches
from nsagen.codegen.template import kernel_name, render, spaces_for
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import STATIC_PARAMS, Param, Workload

TARGET = KNOWN_TARGETS["cuda:90"]
PARAMS: dict[str, Param] = {
    **{
        "head_dim": 64,
        "v_head_dim": 64,
        "index_head_dim": 64,
        "gqa_ratio": 2,
        "kernel_size": 32,
        "kernel_stride": 16,
    },
    **{"block_size": 16, "topk": 4, "init_blocks": 1, "local_blocks": 1, "window_size": 100},
}
SHUFFLED = re.compile(r"shfl\.sync\.\w+\.b32\s+(%r\d+)")
FUSED = re.compile(r"fma\.rn(?:\.ftz)?\.f32\s+%r\d+, %r\d+, %r\d+, (%r\d+)")


def fused_with_shuffled(ptx: str) -> set[str]:
    """The registers that came from another thread and were added to a product."""
    return set(SHUFFLED.findall(ptx)) & set(FUSED.findall(ptx))


CALLS = [
    ("selected_attention", "forward"),
    ("compressed_attention", "decode"),
    ("native_sparse_attention", "decode"),
    ("selected_attention", "decode"),
]


@pytest.mark.parametrize(
    ("op", "pass_", "dtype"),
    [
        pytest.param(*call, dtype, marks=[] if i % 2 == j else pytest.mark.slow)
        for i, call in enumerate(CALLS)
        for j, dtype in enumerate(("float32", "bfloat16"))
    ],
)
def test_no_product_is_fused_with_what_another_thread_sends(
    op: str, pass_: str, dtype: str, tmp_path: Path
) -> None:
    work = Workload.of(op, pass_, dtype=dtype, **{n: PARAMS[n] for n in STATIC_PARAMS[op, pass_]})
    for space in spaces_for(work, TARGET):
        schedule = space.default_schedule(work, TARGET)
        path = tmp_path / f"{kernel_name(work, schedule)}.py"
        path.write_text(render(work, schedule, "# test"))
        for call in recorded_launches(path, work):
            ptx = compile_launch(call, TARGET, path.stem).asm["ptx"]
            assert not fused_with_shuffled(ptx), f"{space.algorithm}: {call.kernel.__name__}"
