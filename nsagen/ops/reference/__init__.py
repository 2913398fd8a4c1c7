"""The ops in plain PyTorch: any device, any float dtype, differentiable where the op is.

This is the oracle that kernels are checked against and what CPU tensors run through. It follows
the mathematics closely, in float32 or wider, and reads offsets on the host, so it is not fast.
"""

from nsagen.ops.layout import compressed_cu_seqlens, positions_in_sequence
from nsagen.ops.reference.block_selection import (
    block_selection,
    block_selection_decode,
    compressed_lse,
)
from nsagen.ops.reference.cache_append import cache_append
from nsagen.ops.reference.compress import (
    avgpool_compress,
    compress,
    linear_compress,
    mlp_compress,
    mlp_first_layer,
    sigmoid_mul_compress,
    weightedpool_compress,
)
from nsagen.ops.reference.compressed_attention import (
    compressed_attention,
    compressed_attention_decode,
    compressed_attention_forward,
)
from nsagen.ops.reference.gated_sum import gated_sum
from nsagen.ops.reference.index_loss import index_loss
from nsagen.ops.reference.linear_decode import linear_decode
from nsagen.ops.reference.load_rows import load_rows
from nsagen.ops.reference.native_sparse_attention import (
    native_sparse_attention,
    native_sparse_attention_decode,
)
from nsagen.ops.reference.norm_rope import norm_rope
from nsagen.ops.reference.pool_append import pool_append
from nsagen.ops.reference.quantize import dequantize, quantize
from nsagen.ops.reference.rope import rope
from nsagen.ops.reference.selected_attention import (
    forced_blocks,
    forced_blocks_attention,
    free_blocks_attention,
    selected_attention,
    selected_attention_decode,
    topk_sparse_attention,
)
from nsagen.ops.reference.sliding_window_attention import (
    sliding_window_attention,
    sliding_window_attention_forward,
)
from nsagen.ops.reference.store_rows import store_rows

__all__ = [
    "avgpool_compress",
    "block_selection",
    "block_selection_decode",
    "cache_append",
    "compress",
    "compressed_attention",
    "compressed_attention_decode",
    "compressed_attention_forward",
    "compressed_cu_seqlens",
    "compressed_lse",
    "dequantize",
    "forced_blocks",
    "forced_blocks_attention",
    "free_blocks_attention",
    "gated_sum",
    "index_loss",
    "linear_compress",
    "linear_decode",
    "load_rows",
    "mlp_compress",
    "mlp_first_layer",
    "native_sparse_attention",
    "native_sparse_attention_decode",
    "norm_rope",
    "pool_append",
    "positions_in_sequence",
    "quantize",
    "rope",
    "selected_attention",
    "selected_attention_decode",
    "sigmoid_mul_compress",
    "sliding_window_attention",
    "sliding_window_attention_forward",
    "store_rows",
    "topk_sparse_attention",
    "weightedpool_compress",
]
