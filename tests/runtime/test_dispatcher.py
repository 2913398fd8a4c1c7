import subprocess
import sys
import timeit

import pytest
import torch

from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.core.workload import Workload
from nsagen.runtime import Bucket, Dispatcher, Releases
from nsagen.runtime.dispatcher import default_dispatcher, lookup

from .conftest import selected

GPU = torch.device("cuda", 0)
CPU = torch.device("cpu")


def launched(dispatcher: Dispatcher, tokens: int, device: torch.device = GPU) -> str:
    log: list[str] = []
    dispatcher.launcher(selected(), device, tokens)(log)
    return log[0]


def test_the_first_bucket_that_covers_the_call_serves_it(dispatcher: Dispatcher) -> None:
    assert [launched(dispatcher, n) for n in (1, 100, 101, 4096)] == [
        "small",
        "small",
        "large",
        "large",
    ]


def test_kernels_are_imported_when_first_used(dispatcher: Dispatcher) -> None:
    dispatcher.launcher(selected(), GPU, 5)
    assert f"{dispatcher.package}.small" in sys.modules
    assert f"{dispatcher.package}.large" not in sys.modules


def test_a_size_that_no_bucket_covers_names_the_buckets(dispatcher: Dispatcher) -> None:
    with pytest.raises(UnsupportedWorkloadError, match=r"tokens 1\.\.100; tokens 101\.\.4096, not"):
        dispatcher.launcher(selected(), GPU, 4097)


def test_a_missing_workload_prints_the_spec_lines(dispatcher: Dispatcher) -> None:
    with pytest.raises(UnsupportedWorkloadError) as caught:
        dispatcher.launcher(selected(head_dim=128, dtype="bfloat16"), GPU, 1)
    assert str(caught.value).splitlines() == [
        "dispatcher fake: every call needs a variant; none covers selected_attention forward "
        'bf16_d128_dv64_g4_b64 on cuda:90: on_missing is "error"; '
        "add to the spec and run nsagen build:",
        "attention:",
        "  dtype: bfloat16",
        "  head_dim: 128",
        "  v_head_dim: 64",
        "  gqa_ratio: 4",
        "  block_size: 64",
        "passes: [forward]",
        'targets: ["cuda:90"]',
    ]


