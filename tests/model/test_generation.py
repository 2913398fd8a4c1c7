"""Cached decoding computes what forward computes, at every length and boundary."""

from __future__ import annotations

import contextlib
import gc
import runpy
import sys
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from nsagen.core.workload import COMPRESS_TYPES
from nsagen.model import InferenceConfig, NewToken, ToyLlama, ToyNSALlama
from nsagen.model.cache import NSACache
from tests.model.tiny import dense_config, nsa_model, packed_batch

EXAMPLES = Path(__file__).parents[2] / "examples"


def check_teacher_forcing(model: ToyNSALlama | ToyLlama, lengths: list[int], steps: int) -> None:
    """generate's tokens are forward's greedy choices when forward sees the same text."""
    ids, cu_seqlens = packed_batch(lengths)
    tokens = model.generate(ids, cu_seqlens, max_new_tokens=steps)
    assert tokens.shape == (len(lengths), steps)
    assert tokens.dtype == torch.int64
    texts = [torch.cat([a, b]) for a, b in zip(ids.split(lengths), tokens, strict=True)]
    ends = torch.tensor([0] + [len(text) for text in texts]).cumsum(0).to(torch.int32)
    with torch.no_grad():
        choices = model(torch.cat(texts), ends).argmax(-1)
    expected = torch.stack([choices[end - steps - 1 : end - 1] for end in ends[1:].tolist()])
    wrong = (tokens != expected).any(1).nonzero().squeeze(1).tolist()
    assert not wrong, f"prompt lengths {[lengths[i] for i in wrong]} differ"


def test_every_prompt_length_from_1_to_200() -> None:
    limits = InferenceConfig(max_batch_size=200, max_length=208)
    check_teacher_forcing(nsa_model(limits), list(range(1, 201)), steps=5)


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_every_compress_type_across_all_boundaries(compress_type: str) -> None:
    """From an almost empty cache past the kernel, stride, block and window sizes."""
    model = nsa_model(InferenceConfig(4, 64), compress_type=compress_type)
    check_teacher_forcing(model, [1, 6, 12, 15], steps=40)


def test_three_query_heads_a_group_and_many_blocks() -> None:
    model = nsa_model(InferenceConfig(2, 220), num_attention_heads=6, topk=5)
    check_teacher_forcing(model, [150, 180], steps=20)


def test_dense_model() -> None:
    model = ToyLlama(
        dense_config(), InferenceConfig(8, 64), generator=torch.Generator().manual_seed(1)
    )
    check_teacher_forcing(model.double(), [1, 2, 7, 31, 50], steps=10)


def run(model: ToyNSALlama, ids: Tensor, prompt: int, cache: NSACache) -> Tensor:
    """Prefill `prompt` tokens of one sequence into slot 0, decode the rest: last logits."""
    cu_seqlens = torch.tensor([0, prompt], dtype=torch.int32)
    logits = model.prefill(ids[:prompt], cu_seqlens, [prompt], cache)
    slots = torch.zeros(1, dtype=torch.int32)
    for position in range(prompt, len(ids)):
        where = torch.tensor([position], dtype=torch.int32)
        logits = model.decode(ids[position : position + 1], where, slots, cache)
    return logits[0]


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
@pytest.mark.parametrize(
    ("prompt", "total"), [(1, 9), (7, 8), (8, 12), (15, 17), (31, 34), (60, 65)]
)
def test_decoding_leaves_the_cache_that_prefill_would(
    compress_type: str, prompt: int, total: int
) -> None:
    limits = InferenceConfig(max_batch_size=1, max_length=128)
    model = nsa_model(limits, compress_type=compress_type)
    ids, cu_seqlens = packed_batch([total])
    stepwise, at_once = model.new_cache(), model.new_cache()
    with torch.no_grad():
        logits = run(model, ids, prompt, stepwise)
        expected = run(model, ids, total, at_once)
        forward = model(ids, cu_seqlens)[-1]
    torch.testing.assert_close(logits, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, forward, rtol=1e-5, atol=1e-5)
    windows = (total - 8) // 4 + 1
    for one, other in zip(stepwise, at_once, strict=True):
        for name, valid in (("k", total), ("v", total), ("ck", windows), ("cv", windows)):
            a, b = getattr(one, name)[0, :valid], getattr(other, name)[0, :valid]
            torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
        torch.testing.assert_close(one.k_raw, other.k_raw)


