"""Every workload of every shipped spec has a default schedule for every target, and renders."""

import functools

import pytest

from nsagen.codegen.template import default_schedule, render
from nsagen.core.paths import specs_dir
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Schedule, Workload
from nsagen.spec import load_spec, shipped_specs


@functools.cache
def schedules(name: str) -> dict[tuple[Workload, Schedule], str]:
    """What a spec asks for on all targets -> one of these."""
    return {
        (workload, default_schedule(workload, target)): str(target)
        for workload in load_spec(name).workloads()
        for target in KNOWN_TARGETS.values()
    }


@pytest.mark.parametrize("name", shipped_specs())
def test_every_workload_has_a_schedule_on_every_target(name):
    assert {workload for workload, _ in schedules(name)} == set(load_spec(name).workloads())


@pytest.mark.parametrize("name", [n for n in shipped_specs() if n not in ("sweep", "llama8b")])
def test_every_kernel_renders(name):
    for workload, schedule in schedules(name):
        assert "def launch(" in render(workload, schedule, "# test")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sweep", "llama8b"])
def test_every_kernel_of_many_renders(name):
    for workload, schedule in schedules(name):
        assert "def launch(" in render(workload, schedule, "# test")


@pytest.mark.parametrize("name", shipped_specs())
def test_every_parameter_names_its_source(name):
    """Each parameter has a comment beside it, and the package is named as the file."""
    lines = (specs_dir() / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    section = lines[lines.index("attention:") + 1 :]
    section = section[: section.index("")]
    assert section
    assert all(" # " in line for line in section), section
    assert load_spec(name).name == name
