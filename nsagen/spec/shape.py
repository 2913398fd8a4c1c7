"""Attention shapes: one value for each parameter, the rules between them, and their workloads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace

from nsagen.core.branches import BRANCHES
from nsagen.core.workload import (
    BRANCH_KV,
    FORCED_ONCE,
    STATIC_PARAMS,
    Param,
    Workload,
    parameter_names,
    spec_names,
    wide_band,
)

_SERVES = {
    ("compress", "forward"): {"compressed", "selected"},
    ("compress", "backward"): {"compressed"},
    ("compressed_attention", "forward"): {"compressed", "selected"},
    ("compressed_attention", "backward"): {"compressed"},
    ("compressed_attention", "decode"): {"compressed", "selected"},
    ("block_selection", "forward"): {"selected"},
    ("block_selection", "decode"): set(),
    ("compressed_lse", "forward"): set(),
    ("index_loss", "forward"): set(),
    ("index_loss", "backward"): set(),
    ("dense_index_loss", "forward"): set(),
    ("dense_index_loss", "backward"): set(),
    ("pool_append", "decode"): set(),
    ("selected_attention", "decode"): set(),
    ("selected_attention", "forward"): {"selected"},
    ("selected_attention", "backward"): {"selected"},
    ("sliding_window_attention", "forward"): {"sliding"},
    ("sliding_window_attention", "backward"): {"sliding"},
}
"""The branches of NSA that an op and pass serve; all branches if it is missing here."""

_FAMILY = {
    ("block_selection", "forward"),
    ("block_selection", "decode"),
    ("selected_attention", "forward"),
    ("selected_attention", "backward"),
    ("selected_attention", "decode"),
}
"""What every member of the family besides NSA runs; see `AttentionShape._member_workloads`."""


@dataclass(frozen=True, order=True)
class AttentionShape:
    """One Native Sparse Attention: every static parameter of every op.

    Attributes:
        head_dim: size D of a query and key head; v_head_dim: of a value head.
        gqa_ratio: query heads for one key/value head, G.
        dtype: of q, k, v and the outputs.
        compress_type: one of `nsagen.core.workload.COMPRESS_TYPES`, for keys.
        kernel_size: tokens that one window compresses; kernel_stride: tokens between windows.
        block_size: tokens of a block that is selected as a whole.
        topk: blocks selected per token; always including init_blocks and local_blocks.
        window_size: keys that a token sees in sliding-window attention, its own included;
            0: the branch does not exist.
        with_pe: whether compression adds a position embedding to keys.
        v_compress_type: for values; "" becomes compress_type.
        mlp_hidden: elements between the layers of an mlp, for keys and values alike; 0 becomes
            head_dim. Always 0 if an mlp compresses neither.
        v_with_pe: whether compression adds a position embedding to values.
        branch_kv: "shared" if all branches read the same keys and values, else "separate".
        cache_dtype: of the caches that decoding reads, one of `nsagen.core.workload.CACHE_DTYPES`;
            "": dtype.

    The rest names another member of the family; the defaults are NSA's.

    Attributes:
        scorer: "compressed" if blocks are ranked by compressed keys, "index" if by index queries
            and keys of their own.
        index_heads: index query heads, one per key/value head; index_head_dim: size of each. 0
            with scorer "compressed".
        score_norm, score_heads, score_pool: as in `nsagen.ops.reference.block_selection.Scoring`.
        pool_rope: "before" if keys are compressed before rope, "after" if after it.
        lse_windows: windows that one key of the softmax's normalizer stands for.
        output_gate: "sigmoid" if a gate multiplies the attention's output, else "none".
        rotary_dim: elements of a head that rope rotates; 0 becomes head_dim.
        dense_len: sequences with fewer tokens use dense attention.
    """

    head_dim: int
    v_head_dim: int
    gqa_ratio: int
    dtype: str
    compress_type: str
    kernel_size: int
    kernel_stride: int
    block_size: int
    topk: int
    init_blocks: int
    local_blocks: int
    window_size: int
    with_pe: bool
    v_compress_type: str = ""
    mlp_hidden: int = 0
    v_with_pe: bool = False
    branch_kv: str = BRANCH_KV[0]
    cache_dtype: str = ""
    scorer: str = "compressed"
    index_heads: int = 0
    index_head_dim: int = 0
    score_norm: str = "softmax"
    score_heads: str = "sum"
    score_pool: str = "overlap"
    pool_rope: str = "before"
    lse_windows: int = 1
    output_gate: str = "none"
    rotary_dim: int = 0
    dense_len: int = 0

    def __post_init__(self) -> None:
        types = (self.compress_type, self.v_compress_type or self.compress_type)
        hidden = (self.mlp_hidden or self.head_dim) if "mlp" in types else 0
        object.__setattr__(self, "v_compress_type", types[1])
        object.__setattr__(self, "mlp_hidden", hidden)
        object.__setattr__(self, "rotary_dim", self.rotary_dim or self.head_dim)

    @property
    def family_keys(self) -> tuple[str, ...]:
        """The keys that make this shape another member of the family than NSA; none for NSA."""
        usual = {f.name: f.default for f in fields(self)} | {"rotary_dim": self.head_dim}
        return tuple(name for name in FAMILY_KEYS if getattr(self, name) != usual[name])

    def said(self) -> dict[str, Param]:
        """The parameters, without optional ones that have the value they would get if omitted."""
        optional = {f.name: f.default for f in fields(self) if f.default is not MISSING}
        left_out = asdict(replace(self, **optional))
        values = asdict(self).items()
        return {n: v for n, v in values if n not in optional or v != left_out[n]}

    def workloads(
        self, passes: Iterable[str], branches: Iterable[str] = BRANCHES
    ) -> Iterator[Workload]:
        """The workload of each op that the branches need with one of the passes; `compress` has
        one for keys and one for values."""
        if self.family_keys:
            yield from self._member_workloads(passes)
            return
        on = set(branches) - (set() if self.window_size else {"sliding"})
        shape: dict[str, Param] = asdict(self._least(on))
        of_values = shape | {"head_dim": self.v_head_dim, "with_pe": shape["v_with_pe"]}
        of_values["compress_type"] = shape["v_compress_type"]
        for op, pass_ in STATIC_PARAMS:
            names = spec_names(op, pass_)
            if pass_ not in passes or not on & _SERVES.get((op, pass_), on):
                continue
            used = shape
            if op == "native_sparse_attention":  # as the op calls it: the least for branches off
                window = self.window_size if "sliding" in on else 1
                topk = self.topk if "selected" in on else 1
                used = shape | {"window_size": window, "topk": topk}
            yield self._workload(op, pass_, {name: used[name] for name in names})
            if op == "compress":
                yield self._workload(op, pass_, {name: of_values[name] for name in names})

    def forced_once(
        self, passes: Collection[str], branches: Collection[str] = BRANCHES
    ) -> tuple[Workload, ...]:
        """The forward passes of sliding-window and selected attention that meet forced blocks once,
        which calls run where a target covers both; none where calls don't: see
        `nsagen.ops.forced_blocks`. Of another member, those of a wide local band, backward too:
        see `nsagen.ops.local_band`."""
        if self.family_keys:
            return self._band(passes)
        shared = self.branch_kv == BRANCH_KV[0] and not self.family_keys
        whole = "forward" in passes and set(branches) == set(BRANCHES) and self.window_size
        if not (shared and whole and self.local_blocks):
            return ()
        values: dict[str, Param] = asdict(self)
        return tuple(
            self._workload(*key, {name: values[name] for name in parameter_names(*key)})
            for key in STATIC_PARAMS
            if key in FORCED_ONCE
        )

    def _band(self, passes: Collection[str]) -> tuple[Workload, ...]:
        if "forward" not in passes or not wide_band(self.local_blocks, self.topk):
            return ()
        values: dict[str, Param] = asdict(self) | {"init_blocks": 0}
        values["window_size"] = self.local_blocks * self.block_size
        found = {
            ("selected_attention", "forward"): parameter_names("selected_attention", "forward")
        }
        for pass_ in ("forward", "backward"):
            if pass_ in passes:
                key = ("sliding_window_attention", pass_)
                found[key] = (*STATIC_PARAMS[key], "block_size")
        return tuple(
            self._workload(*key, {name: values[name] for name in names})
            for key, names in found.items()
        )

    def _member_workloads(self, passes: Iterable[str]) -> Iterator[Workload]:
        """Those of a member that has the selected branch alone.

        Rope, norms and the output gate are the model's own. With scorer "index" the selection runs
        on index heads; with a softmax it takes the log-sum-exp of a pass of its own.
        """
        values: dict[str, Param] = asdict(self)
        of_scores = dict(values)
        if self.scorer == "index":
            of_scores |= {"head_dim": self.index_head_dim, "gqa_ratio": self.index_heads}
        for op, pass_ in STATIC_PARAMS:
            used, wanted = of_scores, (op, pass_) in _FAMILY
            if op == "pool_append" or (op, pass_) == ("compress", "forward"):
                wanted = self.kernel_size > 1
            elif op in ("index_loss", "dense_index_loss"):
                # Only training calls it, its forward pass too.
                wanted, used = self.scorer == "index" and "backward" in passes, values
            elif op == "compressed_lse":
                wanted = self.score_norm == "softmax"
                used = values | {
                    "kernel_size": self.kernel_size * self.lse_windows,
                    "kernel_stride": self.kernel_stride * self.lse_windows,
                }
            elif op != "block_selection":
                used = values
            if wanted and pass_ in passes:
                names = spec_names(op, pass_)
                yield self._workload(op, pass_, {name: used[name] for name in names})

    def _least(self, on: Collection[str]) -> AttentionShape:
        """As a model calls the ops: compression for a branch that is off is a plain mean."""
        if "compressed" in on:
            return self
        values = replace(self, v_compress_type="avgpool", v_with_pe=False)
        if "selected" in on:  # ranks blocks by compressed keys
            return values
        return replace(values, compress_type="avgpool", with_pe=False)

    def _workload(self, op: str, pass_: str, params: dict[str, Param]) -> Workload:
        # A narrow cache's means are made of it alone: nothing has another dtype than its scales.
        own = op == "pool_append" and params["cache_dtype"]
        return Workload.of(op, pass_, dtype="float32" if own else self.dtype, **params)


FAMILY_KEYS = (
    *("scorer", "index_heads", "index_head_dim", "score_norm", "score_heads", "score_pool"),
    *("pool_rope", "lse_windows", "output_gate", "rotary_dim", "dense_len"),
)
"""The keys that name a member of the family."""

PARAMETERS = tuple(field.name for field in fields(AttentionShape))
"""The names of a shape's parameters, in the order of its fields."""


