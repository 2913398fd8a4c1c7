"""What a rank launches, on a stand-in for a GPU: kernels of an H200's package that do nothing."""

from __future__ import annotations

import os
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.distributed import context_parallel
from nsagen.model import NativeSparseAttention, RopeConfig
from nsagen.ops import _op
from nsagen.ops.forced_blocks import selected_and_window
from tests.distributed.ranks import on_ranks
from tests.stand_in import Launch, StandIn, dispatcher, same_up_to_addresses
from tests.stand_in import gpu as gpu

pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter launches nothing"
)

SIZES: dict[str, Any] = {
    **{"compress_type": "avgpool", "kernel_size": 32, "kernel_stride": 16, "block_size": 64},
    **{"topk": 16, "init_blocks": 1, "local_blocks": 2, "window_size": 512},
}


def test_pieces_launch_what_a_whole_sequence_does(gpu: StandIn) -> None:
    """Forced blocks are met once, no kernel of attention runs more often than for a whole sequence,
    and a repeated step launches what its ops do. One rank has two pieces, too."""
    tokens = 384

    def run(rank: int) -> list[list[Launch]]:
        layer = NativeSparseAttention(
            hidden_size=64,
            num_q_heads=64,
            num_kv_heads=4,
            head_dim=128,
            rope_config=RopeConfig(tokens, 128, rope_scaling=None),
            dispatcher=dispatcher(),
            **SIZES,
        ).bfloat16()
        ends = torch.tensor([0, tokens], dtype=torch.int32)
        shard = context_parallel(layer).shard(ends)
        x = torch.randn(tokens, 64).bfloat16()

        def step(x: Any, layout: Any) -> None:
            layer(x, layout).sum().backward()

        own = shard.take(x)
        found = [gpu.of(lambda: step(x, ends))]
        found += [gpu.of(lambda: step(own, shard)) for _ in range(4)]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_op._Known, "run", lambda self, args: self.compute(args))
            return [*found, gpu.of(lambda: step(own, shard))]

    def attention(launches: list[Launch]) -> Counter[str]:
        names = (launch.kernel.split(" ")[0] for launch in launches)
        return Counter(name for name in names if "attention" in name or "block_selection" in name)

    ((whole, first, _, _, repeated, by_jit),) = on_ranks(1, run)
    assert attention(repeated) == attention(first) == attention(whole)
    for op in ("sliding_window_attention", "selected_attention"):
        (name,) = (n for n in attention(first) if n.startswith(f"{op}_forward"))
        assert "_i1_c2__" in name
    assert not any(launch.by_jit for launch in repeated)
    assert [(x.kernel, x.grid) for x in repeated] == [(x.kernel, x.grid) for x in by_jit]


def test_repeated_calls_on_gathered_keys_and_values(gpu: StandIn) -> None:
    """These are parts of one tensor."""
    tokens = torch.empty(300, 4, 256, dtype=torch.bfloat16)
    q, blocks = tokens.new_empty(90, 64, 128), torch.empty(4, 90, 16, dtype=torch.int32)
    ends, seen, start = (torch.tensor(x, dtype=torch.int32) for x in ([0, 90], [0, 300], [210]))
    sizes = (512, 64, 1, 2, 0.1, dispatcher().key)

    def call() -> tuple[Tensor, ...]:
        return selected_and_window(q, *tokens.split(128, -1), blocks, ends, *sizes, seen, start)

    for _ in range(2):
        gpu.of(call)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_op._Known, "run", lambda self, args: self.compute(args))
        expected = gpu.of(call)
    found = gpu.of(call)
    assert not any(launch.by_jit for launch in found)
    same_up_to_addresses(found, expected)
