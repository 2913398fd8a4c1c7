"""The sub-commands of `nsagen bench`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsagen.cli.options import CacheDType, Device, check_cache_dtype, sizes_of
from nsagen.core.errors import InvalidInputError
from nsagen.core.installed import require_extra

if TYPE_CHECKING:
    from nsagen.bench.shape import Shape

app = typer.Typer(
    help="Measure kernels on this GPU against dense attention and the GPU's limits.",
    no_args_is_help=True,
)

Spec = Annotated[
    str | None,
    typer.Argument(
        metavar="[SPEC]",
        help="Measure the first shape of this spec that --set agrees with; default: the shape of "
        "the published comparisons.",
    ),
]
Seqlens = Annotated[
    str, typer.Option("--seqlens", help="Tokens of a sequence, such as 2048,16384.")
]
Changes = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="PARAM=VALUE", help="Change the attention, e.g. kv_heads=8."),
]
Package = Annotated[
    str | None, typer.Option("--package", help="Generated package; missing kernels are built.")
]
Out = Annotated[
    Path | None, typer.Option("--out", help="Folder of results; else benchmarks/results/<device>.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the results as JSON, and nothing else.")]


@app.command(epilog="Example: nsagen bench prefill llama8b --seqlens 8192,65536")
def prefill(
    spec: Spec = None,
    seqlens: Seqlens = "",
    changes: Changes = None,
    package: Package = None,
    selection: Annotated[
        str,
        typer.Option(
            "--selection",
            help="Blocks that selected attention reads: random, or learned by a small model of "
            "text, whose neighbouring tokens share most of them.",
        ),
    ] = "random",
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time the forward pass: each op, the whole attention, and dense attention."""
    from nsagen.bench import prefill as bench
    from nsagen.bench.selections import check_selection
    from nsagen.bench.shape import shape_of

    shape = shape_of(spec, changes or ())
    check_selection(selection, shape)
    name = "prefill" if selection == "random" else f"prefill_{selection}"
    _run(name, bench, shape, sizes_of(seqlens), package, out, as_json, {"selection": selection})


