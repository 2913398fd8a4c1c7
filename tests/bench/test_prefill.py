"""The benchmark's calls compute what they are named for, and its rows are complete."""

import re
from dataclasses import replace

import pytest
import torch

from nsagen.bench import measure, prefill, train
from nsagen.bench.shape import Inputs, Shape, shape_of
from nsagen.cases.base import Cost
from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import STATIC_PARAMS
from nsagen.ops import native_sparse_attention

TINY = Shape(
    kv_heads=1,
    gqa_ratio=2,
    head_dim=16,
    v_head_dim=16,
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    topk=4,
    window_size=32,
    dtype="float32",
)


def test_a_shape_has_every_parameter_of_every_workload():
    for op, pass_ in STATIC_PARAMS:
        assert TINY.workload(op, pass_).op == op


def test_the_whole_attention_is_the_op_of_that_name():
    inputs = Inputs.random(TINY, 100, device="cpu")
    whole = native_sparse_attention(
        *(inputs.q, inputs.k, inputs.v, inputs.gate),
        cu_seqlens=inputs.cu_seqlens,
        compress_type="avgpool",
        kernel_size=8,
        kernel_stride=4,
        block_size=16,
        topk=4,
        window_size=32,
    )
    from nsagen.ops import avgpool_compress

    windows = [avgpool_compress(x, None, inputs.cu_seqlens, 8, 4)[0] for x in (inputs.k, inputs.v)]
    for mine, made in zip((inputs.ck, inputs.cv), windows, strict=True):
        mine[: made.shape[0]] = made
    torch.testing.assert_close(inputs.attention(), whole)


@pytest.fixture
def _without_a_gpu(monkeypatch):
    """Calls run once on the CPU and take a millisecond; the GPU can do 1e12 of everything."""

    def once(call):
        call()
        return 1.0

    class Dense:
        cost = Cost(1e9, 1e6)
        q = k = v = torch.ones(1, requires_grad=True)

        def __init__(self, shape, tokens, backend="cuDNN", requires_grad=False):
            pass

        def forward(self):
            return 2 * (self.q + self.k + self.v)

    random = Inputs.random.__func__

    def on_cpu(cls, shape, tokens, dispatcher=None, **options):
        return random(cls, shape, tokens, dispatcher, **{**options, "device": "cpu"})

    for module in (prefill, train):
        monkeypatch.setattr(module, "milliseconds", once)
        monkeypatch.setattr(
            module, "host_cost", lambda call, ms: measure.HostCost(once(call) / 2, 7)
        )
        monkeypatch.setattr(module, "measure_ceilings", lambda: measure.Ceilings(1e12, 1e12))
        monkeypatch.setattr(module, "DenseAttention", Dense)
    monkeypatch.setattr(Inputs, "random", classmethod(on_cpu))
    monkeypatch.setattr(train, "peak_memory", lambda inputs: 0.5)


@pytest.mark.usefixtures("_without_a_gpu")
def test_prefill_has_a_row_for_each_op_the_whole_and_dense_attention():
    kept: list[int] = []
    rows = prefill.run(TINY, (64, 128), keep=lambda rows: kept.append(len(rows)))
    assert kept == [len(rows) / 2, len(rows)]  # a long benchmark that is stopped keeps its rows
    names = [row["what"] for row in rows if row["tokens"] == 64]
    assert names[0] == "dense attention (cuDNN)"
    assert set(names) >= {"compress", "rope", "attention", *prefill.PARTS}
    assert all(set(prefill.COLUMNS) <= set(row) for row in rows)
    assert all(row["floor_ms"] > 0 for row in rows)
    assert {(row["host_ms"], row["launches"], row["bound"]) for row in rows} == {(0.5, 7, "")}
    whole, parts = (
        sum(row["floor_ms"] for row in rows if row["tokens"] == 128 and row["what"] in chosen)
        for chosen in (("attention",), prefill.PARTS)
    )
    assert whole <= parts


