"""Kernels reach elements past 2^31: addresses are 64-bit wherever a tensor may be that large.

Each tensor of a small call that grows with tokens times heads times head_dim, or with cache
slots, is laid out so that its last rows lie past 2^31 elements, in memory of which only the rows
exist: a kernel with an address of 32 bits reads or writes elsewhere, or fails.
"""

import dataclasses
import inspect
import mmap
from collections.abc import Callable

import numpy as np
import pytest
import torch

from nsagen.cases.base import Case, Sizes, cases_of
from nsagen.core.workload import OPTIONAL_PARAMS, STATIC_PARAMS, Workload, spec_names
from nsagen.spec.shape import AttentionShape
from tests.support import check_case, load_kernel, of_shape

pytestmark = pytest.mark.interpreter

SHAPE = AttentionShape(
    head_dim=16,
    v_head_dim=24,
    gqa_ratio=2,
    dtype="float32",
    compress_type="avgpool",
    kernel_size=8,
    kernel_stride=4,
    block_size=16,
    topk=3,
    init_blocks=1,
    local_blocks=1,
    window_size=12,
    with_pe=False,
)
SIZES = Sizes((5, 0, 43), kv_heads=1)
DECODE_SIZES = Sizes((4, -1, 39), kv_heads=1, capacity=48)
_NO_RESERVE = 0x4000
"""Linux's MAP_NORESERVE: no memory stands behind pages that nothing touches."""

CONTIGUOUS = {
    "o",
    "lse",
    "y",
    "q_out",
    "w",
    "w_k",
    "w_v",
    "weight",
    "norm_weight",
    "w_k2",
    "w_v2",
    "pe",
    "pe_v",
    "cos",
    "sin",
}
CONTIGUOUS |= {"dq", "dk", "dv", "dx", "dw", "dpe"}
CONTIGUOUS |= {"loss", "lse_index", "slope", "dloss", "dindex_q", "dindex_k"}
CONTIGUOUS |= {"d_compressed", "d_selected", "d_sliding", "dgate"}
"""What `launch` wants contiguous: outputs, and weights and tables, which are small."""

REACH = 2**31 + 2**20


def far(tensor: torch.Tensor) -> torch.Tensor:
    """The same values with a stride between rows so large that the last row starts past 2^31."""
    rows, row = tensor.shape[0], tensor[0].numel()
    stride = -(-REACH // (rows - 1))
    size = ((rows - 1) * stride + row) * tensor.element_size()
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE
    memory = torch.from_numpy(np.frombuffer(mmap.mmap(-1, size, flags), dtype=np.uint8))
    spread = memory.view(tensor.dtype).as_strided(
        tensor.shape, (stride, *tensor.contiguous().stride()[1:])
    )
    return spread.copy_(tensor)


def spread(case: Case, launch: Callable[..., None]) -> Case:
    """The case with far copies of every tensor that the launch takes with any row stride."""
    named = dict(zip(inspect.signature(launch).parameters, case.args, strict=False))
    copies = {
        id(x): far(x)
        for name, x in named.items()
        if isinstance(x, torch.Tensor) and name not in CONTIGUOUS and x.dtype.is_floating_point
    }
    assert copies
    args = tuple(copies.get(id(x), x) for x in case.args)
    outputs = {name: copies.get(id(x), x) for name, x in case.outputs.items()}
    return dataclasses.replace(case, args=args, outputs=outputs)


def check(op: str, pass_: str, shape: AttentionShape) -> None:
    params = {name: of_shape(shape, name) for name in spec_names(op, pass_)}
    workload = Workload.of(op, pass_, dtype="float32", **params)
    sizes = DECODE_SIZES if pass_ == "decode" else SIZES
    case = cases_of(workload).make_case(workload, sizes, "cpu", 0)
    module = load_kernel(workload)
    check_case(module, spread(case, module.launch))


@pytest.mark.parametrize(("op", "pass_"), sorted(STATIC_PARAMS))
def test_rows_past_two_to_the_31(op, pass_):
    check(op, pass_, SHAPE)


@pytest.mark.parametrize("compress_type", ["sigmoid_mul", "mlp"])
@pytest.mark.parametrize(("op", "pass_"), sorted(OPTIONAL_PARAMS))
def test_rows_past_two_to_the_31_of_separate_branches(op, pass_, compress_type):
    more = {"compress_type": compress_type, "v_compress_type": "", "mlp_hidden": 24}
    check(op, pass_, dataclasses.replace(SHAPE, **more, v_with_pe=True, branch_kv="separate"))
