"""What a swapped model does with each input: checked and laid out before any layer runs.

`Inputs` is a forward hook of the base model, the module whose `layers` NSA is in. It computes the
`Call` that the layers share, and refuses by name what NSA would not compute as the dense model
does. `INPUTS` is the list, which docs/transformers.md repeats.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, StaticCache

from nsagen.integrations.transformers_cache import NSALayer, check_replaceable
from nsagen.integrations.transformers_layout import (
    Call,
    State,
    moved,
    pieces_of,
    refuse,
    refuse_unless,
)
from nsagen.integrations.transformers_rope import Rope, RopeSource
from nsagen.model.packing import Packed
from nsagen.model.sparsity import Sparsity

CALL = "nsa_call"
"""The name under which layers get the `Call`."""

INPUTS = {
    "input_ids": "computed",
    "inputs_embeds": "computed",
    "attention_mask": "computed if [batch, tokens]; prepared masks are refused",
    "position_ids": "computed: documents packed into a row, and positions that go on by one",
    "cache": "computed if a DynamicCache or StaticCache",
    "past_key_values": "computed, as cache",
    "use_cache": "computed",
    "cache_position": "computed if it goes on behind the cache",
    "cu_seq_lens_q": "computed for one row without cache and mask",
    "cu_seq_lens_k": "must equal cu_seq_lens_q",
    "max_length_q": "must be no less than the longest document",
    "max_length_k": "must be no less than the longest document",
    "seq_idx": "computed, as position_ids that start again",
    "output_hidden_states": "computed",
    "output_router_logits": "computed",
    "return_dict": "computed",
    "num_items_in_batch": "computed, by the loss",
    "output_attentions": "True is refused: NSA never forms the weights",
    "is_causal": "False is refused",
}
"""What a base model may be given, and what becomes of it. All else is refused."""


@dataclass(frozen=True)
class Given:
    """The inputs of a call that say where its tokens belong."""

    batch: int
    tokens: int
    device: torch.device
    mask: Tensor | None
    position_ids: Tensor | None
    cu_seqlens: Tensor | None
    seq_idx: Tensor | None
    state: State | None
    caches: bool
    recording: bool

    @property
    def behind(self) -> int:
        return 0 if self.state is None else self.state.seen


@dataclass(frozen=True)
class Inputs:
    """The hook.

    Attributes:
        names: the parameters of the base model's forward, in order.
        layers: indices of the layers that have NSA.
        sparsity: their settings.
        rope: makes their tables.
        window: tokens that the layers which stay dense see; None without such layers.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    sparsity: Sparsity
    rope: RopeSource
    window: int | None = None

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        unknown = [n for n, v in kwargs.items() if n not in INPUTS and v is not None]
        if unknown:
            known = ", ".join(INPUTS)
            refuse("inputs", f"must be among {known}", ", ".join(unknown), "leave it out")
        kwargs = {name: value for name, value in kwargs.items() if name in INPUTS}
        self._check_flags(model, kwargs)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = ids if embeds is None else embeds
        if tokens is None or (ids is not None and embeds is not None):
            return (), kwargs  # the model refuses both
        _check_shape(tokens, embeds is not None)
        given = self._given(model, kwargs, tokens)
        call, position_ids = self._call(given)
        if kwargs.get("position_ids") is None and position_ids is not None:
            kwargs["position_ids"] = position_ids  # for layers that stay dense
        return (), {**kwargs, CALL: call}

    def _check_flags(self, model: Any, kwargs: dict[str, Any]) -> None:
        """Refuse what would change attention, wherever it is said."""
        config = model.config
        advice = "leave it out, or use the dense model"
        for name, wrong, why in (
            ("output_attentions", True, "NSA never forms the weights"),
            ("is_causal", False, "NSA looks back alone"),
        ):
            value = kwargs.get(name)
            if value is None:
                value = getattr(config, name, None)
            if value is wrong:
                refuse(name, f"must not be {wrong}: {why}", str(wrong), advice)
        if getattr(config, "use_bidirectional_attention", False):
            refuse("config.use_bidirectional_attention", "must be False", "True", advice)
        dropout = getattr(config, "attention_dropout", 0.0)
        if model.training and dropout:
            rule = "must be 0 in training: NSA drops no weights of attention"
            refuse("config.attention_dropout", rule, str(dropout), "set it to 0")

    def _given(self, model: Any, kwargs: dict[str, Any], tokens: Tensor) -> Given:
        batch, length = tokens.shape[:2]
        graded = torch.is_grad_enabled()
        recording = graded and (
            tokens.requires_grad or any(p.requires_grad for p in model.parameters())
        )
        cache = kwargs.get("cache")
        if cache is None:
            cache = kwargs.get("past_key_values")
        caches = kwargs.get("use_cache")
        caches = bool(model.config.use_cache if caches is None else caches) or cache is not None
        state = self._state(cache, tokens, model.config.num_hidden_layers)
        if graded and model.training and _checkpoints(model.layers):
            if state is not None:
                rule = "must be empty under gradient checkpointing, which takes it from layers"
                refuse("cache", rule, f"{state.seen} tokens", "call model.eval(), or use no_grad")
            caches = False
        if state is not None and state.recorded and recording:
            refuse(
                "cache",
                "must be filled under torch.no_grad() where gradients are wanted behind it: it "
                "does not lead gradients into the tokens that it holds",
                f"{state.seen} tokens that autograd recorded",
                "wrap the earlier calls, or this one if it needs no gradients, in torch.no_grad()",
            )
        mask = kwargs.get("attention_mask")
        if isinstance(mask, dict):  # what generate prepares for static caches, by kind of layer
            mask = mask.get(self.rope.layer_type or "full_attention")
        seen = 0 if state is None else state.seen
        mask = _checked_mask(mask, batch, seen, length)
        given = Given(
            batch,
            length,
            tokens.device,
            None if mask is None else _real(mask.to(tokens.device), wait=length > 1),
            _checked_rows("position_ids", kwargs.get("position_ids"), batch, length),
            _checked_cu_seqlens(kwargs, batch, length),
            _checked_rows("seq_idx", kwargs.get("seq_idx"), batch, length),
            state,
            caches,
            recording,
        )
        if self.window is not None and given.mask is not None:
            _check_windows(given.mask, length, self.window)
        position = kwargs.get("cache_position")
        if position is not None:
            expected = torch.arange(seen, seen + length, device=position.device)
            same = position.shape == expected.shape
            rule = f"must run from {seen}, the tokens behind it, to {seen + length - 1}"
            what = ("cache_position", rule, f"shape {list(position.shape)}", "leave it out")
            if not same:
                refuse(*what)
            refuse_unless((position == expected).all(), *what, wait=length > 1)
        return given

    def _state(self, cache: Any, tokens: Tensor, count: int) -> State | None:
        """What a cache holds for the first `count` layers; None if it is empty or not there."""
        if cache is None:
            return None
        offloads = getattr(cache, "offloading", False)
        if type(cache) not in (Cache, DynamicCache, StaticCache) or offloads:
            kind = f"a {type(cache).__name__}{' that offloads' if offloads else ''}"
            advice = "leave out cache_implementation, or say static"
            refuse("cache", "must be a DynamicCache or a StaticCache", kind, advice)
        used = [i for i in self.layers if i < count]
        layers = [cache.layers[i] for i in used if i < len(cache.layers)]
        for layer in layers:
            check_replaceable(layer)
            if isinstance(layer, NSALayer) and layer.sparsity != self.sparsity:
                rule = "must be one that a model with the same settings of attention filled"
                refuse("cache", rule, str(layer.sparsity), "start from an empty cache")
        states = [layer.state if isinstance(layer, NSALayer) else None for layer in layers]
        if not states or all(state is None for state in states):
            return None
        seen = {0 if state is None else state.seen for state in states}
        if len(seen) > 1 or len(states) < len(used):
            rule = "must hold as many tokens in every layer; a call that failed leaves it uneven"
            refuse("cache", rule, f"{sorted(seen)}", "start from an empty one")
        state = states[0]
        assert state is not None
        batch = tokens.shape[0]
        if state.lengths.shape[0] != batch:
            rule = f"must have as many rows as the batch, {batch}"
            refuse("cache", rule, str(state.lengths.shape[0]), "start from an empty one")
        return moved(state, tokens.device)

    def _call(self, given: Given) -> tuple[Call, Tensor | None]:
        """The layout, and position_ids for dense layers where none were given."""
        state = given.state
        if state is not None and given.tokens == 1 and not given.recording:
            return self._step(given, state), None
        if (given.cu_seqlens, given.seq_idx) != (None, None):
            return self._packed(given)
        if not given.caches and given.mask is None and given.position_ids is None:
            return self._plain(given), None
        return self._rows(given)  # pyright: ignore

    def _tables(self, given: Given, positions: int, *, wait: bool = True) -> Rope:
        longest = given.behind + given.tokens
        if self.rope.by_length and given.position_ids is not None:
            longest = int(given.position_ids.max()) + 1
        old = None if given.state is None else given.state.rope
        return self.rope.tables(positions, longest, given.device, old, given.caches)

    def _plain(self, given: Given) -> Call:
        """Whole rows, without cache: nothing that a compiler could not trace."""
        ends = torch.arange(given.batch + 1, dtype=torch.int32, device=given.device)
        packed = Packed.of(ends * given.tokens, given.batch * given.tokens)
        rope = self._tables(given, given.tokens)
        return Call(given.batch, given.tokens, packed, rope, given.recording)

    def _step(self, given: Given, state: State) -> Call:
        """One token a row behind a cache: no length is read on the host."""
        real, lengths = None, state.lengths
        if given.mask is not None:
            real = given.mask[:, -1]
            _check_earlier_mask(given.mask, state, wait=False)
        elif state.real is not None:
            _refuse_no_mask()
        if given.position_ids is not None:
            expected = lengths if state.shift is None else lengths + state.shift
            # A row of padding alone may begin anywhere, but not behind one token: it is decoded.
            right = given.position_ids[:, -1].expand(given.batch) == expected
            right = right if real is None else right | ~real
            refuse_unless(right.all(), *_GOES_ON, wait=False)
        elif state.given and state.shift is not None:
            refuse(*_GOES_ON)
        rope = self._tables(given, state.seen + 1)
        positions = lengths if real is None else torch.where(real, lengths, -1)
        after = replace(
            state,
            lengths=lengths + 1 if real is None else lengths + real.to(torch.int32),
            seen=state.seen + 1,
            real=given.mask,
            given=state.given or given.position_ids is not None,
            rope=rope,
        )
        return Call(
            given.batch,
            1,
            None,
            rope,
            False,
            behind=state.seen,
            after=after,
            positions=positions,
        )

    def _packed(self, given: Given) -> tuple[Call, Tensor | None]:
        """Documents in rows, said by cu_seq_lens_q, seq_idx, position_ids or several of them."""
        if given.caches or given.mask is not None:
            refuse(
                "documents packed into a row",
                "must come without cache and attention_mask",
                "a cache" if given.caches else "a mask",
                "pass use_cache=False, and no attention_mask",
            )
        total, starts = given.batch * given.tokens, {}
        if given.cu_seqlens is not None:
            marks = torch.zeros(total + 1, dtype=torch.bool, device=given.device)
            marks[given.cu_seqlens.to(torch.int64)] = True
            starts["cu_seq_lens_q"] = marks[None, :-1]
        if given.position_ids is not None:
            starts["position_ids"] = _starts(given.position_ids, 1)
        if given.seq_idx is not None:
            starts["seq_idx"] = _starts(given.seq_idx, 0)
        (name, first), *others = starts.items()
        for other, marked in others:
            rule, advice = f"must start documents where {name} does", f"leave out {other} or {name}"
            refuse_unless((first == marked).all(), other, rule, "other places", advice)
        ends = given.cu_seqlens
        if ends is None:
            ends = first.flatten().nonzero().squeeze(1)
            ends = torch.cat([ends, ends.new_tensor([total])])
        packed = Packed.of(ends.to(torch.int32), total)
        rope = self._tables(given, given.tokens)
        positions = packed.positions.to(torch.int64).view(given.batch, given.tokens)
        call = Call(given.batch, given.tokens, packed, rope, given.recording)
        return call, positions

    @torch.compiler.disable
    def _rows(self, given: Given) -> tuple[Call, Tensor | None]:
        """A sequence in each row, padded or not, from its start or behind a cache."""
        batch, tokens, state, mask = given.batch, given.tokens, given.state, given.mask
        if given.position_ids is not None and mask is None and state is None:
            broken = not bool((given.position_ids.diff(dim=1) == 1).all())
            if broken:
                return self._packed(given)
        real = torch.ones(batch, tokens, dtype=torch.bool, device=given.device)
        if mask is not None:
            real = mask[:, -tokens:]
            if state is not None:
                _check_earlier_mask(mask, state)
        elif state is not None and state.real is not None:
            _refuse_no_mask()
        counts = real.sum(1).tolist()
        before = [0] * batch if state is None else state.lengths.tolist()
        padded = sum(counts) < batch * tokens
        places = real.flatten().nonzero().squeeze(1) if padded else None
        shift, position_ids = _shift(given, real, before)
        ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        packed = Packed.of(ends.to(given.device), sum(counts))
        after_lengths = [a + b for a, b in zip(before, counts, strict=True)]
        rope = self._tables(given, max(after_lengths, default=1) or 1)
        call = Call(batch, tokens, packed, rope, given.recording, places, given.behind)
        if given.caches:
            whole = not padded if mask is None else bool(mask.all())
            after = State(
                torch.tensor(after_lengths, dtype=torch.int32, device=given.device),
                given.behind + tokens,
                None if whole else mask,
                shift,
                given.position_ids is not None or (state is not None and state.given),
                given.recording or (state is not None and state.recorded),
                rope,
            )
            pieces = pieces_of(before, counts, self.sparsity, given.device)
            call = replace(call, after=after, pieces=pieces)
        return call, position_ids if padded else None


