"""The model on a GPU: graphs, pages and chunks change no token, and few launches make a step."""

from __future__ import annotations

import dataclasses
import importlib
import runpy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional
from torch.profiler import ProfilerActivity, profile

from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    SamplingConfig,
    ToyLlama,
    ToyNSALlama,
)
from nsagen.model.step import DecodeStep, Row
from nsagen.ops.reference.block_selection import BlockRule
from tests.model.forms import EVERY
from tests.model.tiny import dense_config, nsa_model, packed_batch

pytestmark = pytest.mark.gpu

LIMITS = InferenceConfig(5, 256, 24)
LENGTHS = [1, 9, 64, 100, 200]

# Tiles of kernels at their real sizes, in a model small enough for a float64 reference.
SHAPE: dict[str, Any] = {
    "head_dim": 64,
    "num_attention_heads": 8,
    "kernel_size": 16,
    "kernel_stride": 8,
    "block_size": 32,
    "window_size": 64,
}

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in chunks": {"prefill_chunk_size": 37},
    "in pages": {"paged": True, "page_size": 32},
    "in pages of the whole length": {"paged": True, "page_size": 256},
    "in chunks and pages": {"prefill_chunk_size": 64, "paged": True, "page_size": 64},
    "launched one by one": {"cuda_graph": False},
}


def small(limits: InferenceConfig = LIMITS, **changes: Any) -> ToyNSALlama:
    return nsa_model(limits, torch.float16, **{**SHAPE, **changes}).cuda()


def on_gpu(lengths: list[int]) -> tuple[Tensor, Tensor]:
    ids, cu_seqlens = packed_batch(lengths)
    return ids.cuda(), cu_seqlens.cuda()


@contextmanager
def near_ties_of_blocks() -> Iterator[list[Tensor]]:
    """Of each call of the reference's selection: bool [C], whether rounding may choose otherwise.

    It may where the last block that a token chose has a score within half a percent of another's.
    """
    module = importlib.import_module("nsagen.ops.reference.block_selection")
    select_blocks, found = module.select_blocks, []

    def watched(scores: Tensor, tokens: Tensor, rule: BlockRule) -> Tensor:
        blocks, own = torch.arange(scores.shape[-1]), (tokens // rule.block_size)[:, None]
        rival = (blocks >= rule.init_blocks) & (blocks <= own - rule.local_blocks)
        places = rule.topk - rule.init_blocks - rule.local_blocks
        ranked = scores.masked_fill(~rival, 0.0).sort(-1, descending=True).values
        ranked = functional.pad(ranked, (0, places + 1))
        taken, left = ranked[..., places - 1], ranked[..., places]
        found.append(((left > 0.0) & (left > 0.995 * taken)).any(0))
        return select_blocks(scores, tokens, rule)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "select_blocks", watched)
        yield found


def check_choices(
    model: ToyNSALlama, lengths: list[int], tokens: Tensor, ids: Tensor | None = None
) -> None:
    """Every token is the reference's choice, or so near to it that float16 cannot tell.

    A token for which float16 may choose other blocks is not compared.
    """
    ids = packed_batch(lengths)[0] if ids is None else ids
    texts = [torch.cat([a, b]) for a, b in zip(ids.split(lengths), tokens.cpu(), strict=True)]
    ends = torch.tensor([0] + [len(text) for text in texts]).cumsum(0).to(torch.int32)
    reference = ToyNSALlama(model.config).double()
    reference.load_state_dict({n: w.double().cpu() for n, w in model.state_dict().items()})
    with torch.no_grad(), near_ties_of_blocks() as ties:
        logits = reference(torch.cat(texts), ends)
    tied = torch.zeros(len(logits), dtype=torch.bool)
    if ties:
        tied = torch.cat(ties).unflatten(0, (-1, len(logits))).any(0)  # of any layer
    assert tied.float().mean() < 0.1
    steps = tokens.shape[1]
    for length, end, row in zip(lengths, ends[1:].tolist(), tokens.cpu(), strict=True):
        seen = logits[end - steps - 1 : end - 1]
        short = seen.max(-1).values - seen.gather(-1, row[:, None]).squeeze(-1)
        short = short.masked_fill(tied[end - steps - 1 : end - 1], 0.0)
        worst = (short / seen.std(-1)).max().item()
        assert worst <= 0.02, f"prompt of {length}: {worst:.3f} of a deviation below the best"