@app.command(epilog="Example: nsagen bench train llama8b --seqlens 32768 --set gqa_ratio=4")
def train(
    spec: Spec = None,
    seqlens: Seqlens = "",
    changes: Changes = None,
    package: Package = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time the forward and backward passes, and measure their memory."""
    from nsagen.bench import train as bench
    from nsagen.bench.shape import shape_of

    shape = shape_of(spec, changes or ())
    _run("train", bench, shape, sizes_of(seqlens), package, out, as_json)


@app.command(epilog="Example: nsagen bench decode --batch 1,32 --context 32768")
def decode(
    batch: Annotated[str, typer.Option("--batch", help="Sequences, such as 1,32.")] = "",
    context: Annotated[
        str, typer.Option("--context", help="Tokens in the cache, such as 4096,131072.")
    ] = "",
    attention_only: Annotated[
        bool, typer.Option("--attention-only", help="Skip layers and steps of a model.")
    ] = False,
    cache_dtype: CacheDType = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Time decoding: NSA and dense on the same cache, and a model's layers and steps."""
    from nsagen.bench import decode as bench
    from nsagen.bench.measure import require_gpu
    from nsagen.bench.results import write_results
    from nsagen.cli.console import progress_bar

    check_cache_dtype("bench decode", cache_dtype, None)
    plan = bench.plan_of(sizes_of(batch), sizes_of(context), attention_only, cache_dtype)
    bench.check_free(out)
    require_gpu("decode")
    with progress_bar("bench decode") as progress:
        rows = bench.run(plan, progress, keep=partial(write_results, "decode", folder=out))
    _show(bench.save(rows, out), rows, bench.COLUMNS, as_json)


@app.command(epilog="Example: nsagen bench serve --rates 2,8 --requests 64 --prompt 16,512")
def serve(
    rates: Annotated[str, typer.Option("--rates", help="Arrivals a second, such as 1,4.")] = "4",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Of each rate.")] = 32,
    prompt: Annotated[
        str, typer.Option("--prompt", help="Least and greatest tokens of a prompt.")
    ] = "16,512",
    new: Annotated[
        str, typer.Option("--new", help="Least and greatest tokens of an answer.")
    ] = "8,64",
    seed: Annotated[int, typer.Option("--seed", help="Of arrivals and requests.")] = 0,
    url: Annotated[
        str | None, typer.Option("--url", help="A server that runs; default: nsagen serve.")
    ] = None,
    direct: Annotated[
        bool, typer.Option("--direct", help="Also run the load without a server, in this process.")
    ] = False,
    transformers: Annotated[
        bool,
        typer.Option(
            "--transformers", help="Also run it on Transformers' continuous batching, dense."
        ),
    ] = False,
    sizes: Annotated[
        str, typer.Option("--sizes", help="Random weights as in nsagen serve: tiny or guide.")
    ] = "tiny",
    attention: Annotated[
        str | None, typer.Option("--attention", help="nsa or dense, as in nsagen serve.")
    ] = None,
    max_batch_size: Annotated[
        int, typer.Option("--max-batch-size", min=1, help="Sequences that run at once.")
    ] = 16,
    prefill_chunk_size: Annotated[
        int, typer.Option("--prefill-chunk-size", min=1, help="Prompt tokens of a pass.")
    ] = 4096,
    device: Device = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Put a server under load, and time first tokens and the others as clients see them."""
    require_extra("bench serve", "bench", "fastapi", "uvicorn", "openai")
    from nsagen.bench import serve as bench
    from nsagen.bench.results import check_free, write_results
    from nsagen.cli.console import progress_bar
    from nsagen.cli.models import transformers_model
    from nsagen.model import InferenceConfig

    if transformers:
        require_extra("bench serve", "bench", "transformers")
    if url is not None and (direct or transformers):
        given = "--direct" if direct else "--transformers"
        raise InvalidInputError(f"bench serve: {given} runs a model here; got it with --url")
    lengths = _range_of("prompt", prompt), _range_of("new", new)
    loads = [bench.Load(requests, rate, *lengths, seed) for rate in _rates_of(rates)]
    check_free("serve", out)
    options = ["--max-length", str(loads[0].length), "--max-batch-size", str(max_batch_size)]
    options += ["--prefill-chunk-size", str(prefill_chunk_size), "--sizes", sizes]
    options += [] if attention is None else ["--attention", attention]
    options += [] if device is None else ["--device", device]
    rows = []
    with progress_bar("bench serve") as progress:
        count, total = 0, requests * len(loads) * (1 + direct + transformers)

        def done() -> None:
            nonlocal count
            count += 1
            progress("requests", count, total)

        with nullcontext(url) if url else bench.own_server(options) as served:
            for load in loads:
                answers = bench.run_http(served, bench.planned(load), done)
                rows.append(bench.row_of(url or "nsagen serve", load, answers))
                write_results("serve", rows, out)  # also if a later load does not reach its end
        if direct or transformers:
            limits = InferenceConfig(
                max_batch_size, loads[0].length, prefill_chunk_size=prefill_chunk_size
            )
            model = _model(sizes, attention, device, limits)
        for load in loads if direct else ():
            answers = bench.run_batch(model, bench.planned(load), done)
            rows.append(bench.row_of("ContinuousBatch", load, answers))
            write_results("serve", rows, out)
        if transformers:
            weight = next(model.parameters())
            dense = transformers_model(model.config, weight.dtype, weight.device)
            del model  # a GPU may not hold both
        for load in loads if transformers else ():
            more = (max_batch_size, prefill_chunk_size, bench.planned(load), done)
            answers = bench.run_transformers(dense, *more)
            rows.append(bench.row_of("Transformers, dense", load, answers))
    _show(write_results("serve", rows, out), rows, bench.COLUMNS, as_json)
    if any(row["failed"] for row in rows):
        raise typer.Exit(1)


def _model(sizes: str, attention: str | None, device: str | None, limits: Any) -> Any:
    from nsagen.cli.models import device_of, guide_model, random_model

    where = device_of("serve", device)
    if sizes == "guide":
        return guide_model(limits, 0, where, attention, None)
    return random_model("serve", limits, 0, where, attention, None)


def _rates_of(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InvalidInputError(
            f"bench serve: --rates must be numbers; got {text!r}; such as 1,4"
        ) from None


def _range_of(name: str, text: str) -> tuple[int, int]:
    found = sizes_of(text)
    if len(found) != 2:
        raise InvalidInputError(
            f"bench serve: --{name} must be least and greatest; got {text!r}; such as 16,512"
        )
    return found[0], found[1]


@app.command(epilog="Example: nsagen bench plot benchmarks/results/nvidia-h200/prefill.json")
def plot(results: Annotated[Path, typer.Argument(help="A benchmark's JSON file.")]) -> None:
    """Plot results as a PNG beside the JSON file."""
    require_extra("bench plot", "plot", "matplotlib")
    from nsagen.bench.plot import plot as draw

    print(draw(results))


def _run(
    name: str,
    bench: Any,
    shape: Shape,
    seqlens: Sequence[int],
    package: str | None,
    out: Path | None,
    as_json: bool,
    more: dict[str, str] | None = None,
) -> None:
    import nsagen
    from nsagen.bench.measure import require_gpu
    from nsagen.bench.results import check_free, write_results
    from nsagen.cli.console import progress_bar

    check_free(name, out)
    require_gpu(name)
    dispatcher = None if package is None else nsagen.load(package)
    keep = partial(write_results, name, folder=out)
    lengths = tuple(seqlens or bench.SEQLENS)
    with progress_bar(f"bench {name}") as progress:
        rows = bench.run(shape, lengths, dispatcher, progress, keep=keep, **(more or {}))
    _show(write_results(name, rows, out), rows, bench.COLUMNS, as_json)


def _show(path: Path, rows: list[dict[str, Any]], columns: dict[str, str], as_json: bool) -> None:
    """Print what was written to `path`."""
    from nsagen.cli.console import print_line
    from nsagen.cli.table import print_table

    if as_json:
        print(json.dumps(json.loads(path.read_text(encoding="utf-8")), indent=1))
        return
    print_line(f"written to {path}")
    print_table(
        "",
        list(columns),
        [
            ["" if row.get(key) is None else format(row[key], columns[key]) for key in columns]
            for row in rows
        ],
        names=list(columns).index("tokens" if "tokens" in columns else "rate") + 1,
        right=[key for key in columns if key not in ("what", "over")],
    )
