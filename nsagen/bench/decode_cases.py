"""What the decoding benchmark runs: attention on random caches, and a model's layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor

from nsagen import ops
from nsagen.core.workload import Workload
from nsagen.estimate.attention import keys_read
from nsagen.model import InferenceConfig, NSACache, ToyNSALlama, ToyNSALlamaConfig
from nsagen.model.rope import rope_tables
from nsagen.ops.reference import quantize
from nsagen.runtime import Dispatcher
from nsagen.runtime import dispatcher as registry


class NoLaunch:
    """Stands in for a dispatcher: its kernels do nothing, so only the host's work is left.

    It looks its kernel up in a table, as a dispatcher does once it knows a workload.
    """

    def __init__(self) -> None:
        self.key = registry.register(cast(Dispatcher, self), "no launch")
        self._known: dict[tuple[Workload, torch.device], Callable[..., None]] = {}

    def launcher(
        self, workload: Workload, device: torch.device, tokens: int, context: int | None = None
    ) -> Callable[..., None]:
        return self._known.setdefault((workload, device), lambda *args: None)


class AttentionCaches:
    """A random cache of one layer, full except for the token that each sequence gets now.

    Args:
        config: heads and sparsity.
        batch: sequences.
        context: tokens of each, including the new one.
        dispatcher: of the kernels; by default they are built when missing.
        cache_dtype: of the cache, as in `InferenceConfig`; dense attention cannot read such a one.
    """

    def __init__(
        self,
        config: ToyNSALlamaConfig,
        batch: int,
        context: int,
        device: torch.device,
        dtype: torch.dtype,
        dispatcher: Any = None,
        cache_dtype: str | None = None,
    ) -> None:
        self.config, self.batch, self.context = config, batch, context
        self.dispatcher = dispatcher
        heads, kv_heads, dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, device=device, dtype=dtype)

        self.q, self.k, self.v = (normal(batch, n, dim) for n in (heads, kv_heads, kv_heads))
        self.gate = normal(batch, heads, 3).sigmoid()
        self.cos, self.sin = (table.to(device)[:context] for table in rope_tables(config.rope))
        mean = torch.full((2, kv_heads, config.kernel_size), 1 / config.kernel_size)
        self.w_k, self.w_v = mean.to(device, dtype).unbind()
        self.positions = torch.full((batch,), context - 1, dtype=torch.int32, device=device)
        self.slots = torch.arange(batch, dtype=torch.int32, device=device)
        limits = InferenceConfig(batch, context, cache_dtype=cache_dtype)
        self.cache = NSACache(config, limits, device, dtype)[0]
        for name in ("k", "v", "ck", "cv"):
            cache, scale = getattr(self.cache, name), getattr(self.cache, f"{name}_scale")
            if scale is None:
                cache.normal_()
                continue
            for slot in range(batch):  # one at a time: they are wide before they are narrow
                rows, scales = quantize(normal(*cache.shape[1:]), cache.dtype)
                cache[slot].copy_(rows)
                scale[slot].copy_(scales)
        self._selected = self._compressed(self.q)

    def sparse(self) -> Tensor:
        """Append the new token, attend in all three branches and sum them."""
        return self._branches(*self._compressed(self._append()))

    def ops(self) -> dict[str, Callable[[], object]]:
        """The same, op by op."""
        return {
            "cache_append": self._append,
            "compressed_attention_decode": lambda: self._compressed(self.q),
            "native_sparse_attention_decode": lambda: self._branches(*self._selected),
        }

    def bytes_read(self) -> int:
        """What sparse attention must read: all windows, the selected blocks and the window."""
        return keys_read(self.config, self.context) * self._bytes_an_entry() + self.q.nbytes

    def dense_bytes(self) -> int:
        """What dense attention must read."""
        return self.context * self._bytes_an_entry() + self.q.nbytes

    def _bytes_an_entry(self) -> int:
        """For keys and values of all sequences, and their scales."""
        if self.cache.scales is None:
            return 2 * self.k.nbytes
        return 2 * (self.k.numel() + 4 * self.k[..., 0].numel())

    def _append(self) -> Tensor:
        config, cache = self.config, self.cache
        return ops.cache_append(
            *(self.q, self.k, self.v, self.cos, self.sin),
            *(self.w_k, self.w_v, None),
            *(self.positions, self.slots),
            *(cache.k, cache.v, cache.ck, cache.cv, cache.k_raw),
            compress_type="weightedpool",
            kernel_size=config.kernel_size,
            kernel_stride=config.kernel_stride,
            scales=cache.scales,
            dispatcher=self.dispatcher,
        )

    def _compressed(self, q: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        config = self.config
        o, topk_idx = ops.compressed_attention_decode(
            *(q, self.cache.ck, self.cache.cv, self.positions, self.slots),
            kernel_size=config.kernel_size,
            kernel_stride=config.kernel_stride,
            block_size=config.block_size,
            topk=config.topk,
            init_blocks=config.init_blocks,
            local_blocks=config.local_blocks,
            ck_scale=self.cache.ck_scale,
            cv_scale=self.cache.cv_scale,
            dispatcher=self.dispatcher,
        )
        return q, o, topk_idx

    def _branches(self, q: Tensor, o: Tensor, topk_idx: Tensor) -> Tensor:
        return ops.native_sparse_attention_decode(
            *(q, self.cache.k, self.cache.v, topk_idx, self.positions, self.slots, o, self.gate),
            block_size=self.config.block_size,
            window_size=self.config.window_size,
            k_scale=self.cache.k_scale,
            v_scale=self.cache.v_scale,
            dispatcher=self.dispatcher,
        )


def layer_shapes(config: ToyNSALlamaConfig) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of each product of a step."""
    hidden, middle, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
    kv = config.num_key_value_heads * (config.head_dim + config.value_dim)
    gate = config.gate_units(config.head_dim) or len(config.on) * heads
    return {
        "q+k+v+gate": (heads * config.head_dim + len(config.kv_branches) * kv + gate, hidden),
        "o": (hidden, heads * config.value_dim),
        "gate+up": (2 * middle, hidden),
        "down": (hidden, middle),
        "lm_head": (config.vocab_size, hidden),
    }


def layer_x(
    name: str, shape: tuple[int, int], rows: int, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Random x and weight of a product, and the operations around it in a step."""
    out_features, in_features = shape
    x = torch.randn(rows, in_features, device=device, dtype=dtype)
    weight = torch.randn(out_features, in_features, device=device, dtype=dtype)
    weight *= in_features**-0.5
    if name in ("o", "down"):
        return x, weight, {"residual": torch.randn_like(x[:, :1].expand(-1, out_features))}
    gain = torch.ones(in_features, device=device, dtype=dtype)
    around: dict[str, Any] = {"norm_weight": gain, "eps": 1e-5}
    if name == "q+k+v+gate":
        around["sigmoid_from"] = out_features // 2
    return x, weight, {**around, "swiglu": name == "gate+up"}


def step_bytes(model: ToyNSALlama, batch: int, context: int) -> int:
    """What a step must read: every weight except the embeddings once, and the cache's entries."""
    weights = sum(weight.nbytes for weight in model.parameters())
    weights -= model.model.embed_tokens.weight.nbytes
    config, size = model.config, model.lm_head.weight.element_size()
    entry = config.num_key_value_heads * (config.head_dim + config.value_dim) * size
    return weights + config.num_hidden_layers * batch * keys_read(config, context) * entry
