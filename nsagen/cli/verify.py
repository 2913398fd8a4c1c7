"""`nsagen verify`: kernels, or another package's function, against the float64 reference."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import Annotated

import typer

from nsagen.cli.options import Json, OptionalSpecName
from nsagen.core.errors import InvalidInputError

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
    from nsagen.cli.console import print_verification, progress_bar
    from nsagen.spec import load_spec

    loaded = load_spec(spec)
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
    from nsagen.cases.implementation import (
        default_device,
        load_implementation,
        setting_of,
        verify_implementation,
    )
    from nsagen.cli.console import print_implementation

    function = load_implementation(text)
    name = text.rpartition(":")[2].rpartition(".")[2]
    op = ops[0] if len(ops) == 1 else "" if ops else name
    setting, device = setting_of(sizes, seed), default_device()
    rows = list(verify_implementation(function, op, setting, device))
    if as_json:
        print(json.dumps(rows, indent=1))
    else:
        print_implementation(text, setting, device, rows)
    if not {row["result"] for row in rows} <= {"ok", "skipped"}:
        raise typer.Exit(1)
