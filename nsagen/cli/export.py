"""`nsagen export`: a spec's kernels as a package that needs torch and triton only."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from nsagen.cli.options import Json, SpecName
from nsagen.core.packages import as_argument
from nsagen.core.text import counted, printable, shell_text

EXAMPLE = "Example: nsagen export tiny --out exported"


def export(
    spec: SpecName,
    out: Annotated[Path, typer.Option("--out", help="Folder in which it is written.")] = Path(
        "exported"
    ),
    layout: Annotated[
        str,
        typer.Option(
            help="package: a Python package; kernels: the layout of Hugging Face kernels."
        ),
    ] = "package",
    name: Annotated[
        str | None, typer.Option(help="Name to import; default: nsagen_<name of the spec>.")
    ] = None,
    release: Annotated[
        int, typer.Option(help="Counts the exports of a spec; part of the version.")
    ] = 1,
    repo_id: Annotated[
        str, typer.Option("--repo-id", help="organization/name on the hub, for --layout kernels.")
    ] = "",
    tuned: Annotated[
        Path | None,
        typer.Option(
            help="Folder with the spec's tuning records, or the one that tune --out was given; "
            "default: that of the last build, or else beside the spec."
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a spec's kernels, and the ops that run them, as a package that stands alone."""
    from nsagen.cli.console import print_line
    from nsagen.export.write import export as write
    from nsagen.spec import load_spec

    result = write(
        load_spec(spec),
        out,
        layout=layout,  # type: ignore[arg-type]  # checked there
        name=name,
        release=release,
        repo_id=repo_id,
        tuned=tuned,
    )
    for note in result.notes:
        print(f"nsagen: export: {printable(note)}", file=sys.stderr)
    if as_json:
        row = {
            "folder": str(result.folder),
            "package": result.package,
            "layout": layout,
            "kernels": result.kernels,
            "written": list(result.written),
            "removed": list(result.removed),
            "notes": list(result.notes),
        }
        print(json.dumps(row, indent=1))
        return
    changed = f"{counted(len(result.written), 'file')} written, {len(result.removed)} removed"
    kernels = counted(result.kernels, "kernel")
    print_line(f"{result.package}: {kernels} in {result.folder}; {changed}")
    if layout == "package":
        wheel = shell_text(["pip", "wheel", "--no-deps", as_argument(str(result.folder))])
        print_line(f"for a wheel, run: {wheel}")
