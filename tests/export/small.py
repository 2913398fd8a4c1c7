"""Small exports that several tests share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from nsagen.export.write import ExportResult, export
from nsagen.spec import load_spec

NSA = """
name: NAME
attention: {head_dim: 16, gqa_ratio: 2, dtype: float32, compress_type: avgpool, with_pe: false,
  kernel_size: 8, kernel_stride: 4, block_size: 8, topk: 3, window_size: 12}
passes: [forward]
targets: ["cuda:80"]
"""

INFLLM = """
name: NAME
attention: {head_dim: 32, gqa_ratio: 2, dtype: float32, compress_type: avgpool, with_pe: false,
  kernel_size: 8, kernel_stride: 4, block_size: 16, topk: 4, window_size: 0,
  score_pool: max, pool_rope: after}
passes: [forward, decode]
branches: selected
targets: ["cuda:80", "hip:gfx942"]
"""


def exported(folder: Path, text: str, spec: str, **options: Any) -> ExportResult:
    """An export of a spec, into `folder`."""
    folder.mkdir(exist_ok=True)
    (folder / f"{spec}.yaml").write_text(text.replace("NAME", spec))
    return export(load_spec(folder / f"{spec}.yaml"), folder / "out", **options)
