"""What a spec may say, and what it asks for."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from nsagen.core.errors import SpecError
from nsagen.core.paths import specs_dir
from nsagen.core.workload import STATIC_PARAMS, Workload
from nsagen.spec import Spec, json_schema, load_spec, shipped_specs

MINIMAL = """
name: mine
attention:
  head_dim: 64
  gqa_ratio: 4
  dtype: float16
  compress_type: avgpool
  kernel_size: 32
  kernel_stride: 16
  block_size: 64
  topk: 8
  window_size: 512
"""


def spec_of(tmp_path: Path, text: str) -> Spec:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return load_spec(path)


def of_op(spec: Spec, op: str, pass_: str = "forward") -> list[Workload]:
    return [w for w in spec.workloads() if (w.op, w.pass_) == (op, pass_)]


def test_what_is_left_out_has_a_default(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, MINIMAL)
    (shape,) = spec.attention_shapes()
    assert (shape.v_head_dim, shape.init_blocks, shape.local_blocks) == (64, 1, 2)
    assert shape.with_pe is True
    assert spec.passes == ("decode", "forward")
    assert spec.targets == ("cuda:80", "cuda:90")


def test_a_shape_says_nothing_of_what_is_as_usual(tmp_path: Path) -> None:
    (usual,) = spec_of(tmp_path, MINIMAL).attention_shapes()
    assert not {"v_compress_type", "mlp_hidden", "v_with_pe", "branch_kv"} & usual.said().keys()
    other = "  v_compress_type: mlp\n  branch_kv: separate\n"
    (unusual,) = spec_of(tmp_path, MINIMAL + other).attention_shapes()
    more = {"v_compress_type": "mlp", "mlp_hidden": 64, "branch_kv": "separate"}
    assert unusual.said() == usual.said() | more


def test_one_shape_asks_for_each_op_once_and_for_compression_of_keys_and_values(
    tmp_path: Path,
) -> None:
    spec = spec_of(tmp_path, MINIMAL + "passes: [forward, backward, decode]\n")
    others = {("compressed_lse", "forward"), ("block_selection", "decode")}  # parts of NSA's
    others |= {("pool_append", "decode"), ("selected_attention", "decode")}
    others |= {
        (op, p) for op in ("index_loss", "dense_index_loss") for p in ("forward", "backward")
    }
    expected = set(STATIC_PARAMS) - others
    assert {(w.op, w.pass_) for w in spec.workloads()} == expected
    assert len(spec.workloads()) == len(expected) + 2  # compress, forward and backward
    keys_and_values = [(w.head_dim, w.with_pe) for w in of_op(spec, "compress")]
    assert keys_and_values == [(64, False), (64, True)]


def test_values_have_their_own_head_size_and_no_position_embedding(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, MINIMAL.replace("head_dim: 64", "head_dim: 192\n  v_head_dim: 128"))
    compressed = {(w.head_dim, w.with_pe) for w in of_op(spec, "compress")}
    assert compressed == {(192, True), (128, False)}
    assert [w.v_head_dim for w in of_op(spec, "gated_sum")] == [128]
    assert [w.head_dim for w in of_op(spec, "rope")] == [192]


def test_lists_multiply_and_an_op_has_only_the_parameters_that_it_uses(tmp_path: Path) -> None:
    text = MINIMAL.replace("topk: 8", "topk: [8, 16]").replace("ratio: 4", "ratio: [1, 4, 16]")
    spec = spec_of(tmp_path, text)
    assert len(spec.attention_shapes()) == 6
    assert len(of_op(spec, "block_selection")) == 6
    assert len(of_op(spec, "selected_attention")) == 3  # topk is not a parameter of its kernel
    assert len(of_op(spec, "rope")) == 1


def test_exclude_leaves_out_every_combination_that_an_entry_matches(tmp_path: Path) -> None:
    text = MINIMAL.replace("topk: 8", "topk: [8, 16, 32]").replace("ratio: 4", "ratio: [1, 4]")
    spec = spec_of(tmp_path, text + "exclude: [{gqa_ratio: 1, topk: [16, 32]}]\n")
    kept = [(s.gqa_ratio, s.topk) for s in spec.attention_shapes()]
    assert kept == [(1, 8), (4, 8), (4, 16), (4, 32)]


def test_exclude_mends_a_list_whose_product_has_an_invalid_combination(tmp_path: Path) -> None:
    text = MINIMAL.replace("kernel_size: 32", "kernel_size: [8, 32]")
    spec = spec_of(tmp_path, text + "exclude: [{kernel_size: 8, kernel_stride: 16}]\n")
    assert [s.kernel_size for s in spec.attention_shapes()] == [32]


@pytest.mark.parametrize("order", ["[forward, decode]", "[decode, forward]"])
def test_the_order_in_a_file_changes_nothing_but_its_hash(tmp_path: Path, order: str) -> None:
    assert (
        spec_of(tmp_path, MINIMAL + f"passes: {order}\n").workloads()
        == spec_of(tmp_path, MINIMAL).workloads()
    )


def test_passes_choose_the_ops(tmp_path: Path) -> None:
    spec = spec_of(tmp_path, MINIMAL + "passes: decode\n")
    assert {w.pass_ for w in spec.workloads()} == {"decode"}


@pytest.mark.parametrize("word", ["no", "on", "match", "null_space"])
def test_words_that_yaml_1_1_reads_otherwise_are_names(tmp_path: Path, word: str) -> None:
    assert spec_of(tmp_path, MINIMAL.replace("mine", word)).name == word


def test_workloads_are_sorted_and_unique() -> None:
    for name in shipped_specs():
        workloads = load_spec(name).workloads()
        assert list(workloads) == sorted(set(workloads))


def test_a_name_is_a_file_in_specs_or_a_shipped_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shipped = load_spec("tiny")
    (tmp_path / "specs").mkdir()
    (tmp_path / "specs" / "tiny.yaml").write_text(MINIMAL)
    assert (shipped.name, load_spec("tiny").name) == ("tiny", "mine")


def test_a_label_names_a_spec_without_the_machine(tmp_path: Path) -> None:
    assert load_spec("tiny").label == "tiny"
    assert load_spec(specs_dir() / "tiny.yaml").label == "tiny"
    (tmp_path / "project" / "nested").mkdir(parents=True)
    (tmp_path / "project" / "pyproject.toml").touch()
    path = tmp_path / "project" / "nested" / "a.yaml"
    path.write_text(MINIMAL)
    assert load_spec(path).label == "nested/a.yaml"
    (tmp_path / "project" / "pyproject.toml").unlink()
    assert load_spec(path).label in ("a.yaml", os.path.relpath(path, "/"))


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.encode())
    assert load_spec(path).name == "mine"


class TestShipped:
    def test_names_are_the_files_names(self) -> None:
        assert [load_spec(name).name for name in shipped_specs()] == list(shipped_specs())

    def test_llama8b_covers_the_guides_model_and_llamas_own_heads(self) -> None:
        shapes = load_spec("llama8b").attention_shapes()
        guide = [s for s in shapes if s.gqa_ratio == 16 and s.topk == 8]
        assert {s.compress_type for s in guide} == {"avgpool", "weightedpool", "linear"}
        assert {s.gqa_ratio for s in shapes} == {4, 16}
        assert {s.head_dim for s in shapes} == {128}

    def test_tiny_runs_in_the_interpreter(self) -> None:
        dtypes = {s.dtype for s in load_spec("tiny").attention_shapes()}
        assert dtypes == {"float32", "float16"}  # bfloat16 is wrong there

    @pytest.mark.parametrize("name", ["llama8b", "tiny"])
    def test_editors_find_the_schema(self, name: str) -> None:
        first = (specs_dir() / f"{name}.yaml").read_text().splitlines()[0]
        assert first == "# yaml-language-server: $schema=spec.schema.json"

    def test_the_schema_file_is_fresh(self) -> None:
        text = (specs_dir() / "spec.schema.json").read_text()
        assert text == json.dumps(json_schema(), indent=2) + "\n", (
            "run: nsagen inspect --schema > specs/spec.schema.json"
        )


@pytest.mark.parametrize(
    ("lines", "gone", "kept"),
    [
        ("branches: [compressed, selected]\n", {"sliding_window_attention"}, "selected_attention"),
        ("branches: sliding\n", {"compress", "block_selection"}, "sliding_window_attention"),
        ("branches: [compressed]\n", {"block_selection", "selected_attention"}, "compress"),
        # Selection ranks what compressed attention computes.
        ("branches: selected\n", {"sliding_window_attention"}, "compressed_attention"),
    ],
)
def test_branches_that_are_off_have_no_kernels(
    tmp_path: Path, lines: str, gone: set[str], kept: str
) -> None:
    spec = spec_of(tmp_path, MINIMAL + "passes: [forward, backward, decode]\n" + lines)
    ops = {w.op for w in spec.workloads()}
    assert not ops & gone
    assert {kept, "gated_sum", "rope", "cache_append", "native_sparse_attention"} <= ops
    if lines == "branches: selected\n":
        backward = {w.op for w in spec.workloads() if w.pass_ == "backward"}
        assert backward == {"selected_attention", "gated_sum"}


def test_a_window_of_0_is_no_sliding_branch(tmp_path: Path) -> None:
    text = MINIMAL.replace("window_size: 512", "window_size: [0, 512]")
    spec = spec_of(tmp_path, text)
    assert [w.window_size for w in of_op(spec, "sliding_window_attention")] == [512]
    decode = of_op(spec, "native_sparse_attention", "decode")
    with pytest.raises(SpecError, match="13: branches: one branch must be on; got sliding alone"):
        spec_of(tmp_path, text + "branches: sliding\n")
    assert [w.window_size for w in decode] == [1, 512]  # masked by the gate
