"""Native Sparse Attention of one rank's tokens to those of all ranks, with gradients.

In order: the windows that start in this rank's pieces; gathers of all windows, then of all keys and
values; meanwhile compressed attention and block selection, which need windows alone; then the other
branches, which meet forced blocks once where those of whole sequences do. The backward pass gathers
both again. With gates, deltas are computed meanwhile, and windows come last: their gradients while
those of keys and values are summed over the ranks, and added to the queries', of which there is one
tensor at a time. Without, windows come first.

What is small goes in one exchange, as do its gradients: there is nothing to hide, and each exchange
costs the host. With gates all branches are then one op in each pass, as those of whole sequences.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsagen.core.branches import BRANCHES
from nsagen.distributed.gathering import (
    Gathering,
    RemoteTokens,
    are_small,
    start_together,
    sum_together,
)
from nsagen.distributed.shard import Shard, Windows
from nsagen.model.heads import KV, Heads
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.rope import Tables
from nsagen.ops._launch import key_of, on_kernels
from nsagen.ops.compressed_attention import (
    compressed_attention_backward,
    compressed_attention_forward,
)
from nsagen.ops.forced_blocks import selected_and_window
from nsagen.ops.gated_attention import (
    add_windows_gradient,
    branch_columns,
    branch_deltas,
    branches_backward,
    branches_forward,
    tokens_backward,
    windows_forward,
)
from nsagen.ops.gated_sum import gated_sum_forward
from nsagen.ops.selected_attention import selected_attention_backward, selected_attention_forward
from nsagen.ops.sliding_window_attention import (
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

    @property
    def sizes(self) -> tuple[int, ...]:
        """Of all branches, as their op takes them."""
        s = self.module.sparsity
        blocks = (s.block_size, s.topk, s.init_blocks, s.local_blocks)
        return s.kernel_size, s.kernel_stride, *blocks, s.window_size

    def start(self, joined: Sequence[Tensor]) -> bool:
        """Gather windows, if there are any, first, because they are needed first; then tokens.

        Returns:
            whether both go together.
        """
        together = self.of_windows is not None and are_small(joined)
        if together:
            start_together(self.gatherings, joined)
            return True
        if self.of_windows is not None:
            self.of_windows.start(joined[1])
        self.of_tokens.start(joined[0])
        return False

    @property
    def gatherings(self) -> list[Gathering]:
        """In the order of `_TOKENS_FIRST`."""
        return [self.of_tokens] if self.of_windows is None else [self.of_tokens, self.of_windows]

    def seen(self) -> tuple[Tensor, ...]:
        """Keys and values of tokens, and of windows."""
        return tuple(x for gathering in self.gatherings for x in gathering.wait())


class _Branches(torch.autograd.Function):
    """Output and lse of each branch that is on; with gates their gated sum.

    `tensors` are this rank's keys and values of the selected branch, those of the sliding one if
    it has its own, and windows if a branch needs them.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, q: Tensor, gate: Tensor | None, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        tokens, windows = call.parted(tensors)
        joined = [call.of_tokens.join(*tokens)]
        if call.of_windows is not None:
            joined.append(call.of_windows.join(*windows))
        ctx.call, ctx.together = call, call.start(joined)
        ctx.set_materialize_grads(False)
        if call.gated and ctx.together:
            k, v, ck, cv = call.seen()
            o, *made, topk_idx = branches_forward(
                *(q, k, v, ck, cv, gate, *call.windows, *call.sizes, *call.last, *call.keys)
            )
            ctx.save_for_backward(q, gate, topk_idx, *made[1::2], *made[::2], *joined)
            return (o,)
        topk_idx, found = _in_turn(call, q, len(tokens))
        outputs, lses = zip(*(found[name] for name in call.on), strict=True)
        ctx.save_for_backward(q, gate, topk_idx, *lses, *outputs, *joined)
        if call.gated:
            return (gated_sum_forward(*outputs, gate, call.last[1]),)
        ctx.mark_non_differentiable(*lses)
        return tuple(x for pair in zip(outputs, lses, strict=True) for x in pair)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor | None, ...]:
        call: _Call = ctx.call
        q, gate, topk_idx, *kept = ctx.saved_tensors
        many = len(call.on)
        lses, outputs, joined = kept[:many], kept[many : 2 * many], kept[2 * many :]
        call.start(joined)
        needed = dict(zip(_TOKENS_FIRST, call.parted(ctx.needs_input_grad[3:]), strict=True))
        found: _Gradients
        if call.gated:
            do, (o_compressed, o_selected, o_sliding) = gradients[0], outputs
            of_sum = branch_deltas(do, o_compressed, o_selected, o_sliding, gate, call.last[1])
            del o_compressed, o_selected, o_sliding, outputs, kept
            ctx.maybe_clear_saved_tensors()  # outputs are free, unless the graph is kept
            if ctx.together:
                dq, *made, dgate = branches_backward(
                    *(do, of_sum, q, *call.seen(), gate, *call.windows, *lses, topk_idx),
                    *(*call.sizes, *call.last, *call.keys),
                )
                sums = sum_together(call.gatherings, call.parted(made), [*needed.values()])
                return None, dq, dgate, *sums[0], *sums[1]
            columns, dgate = branch_columns(gate, of_sum)
            found, order = _OfSum(call, q, topk_idx, do, lses, columns), _TOKENS_FIRST
        else:
            branches = zip(gradients[::2], outputs, lses, strict=True)
            found = _OfBranches(call, q, topk_idx, dict(zip(call.on, branches, strict=True)))
            dgate, order = None, reversed(_TOKENS_FIRST)
        summed = {what: found.sums(what, needed[what]) for what in order}
        return None, found.dq, dgate, *summed["tokens"], *summed["windows"]


