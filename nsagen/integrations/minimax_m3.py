"""MiniMax-M3 with `attn_implementation="nsagen"`: its indexer, its training, on nsagen's ops.

Transformers scores all keys in an indexer before it calls the attention function, with N * N
scores, and trains nothing of it. `register` replaces three methods of its classes, which do as
before under any other implementation:

- the indexer's forward gives `IndexHeads`, from which the attention function selects blocks,
  counted from each sequence's first token, wherever padding is;
- the attention's forward keeps a cache in one byte an element, if the config says so;
- the forward of both models with a head has `index_loss` in its output and adds it to the loss.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import MoeCausalLMOutputWithPast
from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3

from nsagen.integrations.attention_cache import give_cache, narrow_dtype
from nsagen.integrations.attention_interface import IMPLEMENTATION, LOSSES
from nsagen.integrations.attention_layout import Layout, refuse
from nsagen.integrations.block_attention import chosen, dense
from nsagen.integrations.narrow_rows import Rows, cache_and_scale
from nsagen.model.checks import require
from nsagen.model.forms import Index, check_narrow, check_package, dispatcher_of
from nsagen.ops import block_selection, block_selection_decode, index_loss

SCORES: dict[str, Any] = {"score_norm": "none", "score_heads": "each", "score_pool": "max"}
"""A block's score: the largest product of an index query with its tokens' index keys."""


@dataclass(frozen=True)
class IndexSettings:
    """What `config.nsagen` may say of a MiniMax-M3.

    Attributes:
        index_loss_coef: times the index loss is what is added to the loss in training; 0: none is
            computed. Only the index projections and their norms learn from it.
        index_warmup: whether sparse layers attend to everything, and the index learns from all
            tokens that a query sees, as when it is new.
        package: name of the generated package whose kernels a GPU runs; None for nsagen's own
            choice.
        cache_dtype: "float8_e4m3fn" or "int8": caches keep keys, values and index keys in one byte
            an element, with a scale for each head of a token; None: in the model's dtype.
    """

    index_loss_coef: float = 1.0
    index_warmup: bool = False
    package: str | None = None
    cache_dtype: str | None = None


def settings_of(config: Any) -> IndexSettings:
    """The settings in a config, checked.

    Raises:
        InvalidInputError: an unknown name, or a value out of its range.
    """
    given = getattr(config, "nsagen", None)
    where, names = "config.nsagen", ", ".join(IndexSettings.__annotations__)
    given = {} if given is None else given
    known = isinstance(given, Mapping) and set(given) <= set(IndexSettings.__annotations__)
    require(known, where, f"must be a mapping of {names}", repr(given), "correct the name")
    settings = IndexSettings(**given)
    coef, warm = settings.index_loss_coef, settings.index_warmup
    fits = isinstance(coef, int | float) and not isinstance(coef, bool) and coef >= 0
    rule = "index_loss_coef must be a number of at least 0"
    require(fits, where, rule, repr(coef), "1.0 is the default")
    check_package(where, settings.package)
    check_narrow(where, settings.cache_dtype)
    rule = "index_warmup must be true or false"
    require(isinstance(warm, bool), where, rule, repr(warm), "false is the default")
    return settings


@dataclass
class MiniMaxM3Output(MoeCausalLMOutputWithPast):
    """A causal language model's output with `index_loss`.

    Attributes:
        index_loss: mean over layers, key/value heads and tokens of KL(attention || index), in
            training; else None. `loss` has it in, times its coefficient.
    """

    index_loss: Tensor | None = None


@dataclass
class MiniMaxM3VLOutput(m3.MiniMaxM3VLCausalLMOutputWithPast):
    """The same of the model that sees images too, which the released folder names."""

    index_loss: Tensor | None = None


@dataclass
class IndexLosses:
    """The index losses of one call's layers."""

    by_layer: dict[int, Tensor] = field(default_factory=dict)

    def add(self, layer: int, loss: Tensor) -> None:
        """Gradient checkpointing computes a layer twice: the first counts."""
        self.by_layer.setdefault(layer, loss)

    def mean(self) -> Tensor | None:
        losses = list(self.by_layer.values())
        return (
            torch.stack([loss.to(losses[0].device) for loss in losses]).mean() if losses else None
        )


