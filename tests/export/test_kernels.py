"""The layout of Hugging Face kernels: loaded by `kernels`, used by Transformers."""

from __future__ import annotations

import copy
import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from tests.export.small import INFLLM, exported

kernels = pytest.importorskip("kernels")
transformers = pytest.importorskip("transformers")

from transformers import AttentionInterface, AttentionMaskInterface, LlamaConfig, LlamaForCausalLM  # noqa: E402

import nsagen.integrations.transformers  # noqa: E402, F401  # registers "nsagen", the oracle
from tests.integrations.tiny import LLAMA  # noqa: E402

FORM = {"form": "infllm_v2", "kernel_size": 8, "kernel_stride": 4, "block_size": 16, "topk": 4}
FORM |= {"init_blocks": 1, "local_blocks": 2, "dense_len": 0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("export")
    options: dict[str, Any] = {"layout": "kernels", "release": 3, "repo_id": "mine/member"}
    return exported(place, INFLLM, "member", **options).folder


@pytest.fixture(scope="module")
def kernel(folder: Path) -> Any:
    found = kernels.get_local_kernel(folder)
    found.register("nsagen_test", found.attention, AttentionInterface, AttentionMaskInterface)
    return found


@pytest.fixture(scope="module")
def models(kernel: Any) -> tuple[Any, Any]:
    """The same small model with the kernel's attention, and with nsagen's own."""
    config = LlamaConfig(**LLAMA | {"initializer_range": 0.2})
    torch.manual_seed(0)
    mine = LlamaForCausalLM(config).eval()
    oracle = copy.deepcopy(mine)
    mine.set_attn_implementation("nsagen_test")
    oracle.config.nsagen = FORM
    oracle.set_attn_implementation("nsagen")
    return mine, oracle


def tokens(*shape: int) -> Tensor:
    return torch.randint(1, 97, shape, generator=torch.Generator().manual_seed(2))


def test_the_folders_are_those_that_kernels_knows(folder: Path) -> None:
    build = tomllib.loads((folder / "build.toml").read_text())
    assert build["general"]["hub"] == {"repo-id": "mine/member"}
    assert (build["general"]["edition"], build["general"]["version"]) == (5, 3)
    assert {path.name for path in (folder / "build").iterdir()} == {
        "torch-cpu",
        "torch-cuda",
        "torch-rocm",
    }
    cuda = json.loads((folder / "build/torch-cuda/metadata.json").read_text())
    assert cuda["backend"] == {"type": "cuda", "archs": ["8.0"]}
    rocm = json.loads((folder / "build/torch-rocm/metadata.json").read_text())
    assert rocm["backend"] == {"type": "rocm", "archs": ["gfx942"]}
    source = {
        p.relative_to(folder / "torch-ext/nsagen_member")
        for p in folder.glob("torch-ext/*/**/*.py")
    }
    built = {
        p.relative_to(folder / "build/torch-cuda") for p in folder.glob("build/torch-cuda/**/*.py")
    }
    assert source == built


def test_kernels_reads_the_metadata_and_finds_every_file_as_it_was_hashed(folder: Path) -> None:
    rust = pytest.importorskip("kernels._rust")
    for variant in (folder / "build").iterdir():
        metadata = rust.Metadata.read_from_file(variant / "metadata.json")
        metadata.digest.validate(rust.Digest.hash_variant(metadata.digest.algorithm, variant))
        assert (metadata.version, metadata.license) == (3, "Apache-2.0")
    (folder / "build/torch-rocm/stray.py").write_text("x = 1\n")
    found = rust.Digest.hash_variant(metadata.digest.algorithm, folder / "build/torch-rocm")
    metadata = rust.Metadata.read_from_file(folder / "build/torch-rocm/metadata.json")
    with pytest.raises(rust.DigestValidationError):
        metadata.digest.validate(found)
    (folder / "build/torch-rocm/stray.py").unlink()


def test_its_ops_are_in_a_namespace_of_their_own(kernel: Any, folder: Path) -> None:
    """Beside those of nsagen, which this process has too: the metadata's id is its name."""
    metadata = json.loads((folder / "build/torch-cpu/metadata.json").read_text())
    assert kernel.__name__ == metadata["id"]
    assert metadata["id"].startswith("nsagen_member_cpu_")
    own = getattr(torch.ops, metadata["id"])
    assert own.rope_forward.default is not torch.ops.nsagen.rope_forward.default
    assert kernel.supports_flash_attn
    assert kernel.flash_attn_forward is kernel.attention


@torch.no_grad()
def test_a_model_computes_what_nsagens_own_attention_computes(models: tuple[Any, Any]) -> None:
    mine, oracle = models
    ids = tokens(2, 100)
    assert torch.equal(mine(ids).logits, oracle(ids).logits)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_takes_no_part(models: tuple[Any, Any], side: str) -> None:
    mine, oracle = models
    ids, mask = tokens(2, 90), torch.ones(2, 90, dtype=torch.int64)
    mask[0, slice(0, 20) if side == "left" else slice(70, 90)] = 0
    given = {"attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    one, other = mine(ids, **given).logits, oracle(ids, **given).logits
    torch.testing.assert_close(one[mask.bool()], other[mask.bool()])


@pytest.mark.parametrize("cache", [None, "static"])
def test_generated_tokens_are_those_of_nsagens_own(
    models: tuple[Any, Any], cache: str | None
) -> None:
    mine, oracle = models
    ids, mask = tokens(2, 70), torch.ones(2, 70, dtype=torch.int64)
    mask[1, :9] = 0
    wanted: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "attention_mask": mask}
    made = [m.generate(ids, cache_implementation=cache, **wanted) for m in (mine, oracle)]
    assert torch.equal(*made)


def test_gradients_reach_the_weights(models: tuple[Any, Any]) -> None:
    ids, grads = tokens(1, 60), []
    for model in models:
        model.zero_grad()
        model(ids, labels=ids).loss.backward()
        grads.append(model.model.layers[0].self_attn.k_proj.weight.grad)
    assert grads[0].abs().sum() > 0
    torch.testing.assert_close(*grads)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"dropout": 0.1}, "attention_dropout"),
        ({"sliding_window": 8}, "a window of 8"),
        ({"softcap": 30.0}, "softcap"),
        ({"attention_mask": torch.ones(1, 20)}, "must be bool"),
        ({"attention_mask": torch.ones(1, 1, 20, 20, dtype=torch.bool)}, "must be the causal one"),
        ({"cu_seq_lens_q": torch.tensor([0, 20])}, "packed documents"),
    ],
)
def test_what_it_does_not_compute_is_refused_by_name(
    kernel: Any, given: dict[str, Any], said: str
) -> None:
    q, k = torch.randn(1, 4, 20, 32), torch.randn(1, 2, 20, 32)
    with pytest.raises(kernel.InvalidInputError, match=said):
        kernel.attention(torch.nn.Module(), q, k, k, **given)
    assert not issubclass(kernel.InvalidInputError, InvalidInputError)  # nsagen is not there


