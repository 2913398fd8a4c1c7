"""The sub-commands of `nsagen bench`."""

from __future__ import annotations

import gc
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nsagen.cli.options import CacheDType, Device, Kernels, check_cache_dtype, sizes_of
from nsagen.core.errors import InvalidInputError, NsagenError
from nsagen.core.installed import require_extra

if TYPE_CHECKING:
    from nsagen.bench.load import Run
    from nsagen.bench.member import Member
    from nsagen.bench.shape import Shape
    from nsagen.model import InferenceConfig

_log = logging.getLogger("nsagen.bench")

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
    spec: Annotated[
        str | None,
        typer.Argument(
            metavar="[SPEC]",
            help="A spec of another member of the family, such as minimax_m3; default: NSA.",
        ),
    ] = None,
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
    """Time decoding: sparse and dense on the same cache, and of NSA a model's layers and steps."""
    from nsagen.bench import decode as bench
    from nsagen.bench.measure import require_gpu
    from nsagen.bench.results import write_results
    from nsagen.cli.console import progress_bar

    check_cache_dtype("bench decode", cache_dtype, None)
    plan = bench.plan_of(sizes_of(batch), sizes_of(context), attention_only, cache_dtype, spec)
    bench.check_free(out)
    require_gpu("decode")
    with progress_bar("bench decode") as progress:
        rows = bench.run(plan, progress, keep=partial(write_results, "decode", folder=out))
    _show(bench.save(rows, out), rows, bench.COLUMNS, as_json)


@app.command(epilog="Example: nsagen bench serve --rates 2,8 --requests 64 --prompt 16,512")
def serve(
    rates: Annotated[str, typer.Option("--rates", help="Arrivals a second, such as 1,4.")] = "4",
    requests: Annotated[int, typer.Option("--requests", min=1, help="Of each rate, at most.")] = 32,
    seconds: Annotated[
        float | None,
        typer.Option(
            "--seconds",
            min=1,
            help="Of each rate and server, at most: requests arrive in the first 60 percent, and "
            "what is unfinished at the end is cut off and counted.",
        ),
    ] = None,
    total_seconds: Annotated[
        float | None,
        typer.Option(
            "--total-seconds",
            min=1,
            help="Of the command, shared by the servers: their start and warming up count. "
            "It leaves the rows their --seconds, or half of the time. Rows without any time left "
            "are named; the rest of a row's requests is cut off.",
        ),
    ] = None,
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
    kernels: Kernels = None,
    out: Out = None,
    as_json: Json = False,
) -> None:
    """Put a server under load, and time first tokens and the others as clients see them."""
    require_extra("bench serve", "bench", "fastapi", "uvicorn", "openai")
    import torch

    from nsagen.bench import load as loads
    from nsagen.bench.results import check_free, write_results
    from nsagen.cli.console import progress_bar
    from nsagen.cli.models import check_attention
    from nsagen.model import InferenceConfig

    if transformers:
        require_extra("bench serve", "bench", "transformers")
    here = {"--direct": direct, "--transformers": transformers, "--sizes": sizes != "tiny"}
    here |= {"--attention": attention, "--device": device, "--kernels": kernels}
    for name, given in here.items() if url is not None else ():
        if given:
            raise InvalidInputError(f"bench serve: {name} runs a model here; got it with --url")
    check_attention("bench serve", attention, kernels)
    lengths = _range_of("prompt", prompt), _range_of("new", new)
    planned = [
        (load, loads.planned(load))
        for load in (
            loads.Load(requests, rate, *lengths, seed, seconds) for rate in _rates_of(rates)
        )
    ]
    longest = planned[0][0].length
    check_free("serve", out)
    options = ["--max-length", str(longest), "--max-batch-size", str(max_batch_size)]
    options += ["--prefill-chunk-size", str(prefill_chunk_size), "--sizes", sizes]
    options += [] if attention is None else ["--attention", attention]
    options += [] if device is None else ["--device", device]
    options += [] if kernels is None else ["--kernels", kernels]
    limits = InferenceConfig(max_batch_size, longest, prefill_chunk_size=prefill_chunk_size)
    model = partial(_random_model, sizes, attention, device, kernels, limits)
    ways = {url or "nsagen serve": partial(_server, url, options)}
    if transformers:
        release = version("transformers")
        ways[f"Transformers {release}, dense"] = partial(_transformers, model, limits)
    if direct:
        ways["ContinuousBatch"] = partial(_batch, model)
    rows: list[dict[str, Any]] = []
    rows_s = None if seconds is None else seconds * len(planned)
    clock = loads.Clock(total_seconds, len(ways), rows_s)
    with progress_bar("bench serve") as progress:
        broken, count, total = False, 0, len(ways) * sum(len(sent) for _, sent in planned)

        def done() -> None:
            nonlocal count
            count += 1
            progress("requests", count, total)

        def measure(name: str, way: Callable[[], AbstractContextManager[Run]]) -> None:
            with way() as run:
                started = clock.lap()
                most = max((sent for _, sent in planned), key=len)  # begins with the others
                end = clock.rows_begin()
                for some in loads.warm_up(planned[0][0], most, max_batch_size):
                    if (left := clock.until(end)) != 0:
                        run(some, left, lambda: None)
                warmed = clock.lap()
                _log.info("bench serve: %s: start %.0f s, warming up %.0f s", name, started, warmed)
                for load, sent in planned:
                    if clock.left == 0:
                        what = "bench serve: %s at %g requests a second: no time is left of "
                        what += "--total-seconds, after %.0f s of start and %.0f s of warming up"
                        _log.warning(what, name, load.rate, started, warmed)
                        continue
                    limits = [s for s in (load.limit, clock.left) if s is not None]
                    answers = run(sent, min(limits, default=None), done)
                    row = loads.row_of(
                        name, replace(load, limit=min(limits, default=None)), answers
                    )
                    rows.append({**row, "start_s": started, "warm_up_s": warmed})
                    write_results("serve", rows, out)  # also if another does not end

        for name, way in ways.items():
            try:
                clock.begin()
                measure(name, way)
            except Exception as error:
                if not rows:
                    raise
                broken = True
                _log.error("bench serve: %s ended with %r; its other rows are missing", name, error)
            gc.collect()
            torch.cuda.empty_cache()  # a GPU may not hold two models and their caches
    if not rows:
        raise NsagenError(
            f"bench serve: --total-seconds must leave time for a row; got {total_seconds:g}, which "
            "start and warming up took; see the lines above, and pass more"
        )
    _show(write_results("serve", rows, out), rows, loads.COLUMNS, as_json)
    if broken or any(row["failed"] for row in rows):
        raise typer.Exit(1)


