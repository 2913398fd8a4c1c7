"""Where the tokens of a swapped model's call belong, computed before any layer runs.

`Inputs` belongs to the base model, the module whose `layers` have NSA. `laid_out` lets the forward
of its class begin with it: what NSA reads is what forward gets, after all hooks. `Inputs` lays out
the `Call` that the layers share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.masking_utils import create_masks_for_generate

from nsagen.integrations.transformers_cache import begin, end
from nsagen.integrations.transformers_given import (
    CACHES,
    INPUTS,
    Given,
    check_adapters,
    check_flags,
    check_one_cache,
    check_settings,
    check_shape,
    check_windows,
    given_of,
    layers_of,
)
from nsagen.integrations.transformers_layout import (
    Call,
    Recent,
    State,
    on_host,
    pieces_of,
    refuse,
    refuse_unless,
)
from nsagen.integrations.transformers_rope import Checked, Rope, RopeSource
from nsagen.model.packing import Packed
from nsagen.model.sparsity import Sparsity

CALL = "nsa_call"
"""The keyword that passes the `Call` to layers."""


def laid_out(forward: Callable[..., Any]) -> Callable[..., Any]:
    """The forward of a base model's class, with the layout made from what it gets."""

    @functools.wraps(forward)  # Transformers reads its parameters
    def laid_out(self: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get(CALL), Call):  # a subclass's forward, which calls this one
            return forward(self, *args, **kwargs)
        args, kwargs = self.nsa_inputs(self, args, kwargs)
        out, call = forward(self, *args, **kwargs), kwargs.get(CALL)
        if isinstance(call, Call) and call.cache is not None:
            end(call.cache, call)
        return out

    return laid_out


