"""Runs a foreign implementation of an op through the cases that nsagen's own kernels must pass.

`nsagen verify --implementation module:function --op OP` calls a function with the public
signature of one of these ops, and compares its results, gradients and behaviour with the float64
reference:

    topk_sparse_attention(q, k, v, topk_idx, block_size, cu_seqlens, softmax_scale) -> o
    sliding_window_attention(q, k, v, window_size, cu_seqlens, softmax_scale) -> o
    compressed_attention(q, k, v, kernel_size, kernel_stride, block_size, topk, cu_seqlens_q,
        cu_seqlens_k, max_seqlen_q, max_seqlen_k, sm_scale, init_blocks, local_blocks)
        -> (o, topk_idx)
"""

from __future__ import annotations

import dataclasses
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nsagen.cases.base import THRESHOLDS, cu_seqlens_of, relative_error
from nsagen.cases.block_selection import expected_blocks
from nsagen.cases.selected_attention import in_any_order
from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import DTYPES
from nsagen.ops import reference
from nsagen.ops.reference.block_selection import BlockRule

Row = dict[str, Any]
"""case, output, error, threshold, result (ok, failed, refused, skipped) and note."""

OUTPUTS = ("o", "dq", "dk", "dv")

ROW_FACTOR = 8
"""A row may have this many times the relative error that an output may have as a whole, in which a
few wrong rows among many would not show."""

OPS = ("topk_sparse_attention", "sliding_window_attention", "compressed_attention")


@dataclass(frozen=True)
class Setting:
    """The sizes shared by all cases of a run.

    Attributes:
        gqa_ratio: query heads per key/value head; kv_heads: key/value heads.
        window_size: tokens that the sliding window sees, the query's own included.
        topk: blocks per token, with init_blocks at the start and local_blocks up to its own.
    """

    dtype: str = "bfloat16"
    head_dim: int = 128
    gqa_ratio: int = 16
    kv_heads: int = 2
    block_size: int = 64
    topk: int = 16
    kernel_size: int = 32
    kernel_stride: int = 16
    window_size: int = 512
    init_blocks: int = 1
    local_blocks: int = 2
    seed: int = 0

    @property
    def long(self) -> int:
        """A length with more blocks than topk, past the window, that ends within a block."""
        return max(self.block_size * (self.topk + 2), self.window_size + self.block_size) + 5


@dataclass(frozen=True)
class Call:
    """Tensors of one call: q [N, HQ, D], k and v [T, HK, D], offsets, and blocks if needed."""

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens: Tensor
    key_cu_seqlens: Tensor
    topk_idx: Tensor
    scale: float


@dataclass(frozen=True)
class Contract:
    """How an op is called and what it should give.

    Attributes:
        apply: (function, call) -> o, or (o, topk_idx).
        expect: call -> o, differentiable.
    """

    apply: Callable[[Callable[..., Any], Call], Any]
    expect: Callable[[Call], Tensor]


def load_implementation(text: str) -> Callable[..., Any]:
    """The function that `module:function` names.

    Raises:
        InvalidInputError: the module or function does not exist; the text says which.
    """
    module_name, _, name = text.partition(":")
    rule = f"verify: --implementation must be module:function that can be imported; got {text!r}"
    try:
        function = importlib.import_module(module_name)
        for part in name.split("."):
            function = getattr(function, part)
    except (Exception, SystemExit) as error:  # a module may raise anything, or end the program
        remedy = "put its folder on PYTHONPATH, or write an adapter"
        said = f"{type(error).__name__}: {error}"
        raise InvalidInputError(f"{rule}: {said}; {remedy}") from error
    if not callable(function):
        raise InvalidInputError(f"{rule}, which is no function; name one")
    return function


def setting_of(texts: Sequence[str], seed: int) -> Setting:
    """The usual sizes with some changed, `NAME=VALUE` each.

    Raises:
        InvalidInputError: an unknown size, or an invalid value.
    """
    kinds = {field.name: type(field.default) for field in dataclasses.fields(Setting)}
    changed: dict[str, Any] = {"seed": seed}
    for text in texts:
        name, _, value = text.partition("=")
        if name not in kinds or (kinds[name] is int and not value.isdigit()):
            raise InvalidInputError(
                f"verify: --size must be NAME=VALUE of {', '.join(kinds)}; got {text!r}; "
                "values are whole numbers, and a dtype's name"
            )
        changed[name] = kinds[name](value)
    if changed.get("dtype", "float16") not in DTYPES:
        raise InvalidInputError(
            f"verify: dtype must be one of {', '.join(DTYPES)}; got {changed['dtype']!r}; "
            "choose one"
        )
    return Setting(**changed)