@contextmanager
def _server(url: str | None, options: Sequence[str]) -> Iterator[Run]:
    """A server that runs, or one for the time of the block."""
    from nsagen.bench import serve as bench

    with nullcontext(url) if url else bench.own_server(options) as served:
        yield partial(bench.run_http, served)


@contextmanager
def _batch(model: Callable[[], Any]) -> Iterator[Run]:
    """A `ContinuousBatch` as the server's engine has it."""
    from nsagen.bench.serve import run_batch
    from nsagen.model import ContinuousBatch

    batch = ContinuousBatch(model())
    batch.weights_change = False
    yield partial(run_batch, batch)


@contextmanager
def _transformers(model: Callable[[], Any], limits: InferenceConfig) -> Iterator[Run]:
    """Transformers' continuous batching of a dense model of the same sizes."""
    from nsagen.bench.serve import transformers_manager
    from nsagen.cli.models import transformers_model

    made = model()
    weight = next(made.parameters())
    dense = transformers_model(made.config, weight.dtype, weight.device)
    del made, weight
    chunk = limits.prefill_chunk_size or limits.max_length
    with transformers_manager(dense, limits.max_batch_size, chunk, limits.max_length) as run:
        yield run


def _random_model(
    sizes: str, attention: str | None, device: str | None, kernels: str | None, limits: Any
) -> Any:
    from nsagen.cli.models import device_of, guide_model, random_model

    where = device_of("bench serve", device)
    if sizes == "guide":
        return guide_model(limits, 0, where, attention, kernels)
    return random_model("serve", limits, 0, where, attention, kernels)


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
    shape: Shape | Member,
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
