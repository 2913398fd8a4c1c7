"""A gallery: the page of each spec, and one page a kernel with its code and what is known of it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import Any

from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from nsagen.cases.base import Sizes, cases_of
from nsagen.cases.sizes import TOPK
from nsagen.core.packages import read_manifest
from nsagen.core.workload import Workload
from nsagen.estimate.model import GPUS, Gpu
from nsagen.reports.inspection import inspection_page
from nsagen.reports.page import page
from nsagen.reports.target_support import Table, Usage
from nsagen.spec import load_spec

_MEASURED = re.compile(
    r"tuned on nvidia-(\w+): ([\d.e-]+) ms at "
    r"(\d+) x (?:context )?(\d+)(?: tokens)?, (\d+) kv heads(?:, (\d+) blocks)?"
)
"""As `TuningRecord.evidence` says it."""


def write_gallery(
    folder: Path, specs: Sequence[str], packages: Sequence[Path], table: Table
) -> Iterator[str]:
    """Write `index.html`, a page for each spec, and one for each kernel of some packages.

    Args:
        specs: names.
        packages: folders that `nsagen build` wrote.
        table: what kernels use on each target; see `nsagen.reports.target_support.read`.

    Yields:
        the name of each page when it is written.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = ["<h2>Specs</h2>", "<ul>"]
    for name in specs:
        spec = load_spec(name)
        (folder / f"{name}.html").write_text(inspection_page(spec), encoding="utf-8")
        lines.append(f'<li><a href="{name}.html">{name}</a>: {escape(spec.description)}</li>')
        yield name
    lines.append("</ul>")
    for package in packages:
        variants: Mapping[str, Any] = (read_manifest(package) or {"variants": {}})["variants"]
        lines.append(f"<h2>Kernels of {escape(package.name)}</h2>")
        for (op, pass_), group in groupby(
            sorted(variants.items()), key=lambda item: (item[1]["op"], item[1]["pass"])
        ):
            lines.append(f"<h3>{escape(op)} {escape(pass_)}</h3><ul>")
            for name, variant in group:
                code = (package / "kernels" / f"{name}.py").read_text(encoding="utf-8")
                text = _kernel_page(name, variant, code, table)
                (folder / f"{name}.html").write_text(text, encoding="utf-8")
                targets = ", ".join(variant["targets"])
                lines.append(
                    f'<li><a href="{name}.html"><code>{name}</code></a>: '
                    f"{escape(variant['algorithm'])}, {targets}</li>"
                )
                yield name
            lines.append("</ul>")
    intro = (
        "<p>What each shipped spec asks for and dispatches to, and the kernels of the committed "
        "packages: formula, schedule, resources, measured time and code.</p>"
    )
    (folder / "index.html").write_text(page("Gallery", intro, *lines), encoding="utf-8")
    yield "index"


def _kernel_page(name: str, variant: Mapping[str, Any], code: str, table: Table) -> str:
    workload = Workload.of(
        variant["op"], variant["pass"], dtype=variant["dtype"], **variant["params"]
    )
    formula = ast.get_docstring(ast.parse(code)) or ""
    facts = {
        "workload": str(workload),
        "template": f"templates/{variant['template']}",
        "algorithm": variant["algorithm"],
        "schedule": ", ".join(f"{key}={value}" for key, value in variant["schedule"].items()),
        "fingerprint": variant["fingerprint"],
    }
    usages = {t: table[name, t] for t in variant["targets"] if (name, t) in table}
    return page(
        name,
        f"<pre>{escape(formula)}</pre>",
        f"<style>{_code_style()}</style>",
        _rows(("", ""), facts.items()),
        "<h2>Where it runs</h2>",
        _rows(
            ("target", "calls", "provenance", "share of the roofline"),
            (
                (use["target"], use["sizes"], why := use["provenance"], _share(workload, why))
                for use in variant.get("uses", ())
            ),
        ),
        "<h2>Resources</h2>",
        _rows(
            ("target", "registers", "stack", "shared memory", "matrix instructions", "Triton"),
            ((target, *_usage(usage)) for target, usage in usages.items()),
        )
        if usages
        else "<p>Not in docs/support.json, which has default schedules.</p>",
        "<h2>Code</h2>",
        f'<div class="scroll">{highlight(code, PythonLexer(), HtmlFormatter())}</div>',
    )


def _share(workload: Workload, provenance: str) -> str:
    """The least time for the work on the GPU of a measurement, over the time; "" if unknown."""
    found = _MEASURED.match(provenance)
    gpu = GPUS.get(found[1]) if found else None
    if found is None or gpu is None:
        return ""
    rows, tokens, heads = int(found[3]), int(found[4]), int(found[5])
    if workload.pass_ == "decode":
        sizes = Sizes((tokens - 1,) * rows, heads, capacity=tokens)
    else:
        sizes = Sizes((tokens,) * rows, heads, topk=int(found[6] or TOPK))
    cost = cases_of(workload).make_case(workload, sizes, "meta").cost
    return f"{_floor_ms(gpu, cost.flops, cost.bytes) / float(found[2]):.0%}"


def _floor_ms(gpu: Gpu, flops: float, bytes_: float) -> float:
    return 1e3 * max(flops / gpu.flops, bytes_ / gpu.bandwidth)


def _usage(usage: Usage) -> tuple[str, ...]:
    stack = f"{usage.spill_bytes} B"
    if usage.loop_spills:
        stack += f", {usage.loop_spills} times in loops"
    shared = f"{usage.shared_bytes:,} B"
    return str(usage.registers), stack, shared, usage.matrix or "none", usage.triton


def _rows(headings: Sequence[str], rows: Iterable[Iterable[object]]) -> str:
    head = "".join(f"<th>{escape(text)}</th>" for text in headings) if any(headings) else ""
    body = "".join(
        "<tr>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f'<div class="scroll"><table><tr>{head}</tr>{body}</table></div>'


def _code_style() -> str:
    dark = HtmlFormatter(style="github-dark").get_style_defs(".highlight")
    return (
        ".scroll { overflow-x: auto; } pre { white-space: pre-wrap; } .highlight pre "
        "{ white-space: pre; font-size: .8125rem; }\n"
        f"{HtmlFormatter().get_style_defs('.highlight')}\n"
        f"@media (prefers-color-scheme: dark) {{ {dark} }}"
    )
