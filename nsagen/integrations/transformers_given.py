"""The inputs of a swapped model's call: each read and checked before any layer runs.

`INPUTS` is the list, which docs/transformers.md repeats. What `transformers_inputs` lays out is a
`Given`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsagen.integrations.transformers_cache import state_of
from nsagen.integrations.transformers_layout import Call, State, refuse, refuse_unless
from nsagen.model.forms import check_narrow
from nsagen.model.sparsity import Sparsity

INPUTS = {
    "input_ids": "computed",
    "inputs_embeds": "computed",
    "attention_mask": "computed if [batch, tokens]; prepared masks are refused",
    "position_ids": "computed: documents packed into a row, and positions that increase by one",
    "cache": "computed if a DynamicCache or StaticCache",
    "past_key_values": "computed, as cache",
    "use_cache": "computed",
    "cache_position": "computed if it continues after the cache",
    "cu_seq_lens_q": "computed for one row without cache and mask",
    "cu_seq_lens_k": "must equal cu_seq_lens_q",
    "max_length_q": "must be at least the length of the longest document",
    "max_length_k": "must be at least the length of the longest document",
    "seq_idx": "computed, as position_ids that restart",
    "output_hidden_states": "computed",
    "output_router_logits": "computed",
    "return_dict": "computed",
    "num_items_in_batch": "computed, by the loss",
    "shift_labels": "computed, by the loss",
    "output_attentions": "True is refused: NSA never forms the weights",
    "is_causal": "False is refused",
    "nsa_shard": "computed: a shard of `nsagen.distributed`, whose tokens are the one row",
}
"""The inputs of a base model, and how each is handled. Any other input is refused."""


@dataclass(frozen=True)
class Given:
    """The inputs of a call that say where its tokens belong.

    Attributes:
        batch, tokens, device: of the tokens.
        mask: bool [B, cached and new tokens], True for a token; [B, capacity] in a step with a
            cache of fixed capacity.
        position_ids: [B, T].
        cu_seqlens: [documents + 1].
        seq_idx: [B, T].
        last: place in a cache of the last layer with NSA.
        cache: Transformers' `Cache`.
        state: what it holds; fixed in a step with a cache of fixed capacity, else plain.
        capacity: of its layers; None: they grow.
        caches: whether the call may write to a cache.
        recording: whether autograd records.
        cache_dtype: of new layers of the cache; None for that of the tokens.
    """

    batch: int
    tokens: int
    device: torch.device
    mask: Tensor | None
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None
    last: int
    cache: Any
    state: State | None
    capacity: int | None
    caches: bool
    recording: bool
    cache_dtype: str | None

    @property
    def seen(self) -> int | Tensor:
        return 0 if self.state is None else self.state.seen

    @property
    def is_step(self) -> bool:
        """One token per row after cached ones: the host reads no length."""
        return self.state is not None and self.tokens == 1 and not self.recording


def check_flags(model: Any, inputs: dict[str, Any]) -> None:
    """Refuse what would change attention, whether an input or the config asks for it."""
    config = model.config
    advice = "leave it out, or use the dense model"
    for name, wrong, why in (
        ("output_attentions", True, "NSA never forms the weights"),
        ("is_causal", False, "NSA is causal"),
    ):
        value = inputs.get(name)
        if value is None:
            value = getattr(config, name, None)
        if value is not None and bool(value) is wrong:
            refuse(name, f"must not be {wrong}: {why}", str(value), advice)
    if getattr(config, "use_bidirectional_attention", False):
        refuse("config.use_bidirectional_attention", "must be False", "True", advice)
    dropout = getattr(config, "attention_dropout", 0.0)
    if model.training and dropout:
        rule = "must be 0 in training: NSA has no attention dropout"
        refuse("config.attention_dropout", rule, str(dropout), "set it to 0")


def check_settings(model: Any, stored: dict[str, Any]) -> None:
    """Refuse settings that were changed in the config after the model was built from it."""
    settings = getattr(model.config, "nsa", None)
    if settings is not None and settings != stored:
        names = sorted(n for n in {*settings, *stored} if settings.get(n) != stored.get(n))
        refuse(
            "config.nsa",
            "must be the settings that the model was built with",
            ", ".join(f"{name}={settings.get(name)!r}" for name in names),
            "save the model, and load it with from_pretrained(folder, nsa={...})",
        )


def cache_dtype_of(config: Any, sparsity: Sparsity) -> str | None:
    """`config.nsagen["cache_dtype"]`: the dtype that new caches of a swapped model have.

    Raises:
        InvalidInputError: an unknown dtype or another key; branches with keys of their own.
    """
    settings = getattr(config, "nsagen", None)
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or set(settings) - {"cache_dtype"}:
        rule = "of a swapped model takes cache_dtype alone: nsa has the settings of attention"
        refuse("config.nsagen", rule, repr(settings), "leave the others out")
    cache_dtype = settings.get("cache_dtype")
    check_narrow("config.nsagen", cache_dtype)
    if cache_dtype is not None and sparsity.branch_kv != "shared":
        rule = "needs branches that share keys and values"
        refuse("cache_dtype", rule, f"branch_kv={sparsity.branch_kv!r}", "leave cache_dtype out")
    return cache_dtype


CACHES = ("cache", "past_key_values")
"""The names of a cache, the newer one first."""


def check_one_cache(inputs: dict[str, Any]) -> list[Any]:
    """The cache among a call's inputs, or none; two different ones are refused."""
    given = [inputs[name] for name in CACHES if inputs.get(name) is not None]
    if len(given) == 2 and given[0] is not given[1]:
        refuse("past_key_values", "must not differ from cache", "another", "pass one of them")
    return given