_GOES_ON = (
    "position_ids",
    "must go on by one from token to token of a row, padding not counted, and from those that the "
    "cache holds",
    "others",
    "leave them out; to pack documents into a row, pass use_cache=False and no attention_mask",
)


def _refuse_no_mask() -> None:
    rule = "must be given behind a cache that holds padding, for all its tokens and the new ones"
    refuse("attention_mask", rule, "none", "extend the earlier one by ones")


def _check_earlier_mask(mask: Tensor, state: State, wait: bool = True) -> None:
    """The mask must say of tokens in the cache what it said when they were put there."""
    earlier = mask[:, : state.seen]
    same = earlier.all() if state.real is None else (earlier == state.real).all()
    rule = "must not change for tokens that the cache holds"
    refuse_unless(same, "attention_mask", rule, "another", "start from an empty cache", wait=wait)


def _shift(given: Given, real: Tensor, before: list[int]) -> tuple[Tensor | None, Tensor]:
    """How far position_ids are ahead, and position_ids [B, T] where none are given.

    Rope sees differences only, so a row may begin at any position. It must go on by one.
    """
    state, device = given.state, given.device
    counted = torch.tensor(before, device=device)[:, None] + real.cumsum(1) - 1
    usual = torch.arange(given.behind, given.behind + given.tokens, device=device)
    ids = usual[None] if given.position_ids is None else given.position_ids
    ahead = ids.expand(given.batch, -1) - counted
    first = real.to(torch.int8).argmax(1, keepdim=True)
    shift = ahead.gather(1, first).squeeze(1).where(real.any(1), 0)
    if state is not None:
        old = torch.zeros_like(shift) if state.shift is None else state.shift
        shift = torch.where(state.lengths > 0, old, shift)
    if given.position_ids is None and state is not None and state.given and state.shift is not None:
        refuse(*_GOES_ON)
    if given.position_ids is not None:
        right = (ahead == shift[:, None]) | ~real
        refuse_unless(right.all(), *_GOES_ON)
    positions = (counted + shift[:, None]).clamp(min=0)
    return (shift if bool(shift.any()) else None), positions


