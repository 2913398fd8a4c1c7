"""A small model on kernels, in Triton's interpreter, against the same on the reference.

TRITON_INTERPRET=1 pytest tests/model/test_interpreter.py
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.model import ContinuousBatch, InferenceConfig
from nsagen.model.prefill import DecodeRows
from tests.model.forms import FORMS
from tests.model.tiny import nsa_model, packed_batch

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.kernel,
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
]


QUICK = ("the paper's", "gated values", "no window")
"""Forms whose kernels the others' differ from in little."""


@pytest.fixture(scope="module", autouse=True)
def _own_kernel_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Kernels are built anew, not taken from the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NSAGEN_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        yield


@pytest.mark.parametrize("compress_type", ["avgpool", "weightedpool", "linear"])
@torch.no_grad()
def test_kernels_compute_what_the_reference_does(compress_type: str) -> None:
    limits = InferenceConfig(max_batch_size=4, max_length=64)
    changes = {"num_hidden_layers": 1, "compress_type": compress_type}
    kernels = nsa_model(limits, torch.float32, **changes)
    reference = nsa_model(limits, torch.float64, **changes)  # float64 has no kernels
    ids, cu_seqlens = packed_batch([5, 0, 41, 18])
    actual, expected = kernels(ids, cu_seqlens), reference(ids, cu_seqlens)
    assert (actual - expected).norm() / expected.norm() < 3e-5
    prompts = packed_batch([6, 50, 11])
    expected_tokens = reference.generate(*prompts, max_new_tokens=4)
    assert torch.equal(kernels.generate(*prompts, max_new_tokens=4), expected_tokens)
    if compress_type == "weightedpool":
        kernels.inference_config = dataclasses.replace(limits, prefill_chunk_size=29)
        assert torch.equal(kernels.generate(*prompts, max_new_tokens=1), expected_tokens[:, :1])


@pytest.mark.parametrize(
    "form",
    [form if form in QUICK else pytest.param(form, marks=pytest.mark.slow) for form in FORMS],
)
@torch.no_grad()
def test_forms_on_kernels(form: str) -> None:
    """Forward, prefill whole and in chunks, and steps in pages."""
    limits = InferenceConfig(2, 32, paged=True, page_size=16, prefill_chunk_size=13)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    kernels = nsa_model(limits, torch.float32, **heads, **FORMS[form])
    reference = nsa_model(limits, torch.float64, **heads, **FORMS[form])
    batch = packed_batch([25, 6])
    actual, expected = kernels(*batch), reference(*batch)
    assert (actual - expected).norm() / expected.norm() < 3e-5
    tokens = reference.generate(*batch, max_new_tokens=4)
    assert torch.equal(kernels.generate(*batch, max_new_tokens=4), tokens)


@torch.no_grad()
def test_steps_in_pages_from_an_empty_cache() -> None:
    """Two sequences in steps of four rows; one starts later, and its row is idle until then."""
    limits = InferenceConfig(max_batch_size=4, max_length=32, paged=True, page_size=16)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 64}
    ids, _ = packed_batch([18], vocab_size=64)
    slots = torch.tensor([3, 1, 0, 0], dtype=torch.int32)
    logits = []
    for dtype in (torch.float32, torch.float64):
        model = nsa_model(limits, dtype, num_hidden_layers=1, **heads)
        cache = model.new_cache()
        for slot in (3, 1):
            cache.reserve(slot, 18)
        seen = []
        for position in range(18):
            where = torch.tensor([position, position - 6, -1, -1], dtype=torch.int32).clamp(min=-1)
            rows = model.decode(ids[where.clamp(min=0)], where, slots, cache)
            seen.append(rows[: 1 if position < 6 else 2])
        logits.append(torch.cat(seen))
    actual, expected = logits
    assert (actual - expected).norm() / expected.norm() < 3e-5


