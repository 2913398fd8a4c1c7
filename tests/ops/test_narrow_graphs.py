"""Steps and chunks of MiniCPM4's and MiniMax-M3's attention on narrow caches, in CUDA graphs."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.workload import CACHE_DTYPES

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
ROWS, HEADS, DIM, LENGTH = 3, 2, 128, 4096
WINDOWS = {"kernel_size": 32, "kernel_stride": 16}
MINICPM = {"block_size": 64, "topk": 24, "local_blocks": 9, "score_pool": "max"}
MINIMAX = {
    **{"kernel_size": 1, "kernel_stride": 1, "block_size": 128, "topk": 8, "init_blocks": 0},
    **{"local_blocks": 1, "score_norm": "none", "score_heads": "each", "score_pool": "max"},
}


@dataclasses.dataclass
class Step:
    """New tokens of each row, behind caches of random tokens."""

    q: Tensor
    k: Tensor
    v: Tensor
    index_q: Tensor
    index_k: Tensor
    positions: Tensor
    slots: Tensor

    @classmethod
    def of(cls, seed: int) -> Step:
        random = torch.Generator("cuda").manual_seed(seed)
        heads = (16 * HEADS, HEADS, HEADS, HEADS, 1)
        made = [
            torch.randn(ROWS, n, DIM, generator=random, device="cuda", dtype=torch.bfloat16)
            for n in heads
        ]
        last = torch.tensor([LENGTH - 1 - seed, 31 + 16 * seed, -1])
        return cls(*made, *(x.int().cuda() for x in (last, torch.tensor([2, 0, 1]))))


class Caches:
    """Keys, values, windows and index keys of one byte an element."""

    def __init__(self, dtype: torch.dtype) -> None:
        lengths = {"k": LENGTH, "v": LENGTH, "ck": LENGTH // 16, "index": LENGTH}
        self.of: dict[str, tuple[Tensor, Tensor]] = {}
        for name, length in lengths.items():
            heads = 1 if name == "index" else HEADS
            random = torch.Generator("cuda").manual_seed(length + heads)
            x = torch.randn(ROWS, length, heads, DIM, generator=random, device="cuda")
            rows, scale = ops.reference.quantize(x.bfloat16(), dtype)
            self.of[name] = rows, scale.transpose(1, 2).contiguous().transpose(1, 2)

    def minicpm(self, x: Step) -> tuple[Tensor, Tensor]:
        (k, k_scale), (v, v_scale), (ck, ck_scale) = (self.of[n] for n in ("k", "v", "ck"))
        places = (x.positions, x.slots)
        ops.store_rows(x.k, k, k_scale, *places)
        ops.store_rows(x.v, v, v_scale, *places)
        ops.pool_append(k, ck, *places, **WINDOWS, k_scale=k_scale, ck_scale=ck_scale)
        blocks = ops.block_selection_decode(
            x.q, ck, *places, **WINDOWS, **MINICPM, k_scale=ck_scale
        )
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        return blocks, ops.selected_attention_decode(
            x.q, k, v, blocks, *places, block_size=64, **scales
        )

    def minimax(self, x: Step) -> tuple[Tensor, Tensor]:
        (k, k_scale), (v, v_scale), (index, scale) = (self.of[n] for n in ("k", "v", "index"))
        places = (x.positions, x.slots)
        for new, name in ((x.k, "k"), (x.v, "v"), (x.index_k, "index")):
            ops.store_rows(new, *self.of[name], *places)
        blocks = ops.block_selection_decode(x.index_q, index, *places, **MINIMAX, k_scale=scale)
        scales = {"k_scale": k_scale, "v_scale": v_scale}
        return blocks, ops.selected_attention_decode(
            x.q, k, v, blocks, *places, block_size=128, **scales
        )


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("member", ["minicpm", "minimax"])
@torch.no_grad()
def test_a_replay_is_the_step(member: str, cache_dtype: str) -> None:
    """With other tokens at other places than those of the capture, to the bit, caches too."""
    dtype = getattr(torch, cache_dtype)
    captured, eager = Caches(dtype), Caches(dtype)
    first, second = Step.of(1), Step.of(2)
    getattr(Caches(dtype), member)(first)  # builds and compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = getattr(captured, member)(first)
    for one, other in zip(vars(first).values(), vars(second).values(), strict=True):
        one.copy_(other)
    graph.replay()
    expected = getattr(eager, member)(second)
    assert all(map(torch.equal, found, expected))
    for name, pair in eager.of.items():
        for one, other in zip(captured.of[name], pair, strict=True):
            assert torch.equal(
                one.contiguous().view(torch.int8), other.contiguous().view(torch.int8)
            )


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@torch.no_grad()
def test_a_step_is_the_references(cache_dtype: str) -> None:
    """What is stored, to a step of its numbers, and what attention gives for the chosen blocks."""
    caches, x = Caches(getattr(torch, cache_dtype)), Step.of(3)
    on_cpu = {name: tuple(t.cpu() for t in pair) for name, pair in caches.of.items()}
    blocks, o = caches.minicpm(x)
    y = Step(*(t.cpu() for t in vars(x).values()))
    places, scales = (y.positions, y.slots), {}
    for name, new in (("k", y.k), ("v", y.v)):
        ops.reference.store_rows(new, *on_cpu[name], *places)
        scales[f"{name}_scale"] = on_cpu[name][1]
    (k, k_scale), (v, _), (ck, ck_scale) = (on_cpu[n] for n in ("k", "v", "ck"))
    means = {"k_scale": k_scale, "ck_scale": ck_scale}
    ops.reference.pool_append(k, ck, *places, **WINDOWS, **means)
    for name, pair in on_cpu.items():
        numbers, scale = (t.cpu() for t in caches.of[name])
        assert torch.equal(scale, pair[1]), name
        apart = numbers.view(torch.int8).int() - pair[0].view(torch.int8).int()
        assert int(apart.abs().max()) <= (name == "ck"), name
    expected = ops.reference.selected_attention_decode(
        y.q.double(), k, v, blocks.cpu(), *places, block_size=64, **scales
    )
    assert (o.cpu() - expected).norm() / expected.norm() < 1e-2


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize(("name", "block_size", "topk"), [("minicpm", 64, 24), ("minimax", 128, 8)])
@torch.no_grad()
def test_a_chunk_in_a_graph_is_the_steps(
    name: str, block_size: int, topk: int, cache_dtype: str
) -> None:
    """Of the last tokens of a slot, each with blocks that it selected in a step: replayed with
    other queries than the capture's."""
    new, heads, slot = 8, 16 * HEADS, 2
    caches = Caches(getattr(torch, cache_dtype))
    random = torch.Generator("cuda").manual_seed(7)
    like = {"generator": random, "device": "cuda", "dtype": torch.bfloat16}
    q, index_q = torch.randn(new, heads, DIM, **like), torch.randn(new, HEADS, DIM, **like)
    positions = torch.arange(LENGTH - new, LENGTH, device="cuda").int()
    slots = torch.full((new,), slot, device="cuda").int()
    (k, k_scale), (v, v_scale) = (caches.of[n] for n in ("k", "v"))
    if name == "minicpm":
        ck, scale = caches.of["ck"]
        blocks = ops.block_selection_decode(
            q, ck, positions, slots, **WINDOWS, **MINICPM, k_scale=scale
        )
    else:
        index, scale = caches.of["index"]
        blocks = ops.block_selection_decode(
            index_q, index, positions, slots, **MINIMAX, k_scale=scale
        )
    assert blocks.shape == (HEADS, new, topk)
    scales = {"k_scale": k_scale, "v_scale": v_scale}
    expected = ops.selected_attention_decode(
        q, k, v, blocks, positions, slots, block_size=block_size, **scales
    )

    every = torch.arange(LENGTH, device="cuda").int()
    places = (every, torch.full_like(every, slot))
    ends = [torch.tensor([0, n], dtype=torch.int32, device="cuda") for n in (new, LENGTH)]
    given, start = torch.zeros_like(q), positions[:1].clone()

    def chunk() -> Tensor:
        keys, values = (ops.load_rows(*caches.of[n], *places, torch.bfloat16) for n in ("k", "v"))
        return ops.topk_sparse_attention(
            *(given, keys, values, blocks, block_size, ends[0]),
            q_start=start,
            cu_seqlens_k=ends[1],
        )

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        chunk()  # builds and compiles
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = chunk()
    given.copy_(q)
    graph.replay()
    error = (found.double() - expected.double()).norm() / expected.double().norm()
    assert error < 1e-2