def layers_of(model: Any) -> list[Any]:
    """The NSA modules of the layers that a call runs. Layers may have been removed or added since
    the model was swapped."""
    run = model.layers[: model.config.num_hidden_layers]
    return [one.self_attn for one in run if getattr(one.self_attn, "sparsity", None) is not None]


def check_places(model: Any) -> None:
    """Refuse a cache for layers that would share a place in it or leave one empty."""
    run = model.layers[: model.config.num_hidden_layers]
    places = [getattr(layer.self_attn, "layer_idx", None) for layer in run]
    if set(places) != set(range(len(places))):
        refuse(
            "layer_idx",
            f"of the {len(places)} layers must be 0 to {len(places) - 1}: it is their place in a "
            "cache",
            str(places),
            "after removing or adding layers, set layer.self_attn.layer_idx = i for i, layer in "
            "enumerate(layers); or pass use_cache=False",
        )


def check_adapters(layers: Sequence[Any]) -> None:
    """Refuse what an adapter can't compute: rows with compression of their own, as PEFT's
    `adapter_names` asks for by hooks (its weights are those of the whole batch), and gates as they
    start under DoRA, which would make them NaN."""
    for attention in layers:
        for name in ("compress_key", "compress_value", "intra_block_pe", "intra_block_pe_value"):
            part = getattr(attention, name)
            hooks = part._forward_pre_hooks.values() if isinstance(part, nn.Module) else ()
            asked = [getattr(hook, "keywords", {}).get("adapter_names") for hook in hooks]
            for names in asked:
                if names is not None:
                    refuse(
                        "adapter_names",
                        "can't choose adapters of compression, which all rows of a batch share",
                        f"{names} with an adapter of {name}",
                        "call set_adapter, and pass the rows of each adapter by themselves",
                    )
        for part in attention.gate.modules():
            if getattr(part, "lora_magnitude_vector", None):
                holds = part.weight.any(1).all()  # PEFT hands on the base layer's weight
                rule = "must not be 0 under DoRA, which divides by the norm of each row"
                advice = "leave gate out of the layers of DoRA, and add it to modules_to_save"
                refuse_unless(holds, "gate.weight", rule, "rows of 0", advice, wait=False)


def given_of(
    model: Any,
    inputs: dict[str, Any],
    tokens: Tensor,
    layers: Sequence[Any],
    sparsity: Sparsity,
    kinds: Sequence[str],
) -> Given:
    """Read a call's inputs.

    Args:
        model: the base model.
        inputs: by name.
        tokens: the ids or embeddings among them.
        layers: the NSA modules.
        sparsity: their settings.
        kinds: Transformers' names for their kinds, in models that have kinds.

    Raises:
        InvalidInputError: an input that NSA would not compute as the dense model does.
    """
    batch, length = tokens.shape[:2]
    graded = torch.is_grad_enabled()
    recording = graded and (
        tokens.requires_grad or any(p.requires_grad for p in model.parameters())
    )
    cache = inputs.get("cache", inputs.get("past_key_values"))
    caches = inputs.get("use_cache")
    caches = bool(model.config.use_cache if caches is None else caches) or cache is not None
    state = capacity = None
    cache_dtype = cache_dtype_of(model.config, sparsity)
    if graded and model.training:
        cache_dtype = None  # nothing that is rounded passes gradients on
    places = [layer.layer_idx for layer in layers]
    if caches:
        check_places(model)
    if cache is not None:
        where = (batch, tokens.device)
        state, capacity = state_of(cache, places, sparsity, *where, cache_dtype)
    if graded and model.training and _checkpoints(model):
        if state is not None:
            rule = "must be empty under gradient checkpointing, which takes it from layers"
            refuse("cache", rule, f"{state.seen} tokens", "call model.eval(), or use no_grad")
        caches = False
    if caches and cache_dtype is not None and recording:
        refuse(*NO_GRADIENTS)
    if state is not None and state.recorded and recording:
        refuse(*_RECORDED)
    step = state is not None and length == 1 and not recording
    if state is not None and not step:
        state = state.plain()
    given = Given(
        batch,
        length,
        tokens.device,
        _mask(inputs.get("attention_mask"), batch, length, state, capacity, kinds),
        _rows("position_ids", inputs.get("position_ids"), batch, length),
        _cu_seqlens(inputs, batch, length),
        _rows("seq_idx", inputs.get("seq_idx"), batch, length),
        max(places),
        cache,
        state,
        capacity,
        caches,
        recording,
        cache_dtype,
    )
    _check_cache_position(inputs.get("cache_position"), given)
    return given


