"""Decoding a token at a time equals the forward pass, row by row."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from nsagen.cases.compress import compress_weight
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.ops import reference
from nsagen.ops.reference.compress import Weight
from tests.ops.dense import offsets

DIM, VALUE_DIM, HEADS, KV_HEADS = 8, 6, 4, 2
SLOTS, LENGTH = 4, 40
SELECT = {"block_size": 8, "topk": 4, "init_blocks": 1, "local_blocks": 2}
WINDOW = 7


@dataclass
class Caches:
    """Poisoned, to expose reads of memory that was never written."""

    k: Tensor
    v: Tensor
    ck: Tensor
    cv: Tensor
    k_raw: Tensor

    @classmethod
    def of(cls, kernel_size: int, dtype: torch.dtype) -> Caches:
        def poisoned(rows: int, dim: int) -> Tensor:
            return torch.full((SLOTS, rows, KV_HEADS, dim), float("nan"), dtype=dtype)

        return cls(
            poisoned(LENGTH, DIM),
            poisoned(LENGTH, VALUE_DIM),
            poisoned(LENGTH, DIM),
            poisoned(LENGTH, VALUE_DIM),
            poisoned(kernel_size, DIM),
        )

    def all(self) -> tuple[Tensor, ...]:
        return self.k, self.v, self.ck, self.cv, self.k_raw


@dataclass
class Model:
    """Inputs of whole sequences and the weights of their compression."""

    compress: dict[str, object]
    w_k: Weight
    w_v: Weight
    pe: Tensor | None
    cos: Tensor | None
    sin: Tensor | None

    @classmethod
    def of(cls, compress_type: str, size: int, stride: int, plain: bool = False) -> Model:
        torch.manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, dtype=torch.float64)

        w_k, w_v = (
            compress_weight(compress_type, KV_HEADS, size, dim, normal, hidden=5)
            for dim in (DIM, VALUE_DIM)
        )
        angles = torch.arange(LENGTH)[:, None] * 100.0 ** -torch.linspace(0, 1, DIM // 2)
        return cls(
            {"compress_type": compress_type, "kernel_size": size, "kernel_stride": stride},
            w_k,
            w_v,
            None if plain else torch.randn(KV_HEADS, size, DIM, dtype=torch.float64),
            None if plain else angles.cos(),
            None if plain else angles.sin(),
        )

    @property
    def windows(self) -> dict[str, int]:
        return {name: self.compress[name] for name in ("kernel_size", "kernel_stride")}

    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        """One sequence through the whole block."""
        return reference.native_sparse_attention(
            q,
            k,
            v,
            gate,
            cu_seqlens=offsets([len(q)]),
            **self.compress,
            **SELECT,
            window_size=WINDOW,
            w_k=self.w_k,
            w_v=self.w_v,
            pe=self.pe,
            cos=self.cos,
            sin=self.sin,
        )

    def step(
        self,
        new: tuple[Tensor, ...],
        positions: Tensor,
        slots: Tensor,
        caches: Caches,
        block_table: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One token a row; returns (q after rope, o_compressed, topk_idx, o)."""
        q, k, v, gate = new
        weights = (self.cos, self.sin, self.w_k, self.w_v, self.pe)
        q = reference.cache_append(
            *(q, k, v, *weights, positions, slots, *caches.all()),
            **self.compress,
            block_table=block_table,
        )
        o_compressed, topk_idx = reference.compressed_attention_decode(
            *(q, caches.ck, caches.cv, positions, slots),
            **self.windows,
            **SELECT,
            block_table=block_table,
        )
        o = reference.native_sparse_attention_decode(
            q,
            caches.k,
            caches.v,
            topk_idx,
            positions,
            slots,
            o_compressed,
            gate,
            block_size=SELECT["block_size"],
            window_size=WINDOW,
            block_table=block_table,
        )
        return q, o_compressed, topk_idx, o


