"""Decoding: attention beside dense attention on the same cache, a step's layers, and whole steps.

nsagen bench decode --batch 1,32 --context 32768

GPU work is timed as a replayed CUDA graph with a cold L2 cache. Floors are the bytes that must be
read, at the rate of a large copy in the same run.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from nsagen import ops
from nsagen.bench import plot, results
from nsagen.bench.decode_cases import (
    AttentionCaches,
    NoLaunch,
    layer_shapes,
    layer_x,
    step_bytes,
)
from nsagen.bench.dense import dense, dense_grouped
from nsagen.bench.measure import (
    graphed,
    host_milliseconds,
    measure_ceilings,
    milliseconds,
)
from nsagen.bench.member import Member, MemberCaches
from nsagen.bench.results import Keep, write_results
from nsagen.core.errors import InvalidInputError
from nsagen.model import InferenceConfig, SamplingConfig, ToyNSALlama, ToyNSALlamaConfig
from nsagen.model.step import DecodeStep, Row
from nsagen.ops import LINEAR_DECODE_ROWS

BATCHES = (1, 4, 32)
CONTEXTS = (4096, 32768, 131072)

# The heads on which public NSA implementations are measured; the rest is the paper's.
ATTENTION = ToyNSALlamaConfig(num_attention_heads=64, num_key_value_heads=4, num_hidden_layers=1)

# The guide's example model: 8 layers, 2.2e9 parameters.
GUIDE = ToyNSALlamaConfig(topk=8)

COLUMNS = {
    "what": "",
    "batch": "",
    "tokens": "",
    "ms": ".4f",
    "floor_ms": ".4f",
    "of_floor": ".0%",
    "torch_ms": ".4f",
    "of_torch": ".2f",
}


@dataclass(frozen=True)
class Plan:
    """What to time.

    Attributes:
        batches, contexts: of attention; each batch at each context.
        attention: heads and sparsity of attention.
        model: of the layers and the whole step; None to skip both.
        step_batch, step_context: of these.
        new_tokens: of a call of `generate`.
        cache_dtype: also time attention on caches of this dtype; as in `InferenceConfig`.
        member: measure this one's selection and attention, and nothing else.
    """

    batches: tuple[int, ...] = BATCHES
    contexts: tuple[int, ...] = CONTEXTS
    attention: ToyNSALlamaConfig = ATTENTION
    model: ToyNSALlamaConfig | None = GUIDE
    step_batch: int = 4
    step_context: int = 4096
    new_tokens: int = 128
    dtype: torch.dtype = torch.bfloat16
    cache_dtype: str | None = None
    member: Member | None = None

    @property
    def linear_batches(self) -> list[int]:
        """Batches at which the layers of a step are timed."""
        return [n for n in sorted({self.step_batch, *self.batches}) if n <= LINEAR_DECODE_ROWS]


def run(
    plan: Plan,
    progress: Callable[[str, int, int], None] | None = None,
    device: str = "cuda",
    keep: Keep | None = None,
) -> list[dict[str, Any]]:
    """One row per measurement.

    Args:
        keep: takes the rows so far after each row.

    Returns:
        rows with `what`, `batch`, `tokens` of context, `ms`, and where they apply `floor_ms`,
        `of_floor` (the floor's share of the time), `torch_ms` (PyTorch's time for the same;
        for attention: dense), `of_torch` (time over PyTorch's) and `torch` (how).
    """
    rate = measure_ceilings().bytes
    rows: list[dict[str, Any]] = []
    total = len(plan.batches) * len(plan.contexts) * (2 if plan.cache_dtype else 1) + 6
    if plan.member is not None:
        total = len(plan.batches) * len(plan.contexts) * (3 if plan.member.indexed else 4)
    elif plan.model is not None:
        total += 3 + len(plan.linear_batches) * len(layer_shapes(plan.model))
    bench = _Bench(plan, torch.device(device))
    for row in bench.rows():
        if progress:
            progress(row["what"], len(rows), total)
        if row.get("bytes"):
            row["floor_ms"] = 1e3 * row["bytes"] / rate
            row["of_floor"] = row["floor_ms"] / row["ms"]
        if row.get("torch_ms"):
            row["of_torch"] = row["ms"] / row["torch_ms"]
        rows.append(row)
        if keep:
            keep(rows)
    return rows


class _Bench:
    """A plan on a device."""

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.plan, self.device = plan, device

    def rows(self) -> Iterator[dict[str, Any]]:
        if self.plan.member is not None:
            for context, batch in itertools.product(self.plan.contexts, self.plan.batches):
                yield from self.member(self.plan.member, batch, context)
            return
        for context in self.plan.contexts:
            for batch in self.plan.batches:
                yield self.attention(batch, context)
                if self.plan.cache_dtype is not None:
                    yield self.narrow_attention(batch, context, self.plan.cache_dtype)
        yield from self.host()
        if self.plan.model is not None:
            yield from self.linear_layers(self.plan.model)
            yield from self.steps(self.plan.model)

    def attention(self, batch: int, context: int) -> dict[str, Any]:
        """One layer's attention for a token per sequence, from appending it to the gated sum."""
        caches = AttentionCaches(self.plan.attention, batch, context, self.device, self.plan.dtype)
        dense_ms, how = self._dense(caches.q, caches.cache.k, caches.cache.v)
        return {
            "what": "attention",
            "batch": batch,
            "tokens": context,
            "ms": milliseconds(graphed(caches.sparse)),
            "bytes": caches.bytes_read(),
            "torch_ms": dense_ms,
            "torch": f"dense, {how}",
            "dense_bytes": caches.dense_bytes(),
        }

    def member(self, member: Member, batch: int, context: int) -> Iterator[dict[str, Any]]:
        """A step of another member of the family, whole and op by op."""
        caches = MemberCaches(member, batch, context, self.device)
        for what, (call, read) in caches.calls().items():
            row = {"what": what, "batch": batch, "tokens": context, "bytes": read}
            row["ms"] = milliseconds(graphed(call))
            if what == "attention" and not member.shape.cache_dtype:
                dense_ms, how = self._dense(caches.q, caches.k, caches.v)
                row |= {"torch_ms": dense_ms, "torch": f"dense, {how}"}
                row["dense_bytes"] = caches.k.nbytes + caches.v.nbytes
            yield row

    def narrow_attention(self, batch: int, context: int, cache_dtype: str) -> dict[str, Any]:
        """The same as `attention` on a cache of a narrow dtype."""
        plan = self.plan
        caches = AttentionCaches(
            *(plan.attention, batch, context, self.device, plan.dtype), cache_dtype=cache_dtype
        )
        return {
            "what": f"attention, {cache_dtype} caches",
            "batch": batch,
            "tokens": context,
            "ms": milliseconds(graphed(caches.sparse)),
            "bytes": caches.bytes_read(),
        }

    def _dense(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[float | None, str]:
        """The fastest of PyTorch's dense attentions that run on this cache."""
        found: list[tuple[float, str]] = []
        for backend in (SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH):
            if backend is SDPBackend.MATH and found:
                break
            for call in (dense, dense_grouped):
                try:
                    with sdpa_kernel(backend):
                        ms = milliseconds(graphed(functools.partial(call, q, k, v)))
                except RuntimeError:  # this backend does not accept such a call
                    continue
                found.append((ms, f"{call.__name__} by {backend.name}"))
        return min(found, default=(None, "which no backend takes"))

    def host(self) -> Iterator[dict[str, Any]]:
        """The host's time of the ops of attention outside a graph, with and without a launch."""
        settings = (self.plan.attention, 1, 64, self.device, self.plan.dtype)
        for what, dispatcher in (("", None), (", no launch", NoLaunch())):
            caches = AttentionCaches(*settings, dispatcher=dispatcher)
            for name, call in caches.ops().items():
                ms = host_milliseconds(call)
                yield {"what": f"host: {name}{what}", "batch": 1, "tokens": 64, "ms": ms}

    def linear_layers(self, config: ToyNSALlamaConfig) -> Iterator[dict[str, Any]]:
        """A step's products with their surrounding operations, next to PyTorch's products."""
        for batch, (name, shape) in itertools.product(
            self.plan.linear_batches, layer_shapes(config).items()
        ):
            x, weight, around = layer_x(name, shape, batch, self.device, self.plan.dtype)
            yield {
                "what": f"linear: {name} {shape[0]} x {shape[1]}",
                "batch": batch,
                "ms": milliseconds(
                    graphed(functools.partial(ops.linear_decode, x, weight, **around))
                ),
                "bytes": weight.nbytes,
                "torch_ms": milliseconds(graphed(functools.partial(F.linear, x, weight))),
                "torch": "the product alone",
            }

    @torch.no_grad()
    def steps(self, config: ToyNSALlamaConfig) -> Iterator[dict[str, Any]]:
        """A step of the whole model: replayed, launched separately, and within `generate`."""
        batch, context = self.plan.step_batch, self.plan.step_context
        longest = context + max(2048, self.plan.new_tokens)  # each timed step is a token further
        limits = InferenceConfig(batch, longest, self.plan.new_tokens)
        with self.device:
            model = ToyNSALlama(replace(config, max_position_embeddings=longest), limits)
        model = model.to(self.plan.dtype).requires_grad_(False)
        row = {"batch": batch, "tokens": context, "bytes": step_bytes(model, batch, context)}
        step = DecodeStep(model, model.new_cache())
        for tensor in step.cache.tensors():
            tensor.normal_()
        for what, graph in (("replayed", True), ("launch by launch", False)):
            step.fill([Row(slot, context - 1, SamplingConfig()) for slot in range(batch)], kept=[])
            ms = milliseconds(functools.partial(step.run, batch, cuda_graph=graph))
            yield {"what": f"step, {what}", **row, "ms": ms}
        del step
        yield {"what": "step, within generate", **row, "ms": self._generate_ms(model)}

    def _generate_ms(self, model: ToyNSALlama) -> float:
        """A token's time in `generate`: the difference of a longer and a shorter call."""
        batch, context = self.plan.step_batch, self.plan.step_context
        ids = torch.randint(0, model.config.vocab_size, (batch * context,), device=self.device)
        ends = torch.arange(batch + 1, dtype=torch.int32, device=self.device) * context

        def ms(tokens: int) -> float:
            best = float("inf")
            for _ in range(3):
                start = time.perf_counter()
                model.generate(ids, ends, tokens)  # ends when the last token has arrived
                best = min(best, 1e3 * (time.perf_counter() - start))
            return best

        many = self.plan.new_tokens
        return (ms(many) - ms(1)) / (many - 1)


def plan_of(
    batches: Sequence[int] | None,
    contexts: Sequence[int] | None,
    attention_only: bool,
    cache_dtype: str | None = None,
    spec: str | None = None,
) -> Plan:
    """The default plan with some parts replaced or left out.

    Raises:
        SpecError: no such spec, or it is invalid.
        InvalidInputError: the spec is of NSA, whose decoding is measured on heads of its own, or of
            a member that decodes with dense attention.
    """
    model = None if attention_only else GUIDE
    sizes = (tuple(batches or BATCHES), tuple(contexts or CONTEXTS))
    member = None if spec is None else _member_of(spec, cache_dtype)
    return Plan(*sizes, model=model, cache_dtype=cache_dtype, member=member)


def _member_of(spec: str, cache_dtype: str | None) -> Member:
    from nsagen.spec import load_spec  # what measuring does not need

    found = load_spec(spec)
    if not found.shapes[0].family_keys:
        raise InvalidInputError(
            "bench decode: a spec must be of another member of the family than NSA, which is "
            f"measured on the heads of published comparisons; got {found.name}; leave it out"
        )
    if "decode" not in found.passes:
        raise InvalidInputError(
            f"bench decode: the spec's passes must have decode; got {', '.join(found.passes)} in "
            f"{found.name}; add it, or decode with dense attention"
        )
    shape = found.shapes[0]
    return Member.of(replace(shape, cache_dtype=cache_dtype or shape.cache_dtype))


def check_free(folder: Path | None = None) -> None:
    """Refuse a folder where `save` would replace files that are not nsagen's; call before `run`.

    Raises:
        InvalidInputError: names the file.
    """
    path = results.check_free("decode", folder)
    if importlib.util.find_spec("matplotlib"):
        plot.check_free(path.with_suffix(".png"))


def save(rows: Sequence[dict[str, Any]], folder: Path | None = None) -> Path:
    """Write the rows and, if matplotlib is installed, their figure beside them."""
    path = write_results("decode", rows, folder)
    if importlib.util.find_spec("matplotlib"):
        plot.plot(path)
    return path
