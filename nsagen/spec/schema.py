"""The shape of a spec file: its keys, and the rule of each single value."""

from __future__ import annotations

import keyword
from typing import Annotated, Any, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetJsonSchemaHandler,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from nsagen.core.branches import BRANCHES
from nsagen.core.errors import SpecError
from nsagen.core.target import KNOWN_TARGETS, parse_target
from nsagen.core.text import nearest
from nsagen.core.workload import STATIC_PARAMS

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"

PASSES = tuple(dict.fromkeys(pass_ for _, pass_ in STATIC_PARAMS))
"""The passes that some op has."""

DEFAULT_PASSES = ("forward", "decode")
DEFAULT_TARGETS = ("cuda:80", "cuda:90")

MAX_VALUES = 64
"""Most values of one list."""

T = TypeVar("T")


class _OneOrMany:
    """In JSON Schema, a list field also takes one value of its items."""

    def __get_pydantic_json_schema__(
        self, core: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        schema = handler(core)
        return {"anyOf": [schema["items"], {**schema, "uniqueItems": True}]}


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


def _unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    for i, value in enumerate(values):
        if value in values[:i]:
            raise ValueError(f"each value may be listed once; got {value} again; remove one")
    return values


def _known_target(name: str) -> str:
    try:
        return str(parse_target(name))
    except SpecError as error:
        raise ValueError(str(error).removeprefix("target: ")) from None


def _known_pass(name: str) -> str:
    if name not in PASSES:
        rule = f"must be a pass that some op has: {', '.join(PASSES)}"
        raise ValueError(f"{rule}; got {name!r}; {nearest(name, PASSES, 'choose from these')}")
    return name


def _no_truth(value: Any) -> Any:
    if isinstance(value, bool):  # True == 1
        raise ValueError(f"must be a number; got {str(value).lower()}; write a number")
    return value


def _no_keyword(name: str) -> str:
    if keyword.iskeyword(name):
        rule = "must not be a Python keyword, because it names a package"
        raise ValueError(f"{rule}; got {name!r}; choose another, such as '{name}_kernels'")
    return name


Many = Annotated[
    tuple[T, ...],
    Field(min_length=1, max_length=MAX_VALUES),
    AfterValidator(_unique),
    BeforeValidator(_listed),
    _OneOrMany(),
]
"""One value or a list of values, as a tuple."""

HeadDim = Annotated[int, Field(ge=16, le=256, multiple_of=8)]
GqaRatio = Annotated[int, Field(ge=1, le=64)]
DType = Literal["float16", "bfloat16", "float32"]
CompressType = Literal["avgpool", "weightedpool", "linear", "sigmoid_mul", "mlp"]
BranchKV = Literal["shared", "separate"]
CacheDType = Literal["float8_e4m3fn", "int8"]
Scorer = Literal["compressed", "index"]
ScoreNorm = Literal["softmax", "none"]
ScoreHeads = Literal["sum", "each"]
ScorePool = Literal["overlap", "max"]
PoolRope = Literal["before", "after"]
LseWindows = Annotated[Literal[1, 4], BeforeValidator(_no_truth)]
OutputGate = Literal["none", "sigmoid"]
RotaryDim = Annotated[int, Field(ge=2, le=256, multiple_of=2)]
DenseLen = Annotated[int, Field(ge=0, le=1 << 24)]
MlpHidden = Annotated[int, Field(ge=16, le=1024, multiple_of=8)]
KernelSize = Annotated[int, Field(ge=1, le=4096)]
BlockSize = Annotated[int, Field(ge=1, le=4096)]
TopK = Annotated[int, Field(ge=1, le=1024)]
FixedBlocks = Annotated[int, Field(ge=0, le=1024)]
WindowSize = Annotated[int, Field(ge=0, le=1 << 20)]


BranchName = Literal["compressed", "selected", "sliding"]


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class AttentionSection(_Strict):
    """The attention's parameters, each one value or a list; every combination gets kernels."""

    head_dim: Many[HeadDim] = Field(description="size of a query and key head, D")
    v_head_dim: Many[HeadDim] | None = Field(
        default=None, description="size of a value head; left out: the same as head_dim"
    )
    gqa_ratio: Many[GqaRatio] = Field(description="query heads for one key/value head")
    dtype: Many[DType] = Field(description="dtype of queries, keys, values and outputs")
    compress_type: Many[CompressType] = Field(
        description="how keys are compressed, and values unless v_compress_type says otherwise"
    )
    v_compress_type: Many[CompressType] | None = Field(
        default=None, description="how values are compressed; left out: the same as compress_type"
    )
    mlp_hidden: Many[MlpHidden] | None = Field(
        default=None,
        description="hidden size of an mlp, between its two layers; left out: the same as head_dim",
    )
    kernel_size: Many[KernelSize] = Field(
        description="tokens that one window compresses; a multiple of kernel_stride"
    )
    kernel_stride: Many[KernelSize] = Field(description="tokens from one window to the next")
    block_size: Many[BlockSize] = Field(
        description="tokens of a selected block; a multiple of kernel_stride; 64 or 128 are usual"
    )
    topk: Many[TopK] = Field(
        description="blocks selected per token, including init_blocks and local_blocks"
    )
    init_blocks: Many[FixedBlocks] = Field(
        default=(1,), description="blocks at a sequence's start that are always selected"
    )
    local_blocks: Many[FixedBlocks] = Field(
        default=(2,), description="last blocks, up to the token's own, that are always selected"
    )
    window_size: Many[WindowSize] = Field(
        description="keys that a token sees in sliding-window attention, including its own; "
        "0: no sliding branch"
    )
    with_pe: Many[bool] = Field(
        default=(True,), description="whether compression adds a position embedding to keys"
    )
    v_with_pe: Many[bool] = Field(
        default=(False,), description="whether compression adds a position embedding to values"
    )
    branch_kv: Many[BranchKV] = Field(
        default=("shared",),
        description="whether all branches share keys and values, or each has its own",
    )
    cache_dtype: Many[CacheDType] | None = Field(
        default=None,
        description="dtype of the caches that decoding reads, with a scale for each row; left out: "
        "the same as dtype",
    )
    scorer: Many[Scorer] = Field(
        default=("compressed",),
        description="what ranks blocks: compressed keys, or a learned index with queries and keys "
        "of its own",
    )
    index_heads: Many[GqaRatio] | None = Field(
        default=None,
        description="with scorer index: index query heads, one per key/value head; they share one "
        "index key head",
    )
    index_head_dim: Many[HeadDim] | None = Field(
        default=None, description="with scorer index: size of an index query and key head"
    )
    score_norm: Many[ScoreNorm] = Field(
        default=("softmax",),
        description="whether a head's scores become probabilities before heads and windows are "
        "combined",
    )
    score_heads: Many[ScoreHeads] = Field(
        default=("sum",),
        description="whether a group's query heads sum their scores, or each selects for itself",
    )
    score_pool: Many[ScorePool] = Field(
        default=("overlap",),
        description="how windows become a block's score: a sum weighted by shared tokens, or the "
        "maximum",
    )
    pool_rope: Many[PoolRope] = Field(
        default=("before",), description="whether keys are compressed before or after rope"
    )
    lse_windows: Many[LseWindows] = Field(
        default=(1,),
        description="windows that one key of the softmax's normalizer stands for; 4 is nearly "
        "exact at a quarter of the cost",
    )
    output_gate: Many[OutputGate] = Field(
        default=("none",), description="whether a sigmoid gate multiplies the attention's output"
    )
    rotary_dim: Many[RotaryDim] | None = Field(
        default=None, description="elements of a head that rope rotates; left out: all of them"
    )
    dense_len: Many[DenseLen] = Field(
        default=(0,), description="sequences with fewer tokens use dense attention; 0: none do"
    )


class ExcludeEntry(_Strict):
    """A partial assignment: every combination with one of its values for each key is left out."""

    head_dim: Many[int] | None = None
    v_head_dim: Many[int] | None = None
    gqa_ratio: Many[int] | None = None
    dtype: Many[DType] | None = None
    compress_type: Many[CompressType] | None = None
    v_compress_type: Many[CompressType] | None = None
    mlp_hidden: Many[int] | None = None
    kernel_size: Many[int] | None = None
    kernel_stride: Many[int] | None = None
    block_size: Many[int] | None = None
    topk: Many[int] | None = None
    init_blocks: Many[int] | None = None
    local_blocks: Many[int] | None = None
    window_size: Many[int] | None = None
    with_pe: Many[bool] | None = None
    v_with_pe: Many[bool] | None = None
    branch_kv: Many[BranchKV] | None = None
    cache_dtype: Many[CacheDType] | None = None
    scorer: Many[Scorer] | None = None
    index_heads: Many[int] | None = None
    index_head_dim: Many[int] | None = None
    score_norm: Many[ScoreNorm] | None = None
    score_heads: Many[ScoreHeads] | None = None
    score_pool: Many[ScorePool] | None = None
    pool_rope: Many[PoolRope] | None = None
    lse_windows: Many[int] | None = None
    output_gate: Many[OutputGate] | None = None
    rotary_dim: Many[int] | None = None
    dense_len: Many[int] | None = None

    @model_validator(mode="after")
    def _not_empty(self) -> ExcludeEntry:
        if not self.model_fields_set:
            raise ValueError("must name at least one parameter; got an empty mapping; remove it")
        return self


PassName = Annotated[
    str,
    Field(max_length=40, json_schema_extra={"enum": list(PASSES)}),
    AfterValidator(_known_pass),
]
TargetName = Annotated[
    str,
    Field(max_length=40, json_schema_extra={"enum": list(KNOWN_TARGETS)}),
    AfterValidator(_known_target),
]


class SpecFile(_Strict):
    """A spec: the attention shapes, passes and GPU architectures to make kernels for."""

    name: Annotated[str, AfterValidator(_no_keyword)] = Field(
        pattern="^[a-z][a-z0-9_]*$", max_length=64, description="name of the generated package"
    )
    description: str = Field(default="", max_length=2000, description="what the spec is for")
    attention: AttentionSection
    passes: Many[PassName] = Field(
        default=DEFAULT_PASSES, description="which passes to make kernels for"
    )
    branches: Many[BranchName] = Field(
        default=BRANCHES, description="which branches to make kernels for"
    )
    targets: Many[TargetName] = Field(default=DEFAULT_TARGETS, description="GPU architectures")
    exclude: Annotated[tuple[ExcludeEntry, ...], BeforeValidator(_as_tuple)] = Field(
        default=(), max_length=MAX_VALUES, description="combinations to leave out"
    )


def json_schema() -> dict[str, Any]:
    """JSON Schema of a spec file, for editors; `specs/spec.schema.json` is this."""
    schema = SpecFile.model_json_schema()
    return {"$schema": SCHEMA_DIALECT, "title": "nsagen spec", **_pruned(schema)}


def _pruned(schema: Any) -> Any:
    """Without pydantic's titles, and without the nulls that stand for an omitted key."""
    if isinstance(schema, list):
        return [_pruned(item) for item in schema if item != {"type": "null"}]
    if not isinstance(schema, dict):
        return schema
    kept = {
        key: _pruned(value)
        for key, value in schema.items()
        if not (key == "title" and isinstance(value, str))
        and not (key == "default" and value is None)
    }
    if len(kept.get("anyOf", ())) == 1:
        return {**kept.pop("anyOf")[0], **kept}
    return kept
