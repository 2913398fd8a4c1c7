"""A small model on kernels, in Triton's interpreter, against the same on the reference.

TRITON_INTERPRET=1 pytest tests/model/test_interpreter.py
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator

import pytest
import torch

from nsagen.model import InferenceConfig
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