def sequence(seed: int) -> tuple[Tensor, ...]:
    """q, k, v and gate of one sequence."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((HEADS, DIM), (KV_HEADS, DIM), (KV_HEADS, VALUE_DIM), (HEADS, 3))
    return tuple(
        torch.randn(LENGTH, *shape, generator=generator, dtype=torch.float64) for shape in shapes
    )


def rows_of(sequences: list[tuple[Tensor, ...]], positions: list[int]) -> tuple[Tensor, ...]:
    """Each row's new token; an idle row gets the last one, which must not count."""
    rows = zip(sequences, positions, strict=True)
    tokens = [[part[position] for part in parts] for parts, position in rows]
    return tuple(torch.stack(parts) for parts in zip(*tokens, strict=True))


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
@pytest.mark.parametrize(("size", "stride"), [(8, 4), (4, 4), (8, 2)])
def test_a_growing_cache_equals_the_forward_pass(
    compress_type: str, size: int, stride: int
) -> None:
    """Two sequences out of step, crossing every block, stride and window boundary."""
    model, caches = Model.of(compress_type, size, stride), Caches.of(size, torch.float64)
    sequences, late = [sequence(1), sequence(2)], 5
    expected = [model.forward(*parts) for parts in sequences]
    slots = torch.tensor([2, 0], dtype=torch.int32)
    for step in range(LENGTH):
        positions = [step, step - late if step >= late else -1]
        _, _, _, o = model.step(
            rows_of(sequences, positions),
            torch.tensor(positions, dtype=torch.int32),
            slots,
            caches,
        )
        for row, position in enumerate(positions):
            right = expected[row][position] if position >= 0 else torch.zeros_like(o[row])
            torch.testing.assert_close(o[row], right, rtol=1e-11, atol=1e-12)
    assert caches.k[1].isnan().all()  # a slot that no row names stays as it was