@pytest.mark.usefixtures("_without_a_gpu")
def test_a_learned_selection_is_what_selected_attention_reads(monkeypatch):
    made = []

    def nothing(kv_heads, tokens, device):
        made.append(torch.full((kv_heads, tokens, 4), -1, dtype=torch.int32, device=device))
        return made[-1]

    monkeypatch.setattr(prefill, "learned_selection", nothing)
    found = {}
    monkeypatch.setattr(
        prefill, "milliseconds", lambda call: found.update({len(found): call()}) or 1.0
    )
    names = [row["what"] for row in prefill.run(TINY, (64,), selection="learned")]
    results = dict(zip(names, found.values(), strict=True))
    assert names[-1] == "attention"  # public implementations choose by themselves
    assert len(made) == 1
    assert (results["selected_attention"] == 0).all()


def test_the_attention_over_given_blocks_is_the_attention():
    inputs = Inputs.random(TINY, 100, device="cpu")
    given = inputs.attention_over(inputs.compressed()[1])
    torch.testing.assert_close(given, inputs.attention())


@pytest.mark.usefixtures("_without_a_gpu")
def test_few_rows_beside_every_dense_attention(monkeypatch):
    monkeypatch.setattr(prefill, "backends", lambda: ("cuDNN", "FlashAttention-4"))
    times = iter((3.0, 2.0, 1.0))
    monkeypatch.setattr(prefill, "milliseconds", lambda call: next(times))
    rows = prefill.run(TINY, (64,), only={"attention"})
    assert [row["what"].rpartition(" ")[2] for row in rows] == [
        *("(cuDNN)", "(FlashAttention-4)", "attention")
    ]
    assert [row["of_dense"] for row in rows] == [1.5, 1.0, 0.5]  # of the fastest


def test_a_long_call_is_repeated_three_times(monkeypatch):
    waited = iter((5000.0, 300.0, 500.0, 400.0))  # the first one compiles
    monkeypatch.setattr(measure, "_waited_ms", lambda call: next(waited))
    assert measure.milliseconds(lambda: None) == 400.0


@pytest.mark.usefixtures("_without_a_gpu")
def test_train_times_the_gradients_of_each_differentiable_op():
    rows = train.run(TINY, (64,))
    assert [row["what"] for row in rows][1:] == [
        *(op for op in prefill.PARTS if op != "block_selection"),
        "attention",
    ]
    assert rows[-1]["peak_gib"] == 0.5
    assert all(row["backward_ms"] == 1.0 for row in rows)
    assert all(set(train.COLUMNS) - {"peak_gib"} <= set(row) for row in rows)


def test_a_row_that_waits_for_the_host_says_so():
    cost = measure.HostCost(ms=0.5, launches=11)
    assert cost.columns(gpu_ms=0.6) == {"host_ms": 0.5, "launches": 11, "bound": ""}
    assert cost.columns(gpu_ms=0.4)["bound"] == "host"


def test_changes_are_numbers_and_words():
    shape = shape_of(None, ["kv_heads=8", "dtype=float16", "with_pe=true"])
    assert shape == replace(Shape(), kv_heads=8, dtype="float16", with_pe=True)


def test_a_spec_gives_its_first_shape_that_the_changes_agree_with():
    shape = shape_of("tiny", ["gqa_ratio=2", "dtype=float32", "kv_heads=3"])
    assert (shape.gqa_ratio, shape.dtype, shape.kv_heads) == (2, "float32", 3)
    assert (shape.head_dim, shape.kernel_size, shape.window_size) == (32, 8, 32)


@pytest.mark.parametrize(
    ("spec", "change", "said"),
    [
        (None, "tokp=8", "did you mean 'topk'?"),
        (None, "topk", "must be PARAM=VALUE"),
        (None, "topk=many", "must be PARAM=VALUE"),
        (None, "with_pe=1", "must be PARAM=VALUE"),
        ("tiny", "topk=7", "tiny must have a shape with topk=7; it has none"),
        ("minimax_m3", "topk=8", "minimax_m3 must have a shape with topk=8; it has none"),
    ],
)
def test_a_shape_that_cannot_be_measured_is_refused(spec, change, said):
    with pytest.raises(InvalidInputError, match=re.escape(said)):
        shape_of(spec, [change])


def test_without_a_gpu_a_benchmark_says_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(LookupError, match="times are measured on a GPU"):
        measure.require_gpu("prefill")
