"""NSA swapped into Transformers' models, with caches of one byte an element."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, DynamicCache, StaticCache  # noqa: E402

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.core.workload import CACHE_DTYPES  # noqa: E402
from nsagen.integrations.narrow_cache import cache_bytes  # noqa: E402
from nsagen.integrations.transformers import apply_nsa  # noqa: E402
from nsagen.model.layer_cache import NSALayerCache  # noqa: E402
from nsagen.ops.reference.quantize import round_trip  # noqa: E402
from tests.integrations.tiny import (  # noqa: E402
    ATTENTION,
    CACHE,
    dense,
    distance,
    in_pieces,
    refused,
    tokens,
    trained,
)

CUTS = [[70], [33, 70], [1, 2, 30, *range(31, 71)], [64, 65, 66, 67, 70]]


def swapped(cache_dtype: str | None, kind: str = "Llama", **attention: Any) -> Any:
    model = apply_nsa(dense(kind), {**ATTENTION, **attention}, cache_dtype=cache_dtype)
    return trained(model).double()


def stored(cache: Any, tokens: int) -> list[Tensor]:
    """Numbers and scales of the tokens and windows of a cache, as bits."""
    windows = (tokens - ATTENTION["kernel_size"]) // ATTENTION["kernel_stride"] + 1
    return [
        tensor[:, : windows if name.startswith("c") else tokens].contiguous().view(torch.int8)
        for layer in cache.layers
        for name, tensor in layer.store.tensors().items()
        if "raw" not in name
    ]


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("compress_type", ["weightedpool", "linear"])
def test_pieces_leave_the_cache_of_the_whole(cache_dtype: str, compress_type: str) -> None:
    """To the bit where windows are made alike; and logits do not say how tokens came."""
    model, ids = swapped(cache_dtype, compress_type=compress_type), tokens(2, 70)
    expected, whole = in_pieces(model, ids, CUTS[0])
    store = whole.layers[0].store
    assert store.k.dtype == store.cv.dtype == getattr(torch, cache_dtype)
    assert store.k_scale.dtype == torch.float32
    for cuts in CUTS[1:]:
        logits, cache = in_pieces(model, ids, cuts)
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        assert all(map(torch.equal, stored(cache, 70), stored(whole, 70)))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_logits_are_those_of_what_the_cache_gives_back(
    cache_dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = tokens(1, 61)
    logits, _ = in_pieces(swapped(cache_dtype), ids, [40, 59, 60, 61])
    kept = functools.partial(round_trip, dtype=getattr(torch, cache_dtype))
    fill = NSALayerCache.fill

    def rounding(self: NSALayerCache, rows: Any, *pairs: Any) -> Any:
        selected, sliding, raw, windows = pairs
        rounded = [tuple(map(kept, pair)) for pair in (selected, sliding, windows)]
        return fill(self, rows, rounded[0], rounded[1], raw, rounded[2])

    monkeypatch.setattr(NSALayerCache, "fill", rounding)
    expected, _ = in_pieces(swapped(None), ids, [61])
    assert distance(logits, expected) < 1e-6
    monkeypatch.undo()
    assert distance(logits, in_pieces(swapped(None), ids, [61])[0]) > 1e-4


def test_bytes_are_half_of_bfloat16() -> None:
    """Of keys, values and windows; the last keys and values before rope stay as they are."""
    found = []
    for cache_dtype in (None, "int8"):
        model, ids = swapped(cache_dtype).bfloat16(), tokens(1, 256)
        _, cache = in_pieces(model, ids, [256])
        tensors = cache.layers[0].store.tensors()
        found.append(sum(t.nbytes for name, t in tensors.items() if "raw" not in name))
        cache_bytes_of = cache_bytes(model.config, 256)
        rings = sum(t.nbytes for layer in cache.layers for t in layer.recent)
        every = [t for layer in cache.layers for t in layer.store.tensors().values()]
        assert cache_bytes_of == rings + sum(t.nbytes for t in every)
    dim = 16
    assert found[1] * 2 * dim == found[0] * (dim + 4)


def test_rows_with_padding() -> None:
    model, ids = swapped("int8"), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :17] = 0
    together, _ = in_pieces(model, ids, [59], attention_mask=mask[:, :59])
    alone, _ = in_pieces(model, ids[1:, 17:], [20, 41, 42])
    torch.testing.assert_close(together[1, 17:59], alone[0], rtol=1e-6, atol=1e-6)


def test_what_generation_does_to_a_cache() -> None:
    """Rows are repeated, selected and reordered, and the last tokens taken back."""
    model, ids = swapped("float8_e4m3fn"), tokens(2, 60)
    expected, _ = in_pieces(model, ids, [60])
    _, cache = in_pieces(model, ids.flip(0), [50])
    _, cache = in_pieces(model, torch.cat([ids.flip(0)[:, :50], tokens(2, 4)], 1), [54], cache)
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    logits, _ = in_pieces(model, ids, [55, 56, 60], cache)
    torch.testing.assert_close(logits, expected[:, 50:], rtol=1e-6, atol=1e-6)


def test_generate_takes_it() -> None:
    """Greedily, by beams and with a static cache, and behind a cache of inference mode."""
    model, ids = swapped("int8"), tokens(2, 40)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    new = model.generate(ids, **greedy)
    expected, _ = in_pieces(model, new, [46])
    assert torch.equal(expected[:, 39:45].argmax(-1), new[:, 40:])
    assert torch.equal(model.generate(ids, **greedy, cache_implementation="static"), new)
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **greedy), new)
        _, cache = in_pieces(model, ids, [20])
    logits, _ = in_pieces(model, ids, [30, 40], cache)
    torch.testing.assert_close(logits, expected[:, 20:40], rtol=1e-6, atol=1e-6)
    assert model.generate(ids, **greedy, num_beams=2).shape == new.shape
    assert torch.equal(model.generate(ids[:1], **greedy, prompt_lookup_num_tokens=3), new[:1])


def test_a_static_cache_is_narrow_too() -> None:
    model, ids = swapped("int8"), tokens(1, 40)
    expected, _ = in_pieces(model, ids, [40])
    static = StaticCache(config=model.config, max_cache_len=64)
    logits, cache = in_pieces(model, ids, [30], static)
    for token in range(30, 40):
        with torch.no_grad():
            out = model(ids[:, token : token + 1], **{CACHE: cache}, use_cache=True)
        logits = torch.cat([logits, out.logits], 1)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
    assert cache.layers[0].store.k.dtype == torch.int8


def test_a_folder_keeps_the_setting(tmp_path: Path) -> None:
    model, ids = swapped("int8"), tokens(1, 30)
    model.save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    assert again.config.nsagen == {"cache_dtype": "int8"}
    # Weights lie in the file's bytes where they are, and some CPUs' products round by address.
    again.load_state_dict({k: v.clone() for k, v in again.state_dict().items()}, assign=True)
    assert torch.equal(in_pieces(again, ids, [20, 30])[0], in_pieces(model, ids, [20, 30])[0])


def test_training_keeps_keys_as_they_are() -> None:
    """What is rounded has no gradient, so no training step rounds."""
    ids, found = tokens(1, 50), []
    for cache_dtype in (None, "int8"):
        model = swapped(cache_dtype).train()
        model(ids, labels=ids).loss.backward()
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused_by_name() -> None:
    ids, model = tokens(1, 20), swapped("int8")
    offloaded = DynamicCache(config=model.config, offloading=True)
    refused("a DynamicCache that offloads", model, ids, **{CACHE: offloaded})
    _, used = in_pieces(swapped(None), ids, [10])
    refused("came with cache_dtype int8; got None; start", model, ids[:, 10:], **{CACHE: used})
    with pytest.raises(InvalidInputError, match=r"has no gradients.*under torch\.no_grad"):
        model(ids, use_cache=True)
    assert model(ids, use_cache=False).logits.requires_grad
    refused("bfloat16 or float32, .* got torch.float16", model.half(), ids)
    _, narrow = in_pieces(swapped("int8"), ids, [10])
    model = swapped("int8")
    model.config.nsagen = None
    refused("cache_dtype None; got int8", model, ids[:, 10:], **{CACHE: narrow})
    model.config.nsagen = {"cache_dtype": "int4"}
    refused("cache_dtype must be None or one of float8_e4m3fn", model, ids)
    model.config.nsagen = {"form": "moba"}
    refused("config.nsagen: of a swapped model takes cache_dtype alone", model, ids)
    for wrong in ({"cache_dtype": "float8_e5m2"}, {"cache_dtype": "int8", "branch_kv": "separate"}):
        with pytest.raises(InvalidInputError, match="cache_dtype"):
            swapped(**wrong)


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_gradients_that_a_hook_brings_are_refused(cache_dtype: str) -> None:
    model, ids = swapped(cache_dtype).requires_grad_(False), tokens(1, 20)
    layer = model.model.layers[0]
    layer.register_forward_pre_hook(lambda _, args: (args[0].requires_grad_(), *args[1:]))
    with pytest.raises(InvalidInputError, match="of one byte an element has no gradients"):
        model(ids, use_cache=True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_a_gpu_computes_what_a_cpu_does(cache_dtype: str) -> None:
    """Prompt, chunk and steps; a number that rounds to the other side moves little."""
    model, ids = swapped(cache_dtype), tokens(2, 70)
    expected, _ = in_pieces(model, ids, [70])
    logits, cache = in_pieces(model.float().cuda(), ids.cuda(), [40, 66, *range(67, 71)])
    assert cache.layers[0].store.k.is_cuda
    assert distance(logits.cpu(), expected.float()) < 2e-2