@dataclass(frozen=True)
class Violation:
    """A rule between parameters that a shape breaks.

    Attributes:
        key: the parameter to look at first.
        rule: what must hold.
        names: the parameters involved.
        remedy: what to do.
    """

    key: str
    rule: str
    names: tuple[str, ...]
    remedy: str


def violations(shape: AttentionShape) -> Iterator[Violation]:
    """The rules between parameters that the shape breaks (the schema has those for single values).

    kernel_stride divides kernel_size and block_size, so windows and blocks lie on one grid
    and a window shares a whole number of strides with a block.
    """
    size, stride, block = shape.kernel_size, shape.kernel_stride, shape.block_size
    if size % stride:
        remedy = f"choose kernel_stride from {_divisors(size)}"
        if stride % size == 0:
            remedy = (
                f"swap them (kernel_size: {stride}, kernel_stride: {size}): the guide's "
                "`kernel_stride must be divisible by kernel_size` is the other way round"
            )
        yield Violation(
            "kernel_stride",
            "kernel_size must be divisible by kernel_stride",
            ("kernel_size", "kernel_stride"),
            remedy,
        )
    if block % stride:
        yield Violation(
            "block_size",
            "block_size must be divisible by kernel_stride",
            ("block_size", "kernel_stride"),
            f"choose a multiple of {stride} for block_size",
        )
    if shape.topk < shape.init_blocks + shape.local_blocks:
        yield Violation(
            "topk",
            "topk must be at least init_blocks + local_blocks, which are always selected",
            ("topk", "init_blocks", "local_blocks"),
            f"choose topk >= {shape.init_blocks + shape.local_blocks}",
        )
    yield from _cache_violations(shape)
    yield from _family_violations(shape)