_TOKENS_FIRST = ("tokens", "windows")


def _in_turn(
    call: _Call, q: Tensor, count: int
) -> tuple[Tensor | None, dict[str, Sequence[Tensor]]]:
    """The chosen blocks, and (o, lse) of each branch: those of windows while tokens are gathered.

    Args:
        count: of tensors of tokens.
    """
    s, last, q_start = call.module.sparsity, call.last, call.keys[1]
    forced = (s.init_blocks, s.local_blocks)
    made: dict[str, Sequence[Tensor]] = {}
    topk_idx = None
    if call.of_windows is not None:
        ck, cv = call.of_windows.wait()
        sizes = (*call.windows, s.kernel_size, s.kernel_stride)
        if "selected" in call.on:
            selection = (s.block_size, s.topk, *forced)
            *found, topk_idx = windows_forward(q, ck, cv, *sizes, *selection, *last, q_start)
        else:
            found = compressed_attention_forward(q, ck, cv, *sizes, *last, q_start)
        made["compressed"] = found
        del ck, cv
    selected, sliding = pairs_of(call.of_tokens.wait())
    more = (*last, *call.keys)
    if topk_idx is not None and "sliding" in call.on and count == 2:
        sizes = (s.window_size, s.block_size, *forced)
        found = selected_and_window(q, *selected, topk_idx, call.ends, *sizes, *more)
        made["selected"], made["sliding"] = found[:2], found[2:]
    else:
        if topk_idx is not None:
            made["selected"] = selected_attention_forward(
                q, *selected, topk_idx, call.ends, s.block_size, *more
            )
        if "sliding" in call.on:
            made["sliding"] = sliding_window_attention_forward(
                q, *sliding, call.ends, s.window_size, *more
            )
    return topk_idx, made


@dataclass
class _Gradients:
    """The backward pass of the branches; dq is that of the passes so far."""

    call: _Call
    q: Tensor
    topk_idx: Tensor | None

    def __post_init__(self) -> None:
        self.dq: Tensor | None = None

    def sums(self, what: str, needed: Sequence[bool]) -> list[Tensor | None]:
        """Gradients of the keys and values of "tokens", or of "windows" if there are any: their
        sums over the ranks begin."""
        of_windows, on = self.call.of_windows, self.call.on
        if what == "tokens":
            return self.call.of_tokens.sum_gradients(self._of_all_tokens(), needed)
        if of_windows is None:
            return []
        seen = of_windows.wait()
        if "compressed" not in on:
            return [None for _ in needed]
        return of_windows.sum_gradients(self.of_windows(*seen), needed)

    def _of_all_tokens(self) -> Sequence[Tensor]:
        return self.of_tokens(self.call.of_tokens.wait())

    def of_tokens(self, tokens: Sequence[Tensor]) -> Sequence[Tensor]:
        """From the gathered keys and values."""
        raise NotImplementedError

    def of_windows(self, ck: Tensor, cv: Tensor) -> Sequence[Tensor]:
        raise NotImplementedError


@dataclass
class _OfSum(_Gradients):
    """From the gradient of the gated sum, of which `columns` has each branch's part."""

    do: Tensor
    lses: Sequence[Tensor]
    columns: Tensor

    def of_tokens(self, tokens: Sequence[Tensor]) -> Sequence[Tensor]:
        call, s, (k, v) = self.call, self.call.module.sparsity, tokens
        assert self.topk_idx is not None
        _, lse_selected, lse_sliding = self.lses
        inputs = (self.do, self.q, k, v, self.topk_idx, call.ends, lse_selected, lse_sliding)
        more = (self.columns, s.block_size, s.window_size, *call.last, *call.keys)
        self.dq, *found = tokens_backward(*inputs, *more)
        return found

    def of_windows(self, ck: Tensor, cv: Tensor) -> Sequence[Tensor]:
        call, s = self.call, self.call.module.sparsity
        assert self.dq is not None
        inputs = (self.do, self.q, ck, cv, *call.windows, self.lses[0], self.dq, self.columns)
        sizes = (s.kernel_size, s.kernel_stride)
        return add_windows_gradient(*inputs, *sizes, *call.last, call.keys[1])


@dataclass
class _OfBranches(_Gradients):
    """From the gradient of each branch's output, with that output and lse."""

    branches: dict[str, tuple[Tensor, Tensor, Tensor]]

    def of_windows(self, ck: Tensor, cv: Tensor) -> Sequence[Tensor]:
        call, s, (do, *made) = self.call, self.call.module.sparsity, self.branches["compressed"]
        sizes = (s.kernel_size, s.kernel_stride)
        dq, *found = compressed_attention_backward(
            do, self.q, ck, cv, *call.windows, *made, *sizes, *call.last, call.keys[1]
        )
        self._add(dq)
        return found

    def of_tokens(self, tokens: Sequence[Tensor]) -> Sequence[Tensor]:
        call, s, more = self.call, self.call.module.sparsity, (*self.call.last, *self.call.keys)
        selected, sliding = pairs_of(tokens)
        found: list[Tensor] = []
        if "selected" in call.on:
            do, *made = self.branches["selected"]
            dq, *found = selected_attention_backward(
                do, self.q, *selected, self.topk_idx, call.ends, *made, s.block_size, *more
            )
            self._add(dq)
        if "sliding" in call.on:
            do, *made = self.branches["sliding"]
            dq, *near = sliding_window_attention_backward(
                do, self.q, *sliding, call.ends, *made, s.window_size, *more
            )
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
