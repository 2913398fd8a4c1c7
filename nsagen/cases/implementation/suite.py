"""The cases that a foreign implementation is put through, each a generator of rows."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from nsagen.cases.block_selection import expected_blocks
from nsagen.cases.implementation.run import OUTPUTS, Row, Run, said
from nsagen.cases.implementation.setting import contract_of
from nsagen.cases.selected_attention import in_any_order
from nsagen.ops import reference
from nsagen.ops.reference.block_selection import BlockRule


class NotHere(Exception):
    """A case that this machine cannot run."""


def _one_sequence(run: Run) -> Iterator[Row]:
    yield from run.compare(run.call((run.setting.long,)))


def _short_tails(run: Run) -> Iterator[Row]:
    s = run.setting
    lengths = (1, s.kernel_size - 1, s.block_size + 1, s.block_size, 2 * s.block_size - 1)
    yield from run.compare(run.call(lengths))


def _empty_sequences(run: Run) -> Iterator[Row]:
    yield from run.compare(run.call((0, run.setting.block_size + 7, 0, 0, 3, 0)))


def _empty_rows(run: Run) -> Iterator[Row]:
    """Rows that see nothing are 0 and leave gradients finite."""
    call = run.call((run.setting.block_size * 3,))
    if run.op == "topk_sparse_attention":
        call.topk_idx[:, ::3] = -1
    elif run.op == "sliding_window_attention":
        raise NotHere("each token sees itself")
    yield from run.compare(call)


def _any_order(run: Run) -> Iterator[Row]:
    """Blocks are a set: any order, repeats, -1 anywhere, numbers that name no block."""
    if run.op != "topk_sparse_attention":
        raise NotHere("takes no blocks")
    call = run.call((run.setting.long, run.setting.block_size + 1))
    topk_idx = in_any_order(call.topk_idx, run.setting.seed)
    yield from run.compare(dataclasses.replace(call, topk_idx=topk_idx))


def _selection(run: Run) -> Iterator[Row]:
    """The blocks have the best scores, including forced ones, ascending, then -1."""
    if run.op != "compressed_attention":
        raise NotHere("selects no blocks")
    s = run.setting
    call = run.call((s.long, s.block_size + 1, 0, 5))
    _, lse = reference.compressed_attention_forward(
        call.q.double(),
        call.k.double(),
        call.v.double(),
        call.cu_seqlens,
        call.key_cu_seqlens,
        kernel_size=s.kernel_size,
        kernel_stride=s.kernel_stride,
        softmax_scale=call.scale,
    )
    offsets = (call.cu_seqlens, call.key_cu_seqlens)
    forced = (s.init_blocks, s.local_blocks)
    for first, last in dict.fromkeys((forced, forced[::-1])):
        contract = contract_of(run.op, dataclasses.replace(s, init_blocks=first, local_blocks=last))
        _, came = contract.apply(run.function, call)
        rule = BlockRule(s.kernel_size, s.kernel_stride, s.block_size, s.topk, first, last)
        wanted = expected_blocks(
            rule, call.q, call.k, lse, *offsets, came.to(torch.int32), call.scale
        )
        rows = (came != wanted).any(-1).sum().item() if came.shape == wanted.shape else -1
        note = f"{rows} rows differ from the best blocks"
        yield said(f"topk_idx, {first} first and {last} last", rows == 0, note)


def _poisoned(run: Run) -> Iterator[Row]:
    """Everything around the inputs is NaN, and so is the other sequence: neither reaches a row."""
    call = run.call((run.setting.block_size + 9, run.setting.block_size * 2))

    def inside(x: Tensor) -> Tensor:
        buffer = x.new_full((x.shape[0] + 64, *x.shape[1:]), float("nan"))
        buffer[32 : 32 + len(x)] = x
        return buffer[32 : 32 + len(x)]

    wrapped = dataclasses.replace(call, q=inside(call.q), k=inside(call.k), v=inside(call.v))
    with _empty_is_nan():
        rows = list(run.compare(wrapped))
    for row in rows:
        yield row | {"output": f"{row['output']} between NaN"}
    end, key_end = int(call.cu_seqlens[1]), int(call.key_cu_seqlens[1])
    alone = run.output(call)[:end].clone()
    for x, rows in ((call.q, end), (call.k, key_end), (call.v, key_end)):
        x[rows:] = float("nan")
    same = torch.equal(run.output(call)[:end], alone)
    yield said("o beside NaN", same, "a sequence of NaN changes another one")


@contextmanager
def _empty_is_nan() -> Iterator[None]:
    """Within it, PyTorch fills memory that a function allocates without a value with NaN.

    That is torch.utils.deterministic.fill_uninitialized_memory, which is on by default.
    """
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        torch.use_deterministic_algorithms(True, warn_only=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


def _inputs_are_left_alone(run: Run) -> Iterator[Row]:
    call = run.call((run.setting.long,))
    tensors = {name: x for name, x in vars(call).items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}
    run.gradients(call, run.normal(*call.q.shape))
    changed = [name for name, x in tensors.items() if not torch.equal(x, before[name])]
    yield said("inputs", not changed, f"changed: {', '.join(changed)}")


def _determinism(run: Run) -> Iterator[Row]:
    call = run.call((run.setting.long, run.setting.block_size + 1))
    do = run.normal(*call.q.shape)
    first, second = run.gradients(call, do), run.gradients(call, do)
    for name, x, y in zip(OUTPUTS, first, second, strict=False):
        yield said(name, torch.equal(x, y), "two calls give different bits")


def _strides(run: Run) -> Iterator[Row]:
    """Heads outside tokens, as a transposed projection leaves them."""
    call = run.call((run.setting.long,))

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    q, k, v = (turned(x) for x in (call.q, call.k, call.v))
    yield from run.compare(dataclasses.replace(call, q=q, k=k, v=v))


def _far_strides(run: Run) -> Iterator[Row]:
    """Tokens whose last ones lie past 2^31 elements, in memory that is only partly written."""
    if run.device.type != "cuda" or torch.cuda.mem_get_info(run.device)[0] < 20 << 30:
        raise NotHere("needs a GPU with 20 GiB free")
    call = run.call((run.setting.block_size * 3 + 5,))

    def far(x: Tensor) -> Tensor:
        stride = (((1 << 31) // (len(x) - 2)) + 8) // 8 * 8
        buffer = torch.empty(stride * len(x), dtype=x.dtype, device=x.device)
        view = buffer.as_strided(x.shape, (stride, x.shape[2], 1))
        view.copy_(x)
        return view

    do = run.normal(*call.q.shape)
    expected = run.expected(call, do)
    for name in ("q", "k", "v"):
        moved = dataclasses.replace(call, **{name: far(getattr(call, name))})
        for row in run.rows(run.gradients(moved, do), expected):
            yield row | {"output": f"{row['output']}, far {name}"}


def _equal_scores(run: Run) -> Iterator[Row]:
    call = run.call((run.setting.long,))
    yield from run.compare(dataclasses.replace(call, k=torch.zeros_like(call.k)))


def _huge_scores(run: Run) -> Iterator[Row]:
    """Scores of 1e4 and more, whose softmax is one key."""
    call = run.call((run.setting.long,))
    wide = dataclasses.replace(call, q=call.q * 60, k=call.k * 60)
    wanted = run.contract.expect(
        dataclasses.replace(wide, q=wide.q.double(), k=wide.k.double(), v=wide.v.double())
    )
    # A score that float32 rounds may move a whole row, so only all rows together are compared.
    yield {"output": "o"} | run.compared(run.output(wide), wanted, each_row=False)


def _offset_keys(run: Run) -> Iterator[Row]:
    """A channel of the keys with a bias, and large gradients: sums of float16 must not overflow."""
    call = run.call((run.setting.long,))
    call.q[..., 0], call.k[..., 0] = 0.5, -60.0
    do = run.normal(*call.q.shape) * 300
    found, expected = run.gradients(call, do), run.expected(call, do)
    for name, x, wanted in zip(OUTPUTS, found, expected, strict=False):
        fits = wanted.abs().max() < torch.finfo(x.dtype).max
        finite = bool(x.isfinite().all()) or not fits
        yield said(name, finite, f"not finite, where the largest value is {wanted.abs().max():.0f}")


def _replay(run: Run) -> Iterator[Row]:
    """A captured CUDA graph, replayed with new inputs, gives the same bits as an eager call."""
    if run.device.type != "cuda":
        raise NotHere("needs a GPU")
    first, second = (run.call((run.setting.long,)) for _ in range(2))
    wanted = run.output(second).clone()
    run.output(first)
    torch.cuda.synchronize(run.device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.Stream(run.device)):
        o = run.output(first)
    for name in ("q", "k", "v", "topk_idx"):
        getattr(first, name).copy_(getattr(second, name))
    graph.replay()
    torch.cuda.synchronize(run.device)
    yield said("o", torch.equal(o, wanted), "a replayed graph differs from an eager call")


CASES: dict[str, Callable[[Run], Iterator[Row]]] = {
    "one sequence": _one_sequence,
    "short tails": _short_tails,
    "empty sequences": _empty_sequences,
    "rows that see nothing": _empty_rows,
    "blocks in any order": _any_order,
    "the best blocks": _selection,
    "poisoned memory": _poisoned,
    "inputs left alone": _inputs_are_left_alone,
    "same bits twice": _determinism,
    "heads outside tokens": _strides,
    "strides past 2^31": _far_strides,
    "equal scores": _equal_scores,
    "huge scores": _huge_scores,
    "offset keys, large gradients": _offset_keys,
    "replayed CUDA graph": _replay,
}
