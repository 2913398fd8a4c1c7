"""Workloads and schedules: what a kernel computes, and how.

Static parameters change a kernel's meaning and live in `Workload`; knobs change only its speed and
live in `Schedule`. The two never mix. Both the generating and the running side import this module,
so it needs only the standard library.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass

from nsagen.core.errors import InvalidInputError

Param = int | str | bool

PASSES = ("forward", "backward", "decode")

DTYPES = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}

COMPRESS_TYPES = ("avgpool", "weightedpool", "linear", "sigmoid_mul", "mlp")

BRANCH_KV = ("shared", "separate")
"""Whether all branches read the same keys and values, or each its own."""

CACHE_DTYPES = {"float8_e4m3fn": 448, "int8": 127}
"""Dtypes that a cache can have besides a workload's own, and the largest number of each. Each row,
a head of a token or window, has a scale beside it."""

_COMPRESS = ("compress_type", "head_dim", "kernel_size", "kernel_stride", "with_pe")
_COMPRESSED = ("head_dim", "v_head_dim", "gqa_ratio", "kernel_size", "kernel_stride")
_SELECTION = (
    *("head_dim", "gqa_ratio", "kernel_size", "kernel_stride"),
    *("block_size", "topk", "init_blocks", "local_blocks"),
)
_INDEX = ("head_dim", "index_head_dim", "gqa_ratio", "block_size")
_DENSE_INDEX = ("head_dim", "index_head_dim", "gqa_ratio")
_SELECTED = ("head_dim", "v_head_dim", "gqa_ratio", "block_size")
_SLIDING = ("head_dim", "v_head_dim", "gqa_ratio", "window_size")

STATIC_PARAMS: dict[tuple[str, str], tuple[str, ...]] = {
    ("compress", "forward"): _COMPRESS,
    ("compress", "backward"): _COMPRESS,
    ("rope", "forward"): ("head_dim",),
    ("compressed_attention", "forward"): _COMPRESSED,
    ("compressed_attention", "backward"): _COMPRESSED,
    ("block_selection", "forward"): _SELECTION,
    ("index_loss", "forward"): _INDEX,
    ("index_loss", "backward"): _INDEX,
    ("dense_index_loss", "forward"): _DENSE_INDEX,
    ("dense_index_loss", "backward"): _DENSE_INDEX,
    ("compressed_lse", "forward"): ("head_dim", "gqa_ratio", "kernel_size", "kernel_stride"),
    ("selected_attention", "forward"): _SELECTED,
    ("selected_attention", "backward"): _SELECTED,
    ("sliding_window_attention", "forward"): _SLIDING,
    ("sliding_window_attention", "backward"): _SLIDING,
    ("gated_sum", "forward"): ("v_head_dim",),
    ("gated_sum", "backward"): ("v_head_dim",),
    # Its sizes are the model's, not attention's: it takes any at run time.
    ("linear", "decode"): (),
    ("cache_append", "decode"): (
        "compress_type",
        "head_dim",
        "v_head_dim",
        "gqa_ratio",
        "kernel_size",
        "kernel_stride",
        "with_pe",
    ),
    ("compressed_attention", "decode"): (
        "head_dim",
        "v_head_dim",
        "gqa_ratio",
        "kernel_size",
        "kernel_stride",
        "block_size",
        "topk",
        "init_blocks",
        "local_blocks",
    ),
    ("block_selection", "decode"): _SELECTION,
    ("pool_append", "decode"): ("head_dim", "kernel_size", "kernel_stride"),
    ("selected_attention", "decode"): (*_SELECTED, "topk"),
    ("native_sparse_attention", "decode"): (
        "head_dim",
        "v_head_dim",
        "gqa_ratio",
        "block_size",
        "topk",
        "window_size",
    ),
}
"""The static parameters of each (op, pass), in the order in which names and headers show them."""

_HIDDEN = ("mlp_hidden",)
_SCORING = ("score_norm", "score_heads", "score_pool")
FORCED: dict[tuple[str, str], tuple[str, ...]] = {
    ("sliding_window_attention", "forward"): ("block_size", "init_blocks", "local_blocks"),
    ("sliding_window_attention", "backward"): ("block_size",),
    ("selected_attention", "forward"): ("init_blocks", "local_blocks"),
}
"""What tells of forced blocks that are met once: sliding-window attention gives their partial
result, and selected attention starts from it. A block_size without local_blocks is a window of
whole blocks: its W tokens end with the token's own block."""
FORCED_ONCE = tuple(key for key, names in FORCED.items() if "local_blocks" in names)
"""The forward passes that do so: calls run both or neither."""
OPTIONAL_PARAMS: dict[tuple[str, str], tuple[str, ...]] = {
    ("block_selection", "forward"): _SCORING,
    ("block_selection", "decode"): (*_SCORING, "cache_dtype"),
    ("compress", "forward"): _HIDDEN,
    ("compress", "backward"): _HIDDEN,
    ("cache_append", "decode"): (
        *("v_compress_type", *_HIDDEN, "v_with_pe", "branch_kv"),
        "cache_dtype",
    ),
    ("pool_append", "decode"): ("cache_dtype",),
    ("selected_attention", "decode"): ("cache_dtype",),
    ("compressed_attention", "decode"): ("cache_dtype",),
    ("native_sparse_attention", "decode"): ("cache_dtype",),
    **FORCED,
}
"""More static parameters, which a workload omits when they say nothing: `v_compress_type`
if it is compress_type, `mlp_hidden` if no type is mlp, `v_with_pe` if it is false,
`branch_kv` if it is "shared", `cache_dtype` if it is the workload's, what ranks blocks where it is
as in NSA, and forced blocks that are not met once."""

