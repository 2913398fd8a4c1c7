"""Native Sparse Attention of one rank's tokens to those of all ranks, with gradients.

In order: the windows that start in this rank's pieces; gathers of all windows, then of all keys and
values; meanwhile compressed attention and block selection, which need windows alone; then the other
branches. The backward pass gathers both again. With gates, deltas are computed meanwhile, and
windows come last: their gradients while those of keys and values are summed over the ranks, and
added to the queries', of which there is one tensor at a time. Without, windows come first.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.distributed.gathering import Gathering, RemoteTokens
from nsagen.distributed.shard import Shard, Windows
from nsagen.model.heads import KV, Heads
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.rope import Tables
from nsagen.ops._launch import key_of, on_kernels
from nsagen.ops.block_selection import block_selection_forward
from nsagen.ops.compressed_attention import (
    add_compressed_gradient,
    compressed_attention_backward,
    compressed_attention_forward,
)
from nsagen.ops.gated_attention import branch_columns, branch_deltas
from nsagen.ops.gated_sum import gated_sum_forward
from nsagen.ops.selected_attention import selected_attention_backward, selected_attention_forward
from nsagen.ops.sliding_window_attention import (
    add_sliding_window_gradients,
    sliding_window_attention_backward,
    sliding_window_attention_forward,
)


def attend_sparsely(
    module: NSAOps, heads: Heads, gate: Tensor, shard: Shard, tables: Tables
) -> Tensor:
    """What the module's branches give for this rank's tokens.

    Args:
        module: with the parameters; heads, gate: of this rank's tokens.
        shard: where they are, and where the others.
        tables: of rope.

    Returns:
        [N, HQ * Dv].
    """
    s = module.sparsity
    q, selected, sliding = module.turned(heads, shard.positions, tables)
    own_window = () if sliding is selected else sliding
    of_tokens = Gathering(shard.tokens)
    tensors = of_tokens.enter(*selected, *own_window)
    of_windows = None
    if s.needs_windows:
        layout = shard.windows_for(**s.window_sizes)
        of_windows = Gathering(layout.places)
        windows = _new_windows(module, heads.compressed, shard, layout, tables)
        if "compressed" not in s.on:
            windows = KV(*(x.detach() for x in windows))
        tensors += of_windows.enter(*windows)
    gated, key = takes_gates(module, q, gate, *tensors), key_of(module.dispatcher)
    call = _Call(module, shard, of_tokens, of_windows, gated)
    found = _Branches.apply(call, q, gate if gated else None, *tensors)
    if gated:
        return found[0].flatten(1)
    outputs = dict(zip(s.on, found[::2], strict=True))
    some = found[0]  # read, without weight, in place of one that is off
    o_compressed, o_selected, o_sliding = (outputs.get(name, some) for name in BRANCHES)
    return gated_sum_forward(o_compressed, o_selected, o_sliding, gate, key).flatten(1)


def takes_gates(module: NSAOps, q: Tensor, gate: Tensor, *tensors: Tensor) -> bool:
    """Whether the branches' gradients take the gates, as in `nsagen.ops.gated_attention`: no branch
    has a gradient of its own then, and its output is free when they begin. For training on kernels
    where all branches read the same keys and values."""
    trains = torch.is_grad_enabled() and any(x.requires_grad for x in (q, gate, *tensors))
    shared = len(module.sparsity.on) == len(BRANCHES) and len(tensors) == 4
    return trains and shared and on_kernels(q)


def _new_windows(module: NSAOps, tokens: KV, shard: Shard, layout: Windows, tables: Tables) -> KV:
    """The windows that start in this rank's pieces, keys after rope; then spare rows."""
    read = KV(*RemoteTokens.apply(layout.halo, shard.tokens.group, *tokens))
    ck, cv = module.compress(read, layout.lengths.cu_seqlens, layout.lengths)
    return KV(module.rope(ck, layout.positions, tables), cv)