@dataclass(frozen=True)
class Inputs:
    """Reads the inputs of a base model's forward.

    Attributes:
        names: the parameters of the base model's forward, in order.
        sparsity: the settings of the layers with NSA.
        stored: the same, as the config has them.
        rope: makes their tables.
        window: tokens that dense sliding layers see; None without such layers.
        kinds: Transformers' names for the kinds of the layers with NSA, in models that have kinds.
    """

    names: tuple[str, ...]
    sparsity: Sparsity
    stored: dict[str, Any]
    rope: RopeSource
    window: int | None = None
    kinds: tuple[str, ...] = ()

    def __call__(
        self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if len(args) > len(self.names) or any(name in kwargs for name in self.names[: len(args)]):
            return args, kwargs  # the model refuses both
        kwargs = dict(zip(self.names, args, strict=False)) | kwargs
        unknown = [n for n, v in kwargs.items() if n not in INPUTS and v is not None]
        if unknown:
            known = ", ".join(INPUTS)
            refuse("inputs", f"must be among {known}", ", ".join(unknown), "leave it out")
        kwargs = {name: value for name, value in kwargs.items() if name in INPUTS}
        kwargs |= self._cache_of(kwargs)
        check_flags(model, kwargs)
        check_settings(model, self.stored)
        ids, embeds = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
        tokens = ids if embeds is None else embeds
        if tokens is None or (ids is not None and embeds is not None):
            return (), kwargs  # the model refuses both
        check_shape(tokens, embeds is not None)
        layers = layers_of(model)
        if not layers:
            return (), kwargs  # an assistant that exits before the first of them
        check_adapters(layers)
        shard = kwargs.pop("nsa_shard", None)
        if shard is not None:
            if kwargs.get("use_cache"):
                refuse("nsa_shard", "has no cache", "use_cache=True", "pass use_cache=False")
            kwargs["use_cache"] = False
        given = given_of(model, kwargs, tokens, layers, self.sparsity, self.kinds)
        if self.window is not None:
            check_windows(given, self.window)
        checked = self._check_rope(model, given)
        if shard is None:
            call, position_ids = self._call(given)
        else:
            call, position_ids = self._shared(model, given, layers, shard)
        if call.after is not None:
            call = replace(call, after=replace(call.after, checked=checked))
        if kwargs.get("position_ids") is None and position_ids is not None:
            kwargs["position_ids"] = position_ids  # for layers that stay dense
        cache = given.cache
        if given.caches and cache is None:
            cache = kwargs[self._cache_name] = DynamicCache(config=model.config)
        kwargs["attention_mask"] = self._masks(model, given, kwargs)
        call = replace(call, last=given.last, cache_dtype=given.cache_dtype)
        call = replace(call, cache=cache if given.caches else None)
        return (), {**kwargs, CALL: call}

    def _check_rope(self, model: Any, given: Given) -> Checked | None:
        """Refuse frequencies written into the model's rope: NSA has tables of its own. A decoding
        step compares tensors only if another one holds the frequencies, or they were written to."""
        rotary = getattr(model, "rotary_emb", None)
        before = None if given.state is None else given.state.checked
        compiling = torch.compiler.is_compiling()
        now = before if compiling else self.rope.checked(rotary)
        if given.is_step and not compiling and now is not None and now == before:
            return now
        # Frequencies that depend on the length come from a number on the host.
        check = self.rope.is_that_of if self.rope.fixed else on_host(self.rope.is_that_of)
        same = check(rotary)
        if same is not None:
            rule = "must have the frequencies and the factor that the config's rope_parameters give"
            advice = "set config.rope_parameters, save the model and load it again"
            wait = given.caches and not given.is_step
            refuse_unless(same, "rotary_emb", rule, "others", advice, wait=wait)
        return now

    @property
    def _cache_name(self) -> str:
        return "cache" if "cache" in self.names else "past_key_values"

    def _masks(self, model: Any, given: Given, kwargs: dict[str, Any]) -> Any:
        """What forward gets as its mask: a mark for NSA, which has read the mask. Forward hands on
        masks of four dimensions as they are, so a layer can tell when a hook changed it."""
        mark = torch.empty(0, 0, 0, 0, device=given.device)
        masks = kwargs.get("attention_mask")
        if self.window is None:
            return dict.fromkeys(masks, mark) if isinstance(masks, dict) else mark
        if not isinstance(masks, dict):
            cache = {self._cache_name: kwargs.get(self._cache_name)}
            masks: Any = create_masks_for_generate(
                config=model.config,
                inputs_embeds=torch.empty(
                    given.batch, given.tokens, 0, dtype=model.dtype, device=given.device
                ),
                attention_mask=masks,
                position_ids=kwargs.get("position_ids"),
                **cache,
            )
        return {**masks, **dict.fromkeys(self.kinds, mark)}

    def _cache_of(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The cache under the name that this version of the model has for it."""
        given = check_one_cache(kwargs)
        for name in CACHES:
            kwargs.pop(name, None)
        return {self._cache_name: given[0]} if given else {}

    def _call(self, given: Given) -> tuple[Call, Tensor | None]:
        """The layout, and position_ids for dense layers if the caller gave none."""
        if (given.cu_seqlens, given.seq_idx) != (None, None):
            return self._packed(given)
        if given.state is not None and given.is_step:
            return self._step(given, given.state), None
        if not given.caches and given.mask is None and given.position_ids is None:
            return self._plain(given), None
        return self._rows(given)

    def _tables(self, given: Given, positions: int) -> Rope:
        """Rope tables for `positions`; for a fixed capacity, for all that it has room for."""
        old = None if given.state is None else given.state.rope
        longest = _longest(given) if self.rope.by_length else 1
        if given.caches and given.capacity is not None:
            return self.rope.tables(given.capacity, longest, given.device, old, spare=False)
        return self.rope.tables(positions, longest, given.device, old, spare=given.caches)

    def _plain(self, given: Given) -> Call:
        """Whole rows without a cache: all of it can be traced."""
        ends = torch.arange(given.batch + 1, dtype=torch.int32, device=given.device)
        packed = Packed.of(ends * given.tokens, given.batch * given.tokens)
        rope = self._tables(given, given.tokens)
        return Call(given.batch, given.tokens, packed, rope, given.recording)

    def _step(self, given: Given, state: State) -> Call:
        """One token per row after cached ones: the host reads no length."""
        room = given.capacity
        if room is None:
            assert isinstance(state.seen, int)
            room = state.seen + 1
        else:
            rule, advice = f"has room for {room} tokens", "make it with a larger max_cache_len"
            came = torch.as_tensor(state.seen + 1)
            refuse_unless(came <= room, "cache", rule, came, advice, wait=False)
        real, held = _with_token(state, given.mask)
        lengths, shift = state.lengths, state.shift
        if given.position_ids is not None:
            came = given.position_ids[:, -1].expand(given.batch)
            if state.waiting:
                ahead = came.to(torch.int64) - lengths
                old = torch.zeros_like(ahead) if shift is None else shift
                shift = torch.where(lengths == 0, ahead, old)
            # A row without a token in this step may have any position.
            right = came == (lengths if shift is None else lengths + shift)
            right = right if real is None else right | ~real
            refuse_unless(right.all(), *_GOES_ON, wait=False)
        elif state.given and state.shift is not None:
            refuse_unless(~state.shift.any(), *_GOES_ON, wait=False)
        rope = self._tables(given, room)
        positions = lengths if real is None else torch.where(real, lengths, -1)
        after = replace(
            state,
            lengths=lengths + 1 if real is None else lengths + real.to(torch.int32),
            seen=state.seen + 1,
            real=held,
            shift=shift,
            given=state.given or given.position_ids is not None,
            rope=rope,
        )
        return Call(
            given.batch,
            1,
            None,
            rope,
            False,
            continues=True,
            room=room,
            after=after,
            positions=positions,
            recent=Recent.of_step(positions, self.sparsity),
        )

    def _packed(self, given: Given) -> tuple[Call, Tensor | None]:
        """Documents in rows, marked by cu_seq_lens_q, seq_idx, position_ids or several of them."""
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

    def _shared(self, model: Any, given: Given, nsa: list[Any], shard: Any) -> tuple[Call, Tensor]:
        """One rank's part of each sequence, all of them in one row."""
        layers = model.config.num_hidden_layers
        if self.window is not None or len(nsa) < layers:
            came = f"{layers - len(nsa)} that are dense"
            refuse("nsa_shard", "needs NSA in every layer", came, "use tensor parallel")
        whole = {
            "a cache": given.cache,
            "attention_mask": given.mask,
            "position_ids": given.position_ids,
            "cu_seq_lens_q": given.cu_seqlens,
            "seq_idx": given.seq_idx,
        }
        beside = [name for name, value in whole.items() if value is not None]
        if beside:
            refuse("nsa_shard", "says where all tokens are", ", ".join(beside), "leave it out")
        if not isinstance(shard, Packed) or shard.remote is None:
            refuse(
                "nsa_shard", "must be a shard", repr(shard), "make it with ContextParallel.shard"
            )
        rows = shard.positions.shape[0]
        if (given.batch, given.tokens) != (1, rows):
            came = str([given.batch, given.tokens])
            rule = f"needs input_ids of shape [1, {rows}]"
            refuse("nsa_shard", rule, came, "pass shard.take(input_ids)[None]")
        longest = max(shard.lengths or (), default=0) or 1
        rope = self.rope.tables(longest, longest, given.device, None, spare=False)
        call = Call(1, rows, shard, rope, given.recording)
        return call, shard.positions.to(torch.int64)[None]

    @on_host
    def _rows(self, given: Given) -> tuple[Call, Tensor | None]:
        """One sequence per row, padded or not, from its start or after cached tokens."""
        batch, tokens, state, mask = given.batch, given.tokens, given.state, given.mask
        if given.position_ids is not None and mask is None and state is None:
            broken = not bool((given.position_ids.diff(dim=1) == 1).all())
            if broken:
                return self._packed(given)
        assert isinstance(given.seen, int)
        room = given.seen + tokens
        if given.caches and given.capacity is not None and room > given.capacity:
            rule = f"has room for {given.capacity} tokens"
            refuse("cache", rule, str(room), "make it with a larger max_cache_len")
        real = torch.ones(batch, tokens, dtype=torch.bool, device=given.device)
        if mask is not None:
            real = mask[:, -tokens:]
            if state is not None:
                _check_earlier(mask[:, : given.seen], state)
        elif state is not None and state.real is not None:
            refuse(*_NO_MASK)
        counts = real.sum(1).tolist()
        before = [0] * batch if state is None else state.lengths.tolist()
        padded = sum(counts) < batch * tokens
        places = real.flatten().nonzero().squeeze(1) if padded else None
        shift, position_ids = _shift(given, real, before)
        ends = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        packed = Packed.of(ends.to(given.device), sum(counts))
        lengths = [a + b for a, b in zip(before, counts, strict=True)]
        rope = self._tables(given, max(lengths, default=1) or 1)
        call = Call(batch, tokens, packed, rope, given.recording, places, state is not None)
        if given.caches:
            whole = not padded if mask is None else bool(mask.all())
            after = State(
                torch.tensor(lengths, dtype=torch.int32, device=given.device),
                room,
                None if whole else mask,
                shift,
                given.position_ids is not None or (state is not None and state.given),
                given.recording or (state is not None and state.recorded),
                rope,
                not all(lengths),
            )
            pieces = pieces_of(before, counts, self.sparsity, given.device)
            recent = Recent.of_pass(pieces, after.lengths, self.sparsity)
            after = after if given.capacity is None else after.fixed(given.capacity)
            call = replace(call, room=room, after=after, pieces=pieces, recent=recent)
            begin(given.cache, given.last)
        return call, position_ids if padded else None


_GOES_ON = (
    "position_ids",
    "must increase by one from token to token of a row, not counting padding, and continue after "
    "the tokens in the cache",
    "others",
    "leave them out; to pack documents into a row, pass use_cache=False and no attention_mask",
)

_NO_MASK = (
    "attention_mask",
    "must be given when the cache holds padding, for its tokens and the new ones",
    "none",
    "append ones to the earlier mask",
)


@on_host
def _longest(given: Given) -> int:
    """The largest position of a call plus 1, counting padding; some rope types scale by it."""
    if given.position_ids is not None:
        return int(given.position_ids.max()) + 1
    return int(given.seen) + given.tokens


def _with_token(state: State, mask: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Which rows have a token in a step, bool [B] or None for all; and `State.real` after it."""
    if not isinstance(state.seen, Tensor):
        if mask is None:
            if state.real is not None:
                refuse(*_NO_MASK)
            return None, None
        _check_earlier(mask[:, :-1], state, wait=False)
        return mask[:, -1], mask
    assert state.real is not None
    new = torch.arange(state.real.shape[1], device=state.real.device) == state.seen
    if mask is None:
        refuse_unless((state.lengths == state.seen).all(), *_NO_MASK, wait=False)
        return None, state.real | new
    _check_earlier(mask & ~new, state, wait=False)
    return (mask & new).any(1), mask


def _check_earlier(earlier: Tensor, state: State, wait: bool = True) -> None:
    """The mask of cached tokens must be what it was when they were cached."""
    same = earlier.all() if state.real is None else (earlier == state.real).all()
    rule = "must not change for tokens that the cache holds"
    refuse_unless(same, "attention_mask", rule, "another", "start from an empty cache", wait=wait)


def _shift(given: Given, real: Tensor, before: list[int]) -> tuple[Tensor | None, Tensor]:
    """How far position_ids are ahead of positions in the row, and position_ids [B, T].

    Rope depends on differences only, so a row may start at any position. From there, positions
    must increase by one.
    """
    state, device = given.state, given.device
    counted = torch.tensor(before, device=device)[:, None] + real.cumsum(1) - 1
    usual = torch.arange(given.tokens, device=device) + given.seen
    ids = usual[None] if given.position_ids is None else given.position_ids
    ahead = ids.expand(given.batch, -1) - counted
    first = real.to(torch.int8).argmax(1, keepdim=True)
    shift = ahead.gather(1, first).squeeze(1).where(real.any(1), 0)
    if state is not None:
        old = torch.zeros_like(shift) if state.shift is None else state.shift
        shift = torch.where(state.lengths > 0, old, shift)
        if given.position_ids is None and state.given and bool(old.any()):
            refuse(*_GOES_ON)
    if given.position_ids is not None:
        right = (ahead == shift[:, None]) | ~real
        refuse_unless(right.all(), *_GOES_ON)
    positions = (counted + shift[:, None]).clamp(min=0)
    return (shift if bool(shift.any()) else None), positions


def _starts(values: Tensor, step: int) -> Tensor:
    """bool [B, T]: the start of each row, and where its values do not increase by `step`."""
    starts = torch.ones_like(values, dtype=torch.bool)
    starts[:, 1:] = values.diff(dim=1) != step
    return starts
