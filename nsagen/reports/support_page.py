"""docs/support.md, made from docs/support.json."""

from __future__ import annotations

import shlex
from pathlib import Path

from nsagen.core.errors import BuildError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.reports.target_support import (
    SPECS,
    Table,
    Usage,
    Variant,
    lacking,
    listed,
    shipped,
    variants,
)
from nsagen.spec import load_spec, shipped_specs

COMMAND = shlex.join(
    ["python", str(Path(__file__).resolve().parents[2] / "docs" / "generate.py"), "--support"]
)
"""Measures what docs/support.json lacks, whatever the working folder is."""

HEAD = """\
# Kernels on every target

What the default schedule of every workload of every shipped spec compiles to, on a CPU with no GPU
and the compiler of Triton {triton}; each row names its version. Registers and spills are per
thread, for the kernel of a call that uses most. Shared memory is the most that a program of the
call needs.

This page is generated from `docs/support.json`, which `python docs/generate.py --support` measures.

## Shipped specs

The number of kernels of each spec on each target. All of them compile and fit the target's shared
memory. "In loops" counts those that load or store the stack in a loop, a debt: none should. To list
the schedules of a spec:

```sh
nsagen inspect {example}
```

"""


def page(table: Table) -> str:
    """The whole page.

    Raises:
        BuildError: the table lacks a kernel.
    """
    if missing := lacking(table, variants(shipped())):
        raise BuildError(
            f"docs/support.json: must have every shipped kernel; lacks {len(missing)}, the first "
            f"for {missing[0]}; run: {COMMAND}"
        )
    versions = " or ".join(sorted({usage.triton for usage in table.values()}))
    head = HEAD.format(triton=versions, example=SPECS[0])
    shown = variants(listed())
    parts = [head + _specs(table), "## Targets\n", _summary(table, shown)]
    for target in KNOWN_TARGETS:
        here = [variant for variant in shown if variant.target == target]
        parts += [f"## {target}\n", _list(table, here)]
    return "\n".join(parts)


def _specs(table: Table) -> str:
    lines = ["| spec | " + " | ".join(f"`{target}`" for target in KNOWN_TARGETS) + " |"]
    lines.append("| --- " * (len(KNOWN_TARGETS) + 1) + "|")
    for name in shipped_specs():
        cells = {target: [0, 0] for target in KNOWN_TARGETS}
        for variant in variants(load_spec(name).workloads()):
            cells[variant.target][0] += 1
            cells[variant.target][1] += table[variant.name, variant.target].loop_spills > 0
        shown = (
            f"{all_}, {spill} in loops" if spill else str(all_) for all_, spill in cells.values()
        )
        lines.append(f"| `{name}` | " + " | ".join(shown) + " |")
    return "\n".join(lines) + "\n"


def _summary(table: Table, shown: list[Variant]) -> str:
    text = f"The largest workloads of `{SPECS[0]}`, and each way to compress:\n"
    lines = [
        text,
        "| target | variants | spill in loops | matrix instructions | most shared memory, of |",
    ]
    lines.append("| --- | --- | --- | --- | --- |")
    for target, known in KNOWN_TARGETS.items():
        here = [table[v.name, v.target] for v in shown if v.target == target]
        spills = sum(usage.loop_spills > 0 for usage in here)
        matrix = ", ".join(sorted({m for usage in here for m in usage.matrix.split(", ") if m}))
        shared = max(usage.shared_bytes for usage in here)
        lines.append(
            f"| `{target}` | {len(here)} | {spills or 'none'} | {matrix} "
            f"| {_kib(shared)} of {_kib(known.shared_memory)} |"
        )
    return "\n".join(lines) + "\n"


def _list(table: Table, here: list[Variant]) -> str:
    lines = ["| op | workload | algorithm | matrix | registers | spills | shared memory | Triton |"]
    lines.append("| --- | --- | --- | --- | --- | --- | --- | --- |")
    for variant in here:
        usage: Usage = table[variant.name, variant.target]
        spills = f"{usage.spill_bytes} bytes" if usage.spill_bytes else "none"
        lines.append(
            f"| {variant.workload.op} {variant.workload.pass_} | `{variant.workload.label}` "
            f"| `{variant.schedule.algorithm}` | {usage.matrix or 'none'} | {usage.registers} "
            f"| {spills} | {_kib(usage.shared_bytes)} | {usage.triton} |"
        )
    return "\n".join(lines) + "\n"


def _kib(size: int) -> str:
    return f"{size / 1024:.4g} KiB"
