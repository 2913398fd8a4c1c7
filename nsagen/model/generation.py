"""Generation with a cache: first the packed prompts, then token by token."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from nsagen.core.errors import CapacityError
from nsagen.model.checks import require
from nsagen.model.configs import InferenceConfig, ToyLlamaConfig
from nsagen.model.drafts import Drafter, check_drafter
from nsagen.model.fused import may_fuse, own, renew_joined
from nsagen.model.layers import project
from nsagen.model.memory import home_of
from nsagen.model.packing import check_packed, host_lengths
from nsagen.model.prefill import CachedRows, DecodeRows, Piece, PrefillRows
from nsagen.model.requests import (
    Request,
    check_cuda_graph,
    check_inference,
    check_length,
    check_samplings,
    check_stop_tokens,
    check_stream,
    check_tokens,
    vocabulary,
)
from nsagen.model.sampling import SamplingConfig
from nsagen.model.sequences import NO_TOKEN, NewToken
from nsagen.model.serving import ContinuousBatch

if TYPE_CHECKING:
    from nsagen.model.cache import KVCache, NSACache

    Cache = TypeVar("Cache", KVCache, NSACache)
else:
    Cache = TypeVar("Cache")


@own
class Generation(nn.Module, Generic[Cache]):
    """Gives a model `generate`. The model brings `new_cache` and its parts.

    The model keeps nothing of a call except an idle batch, whose cache the next call takes, until
    the model moves. A call that comes while another runs makes its own batch.
    """

    config: ToyLlamaConfig
    inference_config: InferenceConfig | None
    model: Any
    lm_head: nn.Linear
    dispatcher: Any = None

    def __init__(self) -> None:
        super().__init__()
        self._idle_batches: deque[ContinuousBatch] = deque(maxlen=1)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles have no cache, and no steps captured for another model's weights."""
        return {**self.__dict__, "_idle_batches": deque(maxlen=1)}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Generation[Cache]:
        self._idle_batches.clear()  # its cache would stay behind
        return super()._apply(fn, recurse)

    def new_cache(self) -> Cache:
        """Allocate a cache as large as `inference_config` says, where the weights are."""
        raise NotImplementedError

    def _config_here(self) -> Any:
        """The model's config with the heads that this process has, which its cache is for."""
        # Not from a weight's shape: FSDP splits weights too, and quantizers pack or hide them.
        parts = self.model.modules()
        ranks = next((part.head_ranks for part in parts if hasattr(part, "head_ranks")), 1)
        sizes = ("num_attention_heads", "num_key_value_heads")
        return replace(self.config, **{n: getattr(self.config, n) // ranks for n in sizes})

    def hidden(self, input_ids: Tensor, rows: CachedRows, cache: Cache) -> Tensor:
        """Input of `head` for tokens that follow those in the cache: [N, hidden_size]."""
        return (self.model.before_norm if rows.fused else self.model)(input_ids, rows, cache)

    def head(self, hidden: Tensor, fused: bool) -> Tensor:
        """Logits [R, vocab] of some rows of `hidden`, in the weights' dtype."""
        if not fused:
            return self.lm_head(hidden)
        weight, norm = self.lm_head.weight, self.model.norm
        return project(hidden, weight, norm=norm, dispatcher=self.dispatcher)

    def pass_logits(
        self, tokens: Tensor, rows: CachedRows, cache: Cache, last: Tensor | None = None
    ) -> Tensor:
        """Logits [R, vocab] of rows of a pass over tokens [N], in the weights' dtype.

        PyTorch's global forward hooks get this model, (tokens,) and the logits, as they would get
        the arguments and the output of its forward.

        Args:
            last: int64 [R], the rows; None for all.
        """
        for hook in list(modules._global_forward_pre_hooks.values()):
            changed = hook(self, (tokens,))
            if changed is not None:
                tokens = changed[0] if isinstance(changed, tuple) else changed
        hidden = self.hidden(tokens, rows, cache)
        logits = self.head(hidden if last is None else hidden[last], rows.fused)
        for number, hook in list(modules._global_forward_hooks.items()):
            with_keywords = number in modules._global_forward_hooks_with_kwargs
            keywords: tuple[dict[str, Any], ...] = ({},) if with_keywords else ()
            changed = hook(self, (tokens,), *keywords, logits)
            logits = logits if changed is None else changed
        return logits

    def may_fuse(self) -> bool:
        """Whether a pass would now run as fused products; see `nsagen.model.fused`."""
        return may_fuse(self, self._weight())

    @torch.no_grad()
    def prefill(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        lengths: Sequence[int],
        cache: Cache,
        *,
        slots: Sequence[int] | None = None,
        starts: Sequence[int] | None = None,
    ) -> Tensor:
        """Run packed prompts, or pieces of them, and fill the cache.

        Args:
            input_ids: int64 [N].
            cu_seqlens: int32 [batch+1], where each piece starts.
            lengths: tokens of each piece.
            slots: the sequences' places in the cache; 0, 1, 2, ... by default.
            starts: tokens of each sequence that the cache already holds; 0 by default.

        Returns:
            float32 [batch, vocab], logits of the last tokens.

        Raises:
            CapacityError: a slot of a paged cache has not reserved enough pages.
        """
        numbers = range(len(lengths)) if slots is None else slots
        firsts = [0] * len(lengths) if starts is None else starts
        pieces = [Piece(*each) for each in zip(numbers, firsts, lengths, strict=True)]
        for piece in pieces:
            if piece.end > cache.capacity(piece.slot):
                raise CapacityError(
                    f"prefill: slot {piece.slot} must hold {piece.end} tokens, got room for "
                    f"{cache.capacity(piece.slot)}; call cache.reserve(slot, tokens) first"
                )
        rows = PrefillRows.of(pieces, cache, self.may_fuse())
        if rows.fused:
            renew_joined(self)
        return self.pass_logits(input_ids, rows, cache, cu_seqlens[1:] - 1).float()

    def decode(self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: Cache) -> Tensor:
        """Run one new token of each sequence: logits float32 [R, vocab]."""
        return self.step_logits(tokens, positions, slots, cache).float()

    @torch.no_grad()
    def step_logits(self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: Cache) -> Tensor:
        """`decode` in the weights' dtype."""
        rows = DecodeRows(positions, slots, self.may_fuse())
        return self.pass_logits(tokens, rows, cache)

    @torch.no_grad()
    def several_logits(
        self, tokens: Tensor, positions: Tensor, slots: Tensor, cache: Cache
    ) -> Tensor:
        """Run a few new tokens of each sequence, as many steps would, with the cache that they
        leave: the queries of a token see no later one.

        Args:
            tokens: int64 [n, R], n at most kernel_size.
            positions: int32 [n, R], consecutive down a column; -1 for idle rows, below the others.
            slots: int32 [R], all different.

        Returns:
            [n, R, vocab], in the weights' dtype.
        """
        rows = DecodeRows.several(positions, slots, cache.windows, self.may_fuse())
        return self.pass_logits(tokens.flatten(), rows, cache).unflatten(0, tokens.shape)

    def _weight(self) -> Tensor:
        return next(self.parameters())

    def _take_batch(self) -> ContinuousBatch:
        """An empty batch for this call only: the idle one, or a new one if there is no idle one or
        it has other weights or limits."""
        wanted = (*home_of(self), self.inference_config)
        try:
            idle = self._idle_batches.pop()
        except IndexError:
            return ContinuousBatch(self)
        cache = idle.cache
        if (cache.device, cache.dtype, cache.limits) == wanted:
            idle.serve(self)
            return idle
        del idle, cache  # frees the old cache before the new one is allocated
        return ContinuousBatch(self)

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor,
        max_new_tokens: int = -1,
        *,
        sampling: SamplingConfig | Sequence[SamplingConfig] | None = None,
        stop_tokens: Iterable[int] = (),
        stream: Callable[[NewToken], None] | None = None,
        cuda_graph: bool | None = None,
        drafter: Callable[[], Drafter] | None = None,
    ) -> Tensor:
        """Continue each prompt of a packed batch.

        Everything is checked before any work. The prompts' lengths are read back from the device;
        tokens arrive one step late, so the device never waits for them. Calls may overlap, from
        threads or from `stream`: each has its own cache, allocated while the others run.

        Args:
            input_ids: int64 [N], the prompts concatenated, none of them empty.
            cu_seqlens: int32 [batch+1], where each prompt starts; the last entry is N.
            max_new_tokens: tokens to make for each; -1 for `inference_config.max_new_tokens`.
            sampling: how tokens are chosen, for all prompts or one per prompt; by default the most
                likely ones.
            stop_tokens: tokens that end a sequence; the stop token is the sequence's last.
            stream: called with each new token in its sequence's order; `sequence` is the
                prompt's index in the batch.
            cuda_graph: replay captured steps; `inference_config.cuda_graph` by default.
            drafter: makes what guesses a sequence's next tokens, as in `ContinuousBatch.add`;
                called once for each prompt.

        Returns:
            int64 [batch, max_new_tokens]; -1 after a sequence's end.

        Raises:
            InvalidInputError: names the sequence and the limit that it breaks.
            CapacityError: the cache has too few pages; names the first sequence that lacks
                some.
            Exception: what `stream` or a step raised; the model is ready for the next call.
        """
        limits = check_inference("generate", self)
        check_packed("generate", input_ids, cu_seqlens, None)
        device, _ = home_of(self)
        require(
            input_ids.device == device,
            "generate",
            "input_ids must be where the weights are",
            f"{input_ids.device} and {device}",
            "move one of them",
        )
        lengths = host_lengths("generate", cu_seqlens, input_ids.shape[0], input_ids.shape[0])
        steps = self._check_limits(limits, lengths, max_new_tokens)
        check_tokens("generate", input_ids, vocabulary(self))
        samplings = check_samplings("generate", sampling, len(lengths))
        stops = check_stop_tokens("generate", stop_tokens)
        check_cuda_graph("generate", cuda_graph)
        check_stream("generate", stream)
        check_drafter("generate", drafter)
        tokens: list[list[int]] = [[] for _ in lengths]
        if steps > 0 and lengths:
            prompts = input_ids.to(torch.int64, copy=True).split(lengths)
            requests = [
                Request(prompt, steps, stops, one, drafter=drafter)
                for prompt, one in zip(prompts, samplings, strict=True)
            ]
            self._run(
                requests, stream, limits.cuda_graph if cuda_graph is None else cuda_graph, tokens
            )
        rows = [row + [NO_TOKEN] * (steps - len(row)) for row in tokens]
        output = torch.tensor(rows, dtype=torch.int64, device=input_ids.device)
        return output.reshape(len(lengths), steps)

    def _run(
        self,
        requests: Sequence[Request],
        stream: Callable[[NewToken], None] | None,
        cuda_graph: bool,
        tokens: list[list[int]],
    ) -> None:
        """Generate into `tokens`; whatever happens, the batch is empty afterwards."""
        batch = self._take_batch()
        batch.cuda_graph, batch.retries = cuda_graph, False
        try:
            numbers = [
                batch.admit(f"generate: sequence {i}", request)
                for i, request in enumerate(requests)
            ]
            for new in batch.run(prompts_first=True):
                if new.error is not None:
                    try:
                        raise new.error
                    finally:
                        del new  # or the error's traceback would hold the error, and the model
                index = new.sequence - numbers[0]
                tokens[index].append(new.token)
                if stream is not None:
                    stream(replace(new, sequence=index))
        finally:
            batch.clear()
            batch.serve(None)
            self._idle_batches.append(batch)

    def _check_limits(
        self, limits: InferenceConfig, lengths: Sequence[int], max_new_tokens: int
    ) -> int:
        """Check everything about a call that can be too large; returns the number of steps."""
        require(
            len(lengths) <= limits.max_batch_size,
            "generate",
            f"a batch must have at most InferenceConfig.max_batch_size={limits.max_batch_size} "
            "sequences",
            str(len(lengths)),
            "split the batch or raise max_batch_size",
        )
        steps = check_length("generate", limits, 1, max_new_tokens) if not lengths else 0
        for index, length in enumerate(lengths):
            steps = check_length(f"generate: sequence {index}", limits, length, max_new_tokens)
        return steps
