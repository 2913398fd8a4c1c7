"""Many GPUs over torch.distributed: sequences, heads and batches shared between ranks.

    from nsagen.distributed import context_parallel, tensor_parallel

See docs/scaling.md for what each exchanges and how they compose.
"""

from nsagen.distributed.collectives import naming_lost_ranks
from nsagen.distributed.context_parallel import ContextParallel, context_parallel
from nsagen.distributed.shard import Shard
from nsagen.distributed.tensor_parallel import (
    FeedForwardParallel,
    HeadParallel,
    tensor_parallel,
    tensor_parallel_plan,
)

__all__ = [
    "ContextParallel",
    "FeedForwardParallel",
    "HeadParallel",
    "Shard",
    "context_parallel",
    "naming_lost_ranks",
    "tensor_parallel",
    "tensor_parallel_plan",
]
