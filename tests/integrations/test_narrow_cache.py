"""Caches of one byte an element for MiniCPM4, MoBA and MiniMax-M3: what they hold and give back.

The oracle gives attention the keys, values and windows that such a cache gives back.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache  # noqa: E402
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3  # noqa: E402

from nsagen.core.errors import InvalidInputError  # noqa: E402
from nsagen.core.workload import CACHE_DTYPES  # noqa: E402
from nsagen.integrations.attention_cache import remember_caches  # noqa: E402
from nsagen.integrations.minicpm import MiniCPMConfig  # noqa: E402
from nsagen.integrations.narrow_cache import GrowingRows, NarrowLayer, cache_bytes  # noqa: E402
from nsagen.ops.reference.quantize import round_trip  # noqa: E402
from tests.integrations import test_minicpm, test_minimax_m3  # noqa: E402
from tests.integrations.plain_forms import INFLLM, MOBA, distance, plain  # noqa: E402
from tests.integrations.tiny import CACHE, dense, in_pieces, refused  # noqa: E402

CUTS = ([70], [30, 37, 70], [41, *range(42, 71)])
"""A prompt at once, in chunks, and token by token."""


def minicpm(path: Path, cache_dtype: str | None = None, **sparse: Any) -> Any:
    settings = {**test_minicpm.SPARSE, **sparse}
    if cache_dtype is not None:
        settings["cache_dtype"] = cache_dtype
    return test_minicpm.model(path, settings).double()


def moba(cache_dtype: str) -> Any:
    """A dense model with MoBA, also in decoding; its heads select for themselves."""
    model = dense().double()
    model.config.nsagen = {**MOBA, "dense_decode": False, "cache_dtype": cache_dtype}
    model.set_attn_implementation("nsagen")
    remember_caches(model)
    return model


def minimax(cache_dtype: str | None, attention: str = "nsagen") -> Any:
    """Without experts, which have no float64."""
    settings = None if cache_dtype is None else {"cache_dtype": cache_dtype}
    sizes = {**test_minimax_m3.SIZES, "mlp_layer_types": ["dense"] * 3}
    config = m3.MiniMaxM3VLTextConfig(**sizes, nsagen=settings)
    torch.manual_seed(0)
    model = m3.MiniMaxM3VLForCausalLM._from_config(config, attn_implementation=attention)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("_norm.weight"):
                parameter.normal_(0, 0.3)
    return model.double().eval()


def made(kind: str, path: Path, cache_dtype: str) -> Any:
    if kind == "MiniCPM4":
        return minicpm(path, cache_dtype)
    return moba(cache_dtype) if kind == "MoBA" else minimax(cache_dtype)


def tokens(*shape: int) -> Tensor:
    return torch.randint(3, 96, shape, generator=torch.Generator().manual_seed(2))


def stored(cache: Any) -> list[Tensor]:
    """Numbers and scales of all that a cache keeps, as bits."""
    kinds = ("keys", "values", "index", "windows")
    parts = [
        (layer.rows(name).numbers, layer.rows(name).scale)
        for layer in cache.layers
        for name in kinds
        if name in layer._rows
    ]
    return [x.contiguous().view(torch.int8) for part in parts for x in part]


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("kind", ["MiniCPM4", "MoBA", "MiniMax-M3"])
def test_pieces_leave_the_cache_of_the_whole(kind: str, cache_dtype: str, tmp_path: Path) -> None:
    """To the bit; and logits do not say how tokens came."""
    model, ids = made(kind, tmp_path, cache_dtype), tokens(2, 70)
    expected, whole = in_pieces(model, ids, CUTS[0])
    assert all(isinstance(layer, NarrowLayer) for layer in whole.layers)
    for cuts in CUTS[1:]:
        logits, cache = in_pieces(model, ids, cuts)
        torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)
        assert all(map(torch.equal, stored(cache), stored(whole)))


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("kind", ["MiniCPM4", "MoBA"])
@torch.no_grad()
def test_logits_are_those_of_what_the_cache_gives_back(
    kind: str, cache_dtype: str, tmp_path: Path
) -> None:
    model, ids = made(kind, tmp_path, cache_dtype), tokens(1, 61)
    logits, _ = in_pieces(model, ids, [40, 59, 60, 61])
    kept = functools.partial(round_trip, dtype=getattr(torch, cache_dtype))
    form = {**INFLLM, "topk": 4} if kind == "MiniCPM4" else MOBA
    with plain(model, form, kept=kept) as other:
        assert distance(logits[0], other(ids, use_cache=False).logits[0]) < 1e-6


@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
def test_minimax_selects_by_index_keys_that_the_cache_gives_back(cache_dtype: str) -> None:
    """Its index keys, keys and values of each token, rounded once, in Transformers' own code."""
    model, ids = minimax(cache_dtype), tokens(1, 61)
    logits, cache = in_pieces(model, ids, [40, 59, 60, 61])
    kept = functools.partial(round_trip, dtype=getattr(torch, cache_dtype))
    eager = minimax(None, "eager")

    class Rounding(DynamicCache):
        """Rounds what comes, and what it gives back is as wide as before."""

        def update(self, keys: Tensor, values: Tensor, *args: Any, **kwargs: Any) -> Any:
            return super().update(kept(keys), kept(values), *args, **kwargs)

    rounding = Rounding(config=eager.config)
    for layer in rounding.layers:
        if hasattr(layer, "update_index"):
            layer.update_index = functools.partial(_rounded_index, layer.update_index, kept)
    expected, _ = in_pieces(eager, ids, [61], rounding)
    assert distance(logits[0], expected[0]) < 1e-6
    assert cache.layers[2].rows("index").shape == (1, 1, 61, 32)


