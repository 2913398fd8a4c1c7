"""Repeated launches pass kernels what Triton's JIT does; other launches are never repeated.

Triton compiles as usual, for a driver whose launcher only records.
"""

from __future__ import annotations

import gc
import os
import re
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter compiles nothing"
)

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime import driver  # noqa: E402

from nsagen.cases.base import Sizes, cases_of  # noqa: E402
from nsagen.core.importing import import_file  # noqa: E402
from nsagen.core.workload import Workload  # noqa: E402
from nsagen.runtime import replay  # noqa: E402
from nsagen.runtime.recorder import Recorder  # noqa: E402
from nsagen.runtime.replay import Allocate, Program, Run  # noqa: E402
from tests.support import load_kernel  # noqa: E402

SELECTION = {"block_size": 16, "topk": 4}
WORKLOADS = (
    Workload.of(
        "compressed_attention",
        "decode",
        dtype="float16",
        **{"head_dim": 16, "v_head_dim": 16, "gqa_ratio": 2, "kernel_size": 8},
        **{"kernel_stride": 4, "init_blocks": 1, "local_blocks": 2, **SELECTION},
    ),
    Workload.of(
        "native_sparse_attention",
        "decode",
        dtype="float16",
        **{"head_dim": 16, "v_head_dim": 16, "gqa_ratio": 2, "window_size": 24, **SELECTION},
    ),
    Workload.of("linear", "decode", dtype="float16"),
)


class Driver:
    """A driver for cuda:90 that notes launches: [(grid, arguments by source)]."""

    def __init__(self) -> None:
        self.launches: list[tuple[Any, ...]] = []
        self.utils = SimpleNamespace(
            # No module: it would be unloaded after this driver is gone.
            load_binary=lambda *args: (None, object(), 32, 0, 1024),
            get_device_properties=lambda device: {"max_shared_mem": 232448},
        )

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        def run(x: int, y: int, z: int, stream: int, function: Any, *rest: Any) -> None:
            by_jit = rest[2] is not None  # which always passes its hooks
            self.launches.append(((x, y, z), stream, metadata.hash, by_jit, rest[4:]))

        return run

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 1000 + device


@pytest.fixture
def fake() -> Iterator[Driver]:
    previous = driver._active
    stand_in = Driver()
    driver.set_active(stand_in)  # type: ignore[arg-type]
    yield stand_in
    driver.set_active(previous)  # type: ignore[arg-type]


def call_of(workload: Workload, seed: int = 0, lengths: Any = (319, 77, 200)) -> tuple[Any, ...]:
    sizes = Sizes(lengths, kv_heads=2, capacity=320)
    return cases_of(workload).make_case(workload, sizes, "cpu", seed).args


def normal_form(launches: list[tuple[Any, ...]], args: tuple[Any, ...]) -> list[Any]:
    """Launches with addresses as the input that they are of, or as places in the workspace."""
    inputs = {x.data_ptr(): f"input {i}" for i, x in enumerate(args) if isinstance(x, Tensor)}
    assert len(inputs) == sum(isinstance(x, Tensor) for x in args)

    def address(value: Any) -> Any:
        if isinstance(value, Tensor):
            value = value.untyped_storage().data_ptr() + (
                value.storage_offset() * value.element_size()
            )
        return inputs.get(value, value) if isinstance(value, int) else value

    plain = [[address(value) for value in values] for *_, values in launches]
    large = [v for values in plain for v in values if isinstance(v, int) and v > 1 << 32]
    lowest = min(large, default=0)
    relative = [
        [f"workspace {v - lowest}" if isinstance(v, int) and v > 1 << 32 else v for v in values]
        for values in plain
    ]
    return [(*launch[:3], values) for launch, values in zip(launches, relative, strict=True)]


class Replayed:
    """A `launch` that is recorded once, and then repeated where that is possible."""

    def __init__(self, launch: Callable[..., None], args: tuple[Any, ...]) -> None:
        self.launch = launch
        recorder = Recorder(self.tensors(args))
        recorder.run(launch, args)
        self.program: Program | None = recorder.program(())

    @staticmethod
    def tensors(args: tuple[Any, ...]) -> list[Tensor]:
        return [arg for arg in args if isinstance(arg, Tensor)]

    def __call__(self, *args: Any) -> bool:
        """Whether the call was repeated."""
        return self.program is not None and self.program.run(self.tensors(args)) is not None


