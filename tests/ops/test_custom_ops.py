"""Every custom op against PyTorch's own checks: schema, fakes, autograd, tracing."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from nsagen.core.branches import BRANCHES
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.ops.block_selection import block_selection_forward
from nsagen.ops.compress import compress_backward, compress_forward
from nsagen.ops.compressed_attention import (
    compressed_attention_backward,
    compressed_attention_forward,
)
from nsagen.ops.compressed_lse import compressed_lse_forward
from nsagen.ops.gated_attention import branch_columns
from nsagen.ops.gated_sum import gated_sum_backward, gated_sum_forward
from nsagen.ops.index_loss import dense_index_loss_forward, index_loss_forward
from nsagen.ops.layout import compressed_cu_seqlens
from nsagen.ops.lengths import Lengths
from nsagen.ops.native_sparse_attention import (
    attention_without_gradients,
    finish_gradients,
    turn,
    turn_back,
)
from nsagen.ops.reference.compress import tensors_of
from nsagen.ops.rope import rope_forward
from nsagen.ops.selected_attention import selected_attention_backward, selected_attention_forward
from nsagen.ops.sliding_window_attention import (
    sliding_window_attention_backward,
    sliding_window_attention_forward,
)
from nsagen.ops.sliding_window_gated_sum import sliding_window_gated_sum

from .inputs import STATICS, Cached, Packed

Call = tuple[Callable[..., object], tuple[object, ...]]
WINDOWS = (STATICS["kernel_size"], STATICS["kernel_stride"])
SCALE = 0.25
OPS = torch.ops.nsagen


def check(
    op: Callable[..., object], args: Sequence[object], named: dict[str, object] | None = None
) -> None:
    """PyTorch's own checks of the op that a function calls."""
    torch.library.opcheck(getattr(OPS, op.__name__).default, tuple(args), named)


def compressed(x: Packed) -> tuple[Tensor, ...]:
    """q and compressed k, v with spare rows, and both offsets."""
    cu_seqlens_k = compressed_cu_seqlens(x.cu_seqlens, *WINDOWS)
    rows = x.q.shape[0] // 4
    keys = x.randn(rows, x.kv_heads, x.head_dim), x.randn(rows, x.kv_heads, x.v_head_dim)
    return x.q, *keys, x.cu_seqlens, cu_seqlens_k


def selection(x: Packed) -> Tensor:
    return torch.arange(4, dtype=torch.int32).expand(x.kv_heads, x.q.shape[0], 4).contiguous()


def compress_call(compress_type: str, pe: bool) -> Callable[[Packed], Call]:
    def call(x: Packed) -> Call:
        y_cu_seqlens = compressed_cu_seqlens(x.cu_seqlens, *WINDOWS)
        w = (*tensors_of(x.weights(compress_type)[0]), None)[0]  # of an mlp, the first layer
        tensors = (x.k, w, x.pe if pe else None, x.cu_seqlens, y_cu_seqlens)
        return compress_forward, (*tensors, compress_type, *WINDOWS)

    return call


def like(tensor: Tensor, x: Packed) -> tuple[Tensor, Tensor]:
    """Two more tensors of a tensor's shape."""
    return x.randn(*tensor.shape), x.randn(*tensor.shape)


def positions(x: Packed) -> Tensor:
    return torch.arange(x.q.shape[0], dtype=torch.int32)


def index_inputs(x: Packed) -> tuple[Tensor, ...]:
    """Constants q and k, an index of its own, and the selection."""
    index = x.randn(x.q.shape[0], 2, 8), x.randn(x.q.shape[0], 1, 8)
    return x.q.detach(), x.k.detach(), *index, selection(x), x.cu_seqlens


def dense_index_inputs(x: Packed) -> tuple[object, ...]:
    *tensors, _, cu_seqlens = index_inputs(x)
    return *tensors, cu_seqlens, SCALE, SCALE


