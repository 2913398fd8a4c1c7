"""What Transformers' continuous batching takes of the family, and why `nsagen serve` exists.

Releases differ: 5.17 takes any registered attention by the name of its paged form, 5.24 its own
only. Where a test of a limit fails, the limit is gone: then say so in docs/serving.md.
"""

from __future__ import annotations

import copy
import functools
import inspect
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.generation.continuous_batching.cache")
continuous = pytest.importorskip("transformers.generation.continuous_batching.continuous_api")

from transformers.generation.configuration_utils import (  # noqa: E402
    ContinuousBatchingConfig,
    GenerationConfig,
)

import nsagen.integrations.transformers  # noqa: E402  # registers "nsagen"
from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.integrations.attention_interface import attention  # noqa: E402
from nsagen.integrations.paged_attention import paged_attention  # noqa: E402
from nsagen.model import InferenceConfig  # noqa: E402
from nsagen.model.configs import cache_shapes  # noqa: E402
from tests.integrations.plain_forms import INFLLM, MOBA  # noqa: E402
from tests.integrations.tiny import ATTENTION, LLAMA  # noqa: E402
from tests.model.tiny import nsa_config  # noqa: E402

SWITCH: Any = getattr(continuous.ContinuousBatchingManager, "switch_to_cb_friendly_attn", None)
TAKES_ANY = (
    SWITCH is not None and "auto_switch_to_flash" not in inspect.signature(SWITCH).parameters
)
"""Whether the release runs a registered attention; younger ones compare its name with their own."""

PROMPTS = [
    torch.randint(1, 97, (n,), generator=torch.Generator().manual_seed(n)).tolist()
    for n in (90, 3, 161, 40)
]


@functools.cache
def dense() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**LLAMA)
    return transformers.LlamaForCausalLM(config).eval()


def together(model: Any, prompts: list[list[int]], most: int = 48) -> list[list[int]]:
    """The answers of `generate_batch`, in passes of `most` tokens."""
    names = ContinuousBatchingConfig.__dataclass_fields__
    page: dict[str, Any] = {"page_size" if "page_size" in names else "block_size": 16}
    if model.device.type == "cuda":
        page["use_cuda_graph"] = False  # a pass reads lengths on the host
    made = model.generate_batch(
        prompts,
        generation_config=GenerationConfig(
            max_new_tokens=6, do_sample=False, eos_token_id=-1, pad_token_id=0
        ),
        continuous_batching_config=ContinuousBatchingConfig(
            num_blocks=64, max_batch_tokens=most, **page
        ),
    )
    assert not any(one.error for one in made.values())
    return [made[name].generated_tokens for name in sorted(made)]


@pytest.mark.skipif(not TAKES_ANY, reason="this release takes no attention but its own")
@pytest.mark.parametrize("form", [INFLLM, MOBA], ids=["infllm_v2", "moba"])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_forms_without_parameters_run_in_it(form: dict[str, Any], device: str) -> None:
    """Whole prompts, parts of them behind a cache, and steps, of several requests in a pass."""
    model = copy.deepcopy(dense()).to(device)
    model.config.nsagen = form
    model.set_attn_implementation("nsagen")
    alone = [
        model.generate(torch.tensor([prompt], device=device), max_new_tokens=6, do_sample=False)
        for prompt in PROMPTS
    ]
    plain = [
        dense().generate(torch.tensor([prompt]), max_new_tokens=6, do_sample=False)[0, -6:].tolist()
        for prompt in PROMPTS
    ]
    expected = [tokens[0, -6:].tolist() for tokens in alone]
    assert expected != plain, "it is sparse"
    assert together(model, PROMPTS) == expected
    assert together(model, PROMPTS, most=512) == expected


PLACES: dict[str, Any] = {"read_index": [], "write_index": []}


