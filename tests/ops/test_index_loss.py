"""What the index's loss refuses."""

from __future__ import annotations

import pytest
import torch

from nsagen.core.errors import InvalidInputError
from nsagen.ops import index_loss


@pytest.mark.parametrize("warm_up", [False, True])
def test_a_chunk_of_a_sequence_is_refused_by_name(warm_up: bool) -> None:
    """Fewer queries than keys: with or without selected blocks."""
    q, k = torch.randn(6, 4, 16), torch.randn(10, 2, 16)
    index_q, index_k = torch.randn(6, 2, 16), torch.randn(10, 1, 16)
    topk_idx = None if warm_up else torch.zeros(2, 6, 1, dtype=torch.int32)
    ends = torch.tensor([0, 6], dtype=torch.int32)
    with pytest.raises(InvalidInputError, match=r"a chunk \(q_start, cu_seqlens_k\) has"):
        index_loss(q, k, index_q, index_k, topk_idx, ends, block_size=8)