@pytest.mark.parametrize("workload", WORKLOADS, ids=lambda w: w.op)
def test_a_replay_launches_what_the_jit_would(fake: Driver, workload: Workload) -> None:
    launch = load_kernel(workload).launch
    replayed = Replayed(launch, call_of(workload))
    assert all(by_jit for *_, by_jit, _ in fake.launches)
    for seed in (1, 2):
        args = call_of(workload, seed)
        fake.launches.clear()
        launch(*args)
        expected = normal_form(fake.launches, args)
        fake.launches.clear()
        assert replayed(*args)
        assert not any(by_jit for *_, by_jit, _ in fake.launches)
        assert normal_form(fake.launches, args) == expected


def test_calls_of_other_sizes_share_compiled_code(fake: Driver) -> None:
    """Compiling its text takes longer than recording a call."""
    launch = load_kernel(WORKLOADS[0]).launch
    few, more = call_of(WORKLOADS[0]), call_of(WORKLOADS[0], lengths=(319, 77, 200, 5))
    one, other = Replayed(launch, few).program, Replayed(launch, more).program
    assert one is not None
    assert other is not None
    assert one.run.__code__ is other.run.__code__


def test_the_text_of_a_call_has_names_of_its_own_and_numbers(
    fake: Driver, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is run: nothing that was read may stand in it, such as a text in quotes."""
    texts: list[str] = []
    made = replay._made
    monkeypatch.setattr(replay, "_made", lambda text: (texts.append(text), made(text))[1])
    for workload in WORKLOADS:
        assert Replayed(load_kernel(workload).launch, call_of(workload)).program is not None
    words = set(re.findall(r"[A-Za-z_]\w*", "".join(texts)))
    own = {
        *[
            "def",
            "make",
            "run",
            "tensors",
            "return",
            "if",
            "or",
            "None",
            "stream",
            "del",
            "dtype",
            "device",
        ]
    }
    assert {word for word in words - own if not re.fullmatch(r"[cpt]\d+", word)} == set()
    assert not set("".join(texts)) & set("'\"\\")


def test_addresses_of_another_alignment_are_not_repeated(fake: Driver) -> None:
    """Triton compiles for addresses that are multiples of 16, and for others."""
    workload = WORKLOADS[1]
    launch, args = load_kernel(workload).launch, call_of(workload)
    replayed = Replayed(launch, args)
    odd = torch.empty(args[0].numel() + 1, dtype=args[0].dtype)[1:].view(args[0].shape)
    assert not replayed(odd, *args[1:])
    assert replayed(*args)
    assert Replayed(launch, (odd, *args[1:])).program is None


def test_hooks_see_every_launch(fake: Driver) -> None:
    workload = WORKLOADS[1]
    args = call_of(workload)
    replayed = Replayed(load_kernel(workload).launch, args)

    def hook(metadata: object) -> None: ...

    triton.knobs.runtime.launch_enter_hook.add(hook)
    try:
        assert not replayed(*args)
    finally:
        triton.knobs.runtime.launch_enter_hook.remove(hook)
    assert replayed(*args)


def edited(old: str, new: str) -> ModuleType:
    """The kernel of a linear layer with some text of its `launch` replaced."""
    path = Path(load_kernel(WORKLOADS[2]).__file__ or "")
    source = path.read_text()
    assert old in source
    changed = path.with_name(f"{path.stem}_edited.py")
    changed.write_text(source.replace(old, new))
    return import_file(changed)


def test_a_launch_that_does_more_is_never_repeated(fake: Driver) -> None:
    """What it computed for the first call may be wrong for the next one."""
    module = edited("    outputs = y.shape[1]\n", "    outputs = y.shape[1]\n    x = x + 0\n")
    assert Replayed(module.launch, call_of(WORKLOADS[2])).program is None
    assert fake.launches


def test_a_view_of_an_input_is_a_place_in_it(fake: Driver) -> None:
    module = edited("    outputs = y.shape[1]\n", "    outputs = y.shape[1]\n    x = x[:, 8:]\n")
    replayed = Replayed(module.launch, call_of(WORKLOADS[2]))
    args = call_of(WORKLOADS[2], seed=1)
    fake.launches.clear()
    assert replayed(*args)
    (*_, values), *_ = fake.launches
    assert values[0] == args[0].data_ptr() + 8 * args[0].element_size()


def test_a_view_of_inputs_that_share_memory_is_not_repeated(fake: Driver) -> None:
    """In the next call they may lie elsewhere in it, or apart."""
    module = edited("    outputs = y.shape[1]\n", "    outputs = y.shape[1]\n    x = x[:, 8:]\n")
    x, *rest = call_of(WORKLOADS[2])
    both = torch.zeros(2, *x.shape, dtype=x.dtype)
    recorder = Recorder([*both, *Replayed.tensors(tuple(rest))])
    recorder.run(module.launch, (both[0], *rest))
    assert recorder.program(()) is None


def test_what_launches_nothing_of_triton_is_called_every_time() -> None:
    calls: list[tuple[object, ...]] = []
    args = (torch.zeros(1), 7)
    assert Replayed(lambda *args: calls.append(args), args).program is None
    assert [number for _, number in calls] == [7]


def test_nothing_of_a_recorded_call_is_held(fake: Driver) -> None:
    """Its tensors are freed with the caller's last reference, without garbage collection."""
    args = call_of(WORKLOADS[0])
    held = [weakref.ref(x) for x in args if isinstance(x, Tensor)]
    gc.disable()
    try:
        replayed = Replayed(load_kernel(WORKLOADS[0]).launch, args)
        assert replayed.program is not None
        fake.launches.clear()
        del args
        assert not any(ref() is not None for ref in held)
    finally:
        gc.enable()


class Launcher36:
    """Triton 3.6's launcher of a kernel: its own part takes descriptors apart."""

    def __init__(self, metas: list[dict[str, Any]], launches: list[Any]) -> None:
        self.global_scratch_size = self.profile_scratch_size = 0
        self.launch_cooperative_grid, self.launch_pdl, self.num_ctas = False, False, 1

        def by_c(*args: Any) -> None:
            launches.append(args)

        self.launch = Launcher36.wrapped(by_c, metas) if metas else by_c

    @staticmethod
    def wrapped(launcher: Any, tensordesc_meta: list[dict[str, Any]]) -> Any:
        from triton.runtime import driver

        def inner(*args: Any) -> None:
            final, metas = list(args[:13]), iter(tensordesc_meta)
            for arg in args[13:]:
                if not hasattr(arg, "block_shape"):
                    final.append(arg)
                    continue
                meta, utils = next(metas), driver.active.utils  # type: ignore[attr-defined]
                parts = (meta["swizzle"], meta["elem_size"], meta["elem_type"], meta["block_size"])
                address = arg.base.data_ptr()
                made = utils.fill_tma_descriptor(address, *parts, arg.shape, arg.strides, 0)
                final += [made, *arg.shape, *arg.strides]
            launcher(*final)

        return inner

    def __call__(self, *args: Any) -> None:
        x, y, z, stream, function, *rest = args
        fixed = (self.launch_cooperative_grid, self.launch_pdl, None, None)
        self.launch(x, y, z, stream, function, *fixed, *rest)


Launcher36.__name__ = "CudaLauncher"


@pytest.mark.parametrize("descriptors", [0, 2])
def test_launches_pass_by_a_launcher_that_is_known(fake: Driver, descriptors: int) -> None:
    """They pass its C function what the launcher would, and make descriptors once."""
    made: list[Any] = []

    def fill(*args: Any) -> Any:
        made.append(args)
        return ("map", *map(str, args))

    fake.utils.fill_tma_descriptor = fill
    meta = {"swizzle": 3, "elem_size": 2, "elem_type": 5, "block_size": [64, 16]}
    metas = [meta | {"fp4_padded": False}] * descriptors
    launches: list[Any] = []
    run = Launcher36(metas, launches)
    compiled = SimpleNamespace(run=run, function="function", packed_metadata=(4, 1, 0))
    tensors = [torch.zeros(8, 16, dtype=torch.float16) for _ in range(3)]

    def descriptor(x: Tensor) -> Any:
        fields = {"shape": [8, 16], "strides": [16, 1], "block_shape": [64, 16]}
        return SimpleNamespace(base=x, padding="zero", **fields)

    x, y, z = tensors
    described = [descriptor(x), descriptor(y)][:descriptors]
    args = (*described, 7, x, y, z, 0.5)
    recorder = Recorder(tensors)
    for _ in range(2):
        recorder.launched(compiled, (2, 3), args, [True] * len(args))
    program = recorder.program(())
    assert program is not None
    for _ in range(2):
        assert program.run(tensors) == []
    by_program, *again = launches
    launches.clear()
    plain = [a.data_ptr() if isinstance(a, Tensor) else a for a in args]
    run(2, 3, 1, 1000, "function", (4, 1, 0), None, None, None, *plain)
    assert [by_program, *again] == [launches[0]] * 4
    assert len(made) == 2 * descriptors  # once for the program, once by the launcher itself


def test_inputs_are_free_after_their_last_use(fake: Driver) -> None:
    """Where the caller gives them up; and while a call is recorded, when it lets go of them."""
    inputs = [torch.zeros(8), torch.zeros(8)]
    alive = list[list[bool]]()

    def run(*args: Any) -> None:
        alive.append([one() is not None for one in held])

    compiled = SimpleNamespace(run=run, function=object(), packed_metadata=())
    recorder = Recorder(inputs)
    recorder.launched(compiled, (1,), (inputs[0], 1), [True, False])
    held = [weakref.ref(x) for x in inputs]
    recorder.let_go(inputs.pop(0))
    assert held[0]() is None
    recorder.launched(compiled, (1,), (inputs[0], 1), [True, False])
    program = recorder.program(())
    assert program is not None
    for released in (False, True):
        owned = [torch.zeros(8), torch.zeros(8)]
        held, tensors = [weakref.ref(x) for x in owned], [*owned]
        assert program.run(tensors, owned.clear if released else None) == []
        assert alive == [[True, True], [not released, True]]
        alive.clear()


def test_small_workspaces_share_an_allocation(fake: Driver) -> None:
    """Tensors that PyTorch or the caller reads, and large ones, have their own."""
    (x,) = inputs = [torch.zeros(8)]
    recorder = Recorder(inputs)
    compiled = SimpleNamespace(run=lambda *args: None, function=object(), packed_metadata=())
    kept, filled, first, second, large = (
        torch.empty(size) for size in (3, 4, 5, 6, (2 << 20) // 4 + 1)
    )
    for tensor in (kept, filled, first, second, large):
        recorder.allocated(tensor)
    recorder.applied(Tensor.fill_, (filled, 0), {}, filled)
    args = (x, kept, filled, first[2:], second, large)
    recorder.launched(compiled, (1,), args, [False] * len(args))
    program = recorder.program([kept])
    assert program is not None
    allocated = [step.meta[0] for step in program.steps if isinstance(step, Allocate)]
    assert allocated == [(1024,), (3,), (4,), ((2 << 20) // 4 + 1,)]
    (run,) = (step for step in program.steps if isinstance(step, Run))
    places = [(place.slot, place.offset) for place in run.args]
    assert places == [(0, 0), (2, 0), (3, 0), (1, 8), (1, 512), (4, 0)]
    assert program.outputs == (2,)
    (output,) = program.run(inputs) or []
    assert output.shape == (3,)


def test_large_workspaces_share_an_allocation_where_they_live_together(fake: Driver) -> None:
    """So the peak of memory stays what it was."""
    recorder = Recorder([torch.zeros(8)])
    compiled = SimpleNamespace(run=lambda *args: None, function=object(), packed_metadata=())
    large = (2 << 20) + 1
    first, second, longer, later = (torch.empty(large, dtype=torch.int8) for _ in range(4))
    for tensor in (first, second, longer):
        recorder.allocated(tensor)
    recorder.launched(compiled, (1,), (first, second[1:], longer), [False] * 3)
    recorder.allocated(later)
    recorder.launched(compiled, (1,), (longer, later), [False] * 2)
    program = recorder.program(())
    assert program is not None
    allocated = [step.meta[0] for step in program.steps if isinstance(step, Allocate)]
    assert allocated == [((4 << 20) + 2 * 512,), (large,), (large,)]
    one, other = (step for step in program.steps if isinstance(step, Run))
    assert [(place.slot, place.offset) for place in one.args] == [
        (1, 0),
        (1, (2 << 20) + 513),
        (2, 0),
    ]
    assert [(place.slot, place.offset) for place in other.args] == [(2, 0), (3, 0)]
    assert program.run([torch.zeros(8)]) == []
