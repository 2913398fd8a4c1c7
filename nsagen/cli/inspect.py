"""`nsagen inspect`: the workloads of a spec, and what each target starts from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsagen.cli.options import Json, OptionalSpecName
from nsagen.core.errors import BuildError, InvalidInputError, UnsupportedWorkloadError
from nsagen.core.text import counted

if TYPE_CHECKING:
    from nsagen.core.workload import Workload
    from nsagen.spec import Spec

EXAMPLE = "Example: nsagen inspect tiny --json"


def inspect(
    spec: OptionalSpecName = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON Schema of spec files, for editors.")
    ] = False,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page with pictures to this file.")
    ] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Architecture that --html shows, e.g. cuda:90."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show the workloads that a spec asks for, and the schedule each target starts from."""
    from nsagen.spec import json_schema, load_spec

    if schema:
        print(json.dumps(json_schema(), indent=2))
        return
    if spec is None:
        raise InvalidInputError(
            "inspect: needs a spec; got none; name one, such as: nsagen inspect tiny"
        )
    if html is not None and as_json:
        raise InvalidInputError("inspect: got both --html and --json; give one at most")
    if html is not None:
        from nsagen.cli.console import print_line
        from nsagen.core.files import replace_file
        from nsagen.reports.inspection import inspection_page
        from nsagen.reports.page import check_free

        check_free(html, "give another file to --html")
        replace_file(html, inspection_page(load_spec(spec), target))
        print_line(f"wrote {html}; open it in a browser")
        return
    content = inspection(load_spec(spec))
    if as_json:
        print(json.dumps(content, indent=1))
    else:
        print_inspection(content)


def inspection(spec: Spec) -> dict[str, Any]:
    """A spec's workloads and, for each target, the schedule used where nothing was measured."""
    return {
        "spec": spec.name,
        "description": spec.description,
        "passes": list(spec.passes),
        "targets": list(spec.targets),
        "attention_shapes": len(spec.attention_shapes()),
        "workloads": [
            {
                "op": workload.op,
                "pass": workload.pass_,
                "dtype": workload.dtype,
                "label": workload.label,
                "params": dict(workload.params),
                "schedules": {target: _schedule(workload, target) for target in spec.targets},
            }
            for workload in spec.workloads()
        ],
    }


def _schedule(workload: Workload, target: str) -> dict[str, Any] | None:
    """None where no template makes the workload."""
    from nsagen.codegen.template import default_schedule
    from nsagen.core.target import parse_target

    try:
        schedule = default_schedule(workload, parse_target(target))
    except (BuildError, UnsupportedWorkloadError):
        return None
    return {"algorithm": schedule.algorithm, "knobs": dict(schedule.knobs)}


def print_inspection(content: dict[str, Any]) -> None:
    """One line a workload."""
    from nsagen.cli.table import print_table

    workloads = content["workloads"]
    title = (
        f"{content['spec']}: {counted(len(workloads), 'workload')} of "
        f"{counted(content['attention_shapes'], 'attention shape')}, with each target's default "
        "schedule"
    )
    targets = content["targets"]
    print_table(
        title,
        ["op", "pass", "workload", *targets],
        [
            (
                *(row["op"], row["pass"], row["label"]),
                *(_schedule_text(row["schedules"][target]) for target in targets),
            )
            for row in workloads
        ],
        names=3,
        broken=targets,
    )


def _schedule_text(schedule: dict[str, Any] | None) -> str:
    if schedule is None:
        return "no template covers it"
    knobs = ", ".join(f"{name}={value}" for name, value in schedule["knobs"].items())
    return f"{schedule['algorithm']}({knobs})"
