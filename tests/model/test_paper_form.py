"""The paper's own form, and each of its parts alone: every way to run it gives the same."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from nsagen.core.errors import InvalidInputError
from nsagen.model import InferenceConfig, NSACache, ToyNSALlama
from nsagen.model.compression import mean_weights
from nsagen.model.step import DecodeStep
from nsagen.ops.reference.compress import pool_windows
from tests.model.forms import FORMS, PAPER, expected_attention
from tests.model.test_boundaries import check_all_ways
from tests.model.test_gradients import check_finite_differences
from tests.model.test_prefill import in_pieces
from tests.model.tiny import nsa_config, nsa_model, packed_batch

forms = pytest.mark.parametrize("form", FORMS)


@forms
@torch.no_grad()
def test_a_module_computes_what_the_paper_says(form: str) -> None:
    module = nsa_model(**FORMS[form]).model.layers[0].self_attn
    x = torch.randn(93, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    _, cu_seqlens = packed_batch([5, 0, 70, 18])
    torch.testing.assert_close(module(x, cu_seqlens), expected_attention(module, x, cu_seqlens))


@forms
def test_all_ways_to_run_a_prompt_agree(form: str) -> None:
    check_all_ways(nsa_model(**FORMS[form]), [1, 4, 7, 8, 9, 12, 13, 16, 17, 33, 65, 80])


@forms
def test_pieces_leave_the_cache_of_the_whole(form: str) -> None:
    model = nsa_model(InferenceConfig(3, 128), **FORMS[form])
    prompts = list(packed_batch([70] * 2)[0].split(70))
    expected, whole = in_pieces(model, prompts, [70])
    assert isinstance(whole, NSACache)
    for sizes in ([7, 1, 8, 54], [33, 37], [3, 67]):
        logits, cache = in_pieces(model, prompts, sizes)
        torch.testing.assert_close(logits, expected, rtol=1e-9, atol=1e-9)
        assert isinstance(cache, NSACache)
        for one, other in zip(cache.tensors(), whole.tensors(), strict=True):
            torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@forms
@torch.no_grad()
def test_steps_leave_the_cache_that_prefill_would(form: str) -> None:
    """But for windows that nothing reads: a step compresses them, prefill does not."""
    model = nsa_model(InferenceConfig(1, 48), **FORMS[form])
    ids, _ = packed_batch([41])
    stepwise, at_once = model.new_cache(), model.new_cache()
    slot = torch.zeros(1, dtype=torch.int32)
    for position in range(41):
        where = torch.tensor([position], dtype=torch.int32)
        model.decode(ids[position : position + 1], where, slot, stepwise)
    model.prefill(ids, torch.tensor([0, 41], dtype=torch.int32), [41], at_once)
    for name, tensor in stepwise[0].tensors().items():
        if name in ("ck", "cv") and not model.config.needs_windows:
            continue
        torch.testing.assert_close(tensor, at_once[0].tensors()[name], msg=lambda t, n=name: n + t)


@forms
@pytest.mark.parametrize("paged", [False, True], ids=["contiguous", "in pages"])
def test_cache_bytes_are_what_is_allocated(form: str, paged: bool) -> None:
    limits = InferenceConfig(3, 100, paged=paged, page_size=16)
    config = nsa_config(**FORMS[form])
    cache = NSACache(config, limits)
    assert cache.nbytes == limits.cache_bytes(config)
    layer = cache[0].tensors()
    assert {tensor.shape[-1] for name, tensor in layer.items() if "v" in name} == {config.value_dim}
    own = {"v_raw", "k_window", "v_window"} if form in ("the paper's", "separate") else set()
    if form.startswith("separate without"):
        own = {"v_raw"}  # two branches only: the main cache is one of theirs
    assert layer.keys() == {"k", "v", "ck", "cv", "k_raw", *own}


@forms
def test_a_step_reads_no_value_on_the_host(form: str) -> None:
    model = nsa_model(InferenceConfig(4, 64), torch.bfloat16, **FORMS[form]).to("meta")
    assert DecodeStep(model, model.new_cache()).compute(3, False).shape == (3,)


@forms
def test_every_parameter_gets_a_gradient(form: str) -> None:
    model = nsa_model(**FORMS[form])
    model(*packed_batch([40, 3])).square().mean().backward()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            assert "compressed" not in model.config.on
            assert name.endswith(("compress_key", "intra_block_pe"))
            continue
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().sum() > 0, name


@pytest.mark.parametrize("form", ["the paper's", "gated values", "no window"])
def test_finite_differences(form: str) -> None:
    check_finite_differences(nsa_model(num_hidden_layers=1, **FORMS[form]))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["the paper's", "separate without selection", "sliding alone"])
def test_the_compiler_sees_through_forward(form: str) -> None:
    model = nsa_model(dtype=torch.float32, num_hidden_layers=1, **FORMS[form])
    batch = packed_batch([40, 0, 3])
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)(*batch)
    torch.testing.assert_close(compiled, model(*batch))
    compiled.sum().backward()


def test_the_papers_head_sizes() -> None:
    """192 for queries and keys, 128 for values."""
    sizes = {"head_dim": 192, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = nsa_model(**{**PAPER, **sizes, "num_key_value_heads": 1, "v_head_dim": 128})
    attention = model.model.layers[0].self_attn
    assert attention.v_proj_compressed.weight.shape == (128, 64)
    assert attention.o_proj.weight.shape == (64, 256)
    check_all_ways(model, [1, 9, 33, 70])
    model(*packed_batch([40, 3])).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_names_and_shapes_of_the_papers_form() -> None:
    layer = ToyNSALlama(nsa_config(**PAPER)).model.layers[0].self_attn
    added = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert added == {
        "q_proj.weight": (128, 64),
        **{f"k_proj{own}.weight": (64, 64) for own in ("", "_compressed", "_sliding")},
        **{f"v_proj{own}.weight": (32, 64) for own in ("", "_compressed", "_sliding")},
        "o_proj.weight": (64, 64),
        "gate.up_proj.weight": (32, 64),
        "gate.down_proj.weight": (12, 32),
        "compress_key.up": (2, 8 * 32, 32),
        "compress_key.down": (2, 32, 32),
        "compress_value.up": (2, 8 * 16, 32),
        "compress_value.down": (2, 32, 16),
        "intra_block_pe": (2, 8, 32),
        "intra_block_pe_value": (2, 8, 16),
    }


def test_what_only_a_branch_that_is_off_would_read_is_not_there() -> None:
    def names(**changes: Any) -> set[str]:
        layer = ToyNSALlama(nsa_config(**changes)).model.layers[0].self_attn
        assert layer.gate.weight.shape[0] == 4 * len(layer.sparsity.on)
        return {name for name, _ in layer.named_parameters() if "proj" not in name}

    weights = {"gate.weight", "compress_key", "compress_value", "intra_block_pe"}
    assert names(window_size=0, v_with_pe=True) == weights | {"intra_block_pe_value"}
    assert names(branches=("selected",), v_with_pe=True) == weights - {"compress_value"}
    assert names(branches=["sliding"]) == {"gate.weight"}


@pytest.mark.parametrize("hidden", [8, 16, 24, 32, 50])
def test_an_mlp_starts_near_the_mean(hidden: int) -> None:
    """Exactly where two units see a component; with fewer units than components some are 0."""
    dim, windows = 16, torch.randn(40, 8, 2, 16, dtype=torch.float64)
    up, down = mean_weights("mlp", 2, 8, dim, hidden)  # type: ignore[misc]
    made = pool_windows(windows, (up.double(), down.double()), None, "mlp")
    exact, some = max(0, min(hidden - dim, dim)), min(hidden, dim)
    mean = windows.mean(1)
    torch.testing.assert_close(made[..., :exact], mean[..., :exact], rtol=1e-6, atol=1e-6)
    assert (made[..., :some] - mean[..., :some]).norm() <= 0.1 * mean[..., :some].norm()
    assert not made[..., some:].any()


def test_gates_of_an_mlp_join_the_fused_product() -> None:
    model = nsa_model(InferenceConfig(1, 64), **PAPER)
    attention = model.model.layers[0].self_attn
    x = torch.randn(5, 64, dtype=torch.float64)
    with torch.no_grad():
        heads, gate = attention.fused_heads(x, None)
        expected = attention.heads(x)
        torch.testing.assert_close(gate, attention.gates(x))
        for branch in ("compressed", "selected", "sliding"):
            torch.testing.assert_close(getattr(heads, branch), getattr(expected, branch))
    joined = attention.joined_weight()
    assert torch.equal(joined[:128], attention.q_proj.weight)
    assert torch.equal(joined[-32:], attention.gate.up_proj.weight)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"branch_kv": "own"}, "branch_kv must be one of shared, separate, got 'own'"),
        ({"gate_type": "mean"}, "gate_type must be one of linear, mlp, got 'mean'"),
        ({"v_compress_type": "max"}, "v_compress_type must be one of .*mlp, None, got 'max'"),
        ({"v_with_pe": 1}, "v_with_pe must be one of True, False, got 1"),
        ({"mlp_hidden": 0}, "mlp_hidden must be an integer of at least 1, got 0"),
        ({"gate_hidden": 1.5}, "gate_hidden must be an integer of at least 1, got 1.5"),
        ({"v_head_dim": 20}, "v_head_dim must be a multiple of 8 from 16 to 256, got 20"),
        ({"branches": "sliding"}, r"branches must be a tuple.*got 'sliding'; write \('sliding',\)"),
        ({"branches": ("slide",)}, "branches must be of compressed, .*got 'slide'"),
        ({"branches": ()}, "one branch must be on; got branches "),
        ({"branches": ("sliding",), "window_size": 0}, "one branch must be on; .*window_size 0"),
        (
            {"branch_kv": "separate", "branches": ("selected", "sliding")},
            "needs the compressed branch.*got branches selected, sliding; turn it on",
        ),
        ({"branch_kv": "separate", "branches": ("compressed",)}, "got branches compressed; turn"),
    ],
)
def test_refusals_are_one_line(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(InvalidInputError, match=text) as caught:
        nsa_config(**changes)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("ToyNSALlamaConfig: ")