class Holds:
    """A cache that hands out these keys and values, whatever it gets."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.packed = keys, values

    def update(self, *given: Any) -> tuple[Tensor, Tensor]:
        return self.packed


@pytest.mark.parametrize(
    "form",
    [INFLLM, MOBA, {**INFLLM, "dense_decode": True, "dense_len": 60}],
    ids=["infllm_v2", "moba", "dense steps"],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_pass_is_each_request_alone(form: dict[str, Any], device: str) -> None:
    """Whole, behind a cache, a step, a short one, and padding behind them."""
    lengths = [(100, 100), (30, 130), (1, 90), (5, 5)]  # new tokens, and all
    random = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        dtype = torch.float64 if device == "cpu" else torch.bfloat16
        return torch.randn(shape, generator=random).to(device, dtype)

    q, k, v = (draw(1, heads, 144, 32) for heads in (4, 2, 2))
    keys = [draw(held, 2, 2, 32) for _, held in lengths]
    packed = torch.cat(keys).unbind(1)
    module: Any = SimpleNamespace(config=SimpleNamespace(nsagen=form), layer_idx=0, is_causal=True)
    ends = [[0, *accumulate(of), sum(of)] for of in zip(*lengths, strict=True)]
    ends_q, ends_k = torch.tensor(ends, dtype=torch.int32, device=device)
    given = {"cu_seq_lens_q": ends_q, "cu_seq_lens_k": ends_k}
    more = {"read_index": [], "write_index": [], "max_seqlen_q": 100, "use_cache": False}
    o, _ = paged_attention(module, q, k, v, None, cache=Holds(*packed), **given, **more)
    assert o.shape == (1, 144, 4, 32)
    assert not o[:, sum(new for new, _ in lengths) :].any()
    start = 0
    for (new, _), kept in zip(lengths, keys, strict=True):
        of_one = (x.transpose(0, 1)[None] for x in kept.unbind(1))
        module = torch.nn.Module()  # a new one: a hook is put on it
        module.config = SimpleNamespace(nsagen=form)  # type: ignore[assignment]
        expected, _ = attention(module, q[:, :, start : start + new], *of_one, None)
        error = (o[:, start : start + new].double() - expected.double()).norm()
        assert error / expected.double().norm() < (1e-12 if device == "cpu" else 1e-2)
        start += new


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "a pass: must be one of continuous batching; got no paged cache"),
        ({"cache": 1, "sliding_window": 8}, "must reach all tokens .*; got a window of 8"),
        ({"cache": 1, "block_indices": 1}, "must need keys and values alone; got index heads"),
        ({"cache": 1, "form": {"cache_dtype": "int8"}}, "cache_dtype: is for .*; got int8"),
        (
            {"cache": 1, **PLACES, "cu_seq_lens_q": 1, "cu_seq_lens_k": {"one": 1, "two": 2}},
            "must have layers of one kind in continuous batching; got layers of one, two",
        ),
    ],
)
def test_its_attention_refuses_what_a_pass_cannot_hold(given: dict[str, Any], said: str) -> None:
    q, k = torch.zeros(1, 4, 5, 32), torch.zeros(1, 2, 5, 32)
    module: Any = SimpleNamespace(
        config=SimpleNamespace(nsagen={**INFLLM, **given.pop("form", {})})
    )
    with pytest.raises(InvalidInputError, match=said):
        paged_attention(module, q, k, k, None, **given)


@pytest.mark.skipif(TAKES_ANY, reason="this release takes any registered attention")
def test_it_takes_no_attention_but_its_own() -> None:
    """So InfLLM-V2 and MoBA, which its cache could hold, cannot run in it."""
    if SWITCH is None:
        pytest.skip("this release chooses attention elsewhere")
    model = copy.deepcopy(dense())
    model.config.nsagen = INFLLM
    model.set_attn_implementation("nsagen")
    with pytest.raises(ValueError, match="is not supported for continuous batching"):
        together(model, PROMPTS)


def test_native_sparse_attention_is_refused_and_needs_more_than_keys_and_values() -> None:
    """Compressed keys and values, and the last keys before rope, which make the next window."""
    model = nsagen.integrations.transformers.apply_nsa(copy.deepcopy(dense()), attention=ATTENTION)
    with pytest.raises(ValueError, match=r"nsa.* is not supported"):
        together(model, PROMPTS)
    shapes = cache_shapes(nsa_config(), InferenceConfig(max_batch_size=1, max_length=64))
    assert {"k", "v"} < set(shapes)
    assert len(shapes) > 2


def test_its_cache_has_no_place_for_index_keys() -> None:
    """MiniMax-M3's sparse layers keep them beside keys and values."""
    config = transformers.LlamaConfig(
        num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, hidden_size=32
    )
    config.layer_types = ["full_attention", "minimax_m3_sparse"]
    limits = ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=8)
    one = SimpleNamespace(tp_size=1)
    with pytest.raises(ValueError, match=r"Invalid (layer|group) type: minimax_m3_sparse"):
        continuous.PagedAttentionCache(config, limits, "cpu", one, {})


@pytest.mark.parametrize("name", ["nsagen", "paged|nsagen"])
def test_transformers_serve_takes_names_from_a_list(name: str) -> None:
    """So a registered attention cannot be served by it, even where `generate_batch` runs it."""
    serving = pytest.importorskip("transformers.cli.serving.model_manager")
    with pytest.raises(ValueError, match="Unsupported attention implementation"):
        serving.ModelManager(attn_implementation=name)
