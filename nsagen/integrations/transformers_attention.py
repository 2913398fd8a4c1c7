"""Native Sparse Attention as an attention module of a Transformers model."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from nsagen.integrations.transformers_cache import NSALayer, layer_of
from nsagen.integrations.transformers_given import NO_GRADIENTS, check_recording
from nsagen.integrations.transformers_layout import Call, refuse
from nsagen.integrations.transformers_models import Facts
from nsagen.integrations.transformers_rope import Roped, arranged
from nsagen.model.compression import Holder, PlainWeights, Weights
from nsagen.model.heads import KV, PROJECTIONS, Branches, Heads
from nsagen.model.initial import Gates, constant_gate
from nsagen.model.nsa_ops import NSAOps
from nsagen.model.prefill import Context, PrefillRows
from nsagen.model.sparsity import Sparsity


class TransformersNSA(NSAOps):
    """Takes the inputs of a supported model's attention module, and `nsa_call`.

    It uses the replaced module's projections and norms under their names. Its other parameters have
    the names and shapes of `NativeSparseAttention`'s, except that the gate has a bias, and that
    each part of compression is a module that adapters can name, as in `compress_key.weight`.

    Args:
        dense: the module to replace.
        facts: of its model.
        sparsity: the settings.
        turned: components of a head that rope rotates.
        dispatcher: generated kernels to use on a GPU; None for nsagen's own choice.
        gates: initial shares of the branches.
        dtype: of the new parameters.
    """

    def __init__(
        self,
        dense: Any,
        facts: Facts,
        sparsity: Sparsity,
        turned: int,
        dispatcher: Any,
        gates: Gates,
        dtype: torch.dtype,
    ) -> None:
        super().__init__()
        config, head_dim = dense.config, dense.head_dim
        self.config, self.scaling, self.layer_idx = config, dense.scaling, dense.layer_idx
        self.dispatcher, self.facts = dispatcher, facts
        self.sparsity, self.softmax_scale, self.turned_dim = sparsity, dense.scaling, turned
        self.num_q_heads, self.num_kv_heads = config.num_attention_heads, config.num_key_value_heads
        self.head_dim = self.v_head_dim = head_dim
        self.initial_gates = gates
        for name in facts.projections:
            setattr(self, name, getattr(dense, name))
        self.o_proj = dense.o_proj
        self.q_norm, self.k_norm = getattr(dense, "q_norm", None), getattr(dense, "k_norm", None)
        if sparsity.kv_branches[1:]:
            own = self._own_projections()
            for branch in sparsity.kv_branches[1:]:
                for name, layer in zip(PROJECTIONS[branch], own, strict=True):
                    setattr(self, name, copy.deepcopy(layer))
        where = {"device": _tensor_of(dense.o_proj).device, "dtype": dtype}
        self.gate = self._new_gate(config.hidden_size).to(**where)
        self.add_compression(**where)
        for part in self._parts():
            for module in part.modules():
                # Otherwise Transformers would initialize linear layers itself.
                vars(module)["is_part_of_nsa"] = True

    def _new_gate(self, hidden_size: int) -> Any:
        units = self.sparsity.gate_units(self.head_dim)
        return constant_gate(
            hidden_size, self.num_q_heads, self.initial_gates, self.sparsity.on, units
        )

    def _parts(self) -> list[nn.Module]:
        """The modules that NSA adds."""
        names = ("compress_key", "compress_value", "intra_block_pe", "intra_block_pe_value")
        own = [name for branch in self.sparsity.kv_branches[1:] for name in PROJECTIONS[branch]]
        parts = [getattr(self, name) for name in ("gate", *names, *own)]
        return [part for part in parts if part is not None]

    @torch.no_grad()
    def start(self) -> None:
        """Initialize the new parameters, except those that a checkpoint has filled."""
        sparsity, gates = self.sparsity, self.initial_gates
        fresh = TransformersNSA(
            self, self.facts, sparsity, self.turned_dim, None, gates, torch.float32
        )
        for part, new in zip(self._parts(), fresh._parts(), strict=True):
            for parameter, value in zip(part.parameters(), new.parameters(), strict=True):
                if not getattr(parameter, "_is_hf_initialized", False):
                    parameter.copy_(value)

    def held(self, weights: Weights, **where: Any) -> Holder:
        held = super().held(weights, **where)
        return PlainWeights(held.data) if isinstance(held, nn.Parameter) else held

    def _sizes(self) -> list[int]:
        """The widths of the projections of queries, keys and values."""
        kv = self.num_kv_heads * self.head_dim
        return [self.num_q_heads * self.head_dim, kv, kv]

    def _own_projections(self) -> list[nn.Module]:
        """The projections of keys and values; slices of the joined one, if there is one."""
        if len(self.facts.projections) == 3:
            return [getattr(self, name) for name in self.facts.projections[1:]]
        name = self.facts.projections[0]
        joined = getattr(self, name)
        if type(joined) is not nn.Linear or type(joined.weight) is not nn.Parameter:
            weights = type(getattr(joined, "weight", None)).__name__
            refuse(
                f"apply_nsa: {name}",
                "must be plain to be split into keys and values for branch_kv='separate'",
                f"{type(joined).__name__} with weights of type {weights}",
                "call apply_nsa before quantizing or adapting the model",
            )
        weights = joined.weight.detach().split(self._sizes())[1:]
        biases = (
            [None] * 2 if joined.bias is None else joined.bias.detach().split(self._sizes())[1:]
        )
        layers = []
        for weight, bias in zip(weights, biases, strict=True):
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
            layer.weight = nn.Parameter(weight.clone())
            if bias is not None:
                layer.bias = nn.Parameter(bias.clone())
            layers.append(layer)
        return layers

    def heads(self, x: Tensor, call: Call) -> Heads:
        """[B, T, hidden] to packed heads. Projections see rows, not packed tokens, because some
        adapters differ from row to row or start at a token of a row."""
        parts = [call.pack(getattr(self, name)(x)) for name in self.facts.projections]
        if len(parts) == 1:
            parts = list(parts[0].split(self._sizes(), -1))
        for branch in self.sparsity.kv_branches[1:]:
            parts += [call.pack(getattr(self, name)(x)) for name in PROJECTIONS[branch]]
        return self.split(parts)

    def query(self, q: Tensor) -> Tensor:
        return self._normed(q, self.q_norm)

    def key(self, k: Tensor) -> Tensor:
        return self._normed(k, self.k_norm)

    def _normed(self, x: Tensor, norm: nn.Module | None) -> Tensor:
        dtype = x.dtype  # under autocast, norms return another one
        if norm is not None and self.facts.norm == "all heads":
            x = norm(x)
        x = x.unflatten(-1, (-1, self.head_dim))
        if norm is not None and self.facts.norm == "each head":
            x = norm(x)
        return arranged(x.to(dtype), self.turned_dim)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Any = None,
        cache: Any = None,
        past_key_values: Any = None,
        nsa_call: Call | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend within each row of a batch, or each document of a packed one.

        Args:
            hidden_states: [B, T, hidden].
            cache: Transformers' `Cache`; older versions call it past_key_values.
            nsa_call: the layout, made from the model's inputs.
            position_embeddings: checked only: NSA has float32 rope tables in any dtype.
            attention_mask: checked only: the layout says what is padding.
            others: the checked inputs themselves.

        Returns:
            [B, T, hidden], and None for the attention weights, which NSA never forms.
        """
        if nsa_call is None:
            advice = "call the model or its base model, not single layers"
            refuse("a layer", "needs the layout that its base model makes", "a call alone", advice)
        x, call = hidden_states, nsa_call.to(hidden_states.device)
        cache = cache if cache is not None else past_key_values
        _check_same(call, x, position_embeddings, attention_mask, cache)
        layer = None
        if cache is not None:
            layer = layer_of(cache, self.layer_idx, self.sparsity, call.cache_dtype)
        heads = self.heads(x, call)
        gate = self.gate_columns(call.pack(self.gate(x)).sigmoid()).to(heads.q.dtype)
        recording = _records(heads, gate)
        if recording and not call.recording and layer is not None:
            check_recording(call)
        if recording and layer is not None and layer.cache_dtype is not None:
            refuse(*NO_GRADIENTS)
        if layer is not None:
            layer.recorded = recording
        if layer is None:
            assert call.packed is not None
            o = self.attend_packed(heads, gate, call.packed, call.rope.tables)
        elif call.positions is not None:
            o = self._step(heads, gate, layer, call)
        else:
            o = self._pass(heads, gate, layer, call, recording)
        return self.o_proj(call.unpack(o)), None

    def _step(self, heads: Heads, gate: Tensor, layer: NSALayer, call: Call) -> Tensor:
        """One new token per row."""
        assert call.positions is not None
        slots = torch.arange(call.batch, dtype=torch.int32, device=gate.device)
        store = layer.reserve(call, heads)
        layer.remember(call, heads.compressed)
        return self.decode_heads(heads, gate, call.positions, slots, store, call.rope.tables)

    def _pass(
        self, heads: Heads, gate: Tensor, layer: NSALayer, call: Call, recording: bool
    ) -> Tensor:
        """Several new tokens per row, the first ones or after cached ones."""
        pieces = call.pieces
        assert pieces is not None
        store = layer.reserve(call, heads)
        layer.remember(call, heads.compressed)
        seen = self.append(heads, pieces, store, call.rope.tables)
        if pieces.context is None:
            return self.attend(seen, gate)
        whole = self.with_context(seen, pieces, store)
        if not (recording or call.recording):
            return self.attend(whole, gate)
        return self._recorded(seen, whole, gate, pieces)

    def _recorded(
        self, new: Branches, whole: Branches, gate: Tensor, pieces: PrefillRows
    ) -> Tensor:
        """`attend`, with gradients for the new tokens only.

        The whole sequences run, so that windows are made as elsewhere. Cached tokens get queries
        and gates of 0, which take no part in the result. The new tokens' keys and values replace
        their detached copies from the cache.
        """
        assert pieces.context is not None
        assert pieces.windows is not None
        here = _places_in(pieces.context, pieces.index)

        def among(held: KV, own: KV, at: Tensor) -> KV:
            return KV(*(h.detach().index_copy(0, at, o) for h, o in zip(held, own, strict=True)))

        windows = whole.windows
        if windows is not None and new.windows is not None:
            assert pieces.windows.context is not None
            made = _places_in(pieces.windows.context, pieces.windows.index)
            windows = among(windows, new.windows, made)
        selected = among(whole.selected, new.selected, here)
        shared = whole.sliding is whole.selected
        tokens = selected.k.shape[0]
        wide = replace(
            whole,
            q=new.q.new_zeros(tokens, *new.q.shape[1:]).index_copy(0, here, new.q),
            windows=windows,
            selected=selected,
            sliding=selected if shared else among(whole.sliding, new.sliding, here),
            cu_seqlens=pieces.context.cu_seqlens,
            q_start=None,
            cu_seqlens_k=None,
        )
        gates = gate.new_zeros(tokens, *gate.shape[1:]).index_copy(0, here, gate)
        return self.attend(wide, gates)[here]


