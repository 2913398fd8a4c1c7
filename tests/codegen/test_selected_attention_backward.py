"""What selected attention's plain backward kernels compile to, with no GPU present."""

import pytest
from triton._C.libtriton import llvm
from triton.backends.nvidia.compiler import CUDABackend

from nsagen.aot.compile import RecordedLaunch, compile_launch, recorded_launches
from nsagen.aot.resources import Resources, read_resources
from nsagen.codegen.template import kernel_name, render, space_for
from nsagen.core.errors import BuildError
from nsagen.core.target import KNOWN_TARGETS, Target
from nsagen.core.workload import Schedule, Workload


def workload(dim: int, v_dim: int, group: int, block_size: int) -> Workload:
    sizes = {"head_dim": dim, "v_head_dim": v_dim, "gqa_ratio": group, "block_size": block_size}
    return Workload.of("selected_attention", "backward", dtype="float16", **sizes)


def key_blocks_pass(w: Workload, schedule: Schedule, folder) -> RecordedLaunch:
    path = folder / f"{kernel_name(w, schedule)}.py"
    path.write_text(render(w, schedule, "# test"))
    (call,) = (c for c in recorded_launches(path, w) if c.kernel.__name__ == path.stem)
    return call


def resources_of(call: RecordedLaunch, target: Target) -> Resources:
    name = call.kernel.__name__
    return read_resources(name, compile_launch(call, target, name), target)


class _SharedBytes(Exception):
    """Raised with a kernel's shared memory in place of the steps that follow its allocation."""


def shared_bytes(call: RecordedLaunch, target: Target, monkeypatch: pytest.MonkeyPatch) -> int:
    """What Triton allocates: LLVM and ptxas, which take a third of the time, do not change it."""

    def stop(self, src, metadata, *_):
        raise _SharedBytes(metadata["shared"])

    monkeypatch.setenv("TRITON_ALWAYS_COMPILE", "1")  # a cached kernel skips all steps
    monkeypatch.setattr(llvm, "optimize_module", lambda *_, **__: None)
    monkeypatch.setattr(CUDABackend, "make_ptx", stop)
    with pytest.raises(BuildError) as stopped:
        compile_launch(call, target, call.kernel.__name__)
    cause = stopped.value.__cause__
    assert isinstance(cause, _SharedBytes), stopped.value
    return cause.args[0]


SCHEDULES = [
    ((112, 112, 7, 160), "key_major", ("keys", 32, 4, 2)),  # keys lie there in two layouts
    ((80, 96, 4, 160), "key_major", ("keys", 16, 8, 1)),
    ((128, 128, 4, 64), "key_major", ("queries", 128, 8, 2)),  # shares on their way out
    ((64, 64, 7, 160), "key_major", ("keys", 16, 4, 3)),
    ((112, 112, 16, 64), "two_pass", ("keys", 128, 4, 3)),  # three steps of queries
    ((256, 256, 7, 32), "two_pass", ("keys", 32, 4, 1)),
    ((64, 64, 4, 160), "two_pass", ("queries", 32, 8, 1)),
]


def on_either_target():
    """Each schedule on one of two targets, and on the other one as a slow test."""
    for n, schedule in enumerate(SCHEDULES):
        for m, target in enumerate(("cuda:80", "cuda:90")):
            yield pytest.param(*schedule, target, marks=[pytest.mark.slow] if (n + m) % 2 else [])


@pytest.mark.parametrize(("sizes", "algorithm", "knobs", "target"), on_either_target())
def test_no_more_shared_memory_than_estimated(
    sizes, algorithm, knobs, target, tmp_path, monkeypatch
):
    w, sm = workload(*sizes), KNOWN_TARGETS[target]
    space = space_for(w, algorithm)
    names = ("key_orientation", "block_m", "key_warps", "key_stages")
    default = dict(space.default(w, sm))
    schedule = Schedule.of(algorithm, {**default, **dict(zip(names, knobs, strict=True))})
    found = shared_bytes(key_blocks_pass(w, schedule, tmp_path), sm, monkeypatch)
    assert 0 < found <= space.shared_memory(w, schedule)


@pytest.mark.parametrize("target", [f"cuda:{arch}" for arch in (80, 86, 89, 90, 100, 120)])
def test_the_papers_own_heads_fit_registers_and_shared_memory(target, tmp_path):
    """Heads of 192 and 128, which four warps do not hold."""
    w, sm = workload(192, 128, 16, 64), KNOWN_TARGETS[target]
    schedule = space_for(w, "two_pass").default_schedule(w, sm)
    found = resources_of(key_blocks_pass(w, schedule, tmp_path), sm)
    assert found.spill_bytes == 0
    assert not found.problems(sm)


def test_a_large_block_takes_less_than_hopper_has(tmp_path, monkeypatch):
    """A default for which the estimate said that it fits, and Triton that it does not."""
    w, sm90 = workload(112, 112, 7, 160), KNOWN_TARGETS["cuda:90"]
    for algorithm in ("key_major", "two_pass"):
        schedule = space_for(w, algorithm).default_schedule(w, sm90)
        call = key_blocks_pass(w, schedule, tmp_path)
        assert 0 < shared_bytes(call, sm90, monkeypatch) <= sm90.shared_memory
