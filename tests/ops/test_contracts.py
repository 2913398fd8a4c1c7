"""Every tensor of every op, broken in every way that its contract names: one clear error each.

The table has a right call of each op. What is wrong with one tensor is tried on all of them, so
a check that an op lacks, or a tensor that a check forgets, shows here by name.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import COMPRESS_TYPES
from nsagen.ops._checks import check_cu_seqlens
from nsagen.ops._op import MOST_OF
from nsagen.ops.reference import quantize

from .inputs import STATICS, Cached, Packed

Call = tuple[Callable[..., Any], dict[str, Any]]

WINDOWS = {"kernel_size": 8, "kernel_stride": 4}


class Elsewhere(Tensor):
    """A tensor that claims to be on another GPU."""

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return torch.device("cuda", 7)


def narrow(name: str, scale_name: str, cache: Tensor) -> dict[str, Tensor]:
    """A cache in int8 and its scales, by these names."""
    rows, scale = quantize(cache, torch.int8)
    return {name: rows, scale_name: scale}


@functools.cache
def table() -> dict[str, Call]:
    """A valid call of each op."""
    x, c = Packed(), Cached()
    w_k, w_v = x.weights("linear")
    w_pool, _ = x.weights("weightedpool")
    pool = {"x": x.k, "cu_seqlens": x.cu_seqlens, **WINDOWS, "pe": x.pe}
    ck, ends = ops.avgpool_compress(x.k, None, x.cu_seqlens, 8, 4)
    cv, _ = ops.avgpool_compress(x.v, None, x.cu_seqlens, 8, 4)
    qkv = {"q": x.q, "k": x.k, "v": x.v}
    chunk = {"cu_seqlens_k": x.cu_seqlens.clone(), "q_start": torch.zeros(4, dtype=torch.int32)}
    _, topk_idx = ops.compressed_attention(x.q, ck, cv, **STATICS, **_ends(x, ends))
    branches = {f"o_{name}": x.randn(60, 6, 24) for name in ("compressed", "selected", "sliding")}
    tables = {"cos": x.cos, "sin": x.sin}
    (positions, slots), rest = c.rows, dict(zip(CACHES, c.caches(), strict=True))
    rows = {"positions": positions, "slots": slots}
    decode = {"q": c.q, "k_cache": c.k_cache, "v_cache": c.v_cache, "topk_idx": c.topk_idx, **rows}
    compressed = {"q": c.q, "ck_cache": c.ck_cache, "cv_cache": c.cv_cache, **rows, **STATICS}
    new = dict(
        zip(("q", "k", "v", "cos", "sin", "w_k", "w_v", "pe"), c.append_inputs(), strict=False)
    )
    kinds = {"compress_type": "linear", **WINDOWS}
    (k, v, pck, pcv, k_raw), block_table = Cached().paged_caches(16)
    pages = dict(zip(CACHES, (k, v, pck, pcv, k_raw), strict=True))
    block = {
        **qkv,
        "gate": x.gate,
        "cu_seqlens": x.cu_seqlens,
        **kinds,
        **STATICS,
        "window_size": 9,
    }
    k_shape, v_shape = c.k_cache.shape, c.v_cache.shape
    linear = {"x": x.randn(5, 32), "weight": x.randn(24, 32), "norm_weight": x.randn(32)}
    return {
        "avgpool_compress": (ops.avgpool_compress, {**pool, "w": None}),
        "weightedpool_compress": (ops.weightedpool_compress, {**pool, "w": w_pool}),
        "linear_compress": (ops.linear_compress, {**pool, "w": w_k}),
        "sigmoid_mul_compress": (ops.sigmoid_mul_compress, {**pool, "w": x.randn(2, 8, 16)}),
        "mlp_compress": (
            mlp_compress,
            {**pool, "w1": x.randn(2, 128, 20), "w2": x.randn(2, 20, 16)},
        ),
        "compress": (ops.compress, {**pool, "w": w_k, "compress_type": "linear"}),
        "compressed_attention": (
            ops.compressed_attention,
            {"q": x.q, "k": ck, "v": cv, **STATICS, **_ends(x, ends), "q_start": chunk["q_start"]},
        ),
        "compressed_lse": (
            ops.compressed_lse,
            {"q": x.q, "k": ck, **WINDOWS, **_ends(x, ends), "q_start": chunk["q_start"]},
        ),
        "block_selection": (
            ops.block_selection,
            {"q": x.q, "k": ck, "lse": torch.zeros(60, 6), **STATICS, **_ends(x, ends)}
            | {"q_start": chunk["q_start"]},
        ),
        "block_selection_decode": (
            ops.block_selection_decode,
            {"q": c.q, "k_cache": c.ck_cache, **rows, **STATICS},
        ),
        "block_selection_decode in pages": (
            ops.block_selection_decode,
            {"q": c.q, "k_cache": pck, **rows, **STATICS, "block_table": block_table},
        ),
        "pool_append": (
            ops.pool_append,
            {"k_cache": c.k_cache, "ck_cache": c.ck_cache, **rows, **WINDOWS},
        ),
        "pool_append in pages": (
            ops.pool_append,
            {"k_cache": k, "ck_cache": pck, **rows, **WINDOWS, "block_table": block_table},
        ),
        "block_selection_decode of a narrow cache": (
            ops.block_selection_decode,
            {"q": c.q, **narrow("k_cache", "k_scale", c.ck_cache), **rows, **STATICS},
        ),
        "selected_attention_decode of narrow caches": (
            ops.selected_attention_decode,
            {
                **{"q": c.q, "topk_idx": c.topk_idx, "block_size": 8, **rows},
                **narrow("k_cache", "k_scale", c.k_cache),
                **narrow("v_cache", "v_scale", c.v_cache),
            },
        ),
        "pool_append of narrow caches": (
            ops.pool_append,
            {
                **narrow("k_cache", "k_scale", c.k_cache),
                **narrow("ck_cache", "ck_scale", c.ck_cache),
                **rows,
                **WINDOWS,
            },
        ),
        "store_rows": (
            ops.store_rows,
            {"x": c.k, **narrow("cache", "scale", c.k_cache), **rows},
        ),
        "store_rows in pages": (
            ops.store_rows,
            {"x": c.k, **narrow("cache", "scale", k), **rows, "block_table": block_table},
        ),
        "load_rows": (
            ops.load_rows,
            {**narrow("cache", "scale", c.k_cache), **rows, "dtype": torch.float32},
        ),
        "load_rows in pages": (
            ops.load_rows,
            {
                **narrow("cache", "scale", k),
                **{**rows, "dtype": torch.float32, "block_table": block_table},
            },
        ),
        "index_loss": (
            ops.index_loss,
            {"q": x.q, "k": x.k, "index_q": x.randn(60, 2, 24), "index_k": x.randn(60, 1, 24)}
            | {"topk_idx": topk_idx, "cu_seqlens": x.cu_seqlens, "block_size": 8},
        ),
        "topk_sparse_attention": (
            ops.topk_sparse_attention,
            {**qkv, "topk_idx": topk_idx, "block_size": 8, "cu_seqlens": x.cu_seqlens, **chunk},
        ),
        "sliding_window_attention": (
            ops.sliding_window_attention,
            {**qkv, "window_size": 9, "cu_seqlens": x.cu_seqlens, **chunk},
        ),
        "rope": (ops.rope, {"x": x.q, **tables, "positions": torch.arange(60).int()}),
        "gated_sum": (ops.gated_sum, {**branches, "gate": x.gate}),
        "native_sparse_attention": (
            ops.native_sparse_attention,
            {**block, "w_k": w_k, "w_v": w_v, "pe": x.pe, "pe_v": x.randn(2, 8, 24), **tables},
        ),
        "cache_append": (ops.cache_append, {**new, **rows, **rest, **kinds}),
        "cache_append in pages": (
            ops.cache_append,
            {**new, **rows, **pages, **kinds, "block_table": block_table},
        ),
        "cache_append of separate branches": (
            append_separate,
            {**new, **rows, **rest, **kinds, **vars(c.separate()), "pe_v": x.randn(2, 8, 24)},
        ),
        "compressed_attention_decode": (ops.compressed_attention_decode, compressed),
        "compressed_attention_decode in pages": (
            ops.compressed_attention_decode,
            {**compressed, "ck_cache": pck, "cv_cache": pcv, "block_table": block_table},
        ),
        "native_sparse_attention_decode": (
            ops.native_sparse_attention_decode,
            {**decode, "o_compressed": c.o_compressed, "gate": c.gate, **DECODE},
        ),
        "native_sparse_attention_decode in pages": (
            ops.native_sparse_attention_decode,
            {
                **decode,
                **{"k_cache": k, "v_cache": v, "block_table": block_table},
                **{"o_compressed": c.o_compressed, "gate": c.gate, **DECODE},
            },
        ),
        "native_sparse_attention_decode of separate branches": (
            ops.native_sparse_attention_decode,
            {
                **decode,
                **{"k_window_cache": c.randn(*k_shape), "v_window_cache": c.randn(*v_shape)},
                **{"o_compressed": c.o_compressed, "gate": c.gate, **DECODE},
            },
        ),
        "selected_attention_decode": (ops.selected_attention_decode, {**decode, "block_size": 8}),
        "selected_attention_decode in pages": (
            ops.selected_attention_decode,
            {**decode, "k_cache": k, "v_cache": v, "block_table": block_table, "block_size": 8},
        ),
        "linear_decode": (ops.linear_decode, {**linear, "residual": x.randn(5, 24)}),
    }


def mlp_compress(w1: Tensor, w2: Tensor, **given: Any) -> tuple[Tensor, Tensor]:
    """With both layers by name."""
    return ops.mlp_compress(w=(w1, w2), **given)


def append_separate(**given: Any) -> Tensor:
    """With what a `SeparateKV` holds by name."""
    own = {field.name: given.pop(field.name) for field in dataclasses.fields(ops.SeparateKV)}
    return ops.cache_append(**given, separate=ops.SeparateKV(**own))


CACHES = ("k_cache", "v_cache", "ck_cache", "cv_cache", "k_raw")
DECODE = {"block_size": 8, "window_size": 9}


def _ends(x: Packed, of_windows: Tensor) -> dict[str, Tensor]:
    return {"cu_seqlens_q": x.cu_seqlens, "cu_seqlens_k": of_windows}


def call(name: str) -> Call:
    """A valid call of an op on its own tensors, since some ops write to them."""
    function, given = table()[name]
    return function, {k: v.clone() if isinstance(v, Tensor) else v for k, v in given.items()}


def tensors(name: str) -> list[str]:
    return [key for key, value in table()[name][1].items() if isinstance(value, Tensor)]


def broken(key: str, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """(what is wrong, the tensor with it)."""
    yield "device", x.as_subclass(Elsewhere)
    yield "no dimension", x.flatten()[0]
    yield "one dimension fewer", x[0]
    yield "one dimension more", x[None]
    if x.dtype.is_floating_point:
        yield "int32", x.int()
        yield "float64", x.double()
        yield "complex", x.to(torch.complex64)
        yield "last size", x[..., :-1]
        yield "no last size", x[..., :0]
        yield "last size doubled", torch.cat((x, x), -1)
    else:
        yield "int64", x.long()
        yield "float32", x.float()
        yield "bool", x.bool()
        yield "strides", torch.stack((x, x), -1)[..., 0]
    if x.ndim > 1:
        yield "one of the first size fewer", x[1:]
        yield "one of the first size more", torch.cat((x, x[:1]))
        yield "one of the second size fewer", x[:, 1:]
    if key.startswith("cu_seqlens"):
        yield "empty", x[:0]
        yield "a sequence fewer", torch.cat((x[:1], x[2:]))
        yield "a sequence more", torch.cat((x[:1], x))
        yield "starts at 1", torch.cat((x[:1] + 1, x[1:]))
        yield "starts below 0", torch.cat((x[:1] - 1, x[1:]))
        yield "falls", torch.cat((x[:2], x[-1:], x[-2:-1], x[-1:]))[: x.shape[0]]
        yield "ends early", torch.cat((x[:-1], x[-2:-1]))
        yield "ends late", torch.cat((x[:-1], x[-1:] + 1000))
    if key in ("q_start", "slots"):
        yield "below 0", x - 2
    if key == "positions":
        yield "below -1", x - 2
    if key in ("positions", "slots"):
        yield "too large", x + 1000


ANY_VALUES = ("compressed_attention", "topk_sparse_attention", "sliding_window_attention")
OF_DECODE = {
    "compressed_attention_decode": "cv_cache",
    "compressed_attention_decode in pages": "cv_cache",
    "selected_attention_decode": "v_cache",
    "selected_attention_decode in pages": "v_cache",
}
"""Their caches of values, which may have heads of any size."""
ONE_CU_SEQLENS = (*(f"{kind}_compress" for kind in COMPRESS_TYPES), "compress")
PAGED = (
    "block_selection_decode in pages",
    "compressed_attention_decode in pages",
    "load_rows in pages",
    "native_sparse_attention_decode in pages",
    "pool_append in pages",
    "selected_attention_decode in pages",
    "store_rows in pages",
)

AMOUNTS = ("fewer", "more")
RIGHT = {
    *((name, "v", what) for name in ANY_VALUES for what in ("last size", "last size doubled")),
    *(
        (name, cache, what)
        for name, cache in OF_DECODE.items()
        for what in ("last size", "last size doubled")
    ),
    *(
        (name, "cu_seqlens", f"a sequence {what}")
        for name in (*ONE_CU_SEQLENS, "native_sparse_attention", "index_loss")
        for what in ("fewer", "more")
    ),
    *((name, "block_table", "one of the first size more") for name in PAGED),
    *(("pool_append", name, "one of the second size fewer") for name in ("k_cache", "ck_cache")),
    *(  # the caches have their own dtype
        (f"{name}_decode of {caches}", "q", "float64")
        for name, caches in (
            ("block_selection", "a narrow cache"),
            ("selected_attention", "narrow caches"),
        )
    ),
    *((name, "x", "float64") for name in ("store_rows", "store_rows in pages")),
    ("block_selection_decode", "k_cache", "one of the first size more"),
    ("block_selection_decode", "k_cache", "one of the second size fewer"),
    *(
        ("block_selection_decode in pages", "k_cache", f"one of the first size {n}")
        for n in AMOUNTS
    ),
    *(("rope", "x", what) for what in ("float64", "one of the second size fewer")),
    *(
        (name, "k", f"one of the {size}")
        for name in ("compressed_lse", "block_selection")
        for size in ("first size more", "second size fewer")
    ),
    *(  # the windows after it are spare
        (name, "cu_seqlens_k", "ends early")
        for name in ("compressed_attention", "compressed_lse", "block_selection")
    ),
}
"""(op, tensor, change) of calls that are as right as before: values have their own head size, and
some tensors are the only ones to say how many sequences, slots or heads there are."""


EACH_TENSOR = [(name, key) for name in table() for key in tensors(name)]


def told(function: Callable[..., Any], given: dict[str, Any]) -> str:
    """The text of the call's InvalidInputError; empty for a valid call."""
    try:
        function(**given)
    except InvalidInputError as error:
        return str(error)
    return ""


