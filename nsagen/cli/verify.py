"""`nsagen verify`: kernels, or another package's function, against the float64 reference."""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsagen.cli.options import Json, OptionalSpecName
from nsagen.core.errors import InvalidInputError

if TYPE_CHECKING:
    from nsagen.cli.table import Cell

EXAMPLE = "Example: TRITON_INTERPRET=1 nsagen verify tiny --op rope"


def verify(
    spec: OptionalSpecName = None,
    ops: Annotated[
        list[str] | None,
        typer.Option("--op", help="Only this op; repeatable. With --implementation: its op."),
    ] = None,
    implementation: Annotated[
        str | None,
        typer.Option(help="Check another package's module:function instead of a spec."),
    ] = None,
    sizes: Annotated[
        list[str] | None,
        typer.Option("--size", help="With --implementation: NAME=VALUE, such as gqa_ratio=4."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the random inputs.")] = 0,
    as_json: Json = False,
) -> None:
    """Compare a spec's kernels with the float64 reference, on a GPU or in Triton's interpreter.

    With --implementation, run another package's function through the cases of --op.
    """
    if implementation is not None:
        if spec is not None:
            raise InvalidInputError(
                f"verify: got spec {spec} and --implementation; give one of them"
            )
        _verify_implementation(implementation, ops or [], sizes or [], seed, as_json)
        return
    if sizes:
        raise InvalidInputError(
            f"verify: --size needs --implementation; got --size {sizes[0]}; a spec has its own"
        )
    if spec is None:
        raise InvalidInputError(
            "verify: needs a spec or --implementation; got neither; name one: nsagen verify tiny"
        )
    from nsagen.cases.verify import verify as run
    from nsagen.cli.console import progress_bar
    from nsagen.core.paths import prepare_compiler_cache
    from nsagen.runtime.device import interpreting
    from nsagen.spec import load_spec

    loaded = load_spec(spec)
    if not interpreting():
        prepare_compiler_cache("verify", will_write=False)
    with progress_bar(f"verify {loaded.name}") as progress:
        rows = run(loaded, ops=ops or None, seed=seed, progress=progress)
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print_verification(rows)
    counts = Counter(row["result"] for row in rows)
    if counts["failed"] or not counts["ok"]:
        if not counts["failed"]:
            print("nsagen: verify: nothing could be verified here", file=sys.stderr)
        raise typer.Exit(1)


def _verify_implementation(
    text: str, ops: list[str], sizes: list[str], seed: int, as_json: bool
) -> None:
    from nsagen.cases.implementation.apart import verify_apart
    from nsagen.cases.implementation.setting import setting_of

    name = text.rpartition(":")[2].rpartition(".")[2]
    op = ops[0] if len(ops) == 1 else "" if ops else name
    setting = setting_of(sizes, seed)
    rows = list(verify_apart(text, op, setting))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print_implementation(text, setting, rows)
    if not {row["result"] for row in rows} <= {"ok", "skipped"}:
        raise typer.Exit(1)


_STYLES = {"ok": "green", "failed": "bold red", "refused": "red", "skipped": "yellow"}


def print_verification(rows: list[dict[str, Any]]) -> None:
    """One line an output of a kernel: its error beside the threshold."""
    _print_errors(
        "relative error against the float64 reference",
        ["op", "workload", "output"],
        [((f"{row['op']} {row['pass']}", row["workload"], row["output"]), row) for row in rows],
    )


def print_implementation(name: str, setting: Any, rows: list[dict[str, Any]]) -> None:
    """One line an output of each case that an implementation was put through."""
    from nsagen.cases.implementation.verify import default_device
    from nsagen.cli.console import console

    sizes = ", ".join(f"{key} {value}" for key, value in vars(setting).items())
    _print_errors(
        f"{name} on {default_device()}: {sizes}",
        ["case", "output"],
        [((row["case"], row["output"]), row) for row in rows],
    )
    counts = Counter(row["result"] for row in rows)
    console().print(", ".join(f"{count} {result}" for result, count in sorted(counts.items())))


def _print_errors(
    title: str, names: Sequence[str], rows: Sequence[tuple[tuple[str, ...], dict[str, Any]]]
) -> None:
    """A table of relative errors, thresholds and results."""
    from rich.text import Text

    from nsagen.cli.table import print_table

    def cells(row: dict[str, Any]) -> Iterator[Cell]:
        for key in ("error", "threshold"):
            yield "" if row[key] is None else f"{row[key]:.1e}"
        note = f": {row['note']}" if row["note"] else ""
        yield Text.assemble((row["result"], _STYLES[row["result"]]), note)

    print_table(
        title,
        [*names, "error", "threshold", "result"],
        [(*named, *cells(row)) for named, row in rows],
        names=len(names),
        right=("error", "threshold"),
        broken=("result",),
    )
