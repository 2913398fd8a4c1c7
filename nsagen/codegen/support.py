"""What nsagen's kernels use on each target, compiled without a GPU: the documentation's table.

Measuring takes minutes, the first time; the page is made from what was measured.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from nsagen.codegen.target import KNOWN_TARGETS
from nsagen.codegen.template import default_schedule, kernel_name, render
from nsagen.spec import Spec, load_spec
from nsagen.workload import COMPRESS_TYPES, Workload

Row = dict[str, Any]
"""op, pass, workload, target, schedule, and `kernels`: resources, or `error` in their place."""

HEAD = """\
# Kernels on every target

What the default schedules of `llama8b`'s largest workloads, and of each way to compress, compile
to: on a CPU, by Triton's own compiler, with no GPU present. Registers and spills are of the
hungriest kernel that a call launches, a thread; shared memory is what its programs need at most.

The schedules themselves, of every workload of these specs:

```sh
{commands}
```

This page is made from `docs/support.json`, which `python docs/generate.py --support` measures.
"""


SPECS = ("llama8b", "nsa_paper")
"""The specs whose kernels the table shows; of the second one, those that compress."""


def documented() -> tuple[Workload, ...]:
    """The workloads of the table: the first spec's, and of others each way to compress."""
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


def measure(
    workloads: Iterable[Workload],
    targets: Iterable[str] = tuple(KNOWN_TARGETS),
    jobs: int | None = None,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Compile each workload's default schedule for each target, in worker processes.

    Returns:
        one row a workload and target, in their order.
    """
    targets = tuple(targets)
    work = [(workload, target) for workload in workloads for target in targets]
    with ProcessPoolExecutor(jobs or os.cpu_count(), mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(measure_one, *item) for item in work]
        rows = []
        for done, (future, item) in enumerate(zip(futures, work, strict=True), 1):
            rows.append(future.result())
            if progress:
                progress(f"{item[0]} for {item[1]}", done, len(work))
    return rows


def measure_one(workload: Workload, target: str) -> Row:
    """The row of one workload and target."""
    from nsagen.codegen.compiled import compiled_resources
    from nsagen.errors import NsagenError

    row: Row = {"op": workload.op, "pass": workload.pass_, "workload": workload.label}
    row["target"] = target
    try:
        schedule = default_schedule(workload, KNOWN_TARGETS[target])
        row["schedule"] = str(schedule)
        with tempfile.TemporaryDirectory(prefix="nsagen-support-") as folder:
            path = Path(folder) / f"{kernel_name(workload, schedule)}.py"
            path.write_text(render(workload, schedule, "# support"), encoding="utf-8")
            found = compiled_resources(path, workload, KNOWN_TARGETS[target])
    except NsagenError as error:
        return row | {"error": str(error)}
    name = path.stem
    kernels = [
        dataclasses.asdict(one) | {"kernel": one.kernel.replace(name, workload.op)} for one in found
    ]
    return row | {"kernels": kernels}


def spilling(rows: Iterable[Row]) -> Iterator[str]:
    """Each kernel that spills, or does not compile or fit, in words."""
    for row in rows:
        where = f"{row['op']} {row['pass']} {row['workload']} on {row['target']}"
        if "error" in row:
            yield f"{where}: {row['error']}"
            continue
        limit = KNOWN_TARGETS[row["target"]].shared_memory
        for kernel in row["kernels"]:
            if kernel["spill_bytes"]:
                spill = f"{kernel['kernel']} spills {kernel['spill_bytes']} bytes"
                yield f"{where}: {spill}; {row['schedule']}"
            if kernel["shared_bytes"] > limit:
                yield f"{where}: {kernel['kernel']} needs {kernel['shared_bytes']} of {limit} bytes"


def page(rows: list[Row]) -> str:
    """docs/support.md."""
    commands = "\n".join(f"nsagen inspect {name}" for name in SPECS)
    targets = tuple(dict.fromkeys(row["target"] for row in rows))
    parts = [HEAD.format(commands=commands), "## Targets\n", _summary(rows, targets)]
    for target in targets:
        parts += [f"## {target}\n", _table([row for row in rows if row["target"] == target])]
    return "\n".join(parts)


def _summary(rows: list[Row], targets: tuple[str, ...]) -> str:
    lines = ["| target | variants | that spill | matrix instructions | most shared memory, of |"]
    lines.append("| --- | --- | --- | --- | --- |")
    for target in targets:
        here = [row for row in rows if row["target"] == target]
        kernels = [kernel for row in here for kernel in row["kernels"]]
        spills = sum(any(k["spill_bytes"] for k in row["kernels"]) for row in here)
        matrix = ", ".join(sorted({k["matrix"] for k in kernels} - {"none"}))
        shared = max(k["shared_bytes"] for k in kernels)
        limit = KNOWN_TARGETS[target].shared_memory
        lines.append(
            f"| `{target}` | {len(here)} | {spills or 'none'} | {matrix} "
            f"| {_kib(shared)} of {_kib(limit)} |"
        )
    return "\n".join(lines) + "\n"


def _table(rows: list[Row]) -> str:
    lines = ["| op | workload | algorithm | matrix | registers | spills | shared memory |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- |")
    for row in rows:
        kernels = row["kernels"]
        matrix = ", ".join(sorted({k["matrix"] for k in kernels} - {"none"})) or "none"
        spills = max(k["spill_bytes"] for k in kernels)
        lines.append(
            f"| {row['op']} {row['pass']} | `{row['workload']}` "
            f"| `{row['schedule'].partition('(')[0]}` | {matrix} "
            f"| {max(k['registers'] for k in kernels)} | {f'{spills} bytes' if spills else 'none'} "
            f"| {_kib(max(k['shared_bytes'] for k in kernels))} |"
        )
    return "\n".join(lines) + "\n"


def _kib(size: int) -> str:
    return f"{size / 1024:.4g} KiB"