def default_device() -> torch.device:
    """The current GPU, or a CPU without one."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def verify_implementation(
    function: Callable[..., Any], op: str, setting: Setting, device: torch.device | str
) -> Iterator[Row]:
    """A row for each output of each case, as the cases finish.

    A case that the function answers with an exception is `refused`, which is honest but not `ok`.
    """
    if op not in OPS:
        raise InvalidInputError(
            f"verify: --op must name the implementation's contract, one of {', '.join(OPS)}; "
            f"got {op or 'nothing'}; add --op (compressed_attention for block selection)"
        )
    contract = _contract(op, setting)
    for name, case in _CASES.items():
        row: Row = {"case": name, "output": "", "error": None, "threshold": None, "note": ""}
        try:
            for found in case(_Run(function, contract, op, setting, torch.device(device))):
                yield row | found
        except _NotHere as reason:
            yield row | {"result": "skipped", "note": str(reason)}
        except Exception as error:  # any exception of a foreign function is its answer
            text = (str(error).strip() or "no message").splitlines()[0]
            yield row | {"result": "refused", "note": f"{type(error).__name__}: {text}"}


class _NotHere(Exception):
    """A case that this machine cannot run."""


def _contract(op: str, s: Setting) -> Contract:
    windows = (s.kernel_size, s.kernel_stride)
    if op == "sliding_window_attention":
        return Contract(
            lambda f, c: f(c.q, c.k, c.v, s.window_size, c.cu_seqlens, c.scale),
            lambda c: reference.sliding_window_attention(
                c.q, c.k, c.v, s.window_size, c.cu_seqlens, c.scale
            ),
        )
    if op == "topk_sparse_attention":
        return Contract(
            lambda f, c: f(c.q, c.k, c.v, c.topk_idx, s.block_size, c.cu_seqlens, c.scale),
            lambda c: reference.topk_sparse_attention(
                c.q, c.k, c.v, c.topk_idx, s.block_size, c.cu_seqlens, c.scale
            ),
        )
    longest = (s.long, s.long // s.kernel_stride)
    return Contract(
        lambda f, c: f(
            *(c.q, c.k, c.v, *windows, s.block_size, s.topk, c.cu_seqlens, c.key_cu_seqlens),
            *(*longest, c.scale, s.init_blocks, s.local_blocks),
        ),
        lambda c: reference.compressed_attention_forward(
            *(c.q, c.k, c.v, c.cu_seqlens, c.key_cu_seqlens),
            kernel_size=s.kernel_size,
            kernel_stride=s.kernel_stride,
            softmax_scale=c.scale,
        )[0],
    )


class _Run:
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


def _said(name: str, right: bool, note: str) -> Row:
    return {"output": name, "result": "ok" if right else "failed", "note": "" if right else note}


def _one_sequence(run: _Run) -> Iterator[Row]:
    yield from run.compare(run.call((run.setting.long,)))


def _short_tails(run: _Run) -> Iterator[Row]:
    s = run.setting
    lengths = (1, s.kernel_size - 1, s.block_size + 1, s.block_size, 2 * s.block_size - 1)
    yield from run.compare(run.call(lengths))


def _empty_sequences(run: _Run) -> Iterator[Row]:
    yield from run.compare(run.call((0, run.setting.block_size + 7, 0, 0, 3, 0)))


def _empty_rows(run: _Run) -> Iterator[Row]:
    """Rows that see nothing are 0 and leave gradients finite."""
    call = run.call((run.setting.block_size * 3,))
    if run.op == "topk_sparse_attention":
        call.topk_idx[:, ::3] = -1
    elif run.op == "sliding_window_attention":
        raise _NotHere("each token sees itself")
    yield from run.compare(call)


def _any_order(run: _Run) -> Iterator[Row]:
    """Blocks are a set: any order, repeats, -1 anywhere, numbers that name no block."""
    if run.op != "topk_sparse_attention":
        raise _NotHere("takes no blocks")
    call = run.call((run.setting.long, run.setting.block_size + 1))
    topk_idx = in_any_order(call.topk_idx, run.setting.seed)
    yield from run.compare(dataclasses.replace(call, topk_idx=topk_idx))


def _selection(run: _Run) -> Iterator[Row]:
    """The blocks have the best scores, including forced ones, ascending, then -1."""
    if run.op != "compressed_attention":
        raise _NotHere("selects no blocks")
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
        contract = _contract(run.op, dataclasses.replace(s, init_blocks=first, local_blocks=last))
        _, came = contract.apply(run.function, call)
        rule = BlockRule(s.kernel_size, s.kernel_stride, s.block_size, s.topk, first, last)
        wanted = expected_blocks(
            rule, call.q, call.k, lse, *offsets, came.to(torch.int32), call.scale
        )
        rows = (came != wanted).any(-1).sum().item() if came.shape == wanted.shape else -1
        note = f"{rows} rows differ from the best blocks"
        yield _said(f"topk_idx, {first} first and {last} last", rows == 0, note)


def _poisoned(run: _Run) -> Iterator[Row]:
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
    yield _said("o beside NaN", same, "a sequence of NaN changes another one")


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


def _inputs_are_left_alone(run: _Run) -> Iterator[Row]:
    call = run.call((run.setting.long,))
    tensors = {name: x for name, x in vars(call).items() if isinstance(x, Tensor)}
    before = {name: x.clone() for name, x in tensors.items()}
    run.gradients(call, run.normal(*call.q.shape))
    changed = [name for name, x in tensors.items() if not torch.equal(x, before[name])]
    yield _said("inputs", not changed, f"changed: {', '.join(changed)}")


def _determinism(run: _Run) -> Iterator[Row]:
    call = run.call((run.setting.long, run.setting.block_size + 1))
    do = run.normal(*call.q.shape)
    first, second = run.gradients(call, do), run.gradients(call, do)
    for name, x, y in zip(OUTPUTS, first, second, strict=False):
        yield _said(name, torch.equal(x, y), "two calls give different bits")


def _strides(run: _Run) -> Iterator[Row]:
    """Heads outside tokens, as a transposed projection leaves them."""
    call = run.call((run.setting.long,))

    def turned(x: Tensor) -> Tensor:
        return x.transpose(0, 1).contiguous().transpose(0, 1)

    q, k, v = (turned(x) for x in (call.q, call.k, call.v))
    yield from run.compare(dataclasses.replace(call, q=q, k=k, v=v))


def _far_strides(run: _Run) -> Iterator[Row]:
    """Tokens whose last ones lie past 2^31 elements, in memory that is only partly written."""
    if run.device.type != "cuda" or torch.cuda.mem_get_info(run.device)[0] < 20 << 30:
        raise _NotHere("needs a GPU with 20 GiB free")
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


def _equal_scores(run: _Run) -> Iterator[Row]:
    call = run.call((run.setting.long,))
    yield from run.compare(dataclasses.replace(call, k=torch.zeros_like(call.k)))


def _huge_scores(run: _Run) -> Iterator[Row]:
    """Scores of 1e4 and more, whose softmax is one key."""
    call = run.call((run.setting.long,))
    wide = dataclasses.replace(call, q=call.q * 60, k=call.k * 60)
    wanted = run.contract.expect(
        dataclasses.replace(wide, q=wide.q.double(), k=wide.k.double(), v=wide.v.double())
    )
    # A score that float32 rounds may move a whole row, so only all rows together are compared.
    yield {"output": "o"} | run.compared(run.output(wide), wanted, each_row=False)


def _offset_keys(run: _Run) -> Iterator[Row]:
    """A channel of the keys with a bias, and large gradients: sums of float16 must not overflow."""
    call = run.call((run.setting.long,))
    call.q[..., 0], call.k[..., 0] = 0.5, -60.0
    do = run.normal(*call.q.shape) * 300
    found, expected = run.gradients(call, do), run.expected(call, do)
    for name, x, wanted in zip(OUTPUTS, found, expected, strict=False):
        fits = wanted.abs().max() < torch.finfo(x.dtype).max
        finite = bool(x.isfinite().all()) or not fits
        yield _said(
            name, finite, f"not finite, where the largest value is {wanted.abs().max():.0f}"
        )


def _replay(run: _Run) -> Iterator[Row]:
    """A captured CUDA graph, replayed with new inputs, gives the same bits as an eager call."""
    if run.device.type != "cuda":
        raise _NotHere("needs a GPU")
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
    yield _said("o", torch.equal(o, wanted), "a replayed graph differs from an eager call")


_CASES: dict[str, Callable[[_Run], Iterator[Row]]] = {
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
