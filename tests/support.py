"""Helpers that several test files share."""

from __future__ import annotations

import functools
import hashlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from nsagen.cases.base import THRESHOLDS, Case, relative_error
from nsagen.codegen.template import (
    default_schedule,
    kernel_name,
    render,
    space_for,
    spaces_for,
)
from nsagen.core.files import replace_file
from nsagen.core.importing import import_once
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Param, Schedule, Workload
from tests.canaries import guarded


def kernel_device() -> str:
    """Where kernels run in this process: a GPU, or the CPU through Triton's interpreter."""
    return "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Keep PyTorch to one: a forked process has none of its parent's, and would wait for them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def is_hopper() -> bool:
    """Whether the GPU runs what is built on warpgroup products."""
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def kernel_dtypes() -> tuple[str, ...]:
    """The dtypes to test kernels in; the interpreter's tl.dot is wrong on bfloat16."""
    return ("float32", "float16", "bfloat16")[: 3 if torch.cuda.is_available() else 2]


def of_shape(shape: object, name: str) -> Param:
    """A parameter of an AttentionShape; an index has heads as large as the values'."""
    return getattr(shape, "v_head_dim" if name == "index_head_dim" else name)


@functools.cache
def load_kernel(workload: Workload, schedule: Schedule | None = None) -> ModuleType:
    """Render one variant into a temporary folder and import it.

    Without a schedule: the default one for cuda:90, of an algorithm that this process can run.
    """
    target = KNOWN_TARGETS["cuda:90"]
    if schedule is None and is_hopper():
        schedule = default_schedule(workload, target)
    elif schedule is None:
        general = next(space for space in spaces_for(workload, target) if space.general)
        schedule = general.default_schedule(workload, target)
    elif wrong := space_for(workload, schedule.algorithm).violations(workload, schedule, target):
        raise AssertionError(wrong)
    name = kernel_name(workload, schedule)
    source = render(workload, schedule, header=f"# {workload}: {schedule}")
    folder = Path(tempfile.gettempdir()) / "nsagen-test-kernels"
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}_{hashlib.sha256(source.encode()).hexdigest()[:8]}.py"
    replace_file(path, source)  # processes that share the folder must not find half a file
    return import_once(path, "nsagen_test_")


def check_case(module: ModuleType, case: Case) -> None:
    """Launch a kernel and compare every output with the float64 reference.

    Its tensors lie in larger buffers, which it must leave alone.
    """
    with guarded(case) as args:
        module.launch(*args)
    check_outputs(case.outputs, case.expected())


def check_outputs(outputs: dict[str, torch.Tensor], reference: dict[str, torch.Tensor]) -> None:
    """Compare what a kernel wrote with the float64 reference."""
    for name, expected in reference.items():
        out = outputs[name]
        assert out.shape == expected.shape, f"{name}: {tuple(out.shape)} != {tuple(expected.shape)}"
        if not out.dtype.is_floating_point:
            assert torch.equal(out.cpu(), expected.cpu()), f"{name} differs"
            continue
        error = relative_error(out, expected)
        assert error <= THRESHOLDS[out.dtype], f"{name}: relative error {error:.2e}"


def at_odd_bytes(x: torch.Tensor) -> torch.Tensor:
    """As large a tensor of bytes that begins at an odd one."""
    whole = torch.zeros(x.numel() + 1, dtype=x.dtype, device=x.device)
    return whole[1:].view(x.shape)


def stretch_narrow(case: Case) -> Case:
    """A decode case of two rows with queries of 1e-6 and 1e5, and narrow values of 2^-40 to 2^20.

    Products of float16 must hold them. The case's own tensors change.
    """
    q, (*_, k_scale, v_scale) = case.args[0], case.args
    q[0] *= 1e-6
    q[1] *= 1e5
    k_scale *= 2.0**-20
    sizes = 2.0 ** torch.arange(-40, 21, 12, device=v_scale.device)
    v_scale *= sizes.repeat(v_scale.shape[1])[: v_scale.shape[1], None]
    return case
