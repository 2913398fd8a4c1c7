"""torch.compile and torch.export get whole graphs: ops neither break them nor are traced."""

import pytest
import torch
from torch import Tensor, nn

from nsagen import ops
from nsagen.ops import reference

from .inputs import STATICS, Cached, Packed


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_block_compiles_to_one_graph(backend: str) -> None:
    args, keywords = Packed(requires_grad=True).block()
    compiled = torch.compile(
        lambda *args: ops.native_sparse_attention(*args, **keywords).sin(),
        backend=backend,
        fullgraph=True,
    )
    o = compiled(*args)
    expected = reference.native_sparse_attention(*args, **keywords).sin()
    torch.testing.assert_close(o, expected)
    gradients = torch.autograd.grad(o.sum(), args)
    torch.testing.assert_close(gradients, torch.autograd.grad(expected.sum(), args))


def test_another_number_of_tokens_needs_no_other_graph() -> None:
    graphs = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(
        ops.native_sparse_attention, backend=backend, fullgraph=True, dynamic=True
    )
    for seqlens in ((0, 5, 30, 25), (0, 9, 12, 33), (10, 10, 10, 10)):
        args, keywords = Packed(seqlens=seqlens).block()
        expected = reference.native_sparse_attention(*args, **keywords)
        torch.testing.assert_close(compiled(*args, **keywords), expected)
    assert len(graphs) == 1


def test_without_gradients_the_block_is_one_op() -> None:
    """A compiled call costs the host little more than an eager one."""
    ops_seen: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> object:
        ops_seen.extend(str(n.target) for n in graph.graph.nodes if "nsagen" in str(n.target))
        return graph.forward

    args, keywords = Packed().block()
    compiled = torch.compile(ops.native_sparse_attention, backend=backend, fullgraph=True)
    expected = reference.native_sparse_attention(*args, **keywords)
    torch.testing.assert_close(compiled(*args, **keywords), expected)
    assert ops_seen == ["nsagen.attention_without_gradients.default"]


class Block(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, gate: Tensor, cu_seqlens: Tensor) -> Tensor:
        statics = {**STATICS, "compress_type": "avgpool", "window_size": 9}
        return ops.native_sparse_attention(q, k, v, gate, cu_seqlens=cu_seqlens, **statics)


def test_export() -> None:
    x = Packed()
    args = (x.q, x.k, x.v, x.gate, x.cu_seqlens)
    tokens = torch.export.Dim("tokens", min=8, max=4096)
    shapes = [{0: tokens}] * 4 + [None]
    program = torch.export.export(Block(), args, dynamic_shapes=shapes)
    names = {str(node.target) for node in program.graph.nodes}
    assert "nsagen.selected_attention_forward.default" in names
    other = Packed(seqlens=(1, 12, 20, 7))
    args = (other.q, other.k, other.v, other.gate, other.cu_seqlens)
    torch.testing.assert_close(program.module()(*args), Block()(*args))


def test_decoding_compiles_and_changes_the_caches() -> None:
    x = Cached()
    ours, theirs = x.caches(), x.caches()
    statics = {"compress_type": "linear", "kernel_size": 8, "kernel_stride": 4}
    compiled = torch.compile(
        lambda *args: ops.cache_append(*args, **statics), backend="aot_eager", fullgraph=True
    )
    q = compiled(*x.append_inputs(), *ours)
    torch.testing.assert_close(
        q, reference.cache_append(*x.append_inputs(), *theirs, **statics), rtol=0, atol=0
    )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