DIFFERENTIABLE: dict[str, Callable[[Packed], Call]] = {
    "avgpool": compress_call("avgpool", pe=False),
    "avgpool with pe": compress_call("avgpool", pe=True),
    "weightedpool": compress_call("weightedpool", pe=False),
    "linear with pe": compress_call("linear", pe=True),
    "sigmoid_mul with pe": compress_call("sigmoid_mul", pe=True),
    "mlp with pe": compress_call("mlp", pe=True),
    "rope": lambda x: (rope_forward, (x.q, x.cos, x.sin, positions(x))),
    "compressed": lambda x: (compressed_attention_forward, (*compressed(x), *WINDOWS, SCALE)),
    "selected": lambda x: (
        selected_attention_forward,
        (x.q, x.k, x.v, selection(x), x.cu_seqlens, 8, SCALE),
    ),
    "sliding": lambda x: (
        sliding_window_attention_forward,
        (x.q, x.k, x.v, x.cu_seqlens, 9, SCALE),
    ),
    "gated_sum": lambda x: (gated_sum_forward, (x.q, *like(x.q, x), x.gate)),
    "index_loss": lambda x: (index_loss_forward, (*index_inputs(x), 8, SCALE, SCALE)),
    "dense_index_loss": lambda x: (dense_index_loss_forward, dense_index_inputs(x)),
}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_differentiable_ops(name: str) -> None:
    op, args = DIFFERENTIABLE[name](Packed(seqlens=(0, 5, 20, 18), requires_grad=True))
    check(op, args)


def backward_calls() -> dict[str, Call]:
    x = Packed(seqlens=(0, 5, 20, 18))
    windows = compressed(x)
    o, lse = x.randn(43, 6, 24), x.randn(43, 6)
    _, args = compress_call("linear", pe=True)(x)
    _, plain = compress_call("avgpool", pe=False)(x)
    _, mlp = compress_call("mlp", pe=True)(x)
    dy = x.randn(10, 2, 16)
    packed = (o, x.q, x.k, x.v)
    return {
        "linear": (compress_backward, (dy, *args)),
        "avgpool": (compress_backward, (dy, *plain)),
        "mlp": (compress_backward, (x.randn(10, 2, 20), *mlp)),
        "compressed": (compressed_attention_backward, (o, *windows, o, lse, *WINDOWS, SCALE)),
        "selected": (
            selected_attention_backward,
            (*packed, selection(x), x.cu_seqlens, o, lse, 8, SCALE),
        ),
        "sliding": (
            sliding_window_attention_backward,
            (*packed, x.cu_seqlens, o, lse, 9, SCALE),
        ),
        "gated_sum": (gated_sum_backward, (x.q, *like(x.q, x), x.randn(*x.q.shape), x.gate)),
    }


@pytest.mark.parametrize(
    "name", ["linear", "avgpool", "mlp", "compressed", "selected", "sliding", "gated_sum"]
)
def test_backward_ops(name: str) -> None:
    op, args = backward_calls()[name]
    check(op, args)


def test_small_ops_of_the_backward_pass() -> None:
    x = Packed()
    check(branch_columns, (x.gate, x.randn(60, 6, 3)))
    positions, _, window_positions = Lengths.of(x.cu_seqlens, 60, 8, 4).tensors
    tables = (x.cos, x.sin)
    check(turn, (x.q, x.k, x.randn(15, 2, 16), *tables, positions, window_positions))
    check(turn_back, (x.randn(15, 2, 16), *tables, window_positions))
    grads = (x.q, x.k, x.randn(*x.k.shape), x.v, x.randn(*x.v.shape))
    check(finish_gradients, (*grads, *tables, positions))


def test_the_whole_block_as_one_op() -> None:
    x = Packed(seqlens=(0, 5, 20, 18))
    tensors = (x.q, x.k, x.v, x.gate, x.cu_seqlens, None, None, None)
    weights = (None, None, x.pe, None, x.cos, x.sin, None, None)
    statics = ("avgpool", "avgpool", *STATICS.values(), 9, SCALE)
    args = (*tensors, *weights, *statics, " ".join(BRANCHES), "")
    check(attention_without_gradients, args)
    x.q.requires_grad_()  # then the ops that it calls have gradients
    for call in (attention_without_gradients, OPS.attention_without_gradients):
        (gradient,) = torch.autograd.grad(call(*args).sum(), x.q)
        assert bool(gradient.any())