def parameters(name: str) -> list[str]:
    return list(inspect.signature(call(name)[0]).parameters)


def test_the_table_has_every_op() -> None:
    names = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert {name.partition(" ")[0] for name in table()} == names - {"on_kernels"}


@pytest.mark.parametrize("name", table())
def test_the_table_has_right_calls(name: str) -> None:
    function, given = call(name)
    assert told(function, given) == ""


@pytest.mark.parametrize(("name", "key"), EACH_TENSOR)
def test_each_broken_tensor(name: str, key: str) -> None:
    changes = [what for what, _ in broken(key, call(name)[1][key])]
    for index, what in enumerate(changes):
        function, given = call(name)
        given[key] = list(broken(key, given[key]))[index][1]
        text = told(function, given)
        assert bool(text) == ((name, key, what) not in RIGHT), what
        assert not text or (text.isprintable() and text.count("; ") >= 2), (what, text)


@pytest.mark.parametrize(("name", "key"), EACH_TENSOR)
def test_any_strides_work_or_are_refused_by_name(name: str, key: str) -> None:
    """Each tensor as a view of a larger one: rows apart, in a part of its rows, transposed."""
    usual = as_tuple(call(name)[0](**call(name)[1]))
    x = call(name)[1][key]
    views = [torch.stack((x, x), 1)[:, 0], torch.cat((x, x), -1)[..., : x.shape[-1]]]
    if x.ndim > 1:
        views.append(x.mT.contiguous().mT)
    for view in views:
        function, given = call(name)
        assert torch.equal(view, x)
        given[key] = view
        found, text = (), ""
        try:
            found = as_tuple(function(**given))
        except InvalidInputError as error:
            text = str(error)
        if text:
            kind = "pe" if key == "pe_v" else key
            assert kind in text or (key.startswith("w") and "weight" in text)
            continue
        for out, expected in zip(found, usual, strict=True):
            torch.testing.assert_close(out, expected)


