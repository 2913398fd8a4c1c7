"""Context parallel of the family's other members: what ranks compute is what one process does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

pytest.importorskip("transformers")

from nsagen.core.errors import InvalidInputError
from nsagen.distributed import context_parallel
from nsagen.distributed.context_parallel import ContextParallel
from nsagen.integrations.minimax_m3 import SCORES
from nsagen.model.forms import Form, Index, form_of, select
from nsagen.ops import avgpool_compress, block_selection, topk_sparse_attention
from tests.distributed.ranks import on_ranks
from tests.distributed.test_context_parallel import (
    BATCHES,
    Found,
    assert_equal,
    numbers,
    offsets_of,
)
from tests.integrations.test_minimax_m3 import ours as minimax_m3
from tests.integrations.tiny import KINDS, build
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = pytest.mark.usefixtures("one_thread")

BLOCKS = {"block_size": 8, "topk": 4, "init_blocks": 1, "local_blocks": 1}
INFLLM: dict[str, Any] = {"form": "infllm_v2", "kernel_size": 8, "kernel_stride": 4, **BLOCKS}
FORMS: dict[str, dict[str, Any] | None] = {
    "InfLLM-V2": {**INFLLM, "dense_len": 0},
    "MoBA": {"form": "moba", "block_size": 8, "topk": 3},
    "MSA": None,
}
RULE = {"kernel_size": 1, "kernel_stride": 1, **BLOCKS, "init_blocks": 0, **SCORES}
SCALE = 0.25

Pair = tuple[Tensor, Tensor]


def chosen(
    form: Form | None, q: Tensor, k: Tensor, index: tuple[Tensor, Tensor], ends: Tensor
) -> Tensor:
    """The blocks of whole sequences."""
    if form is None:
        return block_selection(*index, None, ends, ends, **RULE)
    windows, window_ends = avgpool_compress(k.detach(), None, ends, **form.window_sizes)
    return select(form, q, windows, ends, window_ends, None, SCALE)


def attended(name: str, lengths: list[int], parallel: ContextParallel | None) -> Found:
    """Output and gradients of a member's attention; of ranks, the whole ones."""
    settings, ends = FORMS[name], offsets_of(lengths)
    form = None if settings is None else form_of("a test", settings)
    tokens = int(ends[-1])
    q, k, v, weight = (numbers(tokens, heads, 16, seed=i) for i, heads in enumerate((4, 2, 2, 4)))
    index = numbers(tokens, 2, 8, seed=4), numbers(tokens, 1, 8, seed=5)
    if parallel is not None:
        shard = parallel.shard(ends)
        q, k, v, weight = (shard.take(x) for x in (q, k, v, weight))
    leaves = [x.requires_grad_() for x in (q, k, v)]
    if parallel is None:
        blocks = chosen(form, q, k, index, ends)
        repeats = blocks.shape[0] // k.shape[1]
        heads = (x.repeat_interleave(repeats, 1) for x in (k, v))
        o = topk_sparse_attention(q, *heads, blocks, 8, ends, SCALE)
    else:
        ranking = form or Index(*(shard.take(x) for x in index), RULE)
        o = parallel.blocks(ranking, q, k, v, shard, SCALE)
    (o * weight).sum().backward()
    found = dict(zip("qkv", (x.grad for x in leaves), strict=True)) | {"o": o.detach()}
    if parallel is not None:
        found = {n: shard.whole(x) for n, x in found.items() if x is not None}
    return found


@pytest.mark.parametrize("count", [2, 4])
def test_outputs_and_gradients_are_one_process_s(count: int) -> None:
    """For every kind of batch; and equal to the bit when they run again."""
    cases = [(name, lengths) for name in FORMS for lengths in BATCHES.values()]

    def run(rank: int) -> list[Found]:
        parallel = ContextParallel(dist.group.WORLD)  # type: ignore[arg-type]
        found = [attended(*case, parallel) for case in cases]
        for one, other in zip(
            found[0].values(), attended(*cases[0], parallel).values(), strict=True
        ):
            assert one is not None
            assert other is not None
            assert torch.equal(one, other)
        return found

    expected = [attended(*case, None) for case in cases]
    for found in on_ranks(count, run):
        for case, mine, one in zip(cases, found, expected, strict=True):
            assert_equal(mine, one, str(case))