@dataclass(frozen=True)
class IndexHeads:
    """What a sparse layer selects blocks by.

    Attributes:
        q: [B, HK, S, Di], after norm and rope.
        k: [B, 1, T, Di], those of a cache included.
        layer: the layer's number.
        config: the model's.
        training: whether the indexer is in training.
    """

    q: Tensor
    k: Rows
    layer: int
    config: Any
    training: bool

    def attend(
        self,
        query: Tensor,
        key: Rows,
        value: Rows,
        layout: Layout,
        scale: float,
        losses: IndexLosses | None,
    ) -> Tensor:
        """The layer's attention [B, S, HQ, D]; its index loss goes into `losses`."""
        self._check_heads(key.shape[1])
        if self.k.shape[2] != key.shape[2]:
            rule = f"must hold an index key for each of its tokens, {key.shape[2]}"
            came, advice = str(self.k.shape[2]), "let a MiniMax-M3 fill it from the first token on"
            refuse("cache", rule, came, advice)
        settings, block_size = settings_of(self.config), self.config.index_block_size
        warm, dispatcher = settings.index_warmup, dispatcher_of(settings.package)
        if losses is not None:
            self._check_training(layout)
        else:
            self._check_learns(settings)
        blocks = None if warm else self._blocks(layout, dispatcher)
        if blocks is None:
            o = dense(query, key, value, layout, scale)
        else:
            sizes = (block_size, self.config.index_local_blocks)
            o = chosen(query, key, value, blocks, *sizes, layout, scale, dispatcher)
        if losses is not None and self.q.requires_grad:
            assert isinstance(key, Tensor)
            assert isinstance(self.k, Tensor)
            q, k = layout.pack_queries(query).detach(), layout.pack_keys(key).detach()
            index_q, index_k = layout.pack_queries(self.q), layout.pack_keys(self.k)
            # Under autocast, rope leaves them in float32.
            index_q, index_k = index_q.to(q.dtype), index_k.to(q.dtype)
            loss = index_loss(
                *(q, k, index_q, index_k, blocks, layout.cu_seqlens_q),
                block_size=block_size,
                softmax_scale=scale,
                dispatcher=dispatcher,
            )
            losses.add(self.layer, loss.mean())
        return o

    def ranking(self, k: Tensor, losses: IndexLosses | None) -> Index | None:
        """How a rank among several selects blocks; None in a warm-up.

        Args:
            k: [N, HK, D], its tokens' keys.

        Raises:
            InvalidInputError: the index is to learn, which takes whole sequences.
        """
        self._check_heads(k.shape[1])
        settings = settings_of(self.config)
        if losses is not None and self.q.requires_grad:
            rule = "must be 0 for a shard: the index loss needs whole sequences"
            advice = "set it to 0, or freeze the indexers; the rest learns"
            refuse("config.nsagen.index_loss_coef", rule, str(settings.index_loss_coef), advice)
        if losses is None:
            self._check_learns(settings)
        if settings.index_warmup:
            return None
        assert isinstance(self.k, Tensor)
        q, index_k = (x[0].transpose(0, 1) for x in (self.q, self.k))
        return Index(q, index_k, self._rule(), dispatcher_of(settings.package))

    def _check_heads(self, heads: int) -> None:
        if self.q.shape[1] != heads:
            rule = f"must equal num_key_value_heads, {heads}: a head selects for one of them"
            came, advice = str(self.q.shape[1]), "use eager attention for this model"
            refuse("config.index_n_heads", rule, came, advice)

    def _check_learns(self, settings: IndexSettings) -> None:
        """Where no loss is collected, none may be expected."""
        if self.training and self.q.requires_grad and settings.index_loss_coef:
            rule = "needs a model with a head, whose loss it is added to: the index would not learn"
            advice = "set index_loss_coef to 0, or freeze the indexers"
            refuse("the index loss", rule, "another model in training", advice)

    def _rule(self) -> dict[str, Any]:
        """What `block_selection` takes besides tensors."""
        return {
            "kernel_size": 1,
            "kernel_stride": 1,
            "block_size": self.config.index_block_size,
            "topk": self.config.index_topk_blocks,
            "init_blocks": 0,
            "local_blocks": self.config.index_local_blocks,
            **SCORES,
        }

    def _check_training(self, layout: Layout) -> None:
        if not torch.is_grad_enabled():
            rule = "must not be the reentrant kind: the index loss would have no gradient"
            advice = 'pass gradient_checkpointing_kwargs={"use_reentrant": False}'
            refuse("gradient checkpointing", rule, "use_reentrant=True", advice)
        if not layout.whole:
            rule = "must be empty in training: the index loss needs whole sequences"
            advice = "pass use_cache=False, call model.eval(), or set index_loss_coef to 0"
            refuse("cache", rule, f"{layout.keys - layout.queries} tokens", advice)

    def _blocks(self, layout: Layout, dispatcher: Any) -> Tensor:
        """As `chosen` takes them."""
        rule = {**self._rule(), "dispatcher": dispatcher}
        if layout.step and layout.key_index is None:
            (k, k_scale), places = cache_and_scale(self.k), (layout.positions, layout.slots)
            return block_selection_decode(self.q[:, :, 0], k, *places, **rule, k_scale=k_scale)
        q, k = layout.pack_queries(self.q), layout.pack_keys(self.k, self.q.dtype)
        ends = (layout.cu_seqlens_q, layout.cu_seqlens_k)
        blocks = block_selection(q, k, None, *ends, **rule, q_start=layout.q_start)
        return layout.by_row(blocks) if layout.step else blocks