@pytest.mark.kernel
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("name", ["topk_sparse_attention", "sliding_window_attention"])
def test_one_tensor_as_queries_keys_and_values(name: str) -> None:
    """Inputs may be the same memory, on either path; gradients are those of separate copies."""
    x = Packed(query_heads=2, seqlens=(0, 3, 14), requires_grad=True)
    more: dict[str, Any] = {"window_size": 7}
    if name == "topk_sparse_attention":
        blocks = torch.tensor([[0, 2, 1]]).expand(17, 3)
        more = {"topk_idx": torch.stack([blocks, blocks]).int(), "block_size": 8}
    found = []
    for inputs in ((x.q, x.q, x.q), (x.q, x.q.clone(), x.q.clone())):
        o = getattr(ops, name)(*inputs, **more, cu_seqlens=x.cu_seqlens)
        found.append((o, *torch.autograd.grad(o.pow(2).sum(), x.q)))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


def as_tuple(found: Any) -> tuple[Tensor, ...]:
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf"), float("-inf")])
def test_scales(scale: float) -> None:
    for name, (function, given) in table().items():
        for word in {"sm_scale", "softmax_scale"} & set(parameters(name)):
            assert "softmax_scale: must be positive" in told(function, {**given, word: scale})


def test_a_scale_is_a_number() -> None:
    function, given = table()["sliding_window_attention"]
    assert "softmax_scale: must be positive" in told(
        function, {**given, "softmax_scale": torch.tensor(0.3)}
    )


