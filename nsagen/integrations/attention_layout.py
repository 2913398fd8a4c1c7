"""Where the tokens of a batch belong that comes through Transformers' attention interface.

Such a batch has queries [B, H, S, D] and keys [B, H, T, D], the last S of which are the queries'
own. `attention_mask.mask_of` reduces what Transformers says of padding and packed documents to one
number a key, and `layout_of` makes sequences of it, counted from each one's first token: padding
takes no part. Needs PyTorch alone: exported packages have it.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch
from torch import Tensor

from nsagen.core.errors import InvalidInputError
from nsagen.integrations.narrow_rows import NarrowRows, Rows, places_of

UNFILLED = -1
"""What a mask has for the part of a static cache that no token fills; 0 is padding."""


IGNORED = {
    "position_ids",  # the model's rope, and the mask, have used them
    "position_embeddings",
    "use_cache",
    "output_hidden_states",
    "output_router_logits",
    "return_dict",
    "num_items_in_batch",
    "cache_position",
    "logits_to_keep",
    "shift_labels",
    "sliding_window",  # None here: layers with a window stay dense
    "is_causal",  # not False here
    "max_length_q",
    "max_length_k",
}
"""What models hand on that changes nothing for a layer. All else that is given is refused."""


def refuse(what: str, rule: str, came: str, advice: str) -> NoReturn:
    """Raise InvalidInputError about what a model was given."""
    raise InvalidInputError(f"nsagen attention: {what}: {rule}; got {came}; {advice}")


def check_inputs(dropout: float, kwargs: dict[str, Any]) -> None:
    """Refuse what would change attention."""
    if dropout:
        rule = "must be 0 in training: no weights of attention are dropped"
        refuse("config.attention_dropout", rule, str(dropout), "set it to 0")
    if kwargs.get("output_attentions"):
        rule = "must not be True: the weights are never formed"
        refuse("output_attentions", rule, "True", "leave it out, or use eager attention")
    if kwargs.get("is_causal") is False:
        refuse("is_causal", "must not be False", "False", "use sdpa")
    known = IGNORED | {"cu_seq_lens_q", "cu_seq_lens_k", "output_attentions"}
    strange = [n for n, v in kwargs.items() if n not in known and v is not None and v is not False]
    if strange:
        advice = "leave it out, or use another implementation of attention"
        refuse("inputs", "must not change attention", ", ".join(strange), advice)


@dataclass(frozen=True)
class Layout:
    """The sequences of a batch.

    Attributes:
        batch, queries, keys: B, S and T, T without the unfilled part of a static cache.
        key_index: int64 [sum of key_lengths], each sequence's keys in the flattened [B, T]; None:
            each row is one sequence, all of it real.
        query_index: int64 [sum of query_lengths], in the flattened [B, S]; None with key_index.
        rows: the row of each sequence.
        key_lengths, query_lengths: tokens of each sequence.
        device: of the tensors.
        packed: whether the sequences, with all of their keys, lie one after another in one row.
    """

    batch: int
    queries: int
    keys: int
    key_index: Tensor | None
    query_index: Tensor | None
    rows: tuple[int, ...]
    key_lengths: tuple[int, ...]
    query_lengths: tuple[int, ...]
    device: torch.device
    packed: bool = False

    @property
    def whole(self) -> bool:
        """Whether all tokens of the sequences are queries: none lies in a cache."""
        return self.key_lengths == self.query_lengths

    @property
    def merged(self) -> bool:
        """Whether rows are packed as heads: [T, B * H, D] is a view of a cache, [B * T, H, D] a
        copy."""
        return self.key_index is None and not self.whole

    @property
    def step(self) -> bool:
        """Whether each row has one new token behind a cache."""
        return self.queries == 1 and not (self.whole or self.packed)

    @functools.cached_property
    def positions(self) -> Tensor:
        """int32 [B], in a step: each row's new token, counted in its sequence; -1: none."""
        found = [-1] * self.batch
        for row, keys, new in zip(self.rows, self.key_lengths, self.query_lengths, strict=True):
            found[row] = keys - 1 if new else -1
        return torch.tensor(found, dtype=torch.int32, device=self.device)

    @functools.cached_property
    def slots(self) -> Tensor:
        """int32 [B], the rows."""
        return torch.arange(self.batch, dtype=torch.int32, device=self.device)

    def places_of(self, tokens: Tensor) -> Tensor:
        """Where in the cache tokens of rows lie, in a step.

        Args:
            tokens: int [..., B, K], counted in each row's sequence.

        Returns:
            int64 [..., B, K], in [B, H, T, D]; anything for rows without a sequence.
        """
        if self.key_index is None:
            return tokens.long()
        return self.key_index[self._row_starts[:, None] + tokens] % self.keys

    @functools.cached_property
    def _row_starts(self) -> Tensor:
        """int64 [B], the first key of each row in `key_index`, in a step."""
        firsts, first = [0] * self.batch, 0
        for row, keys in zip(self.rows, self.key_lengths, strict=True):
            firsts[row] = first
            first += keys
        return torch.tensor(firsts, device=self.device)

    def by_row(self, blocks: Tensor) -> Tensor:
        """Blocks of the packed queries, [R, N, topk], as [R, B, topk], in a step."""
        rows = [r for r, new in zip(self.rows, self.query_lengths, strict=True) if new]
        every = blocks.new_full((blocks.shape[0], self.batch, blocks.shape[2]), -1)
        every[:, rows] = blocks
        return every

    @functools.cached_property
    def cu_seqlens_q(self) -> Tensor:
        """int32 [sequences + 1]; of one sequence where merged, as all have the same lengths."""
        return self._ends(self.query_lengths)

    @functools.cached_property
    def cu_seqlens_k(self) -> Tensor:
        return self._ends(self.key_lengths)

    def _ends(self, lengths: tuple[int, ...]) -> Tensor:
        return ends_of(lengths[:1] if self.merged else lengths, self.device)

    @functools.cached_property
    def q_start(self) -> Tensor | None:
        """int32 [sequences], position of each one's first query; None where all are 0."""
        if self.whole:
            return None
        starts = [k - q for k, q in zip(self.key_lengths, self.query_lengths, strict=True)]
        starts = starts[:1] if self.merged else starts
        return torch.tensor(starts, dtype=torch.int32, device=self.device)

    def pack_queries(self, x: Tensor) -> Tensor:
        """[B, H, S, D] to [N, H, D], or [S, B * H, D] where merged."""
        return self._pack(x, self.query_index)

    def pack_keys(self, x: Rows, dtype: torch.dtype | None = None) -> Tensor:
        """[B, H, >= T, D] to [N, H, D], or [T, B * H, D] where merged.

        Args:
            dtype: what rows of one byte an element become.
        """
        if not isinstance(x, NarrowRows):
            return self._pack(x[:, :, : self.keys], self.key_index)
        assert dtype is not None
        if self.merged:
            return self._pack(x.first(self.keys).wide(dtype), None)
        return x.loaded(self._key_places, dtype)

    @functools.cached_property
    def _key_places(self) -> tuple[Tensor, Tensor]:
        """int32 [N], the packed keys' places in their rows, and the rows."""
        if self.key_index is None:
            inference = torch.is_inference_mode_enabled()
            return places_of(self.batch, 0, self.keys, self.device, inference)
        places, rows = self.key_index % self.keys, self.key_index // self.keys
        return places.to(torch.int32), rows.to(torch.int32)

    def _pack(self, x: Tensor, index: Tensor | None) -> Tensor:
        if self.merged:
            return x.flatten(0, 1).transpose(0, 1)
        flat = x.transpose(1, 2).flatten(0, 1)
        return flat if index is None else flat[index]

    def unpack(self, o: Tensor) -> Tensor:
        """The attention's output [N, H, D], or [S, B * H, D], to [B, S, H, D]; 0 at padding."""
        if self.merged:
            return o.unflatten(1, (self.batch, -1)).transpose(0, 1)
        shape = (self.batch, self.queries, *o.shape[1:])
        if self.query_index is None:
            return o.view(shape)
        flat = o.new_zeros(shape).flatten(0, 1)
        return flat.index_copy(0, self.query_index, o).view(shape)

    def only(self, keep: list[bool]) -> Layout:
        """The layout of some of the sequences, of a batch where they differ."""
        assert self.key_index is not None
        assert self.query_index is not None
        kept = [i for i, one in enumerate(keep) if one]
        keys = self.key_index.split(self.key_lengths)
        queries = self.query_index.split(self.query_lengths)
        return replace(
            self,
            key_index=torch.cat([keys[i] for i in kept]),
            query_index=torch.cat([queries[i] for i in kept]),
            rows=tuple(self.rows[i] for i in kept),
            key_lengths=tuple(self.key_lengths[i] for i in kept),
            query_lengths=tuple(self.query_lengths[i] for i in kept),
        )