def _index_heads(
    self: Any, hidden_states: Tensor, position_embeddings: Any, cache: Any, position_ids: Any
) -> IndexHeads:
    """In place of the indexer's forward. Its input is a constant: the index learns by its loss."""
    x = hidden_states.detach()
    size = (*x.shape[:2], -1, self.head_dim)
    q = self.q_norm(self.q_proj(x).view(size)).transpose(1, 2)
    k = self.k_norm(self.k_proj(x).view(size)).transpose(1, 2)
    cos, sin = (table[..., : self.head_dim] for table in position_embeddings)
    q, k = m3.apply_rotary_pos_emb(q, k, cos, sin)
    if cache is not None:
        layers = cache.layers
        layer: Any = layers[self.layer_idx] if self.layer_idx < len(layers) else None
        if not hasattr(layer, "update_index"):
            rule, advice = "must have room for index keys", "make it with config=model.config"
            refuse("cache", rule, f"a {type(layer).__name__}", advice)
        k = layer.update_index(k)
    return IndexHeads(q, k, self.layer_idx, self.config, self.training)


def _with_index_heads(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation != IMPLEMENTATION:
            return original(self, *args, **kwargs)
        return _index_heads(self, *args, **kwargs)

    return forward


def _with_narrow_cache(original: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.config._attn_implementation == IMPLEMENTATION and narrow_dtype(self) is not None:
            args, kwargs = give_cache(self, args, kwargs) or (args, kwargs)
        return original(self, *args, **kwargs)

    return forward


def _with_index_loss(
    original: Callable[..., Any], output: type[MiniMaxM3Output | MiniMaxM3VLOutput]
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    @functools.wraps(original)
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = self.config.get_text_config()
        if config._attn_implementation != IMPLEMENTATION:
            return original(self, *args, **kwargs)
        misplaced = None if config is self.config else getattr(self.config, "nsagen", None)
        if misplaced is not None:
            rule, advice = "is read in the text config", "set config.text_config.nsagen instead"
            refuse("config.nsagen", rule, f"{misplaced!r} beside it", advice)
        coef = settings_of(config).index_loss_coef
        as_dict = kwargs.pop("return_dict", None)
        as_dict = getattr(self.config, "return_dict", True) if as_dict is None else as_dict
        losses = IndexLosses() if self.training and torch.is_grad_enabled() and coef else None
        more = {} if losses is None else {LOSSES: losses}
        out = output(**original(self, *args, return_dict=True, **kwargs, **more))
        out.index_loss = None if losses is None else losses.mean()
        if out.index_loss is not None and out.loss is not None:
            given = signature.bind(self, *args, **kwargs).arguments
            share = _share(given.get("labels"), kwargs.get("num_items_in_batch"))
            out.loss = out.loss + coef * share * out.index_loss.to(out.loss.device)
        return out if as_dict else out.to_tuple()

    return forward


def _share(labels: Any, items: Any) -> Any:
    """What a batch counts for among those whose gradients are summed, as its loss does."""
    if items is None or labels is None:
        return 1.0
    return (labels[..., 1:] != -100).sum() / items


def register() -> None:
    """Replace the methods of Transformers' classes, once."""
    of_text = functools.partial(_with_index_loss, output=MiniMaxM3Output)
    of_images = functools.partial(_with_index_loss, output=MiniMaxM3VLOutput)
    for kind, wrap in (
        (m3.MiniMaxM3VLIndexer, _with_index_heads),
        (m3.MiniMaxM3VLAttention, _with_narrow_cache),
        (m3.MiniMaxM3VLForCausalLM, of_text),
        (m3.MiniMaxM3SparseForConditionalGeneration, of_images),
    ):
        if not hasattr(kind.forward, "nsagen"):
            kind.forward = wrap(kind.forward)
            kind.forward.nsagen = True