def _check_same(call: Call, x: Tensor, rope: Any, mask: Any, cache: Any) -> None:
    """Refuse what a hook gave a layer in place of its base model's inputs."""
    advice = "change the inputs of the model or of its base model; hooks may do that too"
    if x.shape[:2] != (call.batch, call.tokens):
        rule = f"must keep their shape, [{call.batch}, {call.tokens}, hidden]"
        refuse("hidden_states of a layer", rule, str(list(x.shape)), advice)
    for name, strange, came in (
        ("attention_mask", not _is_mark(mask), type(mask).__name__),
        ("position_embeddings", not isinstance(rope, Roped), type(rope).__name__),
        ("cache", cache is not call.cache, type(cache).__name__),
    ):
        if strange:
            rule = "must be what its base model made of the model's inputs"
            refuse(f"{name} of a layer", rule, f"another {came}", advice)


def _is_mark(mask: Any) -> bool:
    """Whether a layer's mask is what `Inputs` gave its base model."""
    return isinstance(mask, Tensor) and mask.shape == (0, 0, 0, 0)


def _records(heads: Heads, gate: Tensor) -> bool:
    """Whether autograd records what a layer attends with. Hooks may bring in gradients that no
    parameter and no input of the model has."""
    if not torch.is_grad_enabled():
        return False
    return any(
        x.requires_grad for x in (gate, heads.q, *heads.compressed, *heads.selected, *heads.sliding)
    )


def _tensor_of(layer: nn.Module) -> Tensor:
    """Any tensor of a layer: a quantized one may have no weight."""
    return next(chain(layer.parameters(), layer.buffers()))


def _places_in(context: Context, index: tuple[Tensor, Tensor]) -> Tensor:
    """int64: the indices of rows and positions of a cache in a context packed from it."""
    row, position = index
    return context.cu_seqlens[:-1].to(torch.int64)[row] + position