def _starts(values: Tensor, step: int) -> Tensor:
    """bool [B, T]: where a row begins, or its values do not go on by `step`."""
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[:, 1:] = values.diff(dim=1) != step
    return starts


def _checked_mask(mask: Any, batch: int, seen: int, tokens: int) -> Tensor | None:
    if mask is None:
        return None
    expected = (batch, seen + tokens)
    if not isinstance(mask, Tensor) or tuple(mask.shape) != expected:
        came = str(list(mask.shape)) if isinstance(mask, Tensor) else type(mask).__name__
        refuse(
            "attention_mask",
            f"must be [batch, tokens] = {list(expected)} with the tokens of the cache, 1 for a "
            "token and 0 for padding",
            came,
            "NSA chooses itself what a token sees of its row",
        )
    return mask


def _real(mask: Tensor, wait: bool) -> Tensor:
    """bool [B, N], True for tokens. Read as bool, an additive mask (0 and -inf) would mean the
    opposite, and document numbers would be lost."""
    if mask.dtype == torch.bool:
        return mask
    rule = "must be 1 for a token and 0 for padding"
    advice = "mark packed documents by position_ids; for an additive mask, pass mask == 0"
    clear = ((mask == 0) | (mask == 1)).all()
    refuse_unless(clear, "attention_mask", rule, "other values", advice, wait=wait)
    return mask != 0


