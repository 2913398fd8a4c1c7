"""What kernels allocate for a million tokens: bounded, and in proportion to the tokens."""

import pytest

from nsagen.aot.workspace import workspace_bytes
from nsagen.cases.base import Sizes
from nsagen.codegen.template import default_schedule, kernel_name, render
from nsagen.core.target import KNOWN_TARGETS
from nsagen.reports.target_support import representative
from nsagen.spec import load_spec

MILLION = 1 << 20
MIB = 1 << 20

BYTES_A_TOKEN = {
    ("compress", "backward"): 2,
    ("compressed_attention", "backward"): 256,  # delta: 4 bytes a query head
    # partial dk and dv, which tokens chose a block, and a copy of topk_idx without its repeats
    ("selected_attention", "backward"): 9100,
    # lse in base 2 and delta, those of a key/value head together: 8 bytes a query head
    ("sliding_window_attention", "backward"): 512,
}
"""At 64 query heads over 4 of 128 and topk 16; 0 for the ops that are not here."""

CONSTANT = {
    ("block_selection", "forward"): 512 * MIB,  # scores of the tiles in work
    ("compress", "backward"): 32 * MIB,
    ("compressed_attention", "backward"): 512 * MIB,  # partial dk and dv
    ("compressed_attention", "decode"): 40 * MIB,  # scores of 4 rows
    ("native_sparse_attention", "decode"): 40 * MIB,
    ("cache_append", "decode"): MIB,
}
"""Whatever the tokens; in decode at 4 rows."""


@pytest.mark.parametrize("workload", representative(load_spec("llama8b")), ids=str)
def test_workspace_of_a_million_tokens(workload, tmp_path):
    decode = workload.pass_ == "decode"
    seqlens = (MILLION - 1,) * 4 if decode else (MILLION,)
    sizes = Sizes(seqlens, kv_heads=4, capacity=MILLION)
    schedule = default_schedule(workload, KNOWN_TARGETS["cuda:90"])
    path = tmp_path / f"{kernel_name(workload, schedule)}.py"
    path.write_text(render(workload, schedule, "# test"))
    key = (workload.op, workload.pass_)
    limit = CONSTANT.get(key, 0) + BYTES_A_TOKEN.get(key, 0) * MILLION
    assert workspace_bytes(path, workload, sizes) <= limit


@pytest.mark.parametrize("name", ["minimax_m3", "minicpm4", "moba"])
def test_the_family_s_scores_take_no_memory_of_n_squared(name, tmp_path):
    """A million tokens squared are 4 TiB of float32 a head."""
    spec = load_spec(name)
    limits = {
        "block_selection": 512 * MIB,
        "compressed_lse": 0,
        "index_loss": 7600 * MILLION,  # backward: partial gradients of index keys
        "dense_index_loss": 2600 * MILLION,
    }
    for workload in spec.workloads():
        if workload.op not in limits or workload.pass_ == "decode":
            continue
        indexed = workload.op == "block_selection" and name == "minimax_m3"
        sizes = Sizes((MILLION,), kv_heads=1 if indexed else 4, topk=spec.topk_of(workload))
        schedule = default_schedule(workload, KNOWN_TARGETS["cuda:90"])
        path = tmp_path / f"{kernel_name(workload, schedule)}.py"
        path.write_text(render(workload, schedule, "# test"))
        assert workspace_bytes(path, workload, sizes) <= limits[workload.op], workload


@pytest.mark.parametrize("target", ["cuda:90", "cuda:80"])
@pytest.mark.parametrize(
    ("name", "kv_heads", "limit"),
    [("minimax_m3", 4, 2200), ("minicpm4", 2, 3300), ("minicpm_sala", 2, 3300), ("moba", 32, 2000)],
)
def test_the_family_s_gradients_take_a_few_gib(name, kv_heads, limit, target, tmp_path):
    """MiB at 131072 tokens with all heads; q, k, v, o and their gradients are 2 to 8 GiB."""
    spec = load_spec(name)
    works = [w for w in spec.workloads() if (w.op, w.pass_) == ("selected_attention", "backward")]
    for workload in works:
        sizes = Sizes((1 << 17,), kv_heads, topk=spec.topk_of(workload))
        schedule = default_schedule(workload, KNOWN_TARGETS[target])
        path = tmp_path / f"{kernel_name(workload, schedule)}.py"
        path.write_text(render(workload, schedule, "# test"))
        assert workspace_bytes(path, workload, sizes) <= limit * MIB, workload
