"""Other implementations of Native Sparse Attention, measured if they are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from nsagen.bench.shape import Inputs


def public_calls(inputs: Inputs) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """(name, a call that computes compressed, selected and gated attention) of each package found.

    Known: `native_sparse_attention`, whose ops have the signatures of ours. It has no sliding
    window of its own, so our op computes that branch for it.
    """
    try:
        theirs: Any = importlib.import_module("native_sparse_attention.ops")
    except ImportError:
        return
    s = inputs.shape
    limits = (inputs.tokens, inputs.ck.shape[0], None)

    def attention() -> Tensor:
        from nsagen import ops

        o_compressed, topk_idx = theirs.compressed_attention(
            *(inputs.q, inputs.ck, inputs.cv, s.kernel_size, s.kernel_stride, s.block_size, s.topk),
            *(inputs.cu_seqlens, inputs.window_cu_seqlens, *limits, s.init_blocks, s.local_blocks),
        )
        o_selected = theirs.topk_sparse_attention(
            *(inputs.q, inputs.k, inputs.v, topk_idx, s.block_size, inputs.cu_seqlens, None)
        )
        o_sliding = ops.sliding_window_attention(
            *(inputs.q, inputs.k, inputs.v, s.window_size, inputs.cu_seqlens)
        )
        branches = (o_compressed, o_selected, o_sliding)
        return sum(o * inputs.gate[..., i, None] for i, o in enumerate(branches))  # type: ignore[return-value]

    yield f"native_sparse_attention {_version('native_sparse_attention')}", attention


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "(unknown version)"