NO_GRADIENTS = (
    "a cache",
    "of one byte an element has no gradients",
    "keys or values that have",
    "call the model under torch.no_grad(), or with use_cache=False",
)

_RECORDED = (
    "cache",
    "must be filled under torch.no_grad() if later tokens need gradients: gradients do not flow "
    "into cached tokens",
    "tokens that autograd recorded",
    "wrap the earlier calls, or this one if it needs no gradients, in torch.no_grad()",
)


def check_recording(call: Call) -> None:
    """Refuse gradients that a layer can't have, where a hook brings them into a call that was laid
    out without: no parameter and no input says that they will come."""
    if call.continues and call.after is not None and call.after.recorded:
        refuse(*_RECORDED)
    if call.positions is not None:
        refuse(
            "gradients",
            "of one token after a cache must be announced: some parameter of the base model, "
            "or inputs_embeds, must require grad",
            "a layer whose input requires grad, as a forward hook can make it, in a frozen model",
            "call requires_grad_() on a parameter or inputs_embeds, pass use_cache=False with all "
            "tokens, or use torch.no_grad() if you need no gradients",
        )


def check_shape(tokens: Tensor, embeds: bool) -> None:
    """[B, T] or [B, T, hidden], with a token at least."""
    if tokens.dim() != 2 + embeds or not tokens.shape[1]:
        name = "inputs_embeds" if embeds else "input_ids"
        rule = (
            f"must be [batch, tokens{', hidden' if embeds else ''}] with at least one token a row"
        )
        refuse(name, rule, str(list(tokens.shape)), "add the missing dimension or token")