def _check_windows(mask: Tensor, new: int, window: int) -> None:
    """Layers that stay dense count padding in their windows: it must not push a token out."""
    upto = mask.cumsum(1)
    inside = upto - nn.functional.pad(upto, (window, 0))[:, : upto.shape[1]]
    whole = (inside == upto.clamp(max=window)) | ~mask
    rule = f"must have no padding between the last {window} tokens, which sliding layers see"
    advice = "pad on the left before the first tokens, or compute each row by itself"
    holds = whole[:, -new:].all()
    refuse_unless(holds, "attention_mask", rule, "such padding", advice, wait=new > 1)


def _check_shape(tokens: Tensor, embeds: bool) -> None:
    """[B, T] or [B, T, hidden], with a token at least."""
    if tokens.dim() != 2 + embeds or not tokens.shape[1]:
        name = "inputs_embeds" if embeds else "input_ids"
        rule = (
            f"must be [batch, tokens{', hidden' if embeds else ''}] with at least one token a row"
        )
        refuse(name, rule, str(list(tokens.shape)), "add the missing dimension or token")


def _checked_rows(name: str, values: Any, batch: int, tokens: int) -> Tensor | None:
    """[B, T], from [1, T] or that."""
    if values is None:
        return None
    fits = isinstance(values, Tensor) and values.dim() == 2 and _counts(values)
    if not fits or values.shape[0] not in (1, batch) or values.shape[1] != tokens:
        came = f"{values.dtype} {list(values.shape)}" if isinstance(values, Tensor) else str(values)
        refuse(name, f"must be integers [1 or {batch}, {tokens}]", came, "leave it out")
    return values.expand(batch, tokens)