def test_another_triton_gets_the_kernel_that_runs_with_it(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:90")
    table = {selected(): {"cuda:90": ((Bucket(), "small"), (Bucket(), "large"))}}
    needed = {"small": Releases((3, 6), (3, 9))}
    for release, kernel in (((3, 9), "small"), ((3, 10), "large"), (None, "small")):
        monkeypatch.setattr("nsagen.runtime.dispatcher.installed_release", lambda r=release: r)
        found = Dispatcher("releases", kernels, table, "error", needed)
        assert launched(found, 7) == kernel
        assert launched(found.with_on_missing("build"), 7) == kernel


def test_without_a_kernel_for_this_triton_the_error_says_so(
    kernels: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:90")
    monkeypatch.setattr("nsagen.runtime.dispatcher.installed_release", lambda: (4, 0))
    table = {selected(): {"cuda:90": ((Bucket(), "small"),)}}
    found = Dispatcher("releases", kernels, table, "error", {"small": Releases((3, 6), (3, 9))})
    with pytest.raises(UnsupportedWorkloadError, match=r"need Triton 3\.6 to 3\.9, and"):
        found.launcher(selected(), GPU, 7)


def test_a_package_has_the_kernels_of_its_table(dispatcher: Dispatcher) -> None:
    """On a miss it could build others, but a call that can do without them does."""
    for on_missing in ("error", "build"):
        known = dispatcher.with_on_missing(on_missing)
        assert known.has(selected(), GPU)
        assert not known.has(selected(head_dim=128), GPU)


def test_whether_a_kernel_is_there_can_be_traced(dispatcher: Dispatcher) -> None:
    """Ops ask it while they are compiled in parts."""
    works = [selected(), selected(head_dim=128)]

    def found(x: torch.Tensor) -> torch.Tensor:
        return x + torch.tensor([float(dispatcher.has(work, GPU)) for work in works])

    traced = torch.compile(found, fullgraph=True, backend="eager")
    assert traced(torch.zeros(2)).tolist() == [1.0, 0.0]


def test_without_a_package_what_can_be_built_is_there(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"head_dim": 128, "v_head_dim": 128, "gqa_ratio": 16, "window_size": 512}
    blocks = {"block_size": 64, "init_blocks": 1, "local_blocks": 2}
    forced = Workload.of("sliding_window_attention", "forward", dtype="bfloat16", **sizes, **blocks)
    for target, there in (("cuda:90", True), ("cuda:80", False), ("cuda:7", False)):
        monkeypatch.setattr(Dispatcher, "_target", lambda *args, target=target: target)
        assert default_dispatcher().has(forced, GPU) is there


def test_cpu_calls_need_the_interpreter(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(UnsupportedWorkloadError, match="TRITON_INTERPRET=1"):
        dispatcher.launcher(selected(), CPU, 1)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert launched(dispatcher, 1, CPU) == "small"  # of the table's first target


def test_the_interpreter_refuses_bfloat16(
    dispatcher: Dispatcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(InvalidInputError, match="wrongly on bfloat16"):
        dispatcher.launcher(selected(dtype="bfloat16"), CPU, 1)


def test_descriptions(dispatcher: Dispatcher) -> None:
    assert dispatcher.workloads() == (selected(),)
    rows = dispatcher.describe()
    assert [(row["target"], row["sizes"], row["variant"]) for row in rows] == [
        ("cuda:90", "tokens 1..100", "small"),
        ("cuda:90", "tokens 101..4096", "large"),
        ("cuda:80", "any size", "first"),
    ]
    assert rows[0]["params"]["gqa_ratio"] == 4
    assert repr(dispatcher) == (
        "Dispatcher('fake', 1 workloads, targets: cuda:80, cuda:90, on_missing='error')"
    )


def test_on_missing_must_be_known(kernels: str) -> None:
    with pytest.raises(InvalidInputError, match="got 'ignore'"):
        Dispatcher("fake", kernels, {}, on_missing="ignore")  # type: ignore[arg-type]


def test_keys_find_dispatchers_again(kernels: str) -> None:
    first, second = (Dispatcher(f"keys_{kernels}", kernels, {}) for _ in range(2))
    assert first.key == f"keys_{kernels}"
    assert second.key == f"keys_{kernels}#2"
    assert lookup(first.key) is first
    assert lookup(second.key) is second
    strict = first.with_on_missing("error")
    assert strict.key == f"keys_{kernels}:error"
    assert first.with_on_missing("error") is strict
    assert strict.with_on_missing("build") is first
    assert lookup("") is lookup("") is default_dispatcher()
    with pytest.raises(InvalidInputError, match=r'nsagen\.load\("nothing"\)'):
        lookup("nothing:error#2")


def test_a_lookup_takes_microseconds(dispatcher: Dispatcher) -> None:
    workload = selected()
    dispatcher.launcher(workload, GPU, 200)
    times = timeit.repeat(lambda: dispatcher.launcher(workload, GPU, 200), number=1000, repeat=5)
    assert min(times) / 1000 < 20e-6  # about 2 us on an idle core


def test_importing_a_table_is_light() -> None:
    code = (
        "import sys, nsagen, nsagen.runtime as r, nsagen.core.workload as w\n"
        "r.Dispatcher('light', 'x', {w.Workload.of('rope', 'forward', dtype='float16', "
        "head_dim=64): {'cuda:90': ((r.Bucket(), 'y'),)}})\n"
        "heavy = {'torch', 'triton', 'jinja2', 'yaml', 'pydantic', 'optuna'} & set(sys.modules)\n"
        "sys.exit(', '.join(sorted(heavy)) or 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_buckets_without_limits_serve_calls_without_context(kernels: str) -> None:
    table = {selected(): {"cuda:90": ((Bucket(context=(1, 9)), "small"), (Bucket(), "large"))}}
    dispatcher = Dispatcher("contexts", kernels, table)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nsagen.runtime.dispatcher.target_of", lambda device: "cuda:90")
        log: list[str] = []
        dispatcher.launcher(selected(), GPU, 1)(log)
        dispatcher.launcher(selected(), GPU, 1, 9)(log)
    assert log == ["large", "small"]