def test_block_selection() -> None:
    q, k, v, cu_seqlens, cu_seqlens_k = compressed(Packed())
    _, lse = compressed_attention_forward(q, k, v, cu_seqlens, cu_seqlens_k, *WINDOWS, SCALE)
    args = (q, k, lse, cu_seqlens, cu_seqlens_k, *STATICS.values(), SCALE)
    check(block_selection_forward, args)
    q_start = torch.tensor([4] * (cu_seqlens.shape[0] - 1), dtype=torch.int32)
    check(block_selection_forward, args, {"q_start": q_start})
    check(compressed_lse_forward, (q, k, cu_seqlens, cu_seqlens_k, *WINDOWS, SCALE))
    form = {"score_norm": "none", "score_heads": "each", "score_pool": "max"}
    check(block_selection_forward, (q, k, None, *args[3:]), form)


def chunk_calls() -> dict[str, Call]:
    """A chunk of 4 sequences: some keys before the first query of each."""
    x = Packed(seqlens=(0, 5, 20, 18), requires_grad=True)
    ends, firsts = x.cu_seqlens, torch.tensor([0, 0, 3, 8], dtype=torch.int32)
    q_ends = torch.tensor((0, 0, 5, 22, 32), dtype=torch.int32)
    q = x.q.detach()[:32].requires_grad_()
    _, *windows, k_ends = compressed(x)
    ck, cv, _ = windows
    return {
        "sliding": (
            sliding_window_attention_forward,
            (q, x.k, x.v, q_ends, 9, SCALE, "", ends, firsts),
        ),
        "compressed": (
            compressed_attention_forward,
            (q, ck, cv, q_ends, k_ends, *WINDOWS, SCALE, "", firsts),
        ),
    }


@pytest.mark.parametrize("name", ["sliding", "compressed"])
def test_chunks(name: str) -> None:
    check(*chunk_calls()[name])


@pytest.mark.parametrize("chunk", [False, True], ids=["whole", "chunk"])
def test_the_sliding_window_that_ends_in_the_gated_sum(chunk: bool) -> None:
    _, (q, k, v, q_ends, *statics, ends, firsts) = chunk_calls()["sliding"]
    if not chunk:
        q_ends, k, v, ends, firsts = (
            torch.tensor([0, 5, 32], dtype=torch.int32),
            k[:32],
            v[:32],
            None,
            None,
        )
    tensors = [x.detach() for x in (q, k, v)]
    x = Packed()
    args = (*tensors, q_ends, x.randn(32, 6, 24), x.randn(32, 6, 24), x.gate[:32], *statics)
    check(sliding_window_gated_sum, (*args, ends, firsts))


def test_decode_ops() -> None:
    x = Cached()
    args = (*x.append_inputs(), *x.caches(), "linear", *WINDOWS)
    torch.library.opcheck(OPS.cache_append_decode.default, args)
    args = (x.q, x.ck_cache, x.cv_cache, *x.rows, *STATICS.values(), SCALE)
    torch.library.opcheck(OPS.compressed_attention_decode.default, args)
    inputs = (x.q, x.k_cache, x.v_cache, x.topk_idx, *x.rows, x.o_compressed, x.gate)
    torch.library.opcheck(OPS.native_sparse_attention_decode.default, (*inputs, 8, 9, SCALE))