@dataclass(frozen=True)
class _Call:
    """What a call needs beside its tensors."""

    module: NSAOps
    shard: Shard
    of_tokens: Gathering
    of_windows: Gathering | None
    gated: bool

    @property
    def on(self) -> tuple[str, ...]:
        return self.module.sparsity.on

    @property
    def last(self) -> tuple[float, str]:
        return self.module.softmax_scale, key_of(self.module.dispatcher)

    @property
    def ends(self) -> Tensor:
        """The offsets of queries."""
        return self.shard.pieces.cu_seqlens

    @property
    def keys(self) -> tuple[Tensor, Tensor]:
        """The offsets of the tokens that each piece sees, and its first one's position."""
        return self.shard.tokens.starts, self.shard.pieces.q_start

    @property
    def windows(self) -> tuple[Tensor, Tensor]:
        """The offsets of queries, and of the windows that each piece sees."""
        assert self.of_windows is not None
        return self.ends, self.of_windows.places.starts

    def parted(self, values: Sequence[Any]) -> tuple[Sequence[Any], Sequence[Any]]:
        """Values for keys and values of tokens, and those for windows'."""
        count = len(values) - (0 if self.of_windows is None else 2)
        return values[:count], values[count:]

    def start(self, joined: Sequence[Tensor]) -> None:
        """Gather windows, if there are any, first, because they are needed first; then tokens."""
        if self.of_windows is not None:
            self.of_windows.start(joined[1])
        self.of_tokens.start(joined[0])


