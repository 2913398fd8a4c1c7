"""The inverted index that selected attention's key-block-major kernels walk."""

import itertools
from collections import Counter
from collections.abc import Iterator

import pytest
import torch

from nsagen.cases.base import cu_seqlens_of
from nsagen.core.workload import Workload
from tests.support import kernel_device, load_kernel

WORKLOAD = Workload.of(
    "selected_attention",
    "backward",
    dtype="float16",
    head_dim=16,
    v_head_dim=16,
    gqa_ratio=1,
    block_size=16,
)


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Let PyTorch fill memory that it hands out with large numbers."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def lists_of(topk_idx, seqlens):
    """(head, number of the block) -> entries in ascending order, one Python step after another."""
    found: dict[tuple[int, int], list[int]] = {}
    heads, _, topk = topk_idx.shape
    for head in range(heads):
        begin = 0
        for seq, length in enumerate(seqlens):
            for token in range(begin, begin + length):
                blocks = topk_idx[head, token].tolist()
                for place, block in enumerate(blocks):
                    if 0 <= block <= (token - begin) // 16 and block not in blocks[:place]:
                        key = (head, begin // 16 + seq + block)
                        found.setdefault(key, []).append(token * topk + place)
            begin += length
    return found


@pytest.mark.parametrize(
    ("seqlens", "topk"),
    [((0, 3, 50, 1, 0, 17, 16), 3), ((1000,), 4), ((5,), 1), ((1,) * 40, 2), ((0, 90), 70)],
)
def test_lists_hold_each_valid_entry_in_order(seqlens, topk):
    tokens = sum(seqlens)
    random = torch.Generator().manual_seed(0)
    topk_idx = torch.randint(-2, 50, (2, tokens, topk), generator=random)
    topk_idx[..., 0] = 0  # one block that every token selects
    topk_idx = topk_idx.to(kernel_device(), torch.int32)
    module = load_kernel(WORKLOAD)
    index = module.build_index(topk_idx, cu_seqlens_of(seqlens, kernel_device()), sum(seqlens))
    starts, entries = index.starts.tolist(), index.entries.tolist()
    expected = lists_of(topk_idx, seqlens)
    for head in range(2):
        for block in range(index.blocks):
            run = (head * index.blocks + block) * index.chunks
            found = entries[starts[run] : starts[run + index.chunks]]
            assert found == expected.pop((head, block), [])
    assert not expected


@pytest.mark.parametrize("part_tokens", [1, 7, 64])
@pytest.mark.parametrize("range_chunks", [None, 20, 7])
def test_each_list_has_its_parts(part_tokens, range_chunks):
    """All places are written, in memory that held something else, for each range of chunks."""
    seqlens = (30, 0, 61)
    random = torch.Generator().manual_seed(1)
    topk_idx = torch.randint(-1, 6, (3, 91, 4), generator=random, dtype=torch.int32)
    topk_idx = topk_idx.to(kernel_device())
    module = load_kernel(WORKLOAD)
    index = module.build_index(topk_idx, cu_seqlens_of(seqlens, kernel_device()), sum(seqlens))
    step = index.chunks if range_chunks is None else range_chunks
    parts = module.parts_of(index, 3, part_tokens, range_chunks)
    lists = lists_of(topk_idx, seqlens)
    assert parts.shape[0] == -(-index.chunks // step)
    for number, head in itertools.product(range(parts.shape[0]), range(3)):
        first_token = number * step * index.chunk_tokens
        tokens = range(first_token, first_token + step * index.chunk_tokens)
        wanted = {
            block: -(-sum(entry // 4 in tokens for entry in entries) // part_tokens)
            for (h, block), entries in lists.items()
            if h == head
        }
        found = Counter(parts[number, head].tolist())
        idle = found.pop(-1, 0)
        assert found == +Counter(wanted)
        assert idle == parts.shape[2] - sum(found.values())
