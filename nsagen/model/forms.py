"""The parameter-free members of the family: sparse attention from queries and keys after rope.

InfLLM-V2 and MoBA rank blocks of keys by means of roped keys, so they fit any dense model. `Form`
has their settings, `select` their choice.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from nsagen.core.workload import CACHE_DTYPES
from nsagen.model.checks import require
from nsagen.ops import block_selection, block_selection_decode, compressed_lse
from nsagen.runtime import Dispatcher, load

IMPLEMENTATION = "nsagen"
"""The `attn_implementation` of models of Transformers whose layers attend so."""

FORMS: dict[str, dict[str, Any]] = {
    "infllm_v2": {
        "kernel_size": 32,
        "kernel_stride": 16,
        "block_size": 64,
        "topk": 96,
        "init_blocks": 1,
        "local_blocks": 33,
        "dense_len": 8192,
        "dense_decode": False,
    },
    "moba": {
        "kernel_size": 512,
        "kernel_stride": 512,
        "block_size": 512,
        "topk": 3,
        "init_blocks": 0,
        "local_blocks": 1,
        "dense_len": 0,
        "dense_decode": True,
    },
}
"""The defaults of each form: MiniCPM4's sizes, and the smallest that MoBA's paper has."""

SCORES = {
    "infllm_v2": {"score_norm": "softmax", "score_heads": "sum", "score_pool": "max"},
    "moba": {"score_norm": "none", "score_heads": "each", "score_pool": "max"},
}
"""How `block_selection` scores for each form."""


@dataclass(frozen=True)
class Form:
    """The settings of a parameter-free member. Make it with `form_of`, which knows the defaults.

    Attributes:
        form: "infllm_v2" or "moba".
        kernel_size, kernel_stride: tokens of a window, whose keys' mean stands for them, and
            between the starts of two windows. MoBA has one window a block.
        block_size: tokens of a block.
        topk: blocks that a query sees, forced ones among them.
        init_blocks: blocks at the start that it always sees.
        local_blocks: blocks up to its own that it always sees.
        dense_len: sequences with fewer tokens attend to everything; -1 or 0: none do.
        dense_decode: whether a single new token behind a cache attends to everything.
        package: name of the generated package whose kernels a GPU runs; None for nsagen's own
            choice.
        cache_dtype: "float8_e4m3fn" or "int8": caches keep keys, values and windows in one byte an
            element, with a scale for each head of a token or window; None: in the model's dtype.
    """

    form: str
    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    dense_len: int
    dense_decode: bool
    package: str | None = None
    cache_dtype: str | None = None

    @property
    def dispatcher(self) -> Dispatcher | None:
        """The package's."""
        return dispatcher_of(self.package)

    @property
    def window_sizes(self) -> dict[str, Any]:
        """As the ops take them."""
        return {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}

    @property
    def rule(self) -> dict[str, Any]:
        """What `block_selection` takes."""
        return {
            **self.window_sizes,
            "block_size": self.block_size,
            "topk": self.topk,
            "init_blocks": self.init_blocks,
            "local_blocks": self.local_blocks,
            **SCORES[self.form],
        }

    def dense(self, tokens: int) -> bool:
        """Whether a sequence of so many tokens attends to everything."""
        return tokens < self.dense_len

    def windows(self, tokens: int) -> int:
        """Whole windows of a sequence."""
        return max(0, (tokens - self.kernel_size) // self.kernel_stride + 1)


@dataclass(frozen=True)
class Index:
    """A learned index, by which a layer selects blocks.

    Attributes:
        q: [N, HK, Di], a head for each key/value head; k: [N, 1, Di], both after norm and rope.
        rule: what `block_selection` takes besides them and the layout.
        dispatcher: the kernels.
    """

    q: Tensor
    k: Tensor
    rule: Mapping[str, Any]
    dispatcher: Dispatcher | None = None

    @property
    def block_size(self) -> int:
        return self.rule["block_size"]


@functools.cache
def dispatcher_of(package: str | None) -> Dispatcher | None:
    """The dispatcher of a generated package; None for nsagen's own choice.

    Raises:
        InvalidInputError: there is no such package.
    """
    return None if package is None else load(package)


def check_package(where: str, package: Any) -> None:
    """A name or None; whether there is such a package, a call says."""
    fits = package is None or isinstance(package, str)
    rule = "package must be the name of a generated package"
    require(fits, where, rule, repr(package), 'e.g. "minicpm4", after nsagen build')


def check_narrow(where: str, cache_dtype: Any) -> None:
    """A narrow dtype's name, or None."""
    fits = cache_dtype is None or (isinstance(cache_dtype, str) and cache_dtype in CACHE_DTYPES)
    rule = f"cache_dtype must be None or one of {', '.join(CACHE_DTYPES)}"
    require(fits, where, rule, repr(cache_dtype), "leave it out for the model's dtype")


SETTINGS = tuple(field.name for field in fields(Form))


def form_of(where: str, settings: Any) -> Form:
    """The settings with their defaults, checked.

    Args:
        where: what errors name.
        settings: a mapping with `form` and any others of `Form`'s attributes. MoBA's windows are
            its blocks: block_size alone is enough.

    Raises:
        InvalidInputError: not a mapping, an unknown name, or a value out of its range.
    """
    given = dict(settings) if isinstance(settings, Mapping) else {}
    names = ", ".join(FORMS)
    require(
        given.get("form") in FORMS,
        where,
        f"must be a mapping whose form is one of {names}",
        repr(settings),
        'e.g. {"form": "infllm_v2"}',
    )
    unknown = sorted(set(given) - set(SETTINGS), key=str)
    require(
        not unknown,
        where,
        f"the settings are {', '.join(SETTINGS)}",
        ", ".join(map(str, unknown)),
        "correct the name, or leave it out",
    )
    defaults = FORMS[given["form"]]
    if given["form"] == "moba" and "block_size" in given:
        size = given["block_size"]
        defaults = {**defaults, "kernel_size": size, "kernel_stride": size}
    form = Form(**{**defaults, **given})
    _check(where, form)
    return form


def _check(where: str, form: Form) -> None:
    values = asdict(form)
    minimum = {"init_blocks": 0, "local_blocks": 0, "dense_len": -1}
    for name, value in values.items():
        if name in ("form", "dense_decode", "package", "cache_dtype"):
            continue
        least = minimum.get(name, 1)
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        rule = f"{name} must be an integer of at least {least}"
        require(fits, where, rule, repr(value), f"set {name} to such a number")
    check_package(where, form.package)
    check_narrow(where, form.cache_dtype)
    fits = isinstance(form.dense_decode, bool)
    rule = "dense_decode must be true or false"
    require(fits, where, rule, repr(form.dense_decode), "set it to one of them")
    size, stride, block = form.kernel_size, form.kernel_stride, form.block_size
    if form.form == "moba":
        require(
            size == stride == block,
            where,
            "moba has one window a block: kernel_size and kernel_stride must equal block_size",
            f"{size}, {stride} and {block}",
            "leave them out",
        )
    for name, value in (("kernel_size", size), ("block_size", block)):
        rule = f"{name} must be a multiple of kernel_stride"
        require(value % stride == 0, where, rule, f"{value} and {stride}", f"e.g. {2 * stride}")
    forced = form.init_blocks + form.local_blocks
    rule = "topk counts the forced blocks: it must be at least init_blocks + local_blocks"
    require(form.topk >= forced, where, rule, f"{form.topk} and {forced}", "raise topk")


@torch.no_grad()
def select(
    form: Form,
    q: Tensor,
    windows: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    q_start: Tensor | None,
    softmax_scale: float,
) -> Tensor:
    """The blocks that each query sees.

    Args:
        q: [N, HQ, D], after rope.
        windows: [M, HK, D], means of roped keys.
        cu_seqlens_q: int32 [batch + 1].
        cu_seqlens_k: int32 [batch + 1], of the windows.
        q_start: int32 [batch], position of each sequence's first query; None: 0.
        softmax_scale: of the scores.

    Returns:
        int32 [HK, N, topk], or [HQ, N, topk] where each head selects for itself.
    """
    sizes = form.window_sizes
    where: dict[str, Any] = {
        "softmax_scale": softmax_scale,
        "q_start": q_start,
        "dispatcher": form.dispatcher,
    }
    lse = None
    if SCORES[form.form]["score_norm"] == "softmax":
        lse = compressed_lse(q, windows, cu_seqlens_q, cu_seqlens_k, **sizes, **where)
    return block_selection(q, windows, lse, cu_seqlens_q, cu_seqlens_k, **form.rule, **where)


def select_step(
    form: Form,
    q: Tensor,
    windows: Tensor,
    positions: Tensor,
    slots: Tensor,
    softmax_scale: float,
    k_scale: Tensor | None = None,
) -> Tensor:
    """The blocks that one new token of each row sees.

    Args:
        q: [B, HQ, D], after rope.
        windows: [B, M, HK, D], of each row, as a cache keeps them.
        positions: int32 [B], of the new tokens; -1: none.
        slots: int32 [B], the rows of `windows`.
        softmax_scale: of the scores.
        k_scale: float32 [B, M, HK], of windows of a narrow dtype.

    Returns:
        int32 [HK, B, topk], or [HQ, B, topk] where each head selects for itself.
    """
    more: dict[str, Any] = {"softmax_scale": softmax_scale, "dispatcher": form.dispatcher}
    more["k_scale"] = k_scale
    return block_selection_decode(q, windows, positions, slots, **form.rule, **more)
