"""The shipped specs cover every kernel that the models they were written for call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import pytest
import torch

from nsagen.core.workload import Workload
from nsagen.model import InferenceConfig, ToyNSALlama, ToyNSALlamaConfig
from nsagen.model.sparsity import settings_of
from nsagen.runtime import Dispatcher
from nsagen.runtime import dispatcher as registry
from nsagen.spec import AttentionShape, load_spec
from tests.model.forms import FORMS
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


def asked(
    config: ToyNSALlamaConfig, dtype: torch.dtype, patch: pytest.MonkeyPatch
) -> set[Workload]:
    """What a forward and a generate of the model call."""
    recorder = Recorder()
    model = ToyNSALlama(config, InferenceConfig(max_batch_size=2, max_length=128), recorder)
    patch.setenv("TRITON_INTERPRET", "1")  # sends CPU tensors to the recorder
    batch = packed_batch([70, 40], vocab_size=64)
    model = model.to(dtype)
    with torch.no_grad():
        model(*batch)
        model.generate(*batch, max_new_tokens=2)
    return recorder.asked


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
def test_specs_cover_the_models_calls(
    spec: str,
    dtype: torch.dtype,
    config: dict[str, Any],
    compress_type: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make = ToyNSALlamaConfig if config else nsa_config
    found = asked(make(**config, compress_type=compress_type), dtype, monkeypatch)
    assert len({workload.op for workload in found}) == 9  # all but gated_sum, which training calls
    missing = found - set(load_spec(spec).workloads())
    assert not missing, f"specs/{spec}.yaml lacks: {', '.join(map(str, sorted(missing)))}"


def test_the_papers_spec_covers_the_papers_form(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = load_spec("nsa_paper")
    (shape,) = spec.shapes
    sizes = {"num_attention_heads": 16, "num_key_value_heads": 1, "v_head_dim": shape.v_head_dim}
    config = ToyNSALlamaConfig(
        **{**LLAMA, **sizes, "head_dim": shape.head_dim, "gate_type": "mlp", **settings_of(shape)}
    )
    assert (config.branch_kv, config.value_type, config.v_with_pe) == ("separate", "mlp", True)
    missing = asked(config, torch.bfloat16, monkeypatch) - set(spec.workloads())
    assert not missing, f"specs/nsa_paper.yaml lacks: {', '.join(map(str, sorted(missing)))}"


@pytest.mark.parametrize("form", FORMS)
def test_a_shapes_workloads_are_the_models_calls(
    form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them but training's, and no other: also of a model in which branches are off."""
    config = nsa_config(**FORMS[form])
    names = ("compress_type", "kernel_size", "kernel_stride", "block_size", "topk", "init_blocks")
    shape = AttentionShape(
        head_dim=config.head_dim,
        v_head_dim=config.value_dim,
        gqa_ratio=2,
        dtype="float32",
        **{name: getattr(config, name) for name in names},
        local_blocks=config.local_blocks,
        window_size=config.window_size,
        with_pe=True,
        v_compress_type=config.v_compress_type or "",
        mlp_hidden=config.mlp_hidden or 0,
        v_with_pe=config.v_with_pe,
        branch_kv=config.branch_kv,
    )
    expected = set(shape.workloads(("forward", "decode"), config.branches))
    found = asked(config, torch.float32, monkeypatch)
    assert found <= expected
    # Where nothing is trained and all branches are on, the sliding window's kernel sums.
    assert {workload.op for workload in expected - found} <= {"gated_sum"}
