"""The settings that make attention sparse, and the rules between them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any

from nsagen.core.branches import BRANCHES, branches_on
from nsagen.core.workload import BRANCH_KV, COMPRESS_TYPES
from nsagen.model.checks import require, require_integers

GATE_TYPES = ("linear", "mlp")


@dataclass(frozen=True)
class Sparsity:
    """The settings of Native Sparse Attention besides the sizes of its heads.

    Attributes:
        compress_type: how a window of keys becomes one: "avgpool", "weightedpool", "linear",
            "mlp" or "sigmoid_mul".
        kernel_size: tokens that one compression window covers; a multiple of kernel_stride.
        kernel_stride: tokens from one window's start to the next one's.
        block_size: tokens of a selection block; a multiple of kernel_stride.
        topk: blocks that a query attends to, the initial and local ones included.
        init_blocks: first blocks of the sequence that are always selected.
        local_blocks: blocks up to the query's own that are always selected.
        window_size: tokens of the sliding window, the query's own included; 0: no such branch.
        branches: those that are on, of "compressed", "selected" and "sliding".
        branch_kv: "shared": the branches read the same keys and values; "separate": each that is
            on has projections of its own.
        v_compress_type: how a window of values becomes one; None for compress_type.
        mlp_hidden: hidden units of "mlp" compression; None for the head size.
        v_with_pe: whether compression adds a position embedding to values too, as to keys.
        gate_type: "linear": sigmoid(W x); "mlp": sigmoid(W2 silu(W1 x)).
        gate_hidden: hidden units of an "mlp" gate; None for the head size.

    Raises:
        InvalidInputError: a rule above is broken.
    """

    compress_type: str = "weightedpool"
    kernel_size: int = 32
    kernel_stride: int = 16
    block_size: int = 64
    topk: int = 16
    init_blocks: int = 1
    local_blocks: int = 2
    window_size: int = 512
    branches: tuple[str, ...] = BRANCHES
    branch_kv: str = "shared"
    v_compress_type: str | None = None
    mlp_hidden: int | None = None
    v_with_pe: bool = False
    gate_type: str = "linear"
    gate_hidden: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.branches, str):  # JSON has lists
            object.__setattr__(self, "branches", tuple(self.branches))
        _check_kinds(self)
        _check_sizes(self)
        for name, derived in vars(Sparsity).items():
            if isinstance(derived, cached_property):
                getattr(self, name)  # now: code that torch.compile traces may not set it

    @cached_property
    def on(self) -> tuple[str, ...]:
        """The branches that are on, in the order of a gate's columns."""
        return branches_on(type(self).__name__, self.branches, self.window_size)

    @cached_property
    def needs_windows(self) -> bool:
        """Whether anything reads compressed keys: attention, or selection, which ranks by them."""
        return "compressed" in self.on or "selected" in self.on

    @cached_property
    def key_type(self) -> str:
        """How keys compress; the cheapest way if nothing reads them."""
        return self.compress_type if self.needs_windows else "avgpool"

    @cached_property
    def value_type(self) -> str:
        """How values compress; the cheapest way if nothing reads them."""
        if "compressed" not in self.on:
            return "avgpool"
        return self.v_compress_type or self.compress_type

    @cached_property
    def embeds_values(self) -> bool:
        """Whether compression adds a position embedding to values."""
        return self.v_with_pe and "compressed" in self.on

    @cached_property
    def kv_branches(self) -> tuple[str, ...]:
        """The branches with key and value projections. The selected branch's
        serve those without: every branch if shared, and the sliding one if selected is off."""
        if self.branch_kv == "shared":
            return ("selected",)
        both = "selected" in self.on and "sliding" in self.on
        return ("selected", "compressed", "sliding") if both else ("selected", "compressed")

    def mlp_units(self, head_dim: int) -> int:
        """Hidden units of "mlp" compression."""
        return self.mlp_hidden or head_dim

    def gate_units(self, head_dim: int) -> int | None:
        """Hidden units of the gate; None for a linear one."""
        return None if self.gate_type == "linear" else self.gate_hidden or head_dim

    @cached_property
    def window_sizes(self) -> Mapping[str, Any]:
        """What the ops on compression windows take."""
        return {"kernel_size": self.kernel_size, "kernel_stride": self.kernel_stride}

    @cached_property
    def selection_sizes(self) -> Mapping[str, Any]:
        """What the ops that select blocks take."""
        names = ("block_size", "topk", "init_blocks", "local_blocks")
        return {**self.window_sizes, **{name: getattr(self, name) for name in names}}

    def settings(self) -> dict[str, Any]:
        """Only the fields above, of this class or one that adds its own."""
        return {name: getattr(self, name) for name in SETTINGS}


