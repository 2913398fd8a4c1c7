"""`nsagen tune`: parses, calls, prints. It imports what it needs when it runs."""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from time import monotonic
from typing import Annotated, get_args

import typer

from nsagen.cli.options import sizes_of
from nsagen.core.errors import InvalidInputError
from nsagen.core.installed import require_extra
from nsagen.core.text import nearest

EXAMPLE = "Example: nsagen tune llama8b --op selected_attention --time 10m"

_UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0}


def tune(
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC]",
            help="A spec's path or a shipped spec's name; default: what generated/ was built from.",
        ),
    ] = None,
    ops: Annotated[list[str] | None, typer.Option("--op", help="Only this op; repeatable.")] = None,
    passes: Annotated[
        list[str] | None, typer.Option("--pass", help="Only this pass; repeatable.")
    ] = None,
    seqlens: Annotated[
        str, typer.Option(help="Tokens (decoding: of context) to tune for, such as 2048,16384.")
    ] = "",
    batches: Annotated[
        str, typer.Option("--batch", help="Sequences (decoding: rows) to tune for, such as 1,32.")
    ] = "",
    params: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            metavar="NAME=VALUE",
            help="Only workloads with this value, such as gqa_ratio=16 or local_blocks=none, and "
            "those of ops that have no such parameter; repeatable.",
        ),
    ] = None,
    kv_heads: Annotated[
        int | None,
        typer.Option(
            min=1, help="Key/value heads; default: a learned index's, or as for 32 query heads."
        ),
    ] = None,
    trials: Annotated[
        int, typer.Option(min=1, help="Schedules to try per workload and size.")
    ] = 200,
    time: Annotated[
        str,
        typer.Option(
            help="Total time: 90s, 10m or 1h, divided evenly; default: no limit, or 2m with "
            "--objective static."
        ),
    ] = "",
    study: Annotated[
        str | None, typer.Option(help="URL of the studies' storage; default: a local file.")
    ] = None,
    objective: Annotated[
        str, typer.Option(help="time: measure on the GPU. static: use compile-time resources.")
    ] = "time",
    target: Annotated[
        str | None, typer.Option(help="With --objective static: an architecture, e.g. cuda:100.")
    ] = None,
    simulate: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Replay a recording; needs no GPU.")
    ] = None,
    record: Annotated[
        Path | None,
        typer.Option(
            "--record-exhaustive",
            metavar="FILE",
            help="Measure every schedule of one workload into FILE (.jsonl.gz).",
        ),
    ] = None,
    report: Annotated[
        bool, typer.Option("--report", help="Also write an HTML page about the searches.")
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show the running studies on a page of this machine.")
    ] = False,
    sampler: Annotated[str, typer.Option(help="gp, tpe or random.")] = "gp",
    seed: Annotated[int, typer.Option(help="Seed of the sampler.")] = 0,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Compile processes; default: one per core.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder for tuning records; default: beside the spec.")
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print JSON on stdout, and nothing else.")
    ] = False,
) -> None:
    """Find the fastest schedule of each workload and size on this machine's GPU.

    Stop it at any time: the same command resumes. On several GPUs, run it once per GPU
    (CUDA_VISIBLE_DEVICES=0, 1, ...) with the same --study.
    """
    start = monotonic()
    require_extra("tune", "tune", "optuna", "scipy")
    _check_choices(objective, sampler, target)
    from nsagen.cli.tune_progress import Live, print_result, result_json
    from nsagen.tune import session
    from nsagen.tune.search import Budget
    from nsagen.tune.selection import Selection
    from nsagen.tune.settings import Settings

    cores = jobs or os.cpu_count() or 1
    # Ranked schedules wait for no device. One of each workload comes first: what a search has ahead
    # of its first result is lost where the time allows no more.
    each, ahead = (1, cores + 1) if objective == "static" else (3, 3 * cores)
    settings = Settings(
        objective=objective,  # type: ignore[arg-type]  # checked above
        budget=Budget(trials=trials),
        seconds=seconds_of(time or ("2m" if objective == "static" else "")),
        ahead=1 if simulate else ahead,
        each=each,
        one_first=objective == "static",
        sampler=sampler,
        seed=seed,
        since=start,
    )
    sizes = sizes_of(seqlens), sizes_of(batches)
    chosen = Selection(ops or (), passes or (), *sizes, kv_heads, params_of(params or ()))

    def page_of(device: str) -> Path:
        return (out or Path()) / f"tune-{device}.html"

    def check_report(device: str) -> None:
        from nsagen.reports.tuning import check_report

        check_report(page_of(device))

    _check_watch(watch, simulate, study, record)
    places = session.Places(
        out=out,
        url=study,
        target=target,
        jobs=cores,
        check_report=check_report if report else None,
        watch=watch,
    )
    try:
        with Live() as live:
            if simulate is not None:
                result = session.simulate(simulate, settings, places, live)
            elif record is not None:
                result = session.record(spec, chosen, record, settings, places, live)
            else:
                result = session.tune(spec, chosen, settings, places, live)
    except KeyboardInterrupt:
        print("nsagen: tune: stopped; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(1) from None
    if report:
        from nsagen.reports.tuning import write_report

        page = page_of(result.device)
        write_report(page, result)
        result.files.append(page)
    if as_json:
        print(json.dumps(result_json(result), indent=1))
    else:
        print_result(result)
    if result.failures:
        raise typer.Exit(1)


def _check_watch(
    watch: bool, simulate: Path | None, study: str | None, record: Path | None
) -> None:
    if not watch:
        return
    from nsagen.tune.watch import check_watch

    check_watch()
    if record is not None or (simulate is not None and study is None):
        other = "--record-exhaustive" if record is not None else "--simulate without --study"
        raise InvalidInputError(
            f"tune: --watch shows studies; got {other}, which keeps none; leave one out"
        )


def _check_choices(objective: str, sampler: str, target: str | None) -> None:
    from nsagen.records.record import Objective
    from nsagen.tune.sampler import SAMPLERS

    known = (("--objective", objective, get_args(Objective)), ("--sampler", sampler, SAMPLERS))
    for option, got, allowed in known:
        if got not in allowed:
            names = ", ".join(allowed)
            remedy = nearest(got, allowed)
            raise InvalidInputError(f"tune: {option} must be one of {names}; got {got!r}; {remedy}")
    if target is not None and objective != "static":
        raise InvalidInputError(
            f"tune: --target needs --objective static; got {target!r} with {objective}; "
            "leave --target out: a measurement always uses this machine's GPU"
        )


def seconds_of(text: str) -> float | None:
    """Seconds of `90s`, `10m`, `1.5h` or `90`; None of an empty text.

    Raises:
        InvalidInputError: not such a text.
    """
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh]?)", text)
    if not found or not float(found[1]):
        raise InvalidInputError(
            f"tune: --time must be a number with s, m or h; got {text!r}; such as 90s or 10m"
        )
    return float(found[1]) * _UNITS[found[2]]


def params_of(texts: Sequence[str]) -> dict[str, str]:
    """Names and values of `gqa_ratio=16`.

    Raises:
        InvalidInputError: not such a text.
    """
    pairs = [text.partition("=") for text in texts]
    for text, (name, sign, value) in zip(texts, pairs, strict=True):
        if not (name and sign and value):
            raise InvalidInputError(
                f"tune: --param must be NAME=VALUE; got {text!r}; such as gqa_ratio=16"
            )
    return {name.strip(): value.strip() for name, _, value in pairs}