def _rounded_index(update: Any, kept: Any, idx_k: Tensor) -> Tensor:
    return update(kept(idx_k))


@pytest.mark.parametrize("index", [False, True], ids=["keys and values", "index keys, too"])
def test_bytes_are_half_of_bfloat16(index: bool) -> None:
    """A head of 128 of a token takes 128 bytes and a scale of 4, in place of 256."""
    layer, token = NarrowLayer("int8"), 2 * 4 * 128
    k, v = (torch.zeros(2, 4, 500, 128, dtype=torch.bfloat16) for _ in range(2))
    layer.update(k, v)
    if index:
        layer.update_index(torch.zeros(2, 1, 500, 128, dtype=torch.bfloat16))
    heads = 2 * 4 + index
    assert layer.nbytes == 2 * 500 * heads * (128 + 4)
    bfloat16 = 2 * 500 * 2 * (token + index * 128)
    assert layer.nbytes / bfloat16 == pytest.approx(132 / 256)


@pytest.mark.parametrize("kind", ["MiniCPM4", "MiniMax-M3"])
def test_bytes_are_known_before_anything_is_allocated(kind: str, tmp_path: Path) -> None:
    """With windows or index keys; of the released sizes it is little more than half."""
    model = made(kind, tmp_path, "int8")
    _, cache = in_pieces(model, tokens(2, 70), [70])
    assert cache_bytes(model.config, 70, 2) == sum(layer.nbytes for layer in cache.layers)
    released: Any = MiniCPMConfig(
        **{"hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 2},
        sparse_config={},
    )
    wide = cache_bytes(released, 131072)
    released.sparse_config = {"cache_dtype": "int8"}
    assert wide == 32 * 2 * (2 * 131072 + 8191) * 128 * 2
    assert cache_bytes(released, 131072) / wide == pytest.approx(132 / 256)


def test_rows_grow_by_little() -> None:
    rows = GrowingRows(torch.int8, torch.zeros(1, 1, 1, 8), 64)
    for _ in range(200):
        rows.append(torch.randn(1, 1, 1, 8))
    assert rows.length == 200
    assert rows.nbytes <= 200 * 1.125 * (8 + 4)


@pytest.mark.parametrize("kind", ["MiniCPM4", "MiniMax-M3"])
def test_padded_rows_are_as_alone(kind: str, tmp_path: Path) -> None:
    """Left padding, in chunks and steps: places in the cache are not positions."""
    model, ids = made(kind, tmp_path, "int8"), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    logits, cache, first = [], None, 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    for end in (40, 52, *range(53, 61)):
        part = {"attention_mask": mask[:, :end], "position_ids": places[:, first:end]}
        out, cache = in_pieces(model, ids, [end], cache, **part)
        logits.append(out)
        first = end
    alone, _ = in_pieces(model, ids[1:, 23:], [37])
    torch.testing.assert_close(torch.cat(logits, 1)[1:, 23:], alone, rtol=1e-6, atol=1e-6)


def test_a_batch_of_dense_and_sparse_rows_is_as_each_alone(tmp_path: Path) -> None:
    """The shorter row grows past `dense_len` in the steps; its windows are made then."""
    model, ids = minicpm(tmp_path, "int8", dense_len=32), tokens(2, 60)
    mask = torch.ones_like(ids)
    mask[1, :23] = 0
    places = (mask.cumsum(1) - 1).clamp(min=0)
    logits, cache, first = [], None, 0
    for end in (52, *range(53, 61)):
        part = {"attention_mask": mask[:, :end], "position_ids": places[:, first:end]}
        out, cache = in_pieces(model, ids, [end], cache, **part)
        logits.append(out)
        first = end
    together = torch.cat(logits, 1)
    for row, start in enumerate((0, 23)):
        cuts = [52 - start, *range(53 - start, 61 - start)]
        alone, _ = in_pieces(model, ids[row : row + 1, start:], cuts)
        torch.testing.assert_close(together[row, start:], alone[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["MiniCPM4", "MiniMax-M3"])
def test_what_generation_does_to_a_cache(kind: str, tmp_path: Path) -> None:
    """Rows are repeated, selected and reordered, and the last tokens taken back."""
    model, ids = made(kind, tmp_path, "int8"), tokens(2, 60)
    expected, _ = in_pieces(model, ids, [60])
    _, cache = in_pieces(model, ids.flip(0), [50])
    _, cache = in_pieces(model, torch.cat([ids.flip(0)[:, :50], tokens(2, 4)], 1), [54], cache)
    cache.crop(-4)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 0, 1, 2]))
    cache.batch_select_indices(torch.tensor([0, 1]))
    logits, _ = in_pieces(model, ids, [55, 56, 60], cache)
    torch.testing.assert_close(logits, expected[:, 50:], rtol=1e-6, atol=1e-6)