SIZES = [
    (name, key) for name in table() for key, value in call(name)[1].items() if type(value) is int
]


@pytest.mark.parametrize(("name", "key"), SIZES)
def test_sizes_are_whole_numbers_that_kernels_can_add_to_places(name: str, key: str) -> None:
    """9.0 is not 9, though a table of known calls could take one for the other."""
    function, given = call(name)
    for wrong in (float(given[key]), 2**31 - 1, 2**40):
        assert key in told(function, {**given, key: wrong}), wrong
    usual, found = (
        as_tuple(function(**{**given, key: kind(given[key])})) for kind in (int, np.int64)
    )
    for x, expected in zip(found, usual, strict=True):
        assert x is expected or torch.equal(x, expected)


@pytest.mark.parametrize(("name", "key"), [(n, k) for n, k in SIZES if k in MOST_OF])
def test_what_kernels_walk_through_whole_is_as_long_as_a_spec_allows(name: str, key: str) -> None:
    """A block of 2^30 tokens is 2^25 steps for each token, in a sequence of ten too."""
    function, given = call(name)
    for wrong in (2 * MOST_OF[key], 2**30):
        assert f"{key} must be a whole number of at most" in told(function, {**given, key: wrong})


def test_a_spec_allows_no_more_than_ops() -> None:
    schema = json.loads((Path(__file__).parents[2] / "specs" / "spec.schema.json").read_text())
    for key, most in MOST_OF.items():
        described = schema["$defs"]["AttentionSection"]["properties"][key]
        assert described["anyOf"][0]["maximum"] <= most, key