@torch.no_grad()
def test_settings_of_the_model_are_those_of_the_package(
    kernel: Any, models: tuple[Any, Any]
) -> None:
    mine, ids = models[0], tokens(1, 40)
    plain = mine(ids).logits
    try:
        mine.config.nsagen = FORM
        assert torch.equal(mine(ids).logits, plain)
        for settings, said in (
            ({**FORM, "topk": 8}, "must be this package's: topk 4; got topk 8"),
            ({**FORM, "cache_dtype": "int8"}, "cache_dtype None; got cache_dtype int8"),
            ({**FORM, "package": "tiny"}, "package None; got package tiny"),
            ({"form": "moba"}, "form infllm_v2"),
            ({"index_warmup": True}, "config.nsagen"),
        ):
            mine.config.nsagen = settings
            with pytest.raises(kernel.InvalidInputError, match=said):
                mine(ids)
    finally:
        del mine.config.nsagen


@pytest.mark.interpreter
@torch.no_grad()
def test_its_kernels_run(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A prompt and a step behind it, in the interpreter, beside the reference."""
    launched, find = [], kernel.dispatcher.launcher

    def noting(*given: Any) -> Any:
        launched.append(str(given[0]))
        return find(*given)

    monkeypatch.setattr(kernel.dispatcher, "launcher", noting)
    module, random = torch.nn.Module(), torch.Generator().manual_seed(0)
    q = torch.randn(1, 2, 50, 32, generator=random)
    k, v = (torch.randn(1, 1, 50, 32, generator=random) for _ in range(2))
    for new in (50, 1):
        o, _ = kernel.attention(module, q[:, :, 50 - new :], k, v)
        doubles = (q[:, :, 50 - new :].double(), k.double(), v.double())
        expected, _ = kernel.attention(module, *doubles)
        assert (o - expected).norm() / expected.norm() < 1e-5
    ops = {name.rpartition(" ")[0] for name in launched}
    assert ops == {
        "compress forward",
        "compressed_lse forward",
        "block_selection forward",
        "selected_attention forward",
        "block_selection decode",
        "selected_attention decode",
    }