def _mask(
    mask: Any,
    batch: int,
    tokens: int,
    state: State | None,
    capacity: int | None,
    kinds: Sequence[str],
) -> Tensor | None:
    """`Given.mask`. The input may be as wide as the cache's capacity, as `generate` makes it."""
    if isinstance(mask, dict):  # what generate prepares for static caches, by kind of layer
        missing = [kind for kind in kinds if kind not in mask]
        if missing or not kinds:
            rule = f"must have one for layers of each kind: {', '.join(kinds) or 'none'}"
            refuse("attention_mask", rule, ", ".join(map(str, mask)), "pass [batch, tokens]")
        mask = mask[kinds[0]]
    if mask is None:
        return None
    seen, wait = 0 if state is None else state.seen, tokens > 1
    is_rows = isinstance(mask, Tensor) and mask.dim() == 2 and mask.shape[0] == batch
    width = mask.shape[1] if is_rows else 0
    fixed = isinstance(seen, Tensor)
    fits = width == capacity or (0 < width < (capacity or 0) if fixed else width == seen + tokens)
    if not fits:
        expected = [batch, capacity if fixed else seen + tokens]
        refuse(
            "attention_mask",
            f"must be [batch, tokens] = {expected} with the tokens of the cache, 1 for a "
            "token and 0 for padding",
            str(list(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__,
            "NSA decides which tokens of its row a token sees",
        )
    mask = _real(mask if state is None else mask.to(state.lengths.device), wait)
    beyond = ("attention_mask", "must have no ones beyond the tokens so far")
    advice = "make it as wide as the cached tokens and the new ones"
    if not fixed:
        if width > seen + tokens:
            refuse_unless(~mask[:, seen + tokens :].any(), *beyond, "some", advice, wait=wait)
        return mask[:, : seen + tokens]
    assert capacity is not None
    if width < capacity:
        refuse_unless(seen + 1 == width, *beyond, f"a width of {width}", advice, wait=wait)
        return nn.functional.pad(mask, (0, capacity - width))
    return mask


def _real(mask: Tensor, wait: bool) -> Tensor:
    """bool, True for tokens. Cast to bool, an additive mask (0 and -inf) would mean the opposite,
    and document numbers would be lost."""
    if mask.dtype == torch.bool:
        return mask
    rule = "must be 1 for a token and 0 for padding"
    advice = "mark packed documents by position_ids; for an additive mask, pass mask == 0"
    clear = ((mask == 0) | (mask == 1)).all()
    refuse_unless(clear, "attention_mask", rule, "other values", advice, wait=wait)
    return mask != 0


def check_windows(given: Given, window: int) -> None:
    """Layers that stay dense count padding in their windows: it must not displace a token."""
    mask = given.mask
    if mask is None:
        return
    upto, columns = mask.cumsum(1), torch.arange(mask.shape[1], device=mask.device)
    inside = upto - nn.functional.pad(upto, (window, 0))[:, : upto.shape[1]]
    whole = (inside == upto.clamp(max=window)) | ~mask
    rule = f"must have no padding between the last {window} tokens, which sliding layers see"
    advice = "pad on the left before the first tokens, or compute each row by itself"
    holds = (whole | (columns < given.seen)).all()
    refuse_unless(holds, "attention_mask", rule, "such padding", advice, wait=not given.is_step)


def _check_cache_position(position: Any, given: Given) -> None:
    if position is None:
        return
    _check_integers("cache_position", position, "[tokens]")
    expected = torch.arange(given.tokens, device=position.device) + given.seen
    rule = "must run from the number of cached tokens"
    if not isinstance(given.seen, Tensor):
        rule += f", {given.seen}, to {given.seen + given.tokens - 1}"
    what = ("cache_position", rule, f"shape {list(position.shape)}", "leave it out")
    if position.shape != expected.shape:
        refuse(*what)
    refuse_unless((position == expected).all(), *what, wait=not given.is_step)


def _rows(name: str, values: Any, batch: int, tokens: int) -> Tensor | None:
    """[B, T], from [1, T] or that."""
    if values is None:
        return None
    fits = _counts(values) and values.dim() == 2
    if not fits or values.shape[0] not in (1, batch) or values.shape[1] != tokens:
        came = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else str(values)
        refuse(name, f"must be integers [1 or {batch}, {tokens}]", came, "leave it out")
    return values.expand(batch, tokens)


def _counts(values: Any) -> bool:
    dtype = values.dtype if isinstance(values, Tensor) else torch.bool
    return dtype != torch.bool and not dtype.is_floating_point


def _check_integers(name: str, values: Any, shape: str) -> None:
    """Check for a tensor of integers of one dimension."""
    if not _counts(values) or values.dim() != 1 or not values.shape[0]:
        is_tensor = isinstance(values, Tensor)
        came = f"{values.dtype} {list(values.shape)}" if is_tensor else type(values).__name__
        refuse(name, f"must be integers {shape}, a tensor", came, "leave it out")


def _cu_seqlens(inputs: dict[str, Any], batch: int, tokens: int) -> Tensor | None:
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    ends, of_keys, *limits = (inputs.get(name) for name in names)
    if ends is None:
        alone = [name for name in names if inputs.get(name) is not None]
        if alone:
            refuse(alone[0], "must come with cu_seq_lens_q", "no cu_seq_lens_q", "add it")
        return None
    if batch != 1:
        refuse("cu_seq_lens_q", "is for one row", f"{batch} rows", "flatten the batch to one row")
    _check_integers("cu_seq_lens_q", ends, "[documents + 1]")
    rises = (ends[0] == 0) & (ends[-1] == tokens) & (ends.diff() >= 0).all()
    rule = f"must run from 0 to {tokens}, the tokens of the row, without decreasing"
    refuse_unless(rises, "cu_seq_lens_q", rule, "another", "end it with the number of tokens")
    if of_keys is not None and of_keys is not ends:
        _check_integers("cu_seq_lens_k", of_keys, "[documents + 1]")
        what = ("cu_seq_lens_k", "must equal cu_seq_lens_q", "another", "pass the same")
        if of_keys.shape != ends.shape:
            refuse(*what)
        refuse_unless((of_keys.to(ends.device) == ends).all(), *what)
    for name, limit in zip(names[2:], limits, strict=True):
        if limit is not None:
            rule = "must be at least the length of the longest document"
            if not isinstance(limit, int | Tensor):
                refuse(name, rule, repr(limit), "leave it out")
            fits = (ends.diff() <= limit).all()
            refuse_unless(fits, name, rule, str(limit), "leave it out")
    return ends


def _checkpoints(model: Any) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) for layer in model.layers)
