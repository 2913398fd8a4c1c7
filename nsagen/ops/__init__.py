"""The ops of Native Sparse Attention: custom ops with fake implementations and autograd.

CUDA tensors run generated kernels, found by a dispatcher; CPU tensors run `nsagen.ops.reference`,
or the same kernels where TRITON_INTERPRET=1 was set before triton was imported.
"""

from nsagen.ops._launch import on_kernels
from nsagen.ops.block_selection import block_selection
from nsagen.ops.block_selection_decode import block_selection_decode
from nsagen.ops.cache_append import cache_append
from nsagen.ops.compress import compress
from nsagen.ops.compress_types import (
    avgpool_compress,
    linear_compress,
    mlp_compress,
    sigmoid_mul_compress,
    weightedpool_compress,
)
from nsagen.ops.compressed_attention import compressed_attention
from nsagen.ops.compressed_attention_decode import compressed_attention_decode
from nsagen.ops.compressed_lse import compressed_lse
from nsagen.ops.gated_sum import gated_sum
from nsagen.ops.index_loss import index_loss
from nsagen.ops.lengths import Lengths
from nsagen.ops.linear_decode import LINEAR_DECODE_ROWS, linear_decode
from nsagen.ops.load_rows import load_rows
from nsagen.ops.native_sparse_attention import native_sparse_attention
from nsagen.ops.native_sparse_attention_decode import native_sparse_attention_decode
from nsagen.ops.pool_append import pool_append
from nsagen.ops.rope import rope
from nsagen.ops.scales import CacheScales
from nsagen.ops.selected_attention import topk_sparse_attention
from nsagen.ops.selected_attention_decode import selected_attention_decode
from nsagen.ops.separate import SeparateKV
from nsagen.ops.sliding_window_attention import sliding_window_attention
from nsagen.ops.store_rows import store_rows

__all__ = [
    "LINEAR_DECODE_ROWS",
    "CacheScales",
    "Lengths",
    "SeparateKV",
    "avgpool_compress",
    "block_selection",
    "block_selection_decode",
    "cache_append",
    "compress",
    "compressed_attention",
    "compressed_attention_decode",
    "compressed_lse",
    "gated_sum",
    "index_loss",
    "linear_compress",
    "linear_decode",
    "load_rows",
    "mlp_compress",
    "native_sparse_attention",
    "native_sparse_attention_decode",
    "on_kernels",
    "pool_append",
    "rope",
    "selected_attention_decode",
    "sigmoid_mul_compress",
    "sliding_window_attention",
    "store_rows",
    "topk_sparse_attention",
    "weightedpool_compress",
]
