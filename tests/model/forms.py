"""Forms of the attention beside the default one, which tests of the model share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from nsagen.core.workload import COMPRESS_TYPES
from nsagen.model import NativeSparseAttention
from nsagen.model.compression import weights_of
from nsagen.ops import reference
from nsagen.ops.layout import positions_in_sequence

PAPER: dict[str, Any] = {
    "branch_kv": "separate",
    "compress_type": "mlp",
    "v_with_pe": True,
    "gate_type": "mlp",
    "v_head_dim": 16,
}
"""Section 3 and 4.1 of the paper: head sizes 3:2, all else its own."""

FORMS: dict[str, dict[str, Any]] = {
    "the paper's": PAPER,
    "separate": {"branch_kv": "separate"},
    "gated values": {"v_compress_type": "sigmoid_mul", "v_with_pe": True},
    "mlp of other sizes": {"compress_type": "mlp", "mlp_hidden": 20, "v_compress_type": "linear"},
    "mlp gate": {"gate_type": "mlp", "gate_hidden": 24},
    "narrow values": {"v_head_dim": 16, "compress_type": "linear"},
    "wide values": {"v_head_dim": 40, "compress_type": "sigmoid_mul"},
    "no window": {"window_size": 0},
    "separate without a window": {**PAPER, "window_size": 0},
    "separate without selection": {**PAPER, "branches": ("compressed", "sliding")},
    "compressed alone": {"branches": ("compressed",)},
    "selected alone": {"branches": ("selected",)},
    "sliding alone": {"branches": ("sliding",), "v_head_dim": 16},
    "no compressed branch": {"branches": ("selected", "sliding"), "v_compress_type": "mlp"},
}


EVERY: dict[str, dict[str, Any]] = {
    **{kind: {"compress_type": kind} for kind in COMPRESS_TYPES},
    **FORMS,
}
"""These, and each way to compress in the default form."""


def expected_attention(module: NativeSparseAttention, x: Tensor, cu_seqlens: Tensor) -> Tensor:
    """What a module computes, written down from the paper, branch by branch, on the reference."""
    s, tables = module.sparsity, (module.rotary_emb.cos, module.rotary_emb.sin)
    positions = positions_in_sequence(cu_seqlens, x.shape[0])

    def project(name: str, heads: int) -> Tensor:
        return getattr(module, name)(x).unflatten(-1, (heads, -1))

    def pair(branch: str) -> tuple[Tensor, Tensor]:
        names = [f"{kind}_proj_{branch}" for kind in "kv"]
        if not hasattr(module, names[0]):
            names = ["k_proj", "v_proj"]
        k, v = (project(name, module.num_kv_heads) for name in names)
        return k, v

    sizes = {"kernel_size": s.kernel_size, "kernel_stride": s.kernel_stride}
    q = reference.rope(project("q_proj", module.num_q_heads), *tables, positions)
    outputs = {}
    topk_idx = torch.empty(0)
    if s.on != ("sliding",):
        k, v = pair("compressed")
        w_k, w_v = (weights_of(w, k) for w in (module.compress_key, module.compress_value))
        types = (s.compress_type, s.v_compress_type or s.compress_type)
        if "compressed" not in s.on:
            types = (s.compress_type, "avgpool")  # of no consequence
        ck, ends = reference.compress(
            k, w_k, module.intra_block_pe, cu_seqlens, compress_type=types[0], **sizes
        )
        cv, _ = reference.compress(
            v, w_v, module.intra_block_pe_value, cu_seqlens, compress_type=types[1], **sizes
        )
        starts = positions_in_sequence(ends, ck.shape[0]) * s.kernel_stride
        ck = reference.rope(ck, *tables, starts)
        outputs["compressed"], topk_idx = reference.compressed_attention(
            *(q, ck, cv, s.kernel_size, s.kernel_stride, s.block_size, s.topk),
            *(cu_seqlens, ends),
            init_blocks=s.init_blocks,
            local_blocks=s.local_blocks,
        )
    if "selected" in s.on:
        k, v = pair("selected")
        k = reference.rope(k, *tables, positions)
        outputs["selected"] = reference.topk_sparse_attention(
            q, k, v, topk_idx, s.block_size, cu_seqlens
        )
    if "sliding" in s.on:
        k, v = pair("sliding")
        k = reference.rope(k, *tables, positions)
        outputs["sliding"] = reference.sliding_window_attention(q, k, v, s.window_size, cu_seqlens)
    gates = module.gate(x).sigmoid().unflatten(-1, (module.num_q_heads, len(s.on)))
    o = sum(gates[..., i, None] * outputs[name] for i, name in enumerate(s.on))
    return module.o_proj(torch.as_tensor(o).flatten(1))