@pytest.mark.parametrize("form", EVERY)
def test_kernels_choose_the_references_tokens(form: str) -> None:
    model = small(**EVERY[form])
    for changes in WAYS.values():
        model.inference_config = dataclasses.replace(LIMITS, **changes)
        check_choices(model, LENGTHS, model.generate(*on_gpu(LENGTHS)))


@pytest.mark.parametrize("dense", [False, True], ids=["nsa", "dense"])
@pytest.mark.parametrize("sampling", [SamplingConfig(), SamplingConfig(1.0, 50, 0.9, 3)])
def test_a_graph_changes_no_token(dense: bool, sampling: SamplingConfig) -> None:
    model: ToyLlama | ToyNSALlama = small()
    if dense:
        model = ToyLlama(dense_config(head_dim=64), LIMITS).cuda().half()
    for lengths in (LENGTHS, LENGTHS[:1], LENGTHS[1:4]):
        batch = on_gpu(lengths)
        tokens = [
            model.generate(*batch, sampling=sampling, cuda_graph=graph)
            for graph in (True, False, True)
        ]
        assert torch.equal(tokens[0], tokens[1])
        assert torch.equal(tokens[0], tokens[2])


def test_pages_of_a_contiguous_cache_change_no_token() -> None:
    model = small()
    expected = model.generate(*on_gpu(LENGTHS))
    model.inference_config = dataclasses.replace(LIMITS, paged=True, page_size=64)
    assert torch.equal(model.generate(*on_gpu(LENGTHS)), expected)


def read(batch: ContinuousBatch, numbers: list[int]) -> Tensor:
    """The tokens of some sequences, all of which end."""
    tokens: dict[int, list[int]] = {number: [] for number in numbers}
    for new in batch.run():
        tokens[new.sequence].append(new.token)
    return torch.tensor([tokens[number] for number in numbers])


