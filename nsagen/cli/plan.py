"""`nsagen plan`: what a model with a spec's attention needs, beside dense attention."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer

from nsagen.cli.options import CacheDType, Json, SpecName, check_cache_dtype
from nsagen.core.errors import InvalidInputError
from nsagen.core.text import counted, nearest

if TYPE_CHECKING:
    from nsagen.estimate.efficiency import Efficiency
    from nsagen.estimate.model import Gpu, Needs
    from nsagen.estimate.training import Step
    from nsagen.model import ToyLlamaConfig
    from nsagen.spec import AttentionShape, Spec

EXAMPLE = "Example: nsagen plan llama8b --gpu h200 --context 131072 --batch 32 --gpus 8"

STEP_HEADINGS = ("state", "activations", "recompute", "step", "exchange alone", "tokens/s a GPU")

DEFAULT_MODEL: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
}
"""Llama 3.1 8B; its heads follow from the spec's head_dim and gqa_ratio."""

HEADINGS = (
    "weights",
    "cache",
    "workspace",
    "prefill",
    "decode step",
    "measured prefill",
    "measured step",
    "largest batch",
    "largest context",
)


def plan(
    spec: SpecName,
    gpu: Annotated[str, typer.Option(help="a100, h100, h200 or b200.")] = "h200",
    context: Annotated[int, typer.Option(min=1, help="Tokens per sequence.")] = 131072,
    batch: Annotated[int, typer.Option(min=1, help="Concurrent sequences, over all GPUs.")] = 32,
    gpus: Annotated[int, typer.Option(min=1, help="GPUs, on hosts of 8.")] = 1,
    network: Annotated[
        float | None,
        typer.Option(
            min=0.001, help="GB/s of a GPU's adapter to other hosts; default: a DGX system's."
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option(help="Folder with a Llama config.json; default: Llama 3.1 8B's sizes."),
    ] = None,
    prefill_tokens: Annotated[
        int | None, typer.Option(min=1, help="Tokens per prefill pass; default: a sequence.")
    ] = None,
    results: Annotated[
        Path | None,
        typer.Option(help="Folder of bench results; default: benchmarks/results/nvidia-<gpu>."),
    ] = None,
    cache_dtype: CacheDType = None,
    as_json: Json = False,
) -> None:
    """Estimate a model's memory and time with a spec's attention and with dense attention, for
    serving and for training."""
    from dataclasses import replace

    from nsagen.cli.console import print_line
    from nsagen.estimate.efficiency import efficiencies
    from nsagen.estimate.model import GPUS, USABLE, Load, needs
    from nsagen.estimate.training import best_step
    from nsagen.spec import load_spec

    if gpu not in GPUS:
        raise InvalidInputError(
            f"plan: --gpu must be one of {', '.join(GPUS)}; got {gpu!r}; "
            f"{nearest(gpu, GPUS, 'choose the most similar')}"
        )
    check_cache_dtype("plan", cache_dtype, None)
    loaded = load_spec(spec)
    device = GPUS[gpu]
    narrow = _cache_dtype(loaded, cache_dtype)
    members = [name for shape in loaded.shapes for name in shape.family_keys]
    load = Load(context, batch, gpus, prefill_tokens or context, narrow)
    if network is not None:
        device = replace(device, network=network * 1e9)
    if results is not None and not results.is_dir():
        raise InvalidInputError(
            f"plan: --results must be a folder; got {results}; nsagen bench writes one"
        )
    folder = results or Path("benchmarks") / "results" / f"nvidia-{gpu}"
    known = efficiencies(folder, device.flops, device.bandwidth)
    rows = []
    for label, config in _configs(loaded, model):
        efficiency = _efficiency(config, known, load.cache_dtype)
        rows.append((label, config, efficiency, needs(config, device, load, efficiency)))
    if as_json:
        content = {
            "gpu": asdict(device),
            "usable": USABLE,
            "load": asdict(load),
            "models": [
                {
                    **{"attention": label, "config": asdict(config), **asdict(found)},
                    "training": asdict(best_step(config, device, context, batch, gpus, efficiency)),
                    "time": efficiency.source,
                }
                for label, config, efficiency, found in rows
            ],
        }
        print(json.dumps(content, indent=1))
        return
    if members:
        print_line(
            "Another member of the family than NSA, in every layer. nsagen has no parallel plans "
            "for it: a split is as dense attention's would be. Training is without an index loss."
        )
    shown = [
        Row(label, found, needs(config, device, load), efficiency.source)
        for label, config, efficiency, found in rows
    ]
    _print(shown, device, load, model, _heads(config for _, config, *_ in rows))
    steps = [(label, best_step(config, device, context, batch, gpus)) for label, config, *_ in rows]
    _print_training(steps, device, load)


def _cache_dtype(spec: Spec, given: str | None) -> str | None:
    """The dtype of NSA's caches: given, or the spec's own."""
    found = list(dict.fromkeys(shape.cache_dtype for shape in spec.shapes))
    if given is not None or len(found) == 1:
        return given or found[0] or None
    raise InvalidInputError(
        f"plan: {spec.label} has several cache_dtype: {', '.join(filter(None, found))}; "
        "choose one with --cache-dtype"
    )


def _efficiency(
    config: ToyLlamaConfig, known: tuple[Efficiency, Efficiency], cache_dtype: str | None
) -> Efficiency:
    """What was measured of such an attention; the roofline where nothing was."""
    from nsagen.estimate.attention import MemberConfig, head_dims
    from nsagen.estimate.efficiency import ROOFLINE, SHAPE, is_measured

    nsa, dense = known
    if set(head_dims(config)) != {SHAPE["head_dim"]}:
        return ROOFLINE
    if isinstance(config, MemberConfig):
        return ROOFLINE
    if not hasattr(config, "topk"):
        return dense
    if cache_dtype is not None:
        return ROOFLINE
    ratio = config.num_attention_heads // config.num_key_value_heads
    return nsa if is_measured({**asdict(config), "gqa_ratio": ratio}) else ROOFLINE


def _configs(spec: Spec, folder: Path | None) -> Iterator[tuple[str, ToyLlamaConfig]]:
    """A model for each shape that differs in what memory and time depend on, and dense ones."""
    from nsagen.estimate.attention import MemberConfig
    from nsagen.model import ToyLlamaConfig, ToyNSALlamaConfig
    from nsagen.model.sparsity import settings_of

    shapes = spec.shapes
    seen: set[tuple[Any, ...]] = set()
    for ratio in dict.fromkeys(shape.gqa_ratio for shape in shapes):
        like = [shape for shape in shapes if shape.gqa_ratio == ratio]
        model = _model(like[0], folder)
        if model is None:
            continue
        for shape in like:
            if shape.family_keys:
                seen.add((ratio, shape))
                more = {"shape": shape, "dense_decode": "decode" not in spec.passes}
                yield f"{spec.label}, topk {shape.topk}", MemberConfig(**model, **more)
                continue
            settings = {
                **settings_of(shape),
                "branches": spec.branches,
                "v_head_dim": shape.v_head_dim,
            }
            key = (ratio, *(v for n, v in settings.items() if not n.endswith("compress_type")))
            if key not in seen:
                seen.add(key)
                yield (
                    f"NSA, gqa_ratio {ratio}, topk {shape.topk}",
                    ToyNSALlamaConfig(**model, **settings),
                )
        sizes = "" if like[0].v_head_dim == like[0].head_dim else f", head_dim {like[0].head_dim}"
        yield f"dense, gqa_ratio {ratio}{sizes}", ToyLlamaConfig(**model)
    if not seen:
        ratios = ", ".join(str(r) for r in dict.fromkeys(shape.gqa_ratio for shape in shapes))
        raise InvalidInputError(
            f"plan: the spec must have a shape with the model's heads; it has gqa_ratio {ratios}; "
            "give another --model, or add its gqa_ratio and head_dim to the spec"
        )


def _model(shape: AttentionShape, folder: Path | None) -> dict[str, Any] | None:
    """Sizes for ToyLlamaConfig; None where the folder's heads are not the shape's."""
    if folder is not None:
        from nsagen.model.checkpoint_config import dense_config, read_config

        sizes = asdict(dense_config(read_config(folder), folder))
        ratio = sizes["num_attention_heads"] // sizes["num_key_value_heads"]
        return sizes if (ratio, sizes["head_dim"]) == (shape.gqa_ratio, shape.head_dim) else None
    heads = DEFAULT_MODEL["hidden_size"] // shape.head_dim // shape.gqa_ratio * shape.gqa_ratio
    if heads == 0:
        return None
    return {
        **DEFAULT_MODEL,
        "num_attention_heads": heads,
        "num_key_value_heads": heads // shape.gqa_ratio,
        "head_dim": shape.head_dim,
    }


class Row(NamedTuple):
    """An attention in the table; `time` says where the times of `found` come from."""

    label: str
    found: Needs
    floor: Needs
    time: str


def _heads(configs: Iterable[ToyLlamaConfig]) -> str:
    """A line that says which heads the models have."""
    found = dict.fromkeys(
        (c.num_attention_heads, c.num_key_value_heads, c.head_dim) for c in configs
    )
    each = [
        f"gqa_ratio {heads // kv_heads}: {counted(heads, 'query head')} of {size} over {kv_heads} "
        "for keys and values"
        for heads, kv_heads, size in found
    ]
    return "; ".join(each) + "."


def _print(rows: list[Row], gpu: Gpu, load: Any, model: Path | None, heads: str) -> None:
    from nsagen.cli.console import console
    from nsagen.cli.table import print_table
    from nsagen.estimate.model import USABLE

    title = (
        f"{load.gpus} x {gpu.name}, {counted(load.batch, 'sequence')} of {load.context:,} tokens; "
        f"{model or 'a model of Llama 3.1 8B size'}, 16-bit"
        f"{f', sparse caches of {load.cache_dtype}' if load.cache_dtype else ''}"
    )
    print_table(
        title,
        ["attention", "split", *HEADINGS],
        [
            (
                *(label, f"{found.split.tensor} x {found.split.data}"),
                *(_bytes(found.weights), _bytes(found.cache), _bytes(found.workspace)),
                _seconds(floor.prefill),
                _seconds(floor.decode) if floor.fits else f"{_seconds(floor.decode)}, does not fit",
                *(("", "") if time == "roofline" else map(_seconds, (found.prefill, found.decode))),
                *(f"{found.largest_batch:,}", f"{found.largest_context:,}"),
            )
            for label, found, floor, time in rows
        ],
        right=HEADINGS,
    )
    out = console()
    for line in (
        heads,
        f"Bytes are per GPU; {USABLE:.0%} of its {_bytes(gpu.memory)} may be used. Split: GPUs "
        "that share the heads x groups that share the batch.",
        "Prefill and decode step are lower bounds, by the roofline: at "
        f"{gpu.flops / 1e12:.0f} TFLOP/s, {gpu.bandwidth / 1e12:.2f} TB/s and links of "
        f"{gpu.link / 1e9:.0f} GB/s "
        f"({gpu.source}): prefill of one sequence; one step of the whole batch.",
        *(
            f"M{time[1:]}: attention at the share of the roofline measured there at the nearest "
            "sizes, the rest by the roofline."
            for time in dict.fromkeys(time for *_, time in rows if time != "roofline")
        ),
    ):
        out.print(line, highlight=False)


def _print_training(rows: list[tuple[str, Step]], gpu: Gpu, load: Any) -> None:
    from nsagen.cli.console import console
    from nsagen.cli.table import print_table
    from nsagen.estimate.training import STATE_BYTES

    print_table(
        f"Training: {counted(load.batch, 'sequence')} of {load.context:,} tokens a step, "
        "by the roofline",
        ["attention", "tensor x context x data", *STEP_HEADINGS],
        [
            (
                *(label, f"{step.split.tensor} x {step.split.context} x {step.split.data}"),
                _bytes(step.state),
                _bytes(step.activations) + ("" if step.fits else ", does not fit"),
                "yes" if step.recompute else "no",
                *(_seconds(step.seconds), f"{step.exchange / step.seconds:.1%}"),
                f"{step.tokens_per_second:,.0f}",
            )
            for label, step in rows
        ],
        right=STEP_HEADINGS,
    )
    console().print(
        f"The fastest split that fits. State: {STATE_BYTES} bytes a parameter over all GPUs, and "
        f"the layer that is gathered. Exchange alone: with {gpu.link / 1e9:.0f} GB/s links and "
        f"{gpu.network / 1e9:.0f} GB/s from a GPU to other hosts, what computing does not hide.",
        highlight=False,
    )


def _bytes(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"


def _seconds(time: float) -> str:
    return f"{time:.2f} s" if time >= 1 else f"{time * 1e3:.2f} ms"
