"""Selected attention of a part of each sequence's queries: chunked prefill."""

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.errors import InvalidInputError
from nsagen.ops import reference

from .inputs import Packed

BLOCK_SIZE = 8
X = Packed()  # sequences of 0, 5, 30 and 25 tokens
FIRST = (0, 3, 11, 25)  # the first query of each that the chunk has; the last has none left


def chunk() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """(rows of the chunk's queries among all, their cu_seqlens, the op's further arguments)."""
    begins = X.cu_seqlens.tolist()
    rows = [
        torch.arange(begin + first, end)
        for begin, first, end in zip(begins, FIRST, begins[1:], strict=False)
    ]
    ends = torch.tensor([0, *(len(part) for part in rows)]).cumsum(0).to(torch.int32)
    more = {"cu_seqlens_k": X.cu_seqlens, "q_start": torch.tensor(FIRST, dtype=torch.int32)}
    return torch.cat(rows), ends, more


def blocks() -> Tensor:
    random = torch.Generator().manual_seed(0)
    drawn = torch.rand((X.kv_heads, X.q.shape[0], 5), generator=random)
    return drawn.argsort(-1)[..., :3].to(torch.int32).contiguous()


def test_a_chunk_gives_the_rows_of_the_whole() -> None:
    rows, cu_seqlens, more = chunk()
    whole = reference.topk_sparse_attention(X.q, X.k, X.v, blocks(), BLOCK_SIZE, X.cu_seqlens)
    part = blocks()[:, rows].contiguous()
    for namespace in (reference, ops):
        o = namespace.topk_sparse_attention(
            X.q[rows], X.k, X.v, part, BLOCK_SIZE, cu_seqlens, **more
        )
        torch.testing.assert_close(o, whole[rows])


def test_the_custom_op_meets_its_contract() -> None:
    rows, cu_seqlens, more = chunk()
    part = blocks()[:, rows].contiguous()
    tensors = (x.clone().requires_grad_() for x in (X.q[rows], X.k, X.v))
    args = (*tensors, part, cu_seqlens, BLOCK_SIZE, 0.25, "", *more.values())
    torch.library.opcheck(torch.ops.nsagen.selected_attention_forward.default, args)


def test_more_keys_than_queries_need_their_offsets() -> None:
    rows, cu_seqlens, more = chunk()
    args = (X.q[rows], X.k, X.v, blocks()[:, rows].contiguous(), BLOCK_SIZE, cu_seqlens)
    with pytest.raises(InvalidInputError, match="or pass cu_seqlens_k"):
        ops.topk_sparse_attention(*args)
    with pytest.raises(
        InvalidInputError, match=r"cu_seqlens_k must have shape .* batch is cu_seqlens's"
    ):
        ops.topk_sparse_attention(*args, cu_seqlens_k=torch.tensor([0, 60], dtype=torch.int32))
    with pytest.raises(InvalidInputError, match="q_start"):
        ops.topk_sparse_attention(*args, **{**more, "q_start": more["q_start"][1:]})