def test_a_list_without_entries_is_refused() -> None:
    for name, (function, given) in table().items():
        if "topk_idx" in given:
            none = given["topk_idx"][..., :0].contiguous()
            assert "topk_idx must have" in told(function, {**given, "topk_idx": none}), name


@pytest.mark.parametrize("missing", ["cos", "sin"])
def test_half_of_a_rope(missing: str) -> None:
    function, given = table()["native_sparse_attention"]
    assert "cos and sin must come together" in told(function, {**given, missing: None})


WRONG_VALUES = [
    (name, key, what)
    for name, key in EACH_TENSOR
    for what, _ in broken(key, call(name)[1][key])
    if what
    in ("starts at 1", "falls", "ends early", "ends late", "below 0", "below -1", "too large")
    and (name, key, what) not in RIGHT
]


@pytest.mark.gpu
@pytest.mark.parametrize(("name", "key", "what"), WRONG_VALUES)
def test_values_on_a_gpu_are_read_where_that_is_asked_for(
    name: str, key: str, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSAGEN_CHECK_VALUES", "1")
    function, given = call(name)
    given[key] = dict(broken(key, given[key]))[what]
    assert told(function, {k: v.cuda() if isinstance(v, Tensor) else v for k, v in given.items()})


@pytest.mark.parametrize("asked", [False, True])
def test_values_elsewhere_are_read_where_that_is_asked_for(
    asked: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NSAGEN_CHECK_VALUES", "1" if asked else "0")
    monkeypatch.setattr("torch.cuda.is_current_stream_capturing", lambda: False)
    x, ends = (t.as_subclass(Elsewhere) for t in (torch.zeros(9, 2, 4), torch.tensor([0, 5, 3, 9])))

    def check() -> None:
        check_cu_seqlens("op", "cu_seqlens", ends.int().as_subclass(Elsewhere), x)

    assert bool(told(check, {})) is asked
