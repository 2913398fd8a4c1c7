"""The shipped specs cover every kernel that the models they were written for call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from nsagen.model import InferenceConfig, ToyNSALlama, ToyNSALlamaConfig
from nsagen.runtime import Dispatcher, registry
from nsagen.spec import load_spec
from nsagen.workload import Workload
from tests.model.tiny import nsa_config, packed_batch

LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "head_dim": 128,
    "vocab_size": 64,
    "max_position_embeddings": 256,
    "kernel_size": 32,
    "kernel_stride": 16,
    "block_size": 64,
    "window_size": 512,
}


class Recorder:
    """Stands in for a dispatcher: notes the workloads asked for and launches nothing."""

    def __init__(self) -> None:
        self.asked: set[Workload] = set()
        self.key = registry.register(cast(Dispatcher, self), "recorder")

    def launcher(
        self, workload: Workload, device: torch.device, tokens: int, context: int | None = None
    ) -> Callable[..., None]:
        self.asked.add(workload)
        return lambda *args: None


@pytest.mark.parametrize("compress_type", ["avgpool", "weightedpool", "linear"])
@pytest.mark.parametrize(
    ("spec", "dtype", "config"),
    [
        pytest.param(
            "llama8b",
            torch.bfloat16,
            {**LLAMA, "num_attention_heads": 32, "num_key_value_heads": 2, "topk": 8},
            id="the guide's example",
        ),
        pytest.param(
            "llama8b",
            torch.bfloat16,
            {**LLAMA, "num_attention_heads": 32, "num_key_value_heads": 8, "topk": 16},
            id="Llama 3.1 8B's heads",
        ),
        pytest.param("tiny", torch.float32, {}, id="the demo"),
    ],
)
@torch.no_grad()
def test_specs_cover_the_models_calls(
    spec: str,
    dtype: torch.dtype,
    config: dict[str, Any],
    compress_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = ToyNSALlamaConfig if config else nsa_config
    recorder = Recorder()
    limits = InferenceConfig(max_batch_size=2, max_length=128)
    model = ToyNSALlama(make(**config, compress_type=compress_type), limits, recorder).to(dtype)
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # sends CPU tensors to the recorder
    batch = packed_batch([70, 40], vocab_size=64)
    model(*batch)
    model.generate(*batch, max_new_tokens=2)
    assert len({workload.op for workload in recorder.asked}) == 10
    missing = recorder.asked - set(load_spec(spec).workloads())
    assert not missing, f"specs/{spec}.yaml lacks: {', '.join(map(str, sorted(missing)))}"