@pytest.mark.parametrize("compress_type", ["avgpool", "linear"])
@torch.no_grad()
def test_several_tokens_of_a_sequence_leave_the_cache_of_one_after_another(
    compress_type: str,
) -> None:
    """To the bit, where the rows are the same: the append kernels see no other row's token."""
    size, stride, heads, dim = 8, 4, 1, 16
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    starts = torch.tensor([9, 5], dtype=torch.int32)
    positions = starts + torch.arange(7, dtype=torch.int32)[:, None]
    slots = torch.tensor([1, 0], dtype=torch.int32)
    q, k, v = random(7, 2, 2, dim), random(7, 2, heads, dim), random(7, 2, heads, dim)
    w = random(heads, size * dim, dim) if compress_type == "linear" else None
    tables, pe = (random(32, dim // 2), random(32, dim // 2)), random(heads, size, dim)
    shapes = [(4, 16, heads, dim)] * 2 + [(4, 4, heads, dim)] * 2 + [(2, size, heads, dim)]
    filled = [random(*shape) for shape in shapes]
    statics = {"compress_type": compress_type, "kernel_size": size, "kernel_stride": stride}
    table = torch.tensor([[2, 0], [1, 3]], dtype=torch.int32)

    def append(at: Tensor, rows: tuple[Tensor, ...], slots: Tensor, caches: list[Tensor]) -> Tensor:
        more = (*tables, w, w, pe, at, slots, *caches)
        return ops.cache_append(*rows, *more, **statics, block_table=table)

    one, several = [x.clone() for x in filled], [x.clone() for x in filled]
    turned = [append(positions[i], (q[i], k[i], v[i]), slots, one) for i in range(7)]
    rows = DecodeRows.several(positions, slots, (size, stride))
    assert len(rows.appended) == 5
    flat = (q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1))
    parts = [append(at, flat, rows.slots, several) for at in rows.appended]
    assert torch.equal(sum(parts[1:], parts[0]), torch.cat(turned))
    assert all(map(torch.equal, several, one))


@torch.no_grad()
def test_shared_pages_and_drafts_on_kernels() -> None:
    """Chunks that begin behind a shared prefix, and steps of several tokens."""
    limits = InferenceConfig(2, 48, paged=True, page_size=16, share_prefixes=True)
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_hidden_layers": 1}
    kernels = nsa_model(limits, torch.float32, **heads)
    reference = nsa_model(limits, torch.float64, **heads)
    head = packed_batch([21])[0].tolist()
    prompts = [[*head, 1], [*head, 2, 3]]
    told = {}
    for prompt in prompts:
        ends = torch.tensor([0, len(prompt)], dtype=torch.int32)
        told[tuple(prompt)] = reference.generate(torch.tensor(prompt), ends, 6)[0].tolist()
    batch = ContinuousBatch(kernels)
    for prompt in prompts:
        answer = [*prompt, *told[tuple(prompt)]]

        def guess(tokens: Sequence[int], most: int, answer: list[int] = answer) -> list[int]:
            return [*answer[len(tokens) :][:2], 7][:most]

        number = batch.add(prompt, max_new_tokens=6, drafter=lambda guess=guess: guess)
        news = [new.token for new in batch.run() if new.sequence == number]
        assert news == told[tuple(prompt)]
    assert batch.accepted >= 4


@torch.no_grad()
@pytest.mark.parametrize("compress_type", ["weightedpool", "mlp"])
def test_caches_of_int8_on_kernels(compress_type: str) -> None:
    """Prefill whole and in chunks, and steps, in pages; float8 takes the same path."""
    limits = InferenceConfig(
        2, 32, paged=True, page_size=16, prefill_chunk_size=13, cache_dtype="int8"
    )
    heads: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1}
    heads |= {"num_hidden_layers": 1, "compress_type": compress_type}
    kernels = nsa_model(limits, torch.float32, **heads)
    reference = nsa_model(limits, torch.float64, **heads)
    batch = packed_batch([25, 6])
    tokens = reference.generate(*batch, max_new_tokens=4)
    assert torch.equal(kernels.generate(*batch, max_new_tokens=4), tokens)
