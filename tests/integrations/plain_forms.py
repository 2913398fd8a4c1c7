"""InfLLM-V2 and MoBA from their formulas: one query, one head, sets of tokens.

`plain` registers an attention function of Transformers for one whole sequence, so that a model
with it is the oracle of the same model with nsagen's.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import AttentionInterface

INFLLM = {
    "form": "infllm_v2",
    "kernel_size": 8,
    "kernel_stride": 4,
    "block_size": 16,
    "topk": 4,
    "init_blocks": 1,
    "local_blocks": 2,
    "dense_len": 0,
}
MOBA = {"form": "moba", "block_size": 16, "topk": 3}


def as_it_is(x: Tensor) -> Tensor:
    """What a cache of the model's dtype gives back."""
    return x


def blocks_seen(
    q: Tensor, k: Tensor, t: int, scale: float, form: dict[str, Any], kept: Any = as_it_is
) -> set[int]:
    """Of the query at position t: q [G, D] of the heads that select together, k [T, D]."""
    size = form["block_size"]
    infllm = form["form"] == "infllm_v2"
    length = form["kernel_size"] if infllm else size
    stride = form["kernel_stride"] if infllm else size
    init, local = (form["init_blocks"], form["local_blocks"]) if infllm else (0, 1)
    starts = range(0, t + 2 - length, stride)
    own = t // size
    scores = [0.0 if infllm else float("-inf")] * (own + 1)
    if starts:
        means = kept(torch.stack([k[i : i + length].mean(0) for i in starts]))
        products = q @ means.T
        values = (products * scale).softmax(-1) if infllm else products
        for i, value in zip(starts, values.sum(0).tolist(), strict=True):
            for block in {u // size for u in range(i, i + length)} & set(range(own + 1)):
                scores[block] = max(scores[block], value)
    forced = {j for j in range(own + 1) if j < init or j > own - local}
    free = sorted(set(range(own + 1)) - forced, key=lambda j: (-scores[j], j))
    return forced | set(free[: form["topk"] - len(forced)])


def plain_mask(
    q: Tensor, k: Tensor, scale: float, form: dict[str, Any], dense: Any, kept: Any = as_it_is
) -> Tensor:
    """bool [HQ, T, T] of one sequence, q [HQ, T, D] and k [HK, T, D]; `dense(t)` sees all."""
    heads, tokens = q.shape[:2]
    group = heads // k.shape[0]
    together = group if form["form"] == "infllm_v2" else 1
    mask = torch.zeros(heads, tokens, tokens, dtype=torch.bool)
    for t in range(tokens):
        for first in range(0, heads, together):
            rows = slice(first, first + together)
            if dense(t):
                mask[rows, t, : t + 1] = True
                continue
            for block in blocks_seen(q[rows, t], k[first // group], t, scale, form, kept):
                start = block * form["block_size"]
                mask[rows, t, start : min(start + form["block_size"], t + 1)] = True
    return mask


@contextmanager
def plain(
    model: Any, form: dict[str, Any], dense: Any = lambda t: False, kept: Any = as_it_is
) -> Iterator[Any]:
    """The model with plain attention: for one sequence without a cache, all at once.

    Args:
        kept: what a cache gives back of keys, values and windows.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **kwargs: Any
    ) -> tuple[Tensor, None]:
        q, k, v = query[0], kept(key[0]), kept(value[0])
        scale = kwargs["scaling"]
        window, places = getattr(module, "sliding_window", None), torch.arange(q.shape[1])
        if window:
            ahead = places[:, None] - places
            seen = ((ahead >= 0) & (ahead < window)).expand(q.shape[0], -1, -1)
        else:
            seen = plain_mask(q.detach(), k.detach(), scale, form, dense, kept)
        group = q.shape[0] // k.shape[0]
        scores = q @ k.repeat_interleave(group, 0).transpose(1, 2) * scale
        weights = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        return (weights @ v.repeat_interleave(group, 0)).transpose(0, 1)[None], None

    AttentionInterface.register("plain_form", attention)
    before = model.config._attn_implementation
    model.set_attn_implementation("plain_form")
    try:
        yield model
    finally:
        model.set_attn_implementation(before)


def distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()