SETTINGS = tuple(field.name for field in fields(Sparsity))
"""The names of what makes attention sparse."""


def settings_of(source: Any) -> dict[str, Any]:
    """The settings that an object has as attributes: a `Sparsity`, or an `AttentionShape` of a
    spec, whose size of 0 means no MLP."""
    given = {name: getattr(source, name) for name in SETTINGS if hasattr(source, name)}
    return {n: v for n, v in given.items() if (n, v) != ("mlp_hidden", 0)}


def stored_settings(sparsity: Sparsity) -> dict[str, Any]:
    """`settings` as a checkpoint's config.json has them: those of the paper's own form, from
    `branches` on, appear only if they differ from the default."""
    first = SETTINGS.index("branches")
    given = sparsity.settings()
    usual = {field.name: field.default for field in fields(Sparsity)}
    kept = [n for i, n in enumerate(SETTINGS) if i < first or given[n] != usual[n]]
    return {n: list(given[n]) if n == "branches" else given[n] for n in kept}


def _check_kinds(config: Sparsity) -> None:
    where = type(config).__name__
    one_of = {
        "compress_type": COMPRESS_TYPES,
        "v_compress_type": (*COMPRESS_TYPES, None),
        "branch_kv": BRANCH_KV,
        "gate_type": GATE_TYPES,
        "v_with_pe": (True, False),
    }
    for name, allowed in one_of.items():
        value = getattr(config, name)
        require(
            any(value is one or (isinstance(one, str) and value == one) for one in allowed),
            where,
            f"{name} must be one of {', '.join(map(str, allowed))}",
            repr(value),
            "choose one of these",
        )
    require(
        not isinstance(config.branches, str),
        where,
        f"branches must be a tuple of {', '.join(BRANCHES)}",
        repr(config.branches),
        f"write ({config.branches!r},)",
    )


def _check_sizes(config: Sparsity) -> None:
    where = type(config).__name__
    require_integers(config, ("kernel_size", "kernel_stride", "block_size", "topk"), 1)
    require_integers(config, ("init_blocks", "local_blocks", "window_size"), 0)
    hidden = ("mlp_hidden", "gate_hidden")
    require_integers(config, tuple(n for n in hidden if getattr(config, n) is not None), 1)
    size, stride = config.kernel_size, config.kernel_stride
    swapped = stride % size == 0
    require(
        size % stride == 0,
        where,
        "kernel_size must be divisible by kernel_stride (not the other way round)",
        f"kernel_size={size}, kernel_stride={stride}",
        f"did you mean kernel_size={stride}, kernel_stride={size}?"
        if swapped
        else f"try kernel_stride={_largest_divisor(size, stride)}",
    )
    require(
        config.block_size % stride == 0,
        where,
        "block_size must be divisible by kernel_stride",
        f"block_size={config.block_size}, kernel_stride={stride}",
        f"use a multiple of {stride}, such as {-(-config.block_size // stride) * stride}",
    )
    forced = config.init_blocks + config.local_blocks
    require(
        config.topk >= forced,
        where,
        "topk must be at least init_blocks + local_blocks, which are always selected",
        f"topk={config.topk}, init_blocks={config.init_blocks}, local_blocks={config.local_blocks}",
        f"raise topk to {forced} or more",
    )
    on = config.on
    require(
        config.branch_kv == "shared" or ("compressed" in on and len(on) > 1),
        where,
        "branch_kv='separate' needs the compressed branch, which alone trains the keys that "
        "selection ranks by, and another one",
        f"branches {', '.join(on)}",
        "turn it on, or leave branch_kv at 'shared'",
    )


def _largest_divisor(number: int, limit: int) -> int:
    return max(d for d in range(1, min(number, limit) + 1) if number % d == 0)