class _Branches(torch.autograd.Function):
    """Output and lse of each branch that is on; with gates their gated sum.

    `tensors` are this rank's keys and values of the selected branch, those of the sliding one if
    it has its own, and windows if a branch needs them.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, q: Tensor, gate: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        s, last, (starts, q_start) = call.module.sparsity, call.last, call.keys
        tokens, windows = call.parted(tensors)
        joined = [call.of_tokens.join(*tokens)]
        if call.of_windows is not None:
            joined.append(call.of_windows.join(*windows))
        call.start(joined)
        made: dict[str, tuple[Tensor, Tensor]] = {}
        topk_idx = None
        if call.of_windows is not None:
            ck, cv = call.of_windows.wait()
            sizes = (*call.windows, s.kernel_size, s.kernel_stride)
            made["compressed"] = compressed_attention_forward(q, ck, cv, *sizes, *last, q_start)
            if "selected" in call.on:
                _, lse = made["compressed"]
                blocks = (s.block_size, s.topk, s.init_blocks, s.local_blocks)
                topk_idx = block_selection_forward(q, ck, lse, *sizes, *blocks, *last, q_start)
            del ck, cv
        selected, sliding = pairs_of(call.of_tokens.wait())
        if topk_idx is not None:
            made["selected"] = selected_attention_forward(
                q, *selected, topk_idx, call.ends, s.block_size, *last, starts, q_start
            )
        if "sliding" in call.on:
            made["sliding"] = sliding_window_attention_forward(
                q, *sliding, call.ends, s.window_size, *last, starts, q_start
            )
        outputs, lses = zip(*(made[name] for name in call.on), strict=True)
        ctx.call = call
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(q, gate, topk_idx, *lses, *outputs, *joined)
        if call.gated:
            return (gated_sum_forward(*outputs, gate, last[1]),)
        ctx.mark_non_differentiable(*lses)
        return tuple(x for pair in zip(outputs, lses, strict=True) for x in pair)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        q, gate, topk_idx, *kept = ctx.saved_tensors
        many = len(call.on)
        lses, outputs, joined = kept[:many], kept[many : 2 * many], kept[2 * many :]
        call.start(joined)
        dgate, dos, columns, deltas = None, gradients[::2], [None] * many, [None] * many
        if call.gated:
            (do,), (o_compressed, o_selected, o_sliding) = gradients, outputs
            of_sum = branch_deltas(do, o_compressed, o_selected, o_sliding, gate, call.last[1])
            del o_compressed, o_selected, o_sliding
            dos, outputs, kept = [do] * many, [None] * many, None
            ctx.maybe_clear_saved_tensors()  # outputs are free, unless the graph is kept
            made, dgate = branch_columns(gate, of_sum)
            columns, deltas = (parts := made.unbind(0))[:many], parts[many:]
        each = zip(dos, outputs, lses, deltas, columns, strict=True)
        found = _Gradients(call, q, topk_idx, dict(zip(call.on, each, strict=True)))
        needed = dict(
            zip(("tokens", "windows"), call.parted(ctx.needs_input_grad[3:]), strict=True)
        )
        sums = {"tokens": found.sum_tokens, "windows": found.sum_windows}
        order = ("tokens", "windows") if call.gated else ("windows", "tokens")
        summed = {what: sums[what](needed[what]) for what in order}
        return None, found.dq, dgate, *summed["tokens"], *summed["windows"]


@dataclass
class _Gradients:
    """The backward pass of the branches.

    Attributes:
        branches: for each that is on, its output's gradient, its output and lse; with gates the
            sum's gradient, None and lse, then delta and the gate.
        dq: of the passes so far.
    """

    call: _Call
    q: Tensor
    topk_idx: Tensor | None
    branches: dict[str, tuple[Any, ...]]
    dq: Tensor | None = None

    def sum_tokens(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the tokens' keys and values, whose sums over the ranks begin."""
        seen = self.call.of_tokens.wait()
        found = self._of_tokens(seen)
        del seen
        return self.call.of_tokens.sum_gradients(found, needed)

    def sum_windows(self, needed: Sequence[bool]) -> list[Tensor | None]:
        """Those of the windows', if there are any."""
        of_windows, on = self.call.of_windows, self.call.on
        if of_windows is None:
            return []
        seen = of_windows.wait()
        if "compressed" not in on:
            return [None for _ in needed]
        return of_windows.sum_gradients(self._of_windows(*seen), needed)

    def _of_windows(self, ck: Tensor, cv: Tensor) -> list[Tensor]:
        call, s = self.call, self.call.module.sparsity
        do, o, lse, *gates = self.branches["compressed"]
        inputs = (do, self.q, ck, cv, *call.windows, o, lse)
        more = (s.kernel_size, s.kernel_stride, *call.last, call.keys[1])
        if call.gated:
            return [*add_compressed_gradient(*inputs, self.dq, *more, *gates)]
        dq, *found = compressed_attention_backward(*inputs, *more)
        self._add(dq)
        return found

    def _of_tokens(self, tokens: Sequence[Tensor]) -> list[Tensor]:
        call, s = self.call, self.call.module.sparsity
        selected, sliding = pairs_of(tokens)
        found: list[Tensor] = []
        if "selected" in call.on:
            do, o, lse, *gates = self.branches["selected"]
            dq, *found = selected_attention_backward(
                *(do, self.q, *selected, self.topk_idx, call.ends, o, lse, s.block_size),
                *(*call.last, *call.keys, *gates),
            )
            self._add(dq)
        if "sliding" in call.on:
            do, o, lse, *gates = self.branches["sliding"]
            inputs, more = (do, self.q, *sliding, call.ends, o, lse), (*call.last, *call.keys)
            if call.gated:
                window = (self.dq, *found, s.window_size)
                add_sliding_window_gradients(*inputs, *window, *more, *gates)
                return found
            dq, *near = sliding_window_attention_backward(*inputs, s.window_size, *more)
            self._add(dq)
            if len(tokens) > 2:
                return [*(found or map(torch.zeros_like, tokens[:2])), *near]
            found = [a.add_(b) for a, b in zip(found, near, strict=True)] if found else near
        return found or [torch.zeros_like(x) for x in tokens]

    def _add(self, dq: Tensor) -> None:
        self.dq = dq if self.dq is None else self.dq.add_(dq)


def pairs_of(tokens: Sequence[Tensor]) -> tuple[KV, KV]:
    """Keys and values of the selected and of the sliding branch."""
    return KV(*tokens[:2]), KV(*tokens[-2:])