def test_parts_equal_the_forward_parts() -> None:
    """Caches, compressed attention and blocks, not only their sum."""
    model, caches = Model.of("weightedpool", 8, 4), Caches.of(8, torch.float64)
    q, k, v, gate = sequence(3)
    ends, positions = offsets([LENGTH]), torch.arange(LENGTH, dtype=torch.int32)
    ck, ck_ends = reference.compress(k, model.w_k, model.pe, ends, **model.compress)
    cv, _ = reference.compress(v, model.w_v, None, ends, **model.compress)
    turned = reference.rope(q, model.cos, model.sin, positions)
    ck = reference.rope(ck, model.cos, model.sin, torch.arange(len(ck)) * 4)
    right_o, right_idx = reference.compressed_attention(
        turned, ck, cv, 8, 4, SELECT["block_size"], SELECT["topk"], ends, ck_ends
    )
    slot = torch.tensor([1], dtype=torch.int32)
    for t in range(LENGTH):
        new = (q[t : t + 1], k[t : t + 1], v[t : t + 1], gate[t : t + 1])
        q_out, o, topk_idx, _ = model.step(new, positions[t : t + 1], slot, caches)
        torch.testing.assert_close(q_out[0], turned[t], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(o[0], right_o[t], rtol=1e-11, atol=1e-12)
        assert torch.equal(topk_idx[:, 0], right_idx[:, t])
    windows = int(ck_ends[-1])
    torch.testing.assert_close(caches.ck[1, :windows], ck[:windows], rtol=1e-12, atol=1e-13)
    torch.testing.assert_close(caches.cv[1, :windows], cv[:windows], rtol=1e-12, atol=1e-13)
    assert caches.ck[1, windows:].isnan().all()
    turned_keys = reference.rope(k, model.cos, model.sin, positions)
    torch.testing.assert_close(caches.k[1], turned_keys, rtol=1e-13, atol=1e-13)
    assert torch.equal(caches.v[1], v)
    last = torch.arange(LENGTH - 8, LENGTH)
    assert torch.equal(caches.k_raw[1, last % 8], k[last])


def test_without_rope_and_position_embedding() -> None:
    model, caches = Model.of("avgpool", 8, 4, plain=True), Caches.of(8, torch.float64)
    parts = sequence(4)
    expected = model.forward(*parts)
    for t in range(LENGTH):
        _, _, _, o = model.step(
            rows_of([parts], [t]), torch.tensor([t]).int(), torch.tensor([3]).int(), caches
        )
        torch.testing.assert_close(o[0], expected[t], rtol=1e-11, atol=1e-12)


def test_idle_rows_change_nothing() -> None:
    model, caches = Model.of("avgpool", 8, 4), Caches.of(8, torch.float64)
    idle = torch.tensor([-1, -1], dtype=torch.int32)
    new = rows_of([sequence(1), sequence(2)], [0, 0])
    q, o_compressed, topk_idx, o = model.step(new, idle, torch.tensor([0, 3]).int(), caches)
    assert not any(out.any() for out in (q, o_compressed, o))
    assert topk_idx.dtype == torch.int32
    assert torch.equal(topk_idx, torch.full((KV_HEADS, 2, 4), -1, dtype=torch.int32))
    assert all(cache.isnan().all() for cache in caches.all())


def test_low_precision_caches() -> None:
    """A bfloat16 step rounds where the forward pass does, so that both stay close."""
    model, caches = Model.of("linear", 8, 4), Caches.of(8, torch.bfloat16)
    parts = tuple(part.bfloat16() for part in sequence(5))
    model.w_k, model.w_v, model.pe = (w.bfloat16() for w in (model.w_k, model.w_v, model.pe))
    ck, _ = reference.compress(parts[1], model.w_k, model.pe, offsets([LENGTH]), **model.compress)
    ck = reference.rope(ck, model.cos, model.sin, torch.arange(len(ck)) * 4)
    for t in range(LENGTH):
        _, _, _, o = model.step(
            rows_of([parts], [t]), torch.tensor([t]).int(), torch.tensor([0]).int(), caches
        )
        assert o.dtype == torch.bfloat16
        assert o.isfinite().all()
    torch.testing.assert_close(caches.ck[0, :9], ck[:9], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("compress_type", COMPRESS_TYPES)
def test_pages_in_any_order_equal_contiguous_caches(compress_type: str) -> None:
    """Pages come as tokens need them, from a shared pool; entries of later ones name no page."""
    page_size, size, stride = 8, 8, 4
    model = Model.of(compress_type, size, stride)
    whole, paged = Caches.of(size, torch.float64), Caches.of(size, torch.float64)
    pages = SLOTS * LENGTH // page_size

    def in_pages(cache: Tensor, rows: int) -> Tensor:
        return torch.full((pages, rows, *cache.shape[2:]), float("nan"), dtype=cache.dtype)

    paged.k, paged.v = (in_pages(cache, page_size) for cache in (paged.k, paged.v))
    paged.ck, paged.cv = (in_pages(cache, page_size // stride) for cache in (paged.ck, paged.cv))
    table = torch.full((SLOTS, LENGTH // page_size), -1, dtype=torch.int32)
    free = torch.randperm(pages).tolist()
    sequences, slots, late = [sequence(1), sequence(2)], torch.tensor([2, 0]).int(), 5
    for step in range(LENGTH):
        positions = [step, step - late if step >= late else -1]
        for slot, position in zip(slots.tolist(), positions, strict=True):
            if position >= 0 and position % page_size == 0:
                table[slot, position // page_size] = free.pop()
        new, rows = rows_of(sequences, positions), (torch.tensor(positions).int(), slots)
        expected = model.step(new, *rows, whole)
        for one, other in zip(model.step(new, *rows, paged, table), expected, strict=True):
            assert torch.equal(one, other)


def test_attention_to_selected_blocks_is_the_softmax_over_their_tokens() -> None:
    """Each row on its own: repeats once, blocks after the token ignored; idle rows are 0."""
    generator = torch.Generator().manual_seed(5)
    q = torch.randn(3, 4, 8, generator=generator, dtype=torch.float64)
    k, v = (torch.randn(2, 40, 2, 8, generator=generator, dtype=torch.float64) for _ in range(2))
    blocks = torch.tensor([[3, 0, 3, -1, 4], [2, 1, 0, 4, 9], [0, 1, 2, 3, 4]], dtype=torch.int32)
    positions, slots = torch.tensor([29, 20, -1]).int(), torch.tensor([1, 0, 0]).int()
    topk_idx = torch.stack([blocks, blocks.flip(-1)])
    o = reference.selected_attention_decode(q, k, v, topk_idx, positions, slots, block_size=8)
    for row, tokens in enumerate(([*range(8), *range(24, 30)], range(21))):
        slot = int(slots[row])
        keys, values = (x[slot, list(tokens)].repeat_interleave(2, 1) for x in (k, v))
        weights = torch.softmax(torch.einsum("hd,thd->ht", q[row], keys) / 8**0.5, -1)
        right = torch.einsum("ht,thd->hd", weights, values)
        torch.testing.assert_close(o[row], right, rtol=1e-11, atol=1e-12)
    assert not o[2].any()
