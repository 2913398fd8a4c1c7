"""What nsagen's kernels use on each target, compiled without a GPU: docs/support.json.

It holds the default schedules of every workload of every shipped spec, on every target, by kernel
name. A name covers template and schedule, so what is missing or left over shows without compiling,
and only what changed is compiled anew.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from nsagen.aot.variants import COMPILE_LIMIT_S
from nsagen.codegen.template import default_schedule, kernel_name, render
from nsagen.core.files import scratch_folder
from nsagen.core.installed import triton_version
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.worker import map_in_workers
from nsagen.core.workload import COMPRESS_TYPES, Schedule, Workload
from nsagen.spec import Spec, load_spec, shipped_specs


class Usage(NamedTuple):
    """What the hungriest of the kernels that a call launches uses, on one target.

    Attributes:
        registers: of 32 bits, a thread.
        spill_bytes: of the stack, a thread.
        shared_bytes: a program.
        matrix: the matrix instructions used, apart by commas; "" if there are none.
        loop_spills: loads and stores of the stack inside loops.
        error: why it does not compile; "" if it does.
        triton: the version that compiled it.
    """

    registers: int
    spill_bytes: int
    shared_bytes: int
    matrix: str
    loop_spills: int = 0
    error: str = ""
    triton: str = ""


class Variant(NamedTuple):
    """The default schedule of a workload on a target; `name` is its kernel's."""

    workload: Workload
    target: str
    schedule: Schedule
    name: str

    def __str__(self) -> str:
        return f"{self.workload} on {self.target}"


Table = dict[tuple[str, str], Usage]
"""(kernel name, target) -> what it uses."""

SPECS = ("llama8b", "nsa_paper")
"""The specs whose kernels the page lists; of the second one, those that compress."""


def listed() -> tuple[Workload, ...]:
    """The workloads that the page lists: the first spec's, and of others each way to compress."""
    usual, paper = (load_spec(name) for name in SPECS)
    found = [*representative(usual), *(w for w in representative(paper) if _compresses(w))]
    shape, passes = usual.shapes[-1], usual.passes
    kinds = {w.compress_type for w in found if w.op == "compress"}
    for kind in [kind for kind in COMPRESS_TYPES if kind not in kinds]:
        other = dataclasses.replace(shape, compress_type=kind, v_compress_type="")
        found += [w for w in other.workloads(passes) if _compresses(w)]
    return tuple(dict.fromkeys(found))


def _compresses(workload: Workload) -> bool:
    return "compress_type" in dict(workload.params)


def representative(spec: Spec) -> tuple[Workload, ...]:
    """Of each op, pass and compress_type the last workload: the most heads, blocks and inputs."""
    largest: dict[tuple[str, str, str], Workload] = {}
    for workload in spec.workloads():
        kind = str(dict(workload.params).get("compress_type", ""))
        largest[workload.op, workload.pass_, kind] = workload
    return tuple(largest.values())


def shipped() -> tuple[Workload, ...]:
    """Every workload of every shipped spec, once, and the page's others."""
    of_specs = (workload for name in shipped_specs() for workload in load_spec(name).workloads())
    return tuple(dict.fromkeys([*of_specs, *listed()]))


def variants(workloads: Iterable[Workload]) -> list[Variant]:
    """The default schedules of workloads on every target.

    Raises:
        UnsupportedWorkloadError: no algorithm covers one on a target.
    """
    found = []
    for workload in workloads:
        for name, target in KNOWN_TARGETS.items():
            schedule = default_schedule(workload, target)
            found.append(Variant(workload, name, schedule, kernel_name(workload, schedule)))
    return found


def measure(
    wanted: Iterable[Variant],
    known: Mapping[tuple[str, str], Usage] | None = None,
    jobs: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> Table:
    """Compile variants in worker processes, but for those that are known; in the order of names."""
    known = known or {}
    wanted = sorted(wanted, key=lambda variant: (variant.name, variant.target))
    table = {(v.name, v.target): known.get((v.name, v.target)) for v in wanted}
    work = [variant for variant in wanted if table[variant.name, variant.target] is None]
    calls = [(variant,) for variant in work]
    compiled = map_in_workers(usage_of, calls, jobs or os.cpu_count() or 1, COMPILE_LIMIT_S)
    with closing(compiled) as found:
        for done, (variant, usage) in enumerate(zip(work, found, strict=True), 1):
            table[variant.name, variant.target] = usage
            if progress:
                progress(str(variant), done, len(work))
    return {key: usage for key, usage in table.items() if usage is not None}


def usage_of(variant: Variant) -> Usage:
    """Compile a variant, or look it up if the same code was compiled for the target before."""
    from nsagen.aot.cached import compiled_resources
    from nsagen.core.errors import NsagenError

    try:
        with scratch_folder("support") as folder:
            path = folder / f"{variant.name}.py"
            source = render(variant.workload, variant.schedule, "# support")
            path.write_text(source, encoding="utf-8")
            found = compiled_resources(path, variant.workload, KNOWN_TARGETS[variant.target])
    except NsagenError as error:
        return Usage(0, 0, 0, "", 0, str(error), triton_version() or "unknown")
    return Usage(
        registers=max(one.registers for one in found),
        spill_bytes=max(one.spill_bytes for one in found),
        shared_bytes=max(one.shared_bytes for one in found),
        matrix=", ".join(sorted({one.matrix for one in found} - {"none"})),
        loop_spills=max(one.loop_spills for one in found),
        triton=triton_version() or "unknown",
    )


def problems(table: Table, wanted: Iterable[Variant]) -> Iterator[str]:
    """Each variant that does not compile or fit, or spills in a loop, in words."""
    for variant in wanted:
        usage = table[variant.name, variant.target]
        limit = KNOWN_TARGETS[variant.target].shared_memory
        if usage.error:
            yield f"{variant}: {usage.error}"
        if usage.loop_spills:
            yield (
                f"{variant}: loads or stores the stack {usage.loop_spills} times in loops; "
                f"{variant.schedule}"
            )
        if usage.shared_bytes > limit:
            yield f"{variant}: needs {usage.shared_bytes} of {limit} bytes; {variant.schedule}"


def lacking(table: Table, wanted: Iterable[Variant]) -> list[Variant]:
    """The variants that a table does not have: their template or schedule changed since."""
    return [variant for variant in wanted if (variant.name, variant.target) not in table]


def read(path: Path) -> Table:
    """A table from its file."""
    return {
        (name, target): Usage(*values)._replace(triton=triton)
        for triton, kernels in json.loads(path.read_text("utf-8")).items()
        for name, targets in kernels.items()
        for target, values in targets.items()
    }


def write(path: Path, table: Table) -> None:
    """Write a table: by version of Triton, a kernel a line."""
    versions: dict[str, dict[str, dict[str, list[int | str]]]] = {}
    for (name, target), usage in table.items():
        kernels = versions.setdefault(usage.triton, {})
        kernels.setdefault(name, {})[target] = _short(usage)
    parts = [
        f" {json.dumps(triton)}: {{\n"
        + ",\n".join(f"  {json.dumps(name)}: {json.dumps(rows)}" for name, rows in kernels.items())
        + "\n }"
        for triton, kernels in sorted(versions.items())
    ]
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", "utf-8")


def _short(usage: Usage) -> list[int | str]:
    values: list[int | str] = [*usage[:-1]]
    return values if usage.error else values[:-1]
