"""Values that break kernels, through every pass of every op: as the float64 reference does.

Each kind takes the place of the normal numbers that a case draws. Where the reference, rounded
to the output's dtype, is finite, so is the kernel's result, and as close as in any other test.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nsagen.cases.base import THRESHOLDS, Case, Sizes, cases_of, relative_error
from nsagen.cases.selected_attention import make_inputs
from nsagen.codegen.template import default_schedule, space_for, spaces_of
from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import (
    STATIC_PARAMS,
    Param,
    Schedule,
    Workload,
    parameter_names,
)
from nsagen.ops._gradients import reference_gradients
from tests.canaries import guarded
from tests.support import check_case, is_hopper, kernel_device, kernel_dtypes, load_kernel

SHAPE: dict[str, Param] = {
    **{
        "head_dim": 16,
        "v_head_dim": 16,
        "index_head_dim": 16,
        "gqa_ratio": 2,
        "compress_type": "weightedpool",
    },
    **{"kernel_size": 8, "kernel_stride": 4, "block_size": 16, "topk": 4, "init_blocks": 1},
    **{"local_blocks": 2, "window_size": 12, "with_pe": True},
}
PASSES = list(STATIC_PARAMS)
FORCED_SIZES = ("init_blocks", "local_blocks")
DENORMAL = {torch.float32: 1e-41, torch.float16: 2e-7, torch.bfloat16: 1e-40}


def outlier(x: Tensor) -> Tensor:
    x.view(-1)[x.numel() // 2 : x.numel() // 2 + 1] = 1e4
    return x


KINDS: dict[str, Callable[[Tensor], Tensor]] = {
    "zeros": torch.zeros_like,
    "equal": torch.ones_like,
    "denormals": lambda x: (x.float() * DENORMAL[x.dtype]).to(x.dtype),
    "1e4": lambda x: torch.full_like(x, 1e4),
    "-1e4": lambda x: torch.full_like(x, -1e4),
    "1e4 of both signs": lambda x: 1e4 * torch.where(x < 0, -1.0, 1.0).to(x.dtype),
    "one outlier": outlier,
}
HUGE = list(KINDS)[3:]
"""Scores of up to 4e8, beside which float32 holds no logarithm of a sum: passes that take
probabilities from lse must only be finite there."""

FROM_LSE = {key for key in PASSES if key[1] == "backward"} | {
    ("index_loss", "forward"),
    ("dense_index_loss", "forward"),
}
LEAST = ("denormals", "one outlier", "1e4 of both signs")

CASES = [
    (*key, kind, dtype)
    for key in PASSES
    for kind in KINDS
    for dtype in kernel_dtypes()
    # Products of two huge numbers are past float16, also inside a sum whose result is not; and
    # the linear layer's norm is not done by its kernel there.
    if dtype != "float16"
    or (kind in LEAST[: 3 if key[1] != "backward" else 2] and key[0] != "linear")
]


def workload(op: str, pass_: str, dtype: str, **other: Param) -> Workload:
    params = {n: SHAPE[n] for n in STATIC_PARAMS[op, pass_]}
    return Workload.of(op, pass_, dtype=dtype, **params | other)


def adversarial(w: Workload, kind: str, monkeypatch: pytest.MonkeyPatch) -> Case:
    """The case of a ragged batch, or of rows at some positions, with other numbers."""
    draw = torch.randn
    with monkeypatch.context() as patched:
        patched.setattr(torch, "randn", lambda *a, **k: KINDS[kind](draw(*a, **k)))
        sizes = Sizes((40, -1, 3), capacity=48) if w.pass_ == "decode" else Sizes((0, 3, 18))
        return cases_of(w).make_case(w, sizes, kernel_device(), seed=1)


def check(name: str, out: Tensor, exact: Tensor, scale: float, huge: bool) -> None:
    """Finite where the reference is, once rounded; close to it, or to zero beside the scale."""
    out, exact = out.cpu(), exact.cpu()
    if not out.dtype.is_floating_point:
        assert torch.equal(out, exact), f"{name} differs"
        return
    finite = torch.isfinite(exact.to(out.dtype))
    wrong = ~torch.isfinite(out) & finite
    assert not wrong.any(), f"{name}: {out[wrong][:4].tolist()} where the reference is finite"
    if huge:
        return
    error = (out[finite].double() - exact[finite].double()).norm().item()
    tiny = torch.finfo(out.dtype).tiny * out.numel()  # hardware may take these for zero
    limit = THRESHOLDS[out.dtype] * (exact[finite].double().norm().item() + scale) + tiny
    assert error <= limit, f"{name}: error {error:.2e}, limit {limit:.2e}"


@pytest.mark.parametrize(("op", "pass_", "kind", "dtype"), CASES)
def test_each_kind(
    op: str, pass_: str, kind: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    w = workload(op, pass_, dtype)
    case = adversarial(w, kind, monkeypatch)
    with guarded(case) as args:
        load_kernel(w).launch(*args)
    # Equal values cancel in gradients: what is left is rounding, beside sums of about this size.
    scale = 16.0 if kind == "equal" and pass_ == "backward" else 0.0
    if op in (
        "index_loss",
        "dense_index_loss",
    ):  # a difference of logarithms, which cancel where all scores are equal
        scale = max(scale, 4.0)
    for name, exact in case.expected().items():
        huge = kind in HUGE and (op, pass_) in FROM_LSE
        check(name, case.outputs[name], exact, scale, huge)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("compress_type", ["sigmoid_mul", "mlp"])
@pytest.mark.parametrize(
    ("op", "pass_"), [("compress", "forward"), ("compress", "backward"), ("cache_append", "decode")]
)
def test_each_kind_of_compression(
    op: str, pass_: str, compress_type: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Gates that are shut or open, and sums that silu takes to 0."""
    w = workload(op, pass_, "float32", compress_type=compress_type, mlp_hidden=24)
    case = adversarial(w, kind, monkeypatch)
    with guarded(case) as args:
        load_kernel(w).launch(*args)
    for name, exact in case.expected().items():
        check(name, case.outputs[name], exact, 0.0, huge=False)