def test_generate_takes_it(tmp_path: Path) -> None:
    """Greedily and by beams, in inference mode and behind a cache that another mode filled."""
    model, ids = minicpm(tmp_path, "int8"), tokens(2, 40)
    greedy = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    new = model.generate(ids, **greedy)
    expected, _ = in_pieces(model, new, [46])
    assert torch.equal(expected[:, 39:45].argmax(-1), new[:, 40:])
    with torch.inference_mode():
        assert torch.equal(model.generate(ids, **greedy), new)
        _, cache = in_pieces(model, ids, [20])
    logits, _ = in_pieces(model, ids, [30, 40], cache)
    torch.testing.assert_close(logits, expected[:, 20:40], rtol=1e-6, atol=1e-6)
    beams = model.generate(ids, **greedy, num_beams=2)
    assert beams.shape == new.shape


def test_training_keeps_keys_as_they_are(tmp_path: Path) -> None:
    """What is rounded has no gradient, so no training step rounds."""
    ids, found = tokens(1, 50), []
    for cache_dtype in (None, "int8"):
        model = minicpm(tmp_path / str(cache_dtype), cache_dtype).train()
        model(ids, labels=ids).loss.backward()
        found.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused_by_name(tmp_path: Path) -> None:
    ids, model = tokens(1, 20), minicpm(tmp_path, "int8")
    static = StaticCache(config=model.config, max_cache_len=64)
    refused(
        "must be a DynamicCache, .*got a StaticCache; leave out cache_impl",
        model,
        ids,
        **{CACHE: static},
    )
    offloaded = DynamicCache(config=model.config, offloading=True)
    refused("without offloading", model, ids, **{CACHE: offloaded})
    _, used = in_pieces(minicpm(tmp_path), ids, [20])
    refused("got a .*Layer that holds tokens", model, ids, **{CACHE: used})
    with pytest.raises(InvalidInputError, match=r"has no gradients.*under torch\.no_grad"):
        model(ids, use_cache=True)
    assert model(ids, use_cache=False).logits.requires_grad
    refused("bfloat16 or float32, .* got torch.float16", model.half(), ids)
    with pytest.raises(InvalidInputError, match="cache_dtype must be None or one of float8_e4m3fn"):
        minicpm(tmp_path, "float8_e5m2")
    with pytest.raises(InvalidInputError, match="cache_dtype must be None or one of"):
        minimax("int4")(ids)


def test_a_model_without_hooks_is_told_how_to_get_them() -> None:
    model = dense()
    model.config.nsagen = {**INFLLM, "cache_dtype": "int8"}
    model.set_attn_implementation("nsagen")
    refused(r"cache_dtype: needs hooks .*remember_caches\(model\)", model, tokens(1, 20))
    remember_caches(model)
    _, cache = in_pieces(model, tokens(1, 20), [20])
    assert isinstance(cache.layers[0], NarrowLayer)


def test_a_setting_that_went_is_missed(tmp_path: Path) -> None:
    """Numbers without their scales would be taken for keys."""
    model, ids = minimax("int8"), tokens(1, 20)
    _, cache = in_pieces(model, ids, [10])
    model.config.nsagen = None
    refused("one byte an element needs the cache_dtype", model, ids[:, 10:], **{CACHE: cache})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("cache_dtype", CACHE_DTYPES)
@pytest.mark.parametrize("kind", ["MiniCPM4", "MoBA", "MiniMax-M3"])
def test_a_gpu_computes_what_a_cpu_does(kind: str, cache_dtype: str, tmp_path: Path) -> None:
    """Prompt, chunk and steps; a number that rounds to the other side moves little."""
    model, ids = made(kind, tmp_path, cache_dtype), tokens(2, 70)
    expected, _ = in_pieces(model, ids, [70])
    logits, cache = in_pieces(model.float().cuda(), ids.cuda(), [40, 66, *range(67, 71)])
    assert cache.layers[0].rows("keys").numbers.is_cuda
    assert distance(logits.cpu(), expected.float()) < 2e-2