PARAMETERS = {
    "head_dim": "D: elements of a query and a key",
    "v_head_dim": "Dv: elements of a value and an output",
    "index_head_dim": "Di: elements of an index query and an index key",
    "gqa_ratio": "G: query heads of a key/value head",
    "kernel_size": "l: tokens of a window",
    "kernel_stride": "s: tokens between the starts of two windows",
    "block_size": "B: tokens of a block",
    "topk": "blocks that a token selects, forced ones included",
    "init_blocks": "forced blocks at the start of a sequence",
    "local_blocks": "forced blocks up to the token's own",
    "window_size": "W: tokens that a token sees, itself included",
    "compress_type": "how a window becomes one key and one value",
    "v_compress_type": "how a window becomes one value, where that differs",
    "with_pe": "whether a window's keys have a position embedding",
    "v_with_pe": "whether a window's values have one",
    "mlp_hidden": "hidden elements of the MLP that compresses",
    "branch_kv": "whether all branches read the same keys and values, or each its own",
    "cache_dtype": "dtype of the caches, where that differs",
    "score_norm": "whether products become a head's probabilities or stay as they are",
    "score_heads": "whether a group's heads sum their scores, or each selects for itself",
    "score_pool": "how windows become a block's score: a sum by shared tokens, or the maximum",
}
"""What each static parameter means, and its symbol in formulas."""

_SHORT = {
    "head_dim": "d",
    "v_head_dim": "dv",
    "index_head_dim": "di",
    "gqa_ratio": "g",
    "block_size": "b",
    "kernel_size": "l",
    "kernel_stride": "s",
    "topk": "k",
    "window_size": "w",
    "init_blocks": "i",
    "local_blocks": "c",
    "mlp_hidden": "h",
    "v_compress_type": "v",
}


def wide_band(local_blocks: int, topk: int) -> bool:
    """Whether local blocks are computed as dense rows: 16 of them, and a quarter of a choice.

    On an H200 selected attention of 96 blocks then takes 0.79 of the time, and of 64 blocks 0.71,
    where 33 are local.
    """
    return local_blocks >= 16 and 4 * local_blocks >= topk


def parameter_names(op: str, pass_: str) -> tuple[str, ...]:
    """All static parameters of an op and pass; those that can be omitted come last."""
    return STATIC_PARAMS[op, pass_] + OPTIONAL_PARAMS.get((op, pass_), ())


def spec_names(op: str, pass_: str) -> tuple[str, ...]:
    """The parameters that a spec decides: all but forced blocks, which a call asks for."""
    asked = FORCED.get((op, pass_), ())
    return tuple(name for name in parameter_names(op, pass_) if name not in asked)


def _defaults(params: Mapping[str, Param]) -> dict[str, Param]:
    """The value of each parameter that a workload omits; an mlp always has a size."""
    kind = params.get("compress_type", "")
    defaults: dict[str, Param] = {"v_compress_type": kind, "v_with_pe": False}
    defaults["branch_kv"] = BRANCH_KV[0]
    defaults["cache_dtype"] = ""
    defaults |= {"score_norm": "softmax", "score_heads": "sum", "score_pool": "overlap"}
    defaults |= {"block_size": 0, "init_blocks": 0, "local_blocks": 0}
    if "mlp" not in (kind, params.get("v_compress_type")):
        defaults["mlp_hidden"] = 0
    return defaults