def ends_of(lengths: Any, device: torch.device) -> Tensor:
    """int32 [sequences + 1], where each begins, and the sum."""
    ends = torch.tensor([0, *lengths], dtype=torch.int32)
    return ends.cumsum(0, dtype=torch.int32).to(device)


def layout_of(mask: Tensor | None, batch: int, queries: int, keys: int, device: Any) -> Layout:
    """The sequences of a call.

    Args:
        mask: what `mask_of` made.
        batch, queries, keys: B, S, and T with the unfilled part of a static cache.
    """
    if mask is None:
        even = _even if torch.compiler.is_compiling() else _known_even
        return even(batch, queries, keys, device, torch.is_inference_mode_enabled())
    known = getattr(mask, "nsagen_layout", None)
    if known is not None and known[0] == (queries, keys):
        return known[1]
    layout = _from_mask(mask, batch, queries, keys, device)
    mask.nsagen_layout = ((queries, keys), layout)  # type: ignore[attr-defined]
    return layout


def _even(batch: int, queries: int, keys: int, device: Any, inference: bool = False) -> Layout:
    """Rows of one length. Tensors of inference mode serve no backward pass: `inference` keeps those
    of `_known_even` apart."""
    del inference
    lengths = ((keys,) * batch, (queries,) * batch)
    return Layout(batch, queries, keys, None, None, tuple(range(batch)), *lengths, device)