def _counts(values: Tensor) -> bool:
    return values.dtype != torch.bool and not values.is_floating_point()


def _checked_cu_seqlens(kwargs: dict[str, Any], batch: int, tokens: int) -> Tensor | None:
    names = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
    ends, of_keys, *limits = (kwargs.get(name) for name in names)
    if ends is None:
        alone = [name for name in names if kwargs.get(name) is not None]
        if alone:
            refuse(alone[0], "must come with cu_seq_lens_q", "no cu_seq_lens_q", "add it")
        return None
    if batch != 1:
        refuse("cu_seq_lens_q", "is for one row", f"{batch} rows", "flatten the batch to one row")
    if ends.dim() != 1 or ends.shape[0] < 1 or not _counts(ends):
        rule = "must be integers [documents + 1]"
        refuse("cu_seq_lens_q", rule, f"{ends.dtype} {list(ends.shape)}", "start it with 0")
    rises = (ends[0] == 0) & (ends[-1] == tokens) & (ends.diff() >= 0).all()
    rule = f"must run from 0 to {tokens}, the tokens of the row, without decreasing"
    refuse_unless(rises, "cu_seq_lens_q", rule, "another", "end it with the number of tokens")
    if of_keys is not None and of_keys is not ends:
        same = of_keys.shape == ends.shape
        what = ("cu_seq_lens_k", "must equal cu_seq_lens_q", "another", "pass the same")
        if not same:
            refuse(*what)
        refuse_unless((of_keys.to(ends.device) == ends).all(), *what)
    for name, limit in zip(names[2:], limits, strict=True):
        if limit is not None:
            rule = "must be no less than the longest document"
            fits = (ends.diff() <= limit).all()
            refuse_unless(fits, name, rule, str(limit), "leave it out")
    return ends


def _checkpoints(layers: Iterable[nn.Module]) -> bool:
    return any(getattr(layer, "gradient_checkpointing", False) for layer in layers)
