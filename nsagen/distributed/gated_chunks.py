"""Training on kernels where all branches read the same keys and values.

As in `nsagen.ops.gated_attention`: the sum's gradient hands each branch the output's own gradient
and a column of delta, the branches' outputs are free by then, and no branch has a gradient of its
own. So a rank needs its share of what one process needs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.distributed.chunk_attention import Call, attend_tokens, attend_windows, only, total_of
from nsagen.distributed.shard import Chunk
from nsagen.model.heads import KV
from nsagen.ops._launch import on_kernels
from nsagen.ops.compressed_attention import compressed_attention_backward
from nsagen.ops.gated_attention import branch_columns, sum_branches
from nsagen.ops.selected_attention import selected_attention_backward
from nsagen.ops.sliding_window_attention import add_sliding_window_gradients


def takes_gated_branches(call: Call, q: Tensor, gate: Tensor, *tensors: Tensor) -> bool:
    """Whether `attend_gated` takes a call: tensors are keys and values of tokens, then of
    windows."""
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, gate, *tensors))
    shared = len(call.on) == len(BRANCHES) and len(tensors) == 4
    return trains and shared and on_kernels(q)


def attend_gated(call: Call, q: Tensor, gate: Tensor, tokens: KV, windows: KV) -> Tensor:
    """The gated sum of the branches: [N, HQ, Dv]."""
    found = _Branches.apply(call, q, gate, *tokens, *windows)
    each, sums = 2 * len(BRANCHES), []
    for i, chunk in enumerate(call.shard.chunks):
        made: Any = (*found[i * each : (i + 1) * each], gate[chunk.rows], call.last[1])
        sums.append(sum_branches(*made))
    return torch.cat(sums)


class _Branches(torch.autograd.Function):
    """For each chunk, output and lse of each branch; the gradients are those of `sum_branches`."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, q: Tensor, gate: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        tokens, windows = tensors[:2], tensors[2:]
        call.start(tokens, windows)
        chunks = call.shard.chunks
        made: list[dict[str, Tensor]] = [{} for _ in chunks]
        assert call.of_windows is not None
        ck, cv = call.of_windows.wait()
        for chunk, one in zip(chunks, made, strict=True):
            attend_windows(call, chunk, q[chunk.rows], ck, cv, one)
        del ck, cv
        k, v = call.of_tokens.wait()
        for chunk, one in zip(chunks, made, strict=True):
            attend_tokens(call, chunk, q[chunk.rows], (k, v), one)
        kept = [one[name] for one in made for name in _KEPT]
        ctx.call = call
        ctx.save_for_backward(q, gate, *tensors, *kept)
        return tuple(one[f"{what}_{name}"] for one in made for name in BRANCHES for what in _EACH)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        call: Call = ctx.call
        q, gate, k, v, ck, cv, *kept = ctx.saved_tensors
        call.start((k, v), (ck, cv))
        each, many = 2 * len(BRANCHES), len(_KEPT)
        parts = [
            _Part(
                *(call, chunk, q[chunk.rows], gate[chunk.rows]),
                dict(zip(_KEPT, kept[i * many : (i + 1) * many], strict=True)),
                gradients[i * each : (i + 1) * each],
            )
            for i, chunk in enumerate(call.shard.chunks)
        ]
        needed = ctx.needs_input_grad[3:]
        assert call.of_windows is not None
        all_windows = call.of_windows.wait()
        found = total_of(part.windows_backward(*all_windows) for part in parts)
        del all_windows
        of_windows = call.of_windows.sum_gradients(*only(found, needed[2:]))
        all_tokens = call.of_tokens.wait()
        found = total_of(part.tokens_backward(*all_tokens) for part in parts)
        del all_tokens
        of_tokens = call.of_tokens.sum_gradients(*only(found, needed[:2]))
        dq, dgate = (torch.cat([getattr(part, name) for part in parts]) for name in ("dq", "dgate"))
        return None, dq, dgate, *of_tokens, *of_windows


_EACH = ("o", "lse")
_KEPT = (*(f"lse_{name}" for name in BRANCHES), "topk_idx")


class _Part:
    """The backward pass of one chunk."""

    def __init__(
        self,
        call: Call,
        chunk: Chunk,
        q: Tensor,
        gate: Tensor,
        kept: dict[str, Tensor],
        gradients: tuple[Tensor, ...],
    ) -> None:
        self.call, self.chunk, self.q, self.kept = call, chunk, q, kept
        self.do, *_ = gradients
        columns, self.dgate = branch_columns(gate, *gradients[1::2])
        self.gates = dict(zip(BRANCHES, columns[:3], strict=True))
        self.deltas = dict(zip(BRANCHES, columns[3:], strict=True))

    def windows_backward(self, ck: Tensor, cv: Tensor) -> list[Tensor]:
        """Gradients of all windows' keys and values."""
        cu_seqlens, ends, *sizes = self.call.windows_of(self.chunk)
        self.dq, dck, dcv = compressed_attention_backward(
            *(self.do, self.q, ck, cv, cu_seqlens, ends, None, self.kept["lse_compressed"]),
            *(*sizes, *self.call.last, self.chunk.q_start),
            *(self.deltas["compressed"], self.gates["compressed"]),
        )
        return [dck, dcv]

    def tokens_backward(self, k: Tensor, v: Tensor) -> list[Tensor]:
        """Gradients of all tokens' keys and values."""
        s, inputs = self.call.module.sparsity, (self.do, self.q, k, v)
        cu_seqlens, chunk = self.chunk.cu_seqlens, self.chunk
        last = (*self.call.last, self.call.shard.tokens.starts, chunk.q_start)
        dq, dk, dv = selected_attention_backward(
            *(*inputs, self.kept["topk_idx"], cu_seqlens, None, self.kept["lse_selected"]),
            *(s.block_size, *last, self.deltas["selected"], self.gates["selected"]),
        )
        add_sliding_window_gradients(
            *(*inputs, cu_seqlens, None, self.kept["lse_sliding"], dq, dk, dv),
            *(s.window_size, *last, self.deltas["sliding"], self.gates["sliding"]),
        )
        self.dq += dq
        return [dk, dv]
