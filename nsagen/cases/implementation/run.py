"""What the cases of a foreign implementation share: inputs, calls and comparisons."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from nsagen.cases.base import THRESHOLDS, cu_seqlens_of, relative_error
from nsagen.cases.implementation.setting import Call, Contract, Setting

Row = dict[str, Any]
"""case, output, error, threshold, result (ok, failed, refused, skipped) and note."""

OUTPUTS = ("o", "dq", "dk", "dv")

ROW_FACTOR = 8
"""A single row may have this many times the relative error allowed for a whole output. The whole
alone would hide a few wrong rows among many."""


class Run:
    """What the cases share: inputs, calls of the function, and comparisons."""

    def __init__(
        self,
        function: Callable[..., Any],
        contract: Contract,
        op: str,
        setting: Setting,
        device: torch.device,
    ) -> None:
        self.function, self.contract, self.op = function, contract, op
        self.setting, self.device = setting, device
        self.random = torch.Generator().manual_seed(setting.seed)

    def normal(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.random)
        return x.to(self.device, getattr(torch, self.setting.dtype))

    def call(self, lengths: tuple[int, ...]) -> Call:
        """Random inputs of a packed batch of these lengths."""
        s, compressed = self.setting, self.op == "compressed_attention"
        windows = [max(0, (n - s.kernel_size) // s.kernel_stride + 1) for n in lengths]
        keys = tuple(windows) if compressed else lengths
        heads, tokens = s.kv_heads * s.gqa_ratio, sum(lengths)
        return Call(
            self.normal(tokens, heads, s.head_dim),
            self.normal(sum(keys), s.kv_heads, s.head_dim),
            self.normal(sum(keys), s.kv_heads, s.head_dim),
            cu_seqlens_of(lengths, self.device),
            cu_seqlens_of(keys, self.device),
            self.blocks(lengths).to(self.device),
            0.75 * s.head_dim**-0.5,  # not what a function would take by itself
        )

    def blocks(self, lengths: tuple[int, ...]) -> Tensor:
        """int32 [HK, N, topk]: the first, the nearest and random other blocks, then -1."""
        s = self.setting
        own = torch.cat([torch.arange(n) // s.block_size for n in (*lengths, 0)])[:, None]
        block = torch.arange(max(s.topk, -(-max(lengths) // s.block_size)))
        scores = torch.rand((s.kv_heads, len(own), len(block)), generator=self.random)
        forced = (block < s.init_blocks) | (block > own - s.local_blocks)
        scores = scores.masked_fill(forced, 2.0).masked_fill(block > own, -1.0)
        best = scores.topk(s.topk, dim=-1)
        past = 1 << 30
        picked = best.indices.masked_fill(best.values < 0, past).sort(-1).values
        return picked.masked_fill(picked == past, -1).to(torch.int32).contiguous()

    def output(self, call: Call) -> Tensor:
        """Only o."""
        found = self.contract.apply(self.function, call)
        return found[0] if isinstance(found, tuple) else found

    def gradients(self, call: Call, do: Tensor) -> list[Tensor]:
        """o, dq, dk and dv; only o where it has no gradient."""
        leaves = [x.detach().requires_grad_() for x in (call.q, call.k, call.v)]
        o = self.output(dataclasses.replace(call, q=leaves[0], k=leaves[1], v=leaves[2]))
        if not o.requires_grad:
            return [o]
        found = torch.autograd.grad(o, leaves, do.to(o.dtype), allow_unused=True)
        zeros = (torch.zeros_like(x) for x in leaves)
        return [
            o.detach(),
            *(zero if x is None else x for x, zero in zip(found, zeros, strict=True)),
        ]

    def expected(self, call: Call, do: Tensor) -> list[Tensor]:
        """The same, from the float64 reference."""
        leaves = [x.detach().double().requires_grad_() for x in (call.q, call.k, call.v)]
        wide = dataclasses.replace(call, q=leaves[0], k=leaves[1], v=leaves[2])
        o = self.contract.expect(wide)
        return [o.detach(), *torch.autograd.grad(o, leaves, do.double())]

    def compare(self, call: Call, do: Tensor | None = None, scale: float = 1.0) -> Iterator[Row]:
        """A row for o and each gradient."""
        do = self.normal(*call.q.shape[:2], call.v.shape[2]) * scale if do is None else do
        yield from self.rows(self.gradients(call, do), self.expected(call, do))

    def rows(self, found: list[Tensor], expected: list[Tensor]) -> Iterator[Row]:
        """A row for o and each gradient that was found, beside what is expected."""
        for name, x, wanted in zip(OUTPUTS, found, expected, strict=False):
            yield {"output": name} | self.compared(x, wanted)
        if len(found) == 1:
            note = "o does not require grad: the function is not differentiable in q, k and v"
            yield {"output": "dq, dk, dv", "result": "refused", "note": note}

    def compared(self, x: Tensor, wanted: Tensor, *, each_row: bool = True) -> Row:
        """The relative error of an output, and of its worst row beside rows of the usual size."""
        dtype = getattr(torch, self.setting.dtype)
        came, right = (x.dtype, tuple(x.shape)), (dtype, tuple(wanted.shape))
        if came != right:
            text = " of shape ".join(("{}", "{}"))
            return {"result": "failed", "note": f"{text.format(*came)}, not {text.format(*right)}"}
        error, threshold = relative_error(x, wanted), THRESHOLDS[dtype]
        row: Row = {"error": error, "threshold": threshold}
        if not error <= threshold:
            return row | {"result": "failed"}
        size = wanted.norm(dim=-1)
        if not each_row or not size.any():
            return row | {"result": "ok"}
        usual = size[size > size.max() / 1000].median()  # rows that see nothing are not
        off = (x.to(wanted) - wanted).norm(dim=-1) / size.maximum(usual)
        if off.max() > ROW_FACTOR * threshold:
            token, head = divmod(int(off.argmax()), off.shape[1])
            note = f"token {token}, head {head}: relative error {off.max():.1e}"
            return row | {"result": "failed", "note": note}
        return row | {"result": "ok"}


def said(name: str, right: bool, note: str) -> Row:
    return {"output": name, "result": "ok" if right else "failed", "note": "" if right else note}