_known_even = functools.lru_cache(maxsize=8)(_even)
"""All layers of a call have the same layout."""


def _from_mask(mask: Tensor, batch: int, queries: int, keys: int, device: Any) -> Layout:
    if mask.dim() != 2 or mask.shape != (batch, keys) or mask.dtype != torch.int32:
        came = f"{mask.dtype} {list(mask.shape)}"
        advice = "pass attention_mask as [batch, tokens], 1 for a token and 0 for padding"
        refuse("attention_mask", "must not be one that was prepared elsewhere", came, advice)
    filled = int((mask[0] != UNFILLED).sum())
    mask = mask[:, :filled]
    if bool((mask == 1).all()):
        return _even(batch, queries, filled, device)
    index = (mask > 0).flatten().nonzero().squeeze(1)
    row, slot, document = index // filled, index % filled, mask.flatten()[index]
    first = torch.ones_like(row, dtype=torch.bool)
    first[1:] = (row[1:] != row[:-1]) | (document[1:] != document[:-1])
    sequence = first.cumsum(0) - 1
    rows = tuple(row[first].tolist())
    new = slot >= filled - queries
    query_index = (row * queries + slot - (filled - queries))[new]
    key_lengths = sequence.bincount(minlength=len(rows)).tolist()
    query_lengths = sequence[new].bincount(minlength=len(rows)).tolist()
    sizes = (batch, queries, filled)
    lengths = (tuple(key_lengths), tuple(query_lengths))
    return Layout(*sizes, index, query_index, rows, *lengths, device)