def dense_with(form: dict[str, Any]) -> Any:
    """A Llama whose attention is a form's."""
    return build(KINDS["Llama"], attn_implementation="nsagen", nsagen=form).double()


def model_of(kind: str) -> Any:
    if kind == "MiniMax-M3":
        model = minimax_m3(nsagen={"index_loss_coef": 0.0})
        model.set_experts_implementation("eager")  # others have no float64
        return model.double().train()
    forms: dict[str, dict[str, Any]] = {
        "sparse": {**INFLLM, "dense_len": 0},
        "some sequences dense": {**INFLLM, "dense_len": 40},
        "all sequences dense": {**INFLLM, "dense_len": 400},
    }
    return dense_with(forms[kind])


LENGTHS = [7, 0, 64, 2, 45]
IDS = torch.randint(1, 97, (sum(LENGTHS),), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    "kind", ["MiniMax-M3", "sparse", "some sequences dense", "all sequences dense"]
)
def test_a_transformers_model_s_logits_and_gradients(kind: str) -> None:
    targets, ends = IDS.roll(-1), offsets_of(LENGTHS)

    def run(parallel: bool) -> Found:
        model = model_of(kind)
        if parallel:
            shard = context_parallel(model).shard(ends)
            ids, goal, more = shard.take(IDS), shard.take(targets), {"nsa_shard": shard}
        else:
            starts = torch.cat([torch.arange(n) for n in LENGTHS])[None]
            ids, goal, more = IDS, targets, {"position_ids": starts, "use_cache": False}
        logits = model(input_ids=ids[None], **more).logits[0]
        F.cross_entropy(logits.double(), goal, reduction="sum").backward()
        found: Found = {name: p.grad for name, p in model.named_parameters()}
        if parallel:
            for one in found.values():
                if one is not None:
                    dist.all_reduce(one)
        whole = shard.whole(logits) if parallel else logits.detach()
        return {**found, "logits": whole}

    expected = run(parallel=False)
    bound = 1e-6 if kind == "MiniMax-M3" else 1e-12  # its norms compute in float32
    for found in on_ranks(2, lambda rank: run(parallel=True)):
        assert_equal(found, expected, kind, bound)


def test_what_a_shard_does_not_go_with_is_refused_by_name() -> None:
    def run(rank: int) -> list[str]:
        model, m3 = dense_with(INFLLM), minimax_m3().train()
        shard = context_parallel(model).shard(offsets_of(LENGTHS))
        ids = shard.take(IDS)[None]
        context_parallel(m3)
        calls: list[Callable[[], Any]] = [
            lambda: model(input_ids=ids, nsa_shard=shard, labels=ids),
            lambda: model(input_ids=ids, nsa_shard=shard, position_ids=ids),
            lambda: model(input_ids=ids, nsa_shard=shard, use_cache=True),
            lambda: model(input_ids=IDS[None], nsa_shard=shard),
            lambda: model(input_ids=ids, nsa_shard=offsets_of(LENGTHS)),
            lambda: model.model(input_ids=ids, nsa_shard=shard),
            lambda: m3(input_ids=ids, nsa_shard=shard),
        ]
        texts = []
        for call in calls:
            with pytest.raises(InvalidInputError) as error:
                call()
            texts.append(str(error.value))
        return texts

    expected = [
        "goes with no labels: a token's successor may be on another rank, got labels; shift the",
        "says where all tokens are, got position_ids",
        "says where all tokens are, got use_cache",
        "needs input_ids of shape [1, 59], by name or first, got [1, 118]",
        "must be a shard",
        "must come through the model that context_parallel was given",
        "index_loss_coef: must be 0 for a shard: the index loss needs whole sequences",
    ]
    for text, part in zip(on_ranks(2, run)[0], expected, strict=True):
        assert part in text
