"""Specs of the block-sparse family: which keys name a member, what it asks for, what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from nsagen.core.errors import SpecError
from nsagen.core.workload import Workload
from nsagen.spec import Spec, load_spec

INDEX = {
    "head_dim": 128,
    "gqa_ratio": 16,
    "dtype": "bfloat16",
    "compress_type": "avgpool",
    "kernel_size": 1,
    "kernel_stride": 1,
    "block_size": 128,
    "topk": 16,
    "init_blocks": 0,
    "local_blocks": 1,
    "window_size": 0,
    "with_pe": "false",
    "scorer": "index",
    "index_heads": 4,
    "index_head_dim": 64,
    "score_norm": "none",
    "score_heads": "each",
    "score_pool": "max",
    "rotary_dim": 64,
}
POOLED = {
    **{name: INDEX[name] for name in list(INDEX)[:4]},
    **{"kernel_size": 32, "kernel_stride": 16, "block_size": 64, "topk": 96, "local_blocks": 33},
    **{"window_size": 0, "with_pe": "false", "score_pool": "max", "pool_rope": "after"},
}


def spec_of(tmp_path: Path, values: dict[str, object], branches: str = "selected") -> Spec:
    lines = "".join(f"  {name}: {value}\n" for name, value in values.items() if value is not None)
    path = tmp_path / "mine.yaml"
    more = f"branches: {branches}\npasses: [forward, backward, decode]\n"
    path.write_text(f"name: mine\nattention:\n{lines}{more}", encoding="utf-8")
    return load_spec(path)


def work(spec: Spec, op: str, pass_: str = "forward") -> Workload:
    (found,) = (w for w in spec.workloads() if (w.op, w.pass_) == (op, pass_))
    return found


def test_an_index_selects_on_heads_of_its_own(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, INDEX)
    selection = work(spec, "block_selection")
    assert (selection.head_dim, selection.gqa_ratio) == (64, 4)
    assert str(selection).endswith("_l1_s1_b128_k16_i0_c1_none_each_max")
    attention = work(spec, "selected_attention")
    assert (attention.head_dim, attention.gqa_ratio, attention.block_size) == (128, 16, 128)
    step = work(spec, "selected_attention", "decode")
    assert (step.block_size, step.topk, step.gqa_ratio) == (128, 16, 16)
    ops = {w.op for w in spec.workloads()}
    assert not ops & {"compress", "compressed_attention", "sliding_window_attention", "gated_sum"}
    assert "native_sparse_attention" not in ops


def test_pooled_keys_are_compressed_without_values(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, POOLED)
    assert not work(spec, "compress").with_pe
    selection = work(spec, "block_selection")
    assert (selection.score_norm, selection.score_heads, selection.score_pool) == (
        *("softmax", "sum", "max"),
    )
    assert "_max" in str(selection)
    assert "softmax" not in str(selection)


def test_a_shape_says_which_member_it_is(tmp_path: Path) -> None:
    (shape,) = spec_of(tmp_path, POOLED).shapes
    assert shape.family_keys == ("score_pool", "pool_rope")
    assert shape.rotary_dim == 128
    said = shape.said()
    assert (said["score_pool"], said["pool_rope"]) == ("max", "after")
    assert not {"scorer", "rotary_dim", "dense_len", "score_norm"} & said.keys()
    assert load_spec("llama8b").shapes[0].family_keys == ()


@pytest.mark.parametrize(
    ("values", "change", "text"),
    [
        (INDEX, {"kernel_size": 2}, "scorer index needs kernel_size 1"),
        (INDEX, {"score_norm": "softmax"}, "scorer index needs score_norm none"),
        (INDEX, {"score_heads": "sum"}, "scorer index needs score_heads each"),
        (INDEX, {"pool_rope": "after"}, "scorer index needs pool_rope before"),
        (INDEX, {"with_pe": "true"}, "scorer index needs with_pe false"),
        (INDEX, {"index_heads": None}, "scorer index needs index_heads"),
        (INDEX, {"index_head_dim": None}, "add index_head_dim"),
        (INDEX, {"rotary_dim": 192}, "rotary_dim must be at most head_dim"),
        (POOLED, {"index_heads": 4}, "no other scorer takes it"),
        (POOLED, {"score_norm": "none", "score_pool": "overlap"}, "write score_pool: max"),
        (POOLED, {"score_norm": "none", "lse_windows": 4}, "lse_windows needs score_norm softmax"),
        (POOLED, {"score_heads": "each"}, "needs gqa_ratio 1"),
        (POOLED, {"compress_type": "linear"}, "compressed by their plain mean"),
        (POOLED, {"with_pe": "true"}, "compressed by their plain mean"),
        (POOLED, {"lse_windows": 2}, "lse_windows"),
        (POOLED, {"lse_windows": "true"}, "lse_windows"),
        (POOLED, {"score_pool": "mean"}, "score_pool"),
        (POOLED, {"rotary_dim": 63}, "rotary_dim"),
        (POOLED, {"dense_len": -1}, "dense_len"),
    ],
)
def test_what_has_no_meaning_is_refused_by_name(
    tmp_path: Path, values: dict[str, object], change: dict[str, object], text: str
) -> None:
    with pytest.raises(SpecError, match=text):
        spec_of(tmp_path, {**values, **change})


@pytest.mark.parametrize("branches", ["[compressed, selected]", "[compressed, selected, sliding]"])
def test_nsas_other_branches_are_nsas(tmp_path: Path, branches: str) -> None:
    with pytest.raises(SpecError, match=r"must be selected alone.*and score_pool"):
        spec_of(tmp_path, POOLED, branches)


def test_a_wide_local_band_has_kernels_of_its_own(tmp_path: Path) -> None:
    """Those of a window of whole blocks, in both passes, and of the blocks before it."""
    (group,) = spec_of(tmp_path, POOLED).forced_once()
    assert {(w.op, w.pass_) for w in group} == {
        ("sliding_window_attention", "forward"),
        ("sliding_window_attention", "backward"),
        ("selected_attention", "forward"),
    }
    windows = [w for w in group if w.op == "sliding_window_attention"]
    assert {(w.window_size, w.block_size) for w in windows} == {(33 * 64, 64)}
    assert spec_of(tmp_path, {**POOLED, "local_blocks": 8}).forced_once() == ()
    assert spec_of(tmp_path, INDEX).forced_once() == ()


@pytest.mark.parametrize("values", [INDEX, POOLED], ids=["index", "pooled"])
def test_narrow_caches_reach_the_ops_that_read_them(
    values: dict[str, object], tmp_path: Path
) -> None:
    """Those of decoding alone; means of a narrow cache have no dtype but its scales'."""
    spec = spec_of(tmp_path, {**values, "cache_dtype": "float8_e4m3fn"})
    narrow = {w.op: w for w in spec.workloads() if "cache_dtype" in dict(w.params)}
    pools = {"pool_append"} if values is POOLED else set()
    assert set(narrow) == {"block_selection", "selected_attention"} | pools
    assert {w.pass_ for w in narrow.values()} == {"decode"}
    assert narrow["block_selection"].dtype == "bfloat16"
    for op in pools:
        assert narrow[op].dtype == "float32"