@dataclass(frozen=True, order=True)
class Workload:
    """An op and a pass with every static parameter fixed. Build it with `Workload.of`.

    Attributes:
        op: e.g. "selected_attention".
        pass_: "forward", "backward" or "decode".
        dtype: of q, k, v and the outputs: "float16", "bfloat16" or "float32".
        params: (name, value) pairs in the order of `parameter_names`, without those that say
            nothing; see `OPTIONAL_PARAMS`.
    """

    op: str
    pass_: str
    dtype: str
    params: tuple[tuple[str, Param], ...]

    @classmethod
    def of(cls, op: str, pass_: str, *, dtype: str, **params: Param) -> Workload:
        """Check the names and put the parameters into their one order.

        Raises:
            InvalidInputError: unknown op, pass or dtype; a parameter missing or not the op's.
        """
        names = STATIC_PARAMS.get((op, pass_))
        if names is None:
            known = ", ".join(f"{o} {p}" for o, p in STATIC_PARAMS)
            raise InvalidInputError(f"workload: no op {op!r} with pass {pass_!r}; known: {known}")
        if dtype not in DTYPES:
            raise InvalidInputError(
                f"workload {op} {pass_}: dtype must be one of {', '.join(DTYPES)}, got {dtype!r}"
            )
        optional = OPTIONAL_PARAMS.get((op, pass_), ())
        defaults = _defaults(params)
        missing = [n for n in optional if n not in params and n not in defaults]
        if not set(names) <= set(params) <= {*names, *optional} or missing:
            raise InvalidInputError(
                f"workload {op} {pass_}: needs exactly the parameters "
                f"{', '.join((*names, *missing))}; got {', '.join(sorted(params)) or 'none'}"
            )
        if "mlp_hidden" in defaults:  # whatever the given value, nothing has that size
            params = params | {"mlp_hidden": 0}
        told = [n for n in optional if params.get(n, defaults.get(n)) != defaults.get(n)]
        return cls(op, pass_, dtype, tuple((name, params[name]) for name in (*names, *told)))

    def named(self) -> dict[str, Param]:
        """Every static parameter by name, including omitted ones."""
        values = dict(self.params)
        optional = OPTIONAL_PARAMS.get((self.op, self.pass_), ())
        return {**{n: v for n, v in _defaults(values).items() if n in optional}, **values}

    def __getattr__(self, name: str) -> Param:
        for key, value in self.__dict__.get("params", ()):
            if key == name:
                return value
        if "params" in self.__dict__ and name in self.named():
            return self.named()[name]
        raise AttributeError(f"workload {self.__dict__.get('op')} has no parameter {name!r}")

    @property
    def label(self) -> str:
        """Short text for file names and tables, e.g. `bf16_d128_g16_b64`."""
        parts = [DTYPES[self.dtype]]
        values = dict(self.params)
        for name, value in self.params:
            if name == "v_head_dim" and value == values.get("head_dim"):
                continue
            if name in ("with_pe", "v_with_pe"):
                parts += [name.removeprefix("with_").replace("_", "")] if value else []
            else:
                parts.append(f"{_SHORT.get(name, '')}{value}")
        return "_".join(parts)

    def __str__(self) -> str:
        return f"{self.op} {self.pass_} {self.label}"


@dataclass(frozen=True, order=True)
class Schedule:
    """One assignment of an algorithm's knobs. Build it with `Schedule.of`."""

    algorithm: str
    knobs: tuple[tuple[str, Param], ...]

    @classmethod
    def of(
        cls, algorithm: str, knobs: Mapping[str, Param] | None = None, **more: Param
    ) -> Schedule:
        merged = {**(knobs or {}), **more}
        return cls(algorithm, tuple(sorted(merged.items())))

    def __getattr__(self, name: str) -> Param:
        for key, value in self.__dict__.get("knobs", ()):
            if key == name:
                return value
        raise AttributeError(f"schedule {self.__dict__.get('algorithm')} has no knob {name!r}")

    def __str__(self) -> str:
        return f"{self.algorithm}(" + ", ".join(f"{k}={v}" for k, v in self.knobs) + ")"


def variant_name(workload: Workload, schedule: Schedule, fingerprint: str) -> str:
    """Name of a kernel file and of the kernel in it.

    `<op>_<pass>__<label>__<hash8>`; the hash covers workload, schedule and the code's fingerprint.
    """
    text = json.dumps([list(workload.params), workload.dtype, str(schedule), fingerprint])
    digest = hashlib.sha256(text.encode()).hexdigest()[:8]
    return f"{workload.op}_{workload.pass_}__{workload.label}__{digest}"
