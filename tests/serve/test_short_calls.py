"""Requests that a server makes of itself before it takes others'."""

from __future__ import annotations

from typing import Any

import pytest

from nsagen.model import ContinuousBatch, InferenceConfig
from nsagen.model.step import DecodeStep
from nsagen.serve.short_calls import make_short_calls
from tests.model.tiny import nsa_model

CHUNKS = {"prefill_chunk_size": 32}
PAGES = {**CHUNKS, "paged": True, "page_size": 16, "num_pages": 10, "share_prefixes": True}


@pytest.mark.parametrize(
    ("changes", "drafts"), [({}, False), (CHUNKS, True), (PAGES, True)], ids=str
)
def test_all_sizes_of_passes_and_steps_are_run(
    changes: dict[str, Any], drafts: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = nsa_model(InferenceConfig(6, 96, **changes))
    passes, steps = set[tuple[int, bool]](), set[tuple[int, int]]()
    hidden, compute = model.hidden, DecodeStep.compute

    def counted_pass(tokens: Any, rows: Any, *more: Any) -> Any:
        passes.add((tokens.shape[0], getattr(rows, "context", None) is not None))
        return hidden(tokens, rows, *more)

    def counted_step(self: Any, count: int, sampled: bool, several: int = 1) -> Any:
        steps.add((count, several))
        return compute(self, count, sampled, several)

    monkeypatch.setattr(model, "hidden", counted_pass)
    monkeypatch.setattr(DecodeStep, "compute", counted_step)
    batch = ContinuousBatch(model)
    make_short_calls(batch, drafts)
    assert {(16, False), (32, False)} <= passes
    assert ((16, True) in passes) == bool(changes)
    assert {(n, 1) for n in (1, 2, 4, 6)} <= steps
    assert ({several for _, several in steps} == {1, 2, 4, 8}) == drafts
    assert batch.idle
    assert batch.free_slots == 6
    assert batch.cuda_graph
    if batch.cache.pages is not None:
        assert batch.cache.pages.free_pages == 10
        assert batch.cache.pages.index.unused == 0, "no other request may find these prompts"


def test_a_server_with_little_room() -> None:
    batch = ContinuousBatch(nsa_model(InferenceConfig(1, 2)))
    make_short_calls(batch, drafts=True)
    assert batch.idle
