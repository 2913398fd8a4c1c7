"""Kernels in Triton's interpreter, which changes its own language while one runs."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from nsagen.core.workload import Workload
from nsagen.ops import Lengths, sliding_window_attention
from nsagen.ops.reference import sliding_window_attention as expected
from nsagen.runtime.dispatcher import default_dispatcher


@pytest.mark.interpreter
def test_threads_take_turns() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(24, heads, 16, generator=generator) for heads in (2, 1, 1))
    cu_seqlens = torch.tensor([0, 9, 24], dtype=torch.int32)
    want = expected(q, k, v, 8, cu_seqlens)

    def call(_: int) -> bool:
        Lengths.of(cu_seqlens, 24, 8, 4)  # a kernel that is not generated
        found = sliding_window_attention(q, k, v, 8, cu_seqlens)
        return torch.allclose(found, want, rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(6) as threads:
        assert all(threads.map(call, range(12)))


@pytest.mark.interpreter
def test_a_launch_names_the_file_of_its_kernel() -> None:
    workload = Workload.of("gated_sum", "forward", dtype="float32", v_head_dim=16)
    launch = default_dispatcher().launcher(workload, torch.device("cpu"), 4)
    assert Path(launch.__code__.co_filename).stem.startswith("gated_sum_forward__f32_dv16__")