def covered(op: str, pass_: str, algorithm: str, dtype: str) -> Workload | None:
    """The widest heads and smallest blocks of which an algorithm covers a workload."""
    forced = {name: SHAPE[name] for name in parameter_names(op, pass_) if name in FORCED_SIZES}
    for head_dim, block_size, more in itertools.product((256, 128), (16, 32), ({}, forced)):
        sizes = {"head_dim": head_dim, "v_head_dim": 64, **more}
        if "block_size" in STATIC_PARAMS[op, pass_] or more:
            sizes["block_size"] = block_size
        w = workload(op, pass_, dtype, **sizes)
        with contextlib.suppress(UnsupportedWorkloadError):
            space_for(w, algorithm)
            return w
    return None


@pytest.mark.parametrize("both_signs", [False, True])
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("dtype", kernel_dtypes())
@pytest.mark.parametrize(
    ("op", "pass_", "algorithm"),
    [
        (*key, space.algorithm)
        for key in PASSES
        for space in spaces_of(*key)
        if "attention" in key[0] and key[1] != "backward" and (space.general or is_hopper())
    ],
)
def test_scores_at_which_rounding_takes_more_than_one(
    op: str,
    pass_: str,
    algorithm: str,
    dtype: str,
    sign: int,
    both_signs: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads of 128 and 256 full of 9984. All keys weigh the same, or one has all the weight.

    9984 is 39 times 256, so float32 holds each sum of products exactly, and equal scores are equal.
    A GPU's fused s scale - peak is not 0 where peak is s scale, but what rounding took from it.
    """
    drawn = itertools.count()

    def huge(x: Tensor) -> Tensor:
        signs = torch.where(x < 0, -1.0, 1.0) if both_signs else torch.ones_like(x)
        return (signs * 9984 * (sign if next(drawn) == 1 else 1)).to(x.dtype)

    w = covered(op, pass_, algorithm, dtype)
    if w is None:
        pytest.skip("pipelines are for types of 16 bits")
    space = space_for(w, algorithm)
    monkeypatch.setitem(KINDS, "huge", huge)
    case = adversarial(w, "huge", monkeypatch)
    with guarded(case) as args:
        load_kernel(w, space.default_schedule(w, KNOWN_TARGETS["cuda:90"])).launch(*args)
    for name, exact in case.expected().items():
        check(name, case.outputs[name], exact, 0.0, huge=False)


@pytest.mark.parametrize("error", [-3e-7, 3e-7])
@pytest.mark.parametrize(
    "op", [op for op, pass_ in PASSES if pass_ == "backward" and "attent" in op]
)
def test_lse_is_rounded_either_way(op: str, error: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside scores of 2e8, its last places are worth e ** 64: no probability is above 1 for that.

    A fused multiply and subtract, which a GPU has and the interpreter has not, leaves as much.
    """
    drawn = itertools.count()

    def huge(x: Tensor) -> Tensor:
        if next(drawn) < 2:  # queries and keys
            x[..., 0] = 3e4
        return x

    monkeypatch.setitem(KINDS, "huge", huge)
    w = workload(op, "backward", "float16")
    case = adversarial(w, "huge", monkeypatch)
    (lse,) = {t for t in case.args if isinstance(t, Tensor) and t.dtype == torch.float32}
    assert lse.max() > 1e8
    lse.mul_(1 + error)
    load_kernel(w).launch(*case.args)
    for name, exact in case.expected().items():  # without what has huge factors of its own
        check(name, case.outputs[name][..., 1:], exact[..., 1:], 0.0, huge=True)


ALGORITHMS = [s.algorithm for s in spaces_of("selected_attention", "forward") if s.general]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_what_is_in_unselected_blocks_is_not_seen(algorithm: str, value: float) -> None:
    """Forward, in each algorithm, and backward: block 1 of keys and values holds no number.

    More than the reference does, which multiplies by zero. The last block is whole: the last tile
    of a sequence that ends within one begins earlier, and multiplies by zero too.
    """
    w = workload("selected_attention", "forward", "float32")
    x = make_inputs(w, Sizes((48,)), kernel_device(), seed=1)
    blocks = torch.tensor([0, 2], dtype=torch.int32).to(x.q.device)
    x.topk_idx.copy_(torch.nn.functional.pad(blocks, (0, x.topk_idx.shape[-1] - 2), value=-1))
    at = slice(16, 32)
    expected_o, expected_lse = x.attend(x.q.double(), x.k.double(), x.v.double())
    wide = [t.double() for t in (x.q, x.k, x.v)]
    do = torch.randn_like(x.q)
    expected = reference_gradients(lambda *t: x.attend(*t)[0], tuple(wide), do.double())
    x.k[at], x.v[at] = value, value
    o, lse = x.outputs()
    args = (x.q, x.k, x.v, x.topk_idx, x.cu_seqlens)
    schedule = default_of(w, algorithm)
    load_kernel(w, schedule).launch(*args, o, lse, x.softmax_scale)
    assert relative_error(o, expected_o) <= 1e-5
    assert relative_error(lse, expected_lse) <= 1e-5
    gradients = [torch.full_like(t, float("nan")) for t in (x.q, x.k, x.v)]
    backward = load_kernel(workload("selected_attention", "backward", "float32"))
    backward.launch(do, *args, o, lse, *gradients, x.softmax_scale)
    for found, exact in zip(gradients, expected, strict=True):
        assert relative_error(found, exact) <= 1e-5


def default_of(w: Workload, algorithm: str) -> Schedule:
    space = space_for(w, algorithm)
    return Schedule.of(algorithm, dict(space.default(w, KNOWN_TARGETS["cuda:90"])))


@pytest.mark.parametrize("value", [1.0, 1e4, -1e4])
@pytest.mark.parametrize("op", ["compressed_attention", "native_sparse_attention"])
def test_splits_of_a_row_weigh_what_they_saw(
    op: str, value: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal keys, in splits of different numbers of tokens: each counts once, however large."""
    w = workload(op, "decode", "float32")
    usual = default_schedule(w, KNOWN_TARGETS["cuda:90"])
    schedule = Schedule.of(usual.algorithm, dict(usual.knobs) | {"programs": 2112, "block_n": 16})
    case = cases_of(w).make_case(w, Sizes((1279, 700, 130), capacity=1280), kernel_device())
    q, k_cache, *_ = case.args
    q.fill_(value)
    k_cache.copy_(torch.where(k_cache.isnan(), k_cache, value))
    check_case(load_kernel(w, schedule), case)