def with_drafts(model: Any, guesses: list[list[int]], cuda_graph: bool) -> tuple[Tensor, Any]:
    """Tokens of the prompts of LENGTHS, with drafts of some lengths, right ones and wrong ones."""
    batch = ContinuousBatch(model, cuda_graph=cuda_graph)
    numbers, calls = [], count()
    for i, prompt in enumerate(packed_batch(LENGTHS)[0].split(LENGTHS)):

        def guess(tokens: Any, most: int, i: int = i, prompt: int = len(prompt)) -> list[int]:
            done = len(tokens) - prompt
            right = guesses[i][done:][: min(most, (1, 2, 6)[next(calls) // len(LENGTHS) % 3])]
            return [*right, 3][:most] if done % 2 else right

        numbers.append(batch.add(prompt, drafter=lambda guess=guess: guess))
    return read(batch, numbers), batch


@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "in pages"])
def test_drafts_in_graphs_of_their_sizes(paged: bool) -> None:
    """Each size of rows and tokens is captured once, and replays what launches compute."""
    model = small(dataclasses.replace(LIMITS, paged=paged))
    guesses = model.generate(*on_gpu(LENGTHS)).tolist()
    launched, _ = with_drafts(model, guesses, cuda_graph=False)
    replayed, batch = with_drafts(model, guesses, cuda_graph=True)
    assert torch.equal(replayed, launched)
    check_choices(model, LENGTHS, replayed)
    assert batch.accepted > 20
    kinds = list(batch._runner._step._graphs)
    assert {several for _, _, several in kinds} >= {4, 8}
    assert len(kinds) <= 4 * 4, "rows and tokens in powers of two"


def test_drafts_of_a_dense_model_in_graphs() -> None:
    generator = torch.Generator().manual_seed(1)
    model = ToyLlama(dense_config(head_dim=64), LIMITS, generator=generator).cuda().half()
    guesses = model.generate(*on_gpu(LENGTHS)).tolist()
    launched, _ = with_drafts(model, guesses, cuda_graph=False)
    replayed, batch = with_drafts(model, guesses, cuda_graph=True)
    assert torch.equal(replayed, launched)
    assert batch.accepted > 20


@torch.no_grad()
def test_several_tokens_leave_the_keys_of_one_after_another() -> None:
    """To float16's rounding: products of cuBLAS may differ with the rows of a batch. To the bit:
    test_several_tokens_of_a_sequence_leave_the_cache_of_one_after_another."""
    model, lengths = small(), [30, 64, 100]
    ids = packed_batch([21], seed=3)[0].view(7, 3).cuda()
    starts = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    positions = starts + torch.arange(7, dtype=torch.int32, device="cuda")[:, None]
    slots = torch.arange(3, dtype=torch.int32, device="cuda")
    caches = [model.new_cache(), model.new_cache()]
    for cache in caches:
        model.prefill(*on_gpu(lengths), lengths, cache)
    several = model.several_logits(ids, positions, slots, caches[0])
    steps = [model.step_logits(ids[i], positions[i], slots, caches[1]) for i in range(7)]
    pairs = [(several, torch.stack(steps)), *zip(*(c.tensors() for c in caches), strict=True)]
    for actual, expected in pairs:
        error = (actual.double() - expected.double()).norm() / expected.double().norm()
        assert error < 5e-3


def test_shared_prefixes_forks_and_turns() -> None:
    changes = {"paged": True, "page_size": 32, "prefill_chunk_size": 40}
    limits = dataclasses.replace(LIMITS, **changes, share_prefixes=True)
    model = small(limits)
    head, tail = packed_batch([100, 60])[0].split([100, 60])
    prompts = [head, torch.cat([head[:70], tail]), torch.cat([head, tail[:9]])]
    lengths = [len(prompt) for prompt in prompts]
    batch = ContinuousBatch(model)
    for _ in range(2):  # together, and after others
        numbers = [batch.add(prompt, keep=True) for prompt in prompts]
        tokens = read(batch, numbers)
        check_choices(model, lengths, tokens, torch.cat(prompts))
        texts = [torch.cat(pair) for pair in zip(prompts, tokens, strict=True)]
        forks = [batch.fork(number, max_new_tokens=8) for number in numbers[:2]]
        turn = torch.tensor([1, 2, 3])
        batch.resume(numbers[2], turn, max_new_tokens=8)
        texts[2] = torch.cat([texts[2], turn])
        got = read(batch, [*forks, numbers[2]])
        check_choices(model, [len(text) for text in texts], got, torch.cat(texts))
        for number in numbers:
            batch.cancel(number)
    pages = batch.cache.pages
    assert pages is not None
    assert pages.free_pages == limits.total_pages


def test_weights_that_change_reach_a_captured_step() -> None:
    model, batch = small(), on_gpu(LENGTHS)
    first = model.generate(*batch)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1).add_(0.01)
    changed = model.generate(*batch)
    assert not torch.equal(changed, first)
    assert torch.equal(changed, model.generate(*batch, cuda_graph=False))
    model.load_state_dict({n: w.clone() for n, w in model.state_dict().items()}, assign=True)
    assert torch.equal(changed, model.generate(*batch))


def launches(layers: int) -> int:
    """Kernels that a decoding step of so many layers launches."""
    model = nsa_model(LIMITS, torch.bfloat16, **SHAPE, num_hidden_layers=layers).cuda()
    step = DecodeStep(model, model.new_cache())
    step.fill([Row(slot, 100 + slot, SamplingConfig()) for slot in range(4)], kept=[])
    with torch.no_grad():
        step.compute(4, sampled=False)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as profiler:
            step.compute(4, sampled=False)
            torch.cuda.synchronize()
    kernels = [
        event.name
        for event in profiler.events() or ()
        if event.device_type.name == "CUDA" and "Sync" not in event.name
    ]
    return len(kernels)


def test_a_layer_takes_eleven_launches_and_a_step_few_more() -> None:
    """Two norms, four products, the append, and two kernels for each of two attention ops.

    Outside the layers: embedding, norm, head, choice, its copy, and the positions' two.
    """
    one, three = launches(1), launches(3)
    assert (three - one) / 2 <= 11
    assert one - (three - one) / 2 <= 8


def test_the_guides_example_runs(capsys: pytest.CaptureFixture[str]) -> None:
    guide = Path(__file__).parents[2] / "examples" / "guide.py"
    result = runpy.run_path(str(guide), run_name="__main__")
    assert result["output_tokens"].shape == (4, 128)
    assert "EXAMPLE GENERATE" in capsys.readouterr().out
