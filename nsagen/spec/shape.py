"""Attention shapes: one value for each parameter, the rules between them, and their workloads."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace

from nsagen.core.branches import BRANCHES
from nsagen.core.workload import BRANCH_KV, STATIC_PARAMS, Param, Workload, parameter_names

_SERVES = {
    ("compress", "forward"): {"compressed", "selected"},
    ("compress", "backward"): {"compressed"},
    ("compressed_attention", "forward"): {"compressed", "selected"},
    ("compressed_attention", "backward"): {"compressed"},
    ("compressed_attention", "decode"): {"compressed", "selected"},
    ("block_selection", "forward"): {"selected"},
    ("selected_attention", "forward"): {"selected"},
    ("selected_attention", "backward"): {"selected"},
    ("sliding_window_attention", "forward"): {"sliding"},
    ("sliding_window_attention", "backward"): {"sliding"},
}
"""The branches that an op and pass serve; all branches if it is missing here."""


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

    def __post_init__(self) -> None:
        types = (self.compress_type, self.v_compress_type or self.compress_type)
        hidden = (self.mlp_hidden or self.head_dim) if "mlp" in types else 0
        object.__setattr__(self, "v_compress_type", types[1])
        object.__setattr__(self, "mlp_hidden", hidden)

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
        on = set(branches) - (set() if self.window_size else {"sliding"})
        shape: dict[str, Param] = asdict(self._least(on))
        of_values = shape | {"head_dim": self.v_head_dim, "with_pe": shape["v_with_pe"]}
        of_values["compress_type"] = shape["v_compress_type"]
        for op, pass_ in STATIC_PARAMS:
            names = parameter_names(op, pass_)
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

    def _least(self, on: Collection[str]) -> AttentionShape:
        """As a model calls the ops: compression for a branch that is off is a plain mean."""
        if "compressed" in on:
            return self
        values = replace(self, v_compress_type="avgpool", v_with_pe=False)
        if "selected" in on:  # ranks blocks by compressed keys
            return values
        return replace(values, compress_type="avgpool", with_pe=False)

    def _workload(self, op: str, pass_: str, params: dict[str, Param]) -> Workload:
        return Workload.of(op, pass_, dtype=self.dtype, **params)


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


def _divisors(number: int) -> str:
    return ", ".join(str(n) for n in range(1, number + 1) if number % n == 0)