def test_a_step_never_waits_for_the_device() -> None:
    """On the meta device nothing has a value: reading one on the host would raise."""
    model = nsa_model(InferenceConfig(4, 64), torch.bfloat16).to("meta")
    tokens = torch.zeros(3, dtype=torch.int64, device="meta")
    rows = torch.zeros(3, dtype=torch.int32, device="meta")
    assert model.decode(tokens, rows, rows, model.new_cache()).shape == (3, 512)
    assert model(tokens, rows).shape == (3, 512)


def test_calls_leave_nothing_behind_for_the_next() -> None:
    model = nsa_model(InferenceConfig(4, 128))
    short = packed_batch([9, 20], seed=1)
    first = model.generate(*short, max_new_tokens=8)
    model.generate(*packed_batch([100, 90, 80, 70], seed=2), max_new_tokens=8)
    assert torch.equal(model.generate(*short, max_new_tokens=8), first)


@pytest.mark.parametrize("at", [0, 1, 3])
@pytest.mark.parametrize("lengths", [[9], [9, 20, 13]])
def test_an_error_that_does_not_come_back_is_raised(at: int, lengths: list[int]) -> None:
    """Such as a time limit, raised by a signal's handler: a second try would hide it."""
    model, calls = nsa_model(InferenceConfig(3, 64, 6)), []
    batch, seen = packed_batch(lengths), list[NewToken]()
    expected = model.generate(*batch)

    def hook(*args: object) -> None:
        calls.append(True)
        if len(calls) == 1 + at:
            raise TimeoutError("after 30 s")

    model.model.layers[1].mlp.register_forward_hook(hook)
    with pytest.raises(TimeoutError, match="after 30 s"):
        model.generate(*batch, stream=seen.append)
    assert len(calls) == 1 + at, "nothing may run after it"
    for index, row in enumerate(expected.tolist()):
        assert [new.token for new in seen if new.sequence == index] == row[:at]
    assert torch.equal(model.generate(*batch), expected)


@pytest.mark.parametrize("make", [nsa_model, lambda limits: ToyLlama(dense_config(), limits)])
def test_a_model_and_its_cache_are_freed_at_once(
    make: Callable[[InferenceConfig], ToyNSALlama | ToyLlama],
) -> None:
    """Without waiting for the garbage collector, which does not know how large they are."""
    model = make(InferenceConfig(2, 64, 4))
    gc.collect()
    gc.disable()
    try:
        model.generate(*packed_batch([9, 20]))
        (idle,) = model._idle_batches
        held, weight = weakref.ref(idle.cache), weakref.ref(model.lm_head.weight)
        del idle
        model.to("meta")
        assert held() is None, "the cache would stay on the old device"
        model.to_empty(device="cpu")
        model.generate(*packed_batch([9]))
        model.lm_head.register_forward_hook(lambda *_: [][0])
        with contextlib.suppress(IndexError):
            model.generate(*packed_batch([9]))
        del model
        assert weight() is None
    finally:
        gc.enable()


def test_a_cast_model_gets_a_new_cache() -> None:
    model = nsa_model(InferenceConfig(2, 64), dtype=torch.float32)
    model.generate(*packed_batch([9]), max_new_tokens=2)
    model = model.to(torch.float64)
    model.generate(*packed_batch([9]), max_new_tokens=2)
    (idle,) = model._idle_batches
    assert idle.cache.dtype == torch.float64


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_the_guides_calls_in_their_order(
    compress_type: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["guide_cpu.py", compress_type])
    result = runpy.run_path(str(EXAMPLES / "guide_cpu.py"), run_name="__main__")
    assert result["logits"].shape == (result["input_ids"].shape[0], 512)
    assert result["logits"].dtype == torch.float32
    assert result["output_tokens"].shape == (4, 16)
    assert "EXAMPLE GENERATE" in capsys.readouterr().out


def test_the_full_size_guide_says_what_it_needs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match=r"needs a CUDA GPU.*guide_cpu"):
        runpy.run_path(str(EXAMPLES / "guide.py"), run_name="__main__")