def _cache_violations(shape: AttentionShape) -> Iterator[Violation]:
    """What caches of a narrow dtype exclude."""
    if not shape.cache_dtype:
        return
    if shape.branch_kv == "separate":
        yield Violation(
            "branch_kv",
            "cache_dtype needs branch_kv shared",
            ("branch_kv", "cache_dtype"),
            "leave out cache_dtype, or write branch_kv: shared",
        )
    if shape.dtype == "float16":
        yield Violation(
            "dtype",
            "cache_dtype needs dtype bfloat16 or float32, whose range holds the caches' values",
            ("dtype", "cache_dtype"),
            "leave out cache_dtype, or write dtype: bfloat16",
        )


def _family_violations(shape: AttentionShape) -> Iterator[Violation]:
    """Combinations of the family's keys that have no meaning."""
    if shape.rotary_dim > shape.head_dim:
        yield Violation(
            "rotary_dim",
            "rotary_dim must be at most head_dim",
            ("rotary_dim", "head_dim"),
            f"choose rotary_dim <= {shape.head_dim}, or leave it out",
        )
    for name in ("index_heads", "index_head_dim"):
        if (getattr(shape, name) > 0) != (shape.scorer == "index"):
            given = getattr(shape, name) > 0
            yield Violation(
                name,
                f"scorer index needs {name}, and no other scorer takes it",
                ("scorer", name),
                "leave it out, or write scorer: index" if given else f"add {name}",
            )
    if shape.scorer == "index":
        yield from _index_violations(shape)
        return
    if shape.score_norm == "none" and shape.score_pool == "overlap":
        yield Violation(
            "score_pool",
            "score_norm none needs score_pool max: sums of raw products would rank blocks by how "
            "many windows they touch",
            ("score_norm", "score_pool"),
            "write score_pool: max",
        )
    if shape.score_norm == "none" and shape.lse_windows != 1:
        yield Violation(
            "lse_windows",
            "lse_windows needs score_norm softmax, whose normalizer it is for",
            ("score_norm", "lse_windows"),
            "leave lse_windows out",
        )
    if shape.score_heads == "each" and shape.gqa_ratio != 1:
        yield Violation(
            "score_heads",
            "score_heads each needs gqa_ratio 1 with scorer compressed: attention takes one "
            "selection per key/value head",
            ("score_heads", "gqa_ratio"),
            "write gqa_ratio: 1 and repeat keys and values for each query head",
        )
    plain = (shape.compress_type, shape.v_compress_type) == ("avgpool", "avgpool")
    if shape.family_keys and not (plain and not shape.with_pe and not shape.v_with_pe):
        yield Violation(
            "compress_type",
            f"with {shape.family_keys[0]}, keys must be compressed by their plain mean",
            ("compress_type", "with_pe"),
            "write compress_type: avgpool and with_pe: false",
        )


def _index_violations(shape: AttentionShape) -> Iterator[Violation]:
    """A learned index scores tokens one by one: what compression and softmaxes take is refused."""
    needed: dict[str, Param] = {
        "kernel_size": 1,
        "kernel_stride": 1,
        "score_norm": "none",
        "score_heads": "each",
        "score_pool": "max",
        "pool_rope": "before",
        "lse_windows": 1,
        "compress_type": "avgpool",
        "with_pe": False,
    }
    for name, value in needed.items():
        if getattr(shape, name) != value:
            text = str(value).lower()
            yield Violation(
                name,
                f"scorer index needs {name} {text}: it ranks a block by the largest product of an "
                "index query with the index keys of its tokens",
                ("scorer", name),
                f"write {name}: {text}",
            )


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