def test_decode_ops_of_separate_branches() -> None:
    x = Cached()
    args = (*x.append_inputs(), *x.caches(), "linear", *WINDOWS)
    own = {**vars(x.separate()), "pe_v": x.randn(2, 8, 24)}
    torch.library.opcheck(OPS.cache_append_decode.default, args, own)
    w_k, w_v = (x.randn(2, 8 * 16, 20), x.randn(2, 8))
    more = {"w_k2": x.randn(2, 20, 16), "v_compress_type": "weightedpool"}
    args = (*args[:5], w_k, w_v, *args[7:15], "mlp", *WINDOWS)
    torch.library.opcheck(OPS.cache_append_decode.default, args, more)
    inputs = (x.q, x.k_cache, x.v_cache, x.topk_idx, *x.rows, x.o_compressed, x.gate)
    caches = {name: vars(x.separate())[name] for name in ("k_window_cache", "v_window_cache")}
    torch.library.opcheck(
        OPS.native_sparse_attention_decode.default, (*inputs, 8, 9, SCALE), caches
    )


def test_decode_ops_on_pages() -> None:
    x = Cached()
    caches, table = x.paged_caches(page_size=16)
    key = ("", table)
    args = (*x.append_inputs(), *caches, "linear", *WINDOWS, *key)
    torch.library.opcheck(OPS.cache_append_decode.default, args)
    args = (x.q, *caches[2:4], *x.rows, *STATICS.values(), SCALE, *key)
    torch.library.opcheck(OPS.compressed_attention_decode.default, args)
    inputs = (x.q, *caches[:2], x.topk_idx, *x.rows, x.o_compressed, x.gate)
    torch.library.opcheck(OPS.native_sparse_attention_decode.default, (*inputs, 8, 9, SCALE, *key))


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients_by_finite_differences(name: str) -> None:
    x = Packed(dtype=torch.float64, seqlens=(0, 3, 10), query_heads=2, requires_grad=True)
    op, args = DIFFERENTIABLE[name](x)

    def first(*args: object) -> object:
        result = op(*args)
        return result[0] if isinstance(result, tuple) else result

    assert torch.autograd.gradcheck(first, args, fast_mode=True)


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_tangents_are_refused_by_name(name: str) -> None:
    """PyTorch would drop the tangent of an op that has only a backward pass."""
    x = Packed(seqlens=(3, 10), query_heads=2)
    op, args = DIFFERENTIABLE[name](x)
    for call in (op, getattr(OPS, op.__name__).default):
        refused = pytest.raises(UnsupportedWorkloadError, match=f"{op.__name__}: .*forward-mode")
        with refused, torch.no_grad():
            torch.func.jvp(lambda tensor, call=call: call(tensor, *args[1:]), args[:1], args[:1])
        with forward_ad.dual_level(), refused:
            call(forward_ad.make_dual(args[0], torch.ones_like(args[0])), *args[1:])


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_transforms_of_torch_func_differentiate_ops(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch.func.grad and vjp give what backward() gives, also in chunks; vmap is refused."""
    monkeypatch.setattr("nsagen.ops.reference._attend.MAX_SCORES", 64)
    x = Packed(dtype=torch.float64, seqlens=(3, 10), query_heads=2, requires_grad=True)
    op, args = DIFFERENTIABLE[name](x)
    place = 2 if name.endswith("index_loss") else 0  # the first of its arguments with a gradient

    def loss(tensor: Tensor) -> Tensor:
        result = op(*args[:place], tensor, *args[place + 1 :])
        return (result[0] if isinstance(result, tuple) else result).square().sum()

    leaf, start = args[place].detach().requires_grad_(), args[place].detach()
    (expected,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.equal(torch.func.grad(loss)(start), expected)
    assert torch.equal(torch.func.vjp(loss, start)[1](torch.ones_like(loss(start)))[0], expected)
    with pytest.raises(UnsupportedWorkloadError, match=f"{op.__name__}: .*vmap"):
        torch.func.vmap(loss)(torch.stack([start, start]))
    with pytest.raises(UnsupportedWorkloadError, match="forward-mode"):
        torch.func.jvp(torch.func.grad(loss), (start,), (start,))
    if name == "rope":
        return  # its gradient is a rope, which has a gradient
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.func.grad(lambda t: torch.func.grad(loss)(t).sum())(start)
