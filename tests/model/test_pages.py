"""Paged caches: who has which page, what it costs, and what happens when they run out."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.model import InferenceConfig, NSACache, ToyLlama
from nsagen.model.pages import PagePool
from tests.model.tiny import dense_config, nsa_config, nsa_model, packed_batch

PAGED = InferenceConfig(4, 128, 8, paged=True, page_size=16, num_pages=10)


def test_pages_go_to_one_slot_at_a_time() -> None:
    pool = PagePool(PAGED, torch.device("cpu"))
    pool.reserve(1, 33, "one")
    pool.reserve(3, 16, "three")
    pool.reserve(1, 49, "one")  # grows by a page
    assert pool.capacity(1) == 64
    assert pool.free_pages == 5
    pages = pool.table[1, :4].tolist() + pool.table[3, :1].tolist()
    assert len(set(pages)) == 5
    pool.release(1)
    assert pool.free_pages == 9
    assert pool.capacity(1) == 0


def test_running_out_names_who_and_changes_nothing() -> None:
    pool = PagePool(PAGED, torch.device("cpu"))
    pool.reserve(0, 120, "first")
    before = pool.table.clone()
    text = r"second: its 40 tokens need 3 free pages of 16 tokens, got 2 of 10; wait until"
    with pytest.raises(CapacityError, match=text):
        pool.reserve(1, 40, "second")
    assert torch.equal(pool.table, before)
    assert pool.free_pages == 2


def test_bytes_are_those_of_the_pages() -> None:
    config, full = nsa_config(), dataclasses.replace(PAGED, num_pages=None)
    assert full.total_pages == 4 * 8
    for limits in (PAGED, full):
        cache = NSACache(config, limits, dtype=torch.bfloat16)
        assert cache.nbytes == limits.cache_bytes(config)
    assert PAGED.cache_bytes(config) < 0.4 * full.cache_bytes(config)


def test_a_cache_takes_its_paging_as_arguments() -> None:
    cache = NSACache(nsa_config(), InferenceConfig(4, 128), paged=True, page_size=32)
    assert cache.paged
    assert cache[0].k.shape == (16, 32, 2, 32)
    assert cache[0].ck.shape == (16, 8, 2, 32)
    assert cache[0].k_raw.shape == (4, 8, 2, 32)
    assert cache[0].block_table is cache[1].block_table


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"page_size": 24}, "page_size must be a multiple of block_size=16.*got 24.*such as 32"),
        ({"num_pages": 0}, "num_pages must be an integer of at least 1, got 0"),
        ({"paged": 1}, "paged must be True or False, got 1"),
        ({"prefill_chunk_size": 0}, "prefill_chunk_size must be an integer of at least 1"),
    ],
)
def test_refusals_of_settings(changes: dict[str, int], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text):
        nsa_model(dataclasses.replace(PAGED, **changes))


def test_dense_models_have_no_pages() -> None:
    with pytest.raises(InvalidInputError, match="paged=True with ToyLlamaConfig; leave paged"):
        ToyLlama(dense_config(), PAGED)


def test_generate_refuses_what_its_pages_cannot_hold_and_then_goes_on() -> None:
    model = nsa_model(PAGED)
    text = r"generate: sequence 2: its 58 tokens need 4 free pages of 16 tokens, got 2 of 10"
    with pytest.raises(CapacityError, match=text):
        model.generate(*packed_batch([50, 50, 50]))
    model.inference_config = dataclasses.replace(PAGED, num_pages=3)
    with pytest.raises(InvalidInputError, match=r"sequence 0: .*num_pages=3 pages of 16 tokens"):
        model.generate(*packed_batch([50]))
    model.inference_config = PAGED
    batch = packed_batch([50, 50])
    expected = nsa_model(dataclasses.replace(PAGED, paged=False)).generate(*batch)
    assert torch.equal(model.generate(*batch), expected)
    assert torch.equal(model.generate(*batch), expected), "pages must have come back"
