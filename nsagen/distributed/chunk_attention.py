"""What a rank's two chunks of queries compute of gathered keys and values, branch by branch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor

from nsagen.distributed.gathering import Gathering
from nsagen.distributed.shard import Chunk, Shard
from nsagen.model.heads import KV
from nsagen.model.nsa_ops import NSAOps
from nsagen.ops._launch import key_of
from nsagen.ops.block_selection import block_selection_forward
from nsagen.ops.compressed_attention import compressed_attention_forward
from nsagen.ops.selected_attention import selected_attention_forward
from nsagen.ops.sliding_window_attention import sliding_window_attention_forward


@dataclass(frozen=True)
class Call:
    """What a call needs beside its tensors."""

    module: NSAOps
    shard: Shard
    of_tokens: Gathering
    of_windows: Gathering | None

    @property
    def on(self) -> tuple[str, ...]:
        return self.module.sparsity.on

    @property
    def last(self) -> tuple[float, str]:
        return self.module.softmax_scale, key_of(self.module.dispatcher)

    def windows_of(self, chunk: Chunk) -> tuple[Tensor, Tensor, int, int]:
        s = self.module.sparsity
        assert self.of_windows is not None
        ends = self.of_windows.places.starts
        return chunk.cu_seqlens, ends, s.kernel_size, s.kernel_stride

    def blocks(self) -> tuple[int, int, int, int]:
        s = self.module.sparsity
        return s.block_size, s.topk, s.init_blocks, s.local_blocks

    def start(self, tokens: Sequence[Tensor], windows: Sequence[Tensor]) -> None:
        """Gather: the windows first, because they are needed first."""
        if self.of_windows is not None:
            self.of_windows.start(*windows)
        self.of_tokens.start(*tokens)


def attend_windows(
    call: Call, chunk: Chunk, q: Tensor, ck: Tensor, cv: Tensor, made: dict[str, Tensor]
) -> None:
    """What windows alone are needed for."""
    windows, last = call.windows_of(chunk), (*call.last, chunk.q_start)
    o, lse = compressed_attention_forward(q, ck, cv, *windows, *last)
    if "compressed" in call.on:
        made["o_compressed"], made["lse_compressed"] = o, lse
    if "selected" in call.on:
        blocks = block_selection_forward(q, ck, lse, *windows, *call.blocks(), *last)
        made["topk_idx"] = blocks


def attend_tokens(
    call: Call, chunk: Chunk, q: Tensor, tokens: Sequence[Tensor], made: dict[str, Tensor]
) -> None:
    s, ends = call.module.sparsity, call.shard.tokens.starts
    last, (selected, sliding) = (*call.last, ends, chunk.q_start), pairs_of(tokens)
    if "selected" in call.on:
        made["o_selected"], made["lse_selected"] = selected_attention_forward(
            q, *selected, made["topk_idx"], chunk.cu_seqlens, s.block_size, *last
        )
    if "sliding" in call.on:
        made["o_sliding"], made["lse_sliding"] = sliding_window_attention_forward(
            q, *sliding, chunk.cu_seqlens, s.window_size, *last
        )


def pairs_of(tokens: Sequence[Tensor]) -> tuple[KV, KV]:
    """Keys and values of the selected and of the sliding branch."""
    return KV(*tokens[:2]), KV(*tokens[-2:])


def total_of(parts: Iterable[list[Tensor]]) -> list[Tensor]:
    """The sums of each part's tensors."""
    total: list[Tensor] = []
    for part in parts:
        total = [a.add_(b) for a, b in zip(total, part, strict=True)] if total else part
    return total


def only(tensors: Sequence[Tensor], needed: Sequence[bool]) -> list[Tensor | None]:
    """The gradients that autograd asks for."""
    return [x if need else None for x, need in zip(tensors, needed, strict=False)]
