"""Generation's input: a request is checked completely, and copied, before any work."""

from __future__ import annotations

import inspect
import itertools
import operator
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nsagen.core.errors import InvalidInputError
from nsagen.model.checks import is_bool, is_dense, is_integer, kind_of, require
from nsagen.model.configs import InferenceConfig
from nsagen.model.drafts import Drafter
from nsagen.model.fused import is_bare, is_own, is_patched
from nsagen.model.memory import home_of, require_memory
from nsagen.model.sampling import SamplingConfig
from nsagen.ops._checks import values_are_read

PROMPT_DTYPES = (torch.int64, torch.int32)

MOST_STOPS = 1 << 20
"""Stop tokens that a request may have: an endless iterable is a mistake."""


@dataclass(frozen=True)
class Request:
    """A checked request for a sequence.

    Attributes:
        prompt: int64 [L] on the weights' device, in its own memory.
        limit: most new tokens.
        stop_tokens: tokens that end the sequence.
        sampling: how tokens are chosen.
        keep: whether the sequence keeps its place in the cache after its end.
        drafter: makes what guesses the sequence's next tokens; None: they come one by one.
        text: the prompt on the host; None: it is read from the device when it is needed.
    """

    prompt: Tensor
    limit: int
    stop_tokens: frozenset[int]
    sampling: SamplingConfig
    keep: bool = False
    drafter: Callable[[], Drafter] | None = None
    text: tuple[int, ...] | None = None

    @property
    def tokens(self) -> int:
        """Tokens that the cache must have room for."""
        return self.prompt.shape[0] + self.limit


def check_inference(where: str, model: Any) -> InferenceConfig:
    """Check that the model can generate at all; returns its limits.

    Raises:
        InvalidInputError: no InferenceConfig, or weights that are missing or that no kernel takes.
    """
    name = type(model).__name__
    require(
        callable(getattr(type(model), "new_cache", None)),
        where,
        "the model must be a ToyNSALlama or ToyLlama",
        f"a {name}",
        "pass the model itself, not what wraps it (DataParallel, torch.compile)",
    )
    limits = model.inference_config
    require(
        isinstance(limits, InferenceConfig),
        where,
        "the model needs an InferenceConfig, which sizes its cache",
        repr(limits),
        f"build it with {name}(config, InferenceConfig(...))",
    )
    _check_wrapping(where, model)
    require_memory(where, model)
    rows, head = vocabulary(model), model.lm_head
    chosen = head.weight.shape[0] if isinstance(head, nn.Linear) and is_bare(head) else rows
    require(
        chosen <= rows,
        where,
        "the head must choose among tokens that the embedding has",
        f"a head of {chosen} and an embedding of {rows}",
        "change the size of both",
    )
    device, dtype = home_of(model)
    require(
        device.type != "cuda" or dtype in (torch.bfloat16, torch.float16),
        where,
        "weights on a GPU must be bfloat16 or float16",
        str(dtype),
        "call model.to(torch.bfloat16), or model.cpu() to run in float32",
    )
    return limits


def check_hooks(where: str, model: Any) -> None:
    """Refuse what changes a model's own forward, which generation does not call: hooks, patches.

    Raises:
        InvalidInputError: names them.
    """
    own, name = model.__dict__, type(model).__name__
    hooks = [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
    hooks += [own["forward"]] if is_patched(model) else []
    require(
        not hooks,
        where,
        f"generation runs the parts of a {name}, not its forward, so that must be its own",
        ", ".join(map(repr, hooks)),
        "put the hook on model.model or model.lm_head, where it counts",
    )
    kind = type(model)
    require(
        is_own(kind.forward) or not (is_own(kind.hidden) and is_own(kind.head)),
        where,
        "generation runs a model's hidden and head, not its forward",
        f"a {name} with a forward of its own",
        "override head or hidden to the same effect, or put what forward adds into a module",
    )


def _check_wrapping(where: str, model: Any) -> None:
    """Refuse wrappers that would take part in forward, but not here."""
    check_hooks(where, model)
    layers = list(getattr(model.model, "layers", ()))
    most = model.config.num_hidden_layers
    require(
        len(layers) <= most,
        where,
        f"the cache has config.num_hidden_layers={most} layers",
        f"a model of {len(layers)}",
        "build the model with a config of as many",
    )
    parts: list[tuple[str, Any, int]] = [("model", model.model, 3)]
    for index, layer in enumerate(layers):
        parts.append((f"model.layers.{index}", layer, 3))
        parts.append((f"model.layers.{index}.self_attn", getattr(layer, "self_attn", None), 4))
    for part, module, arguments in parts:
        require(
            module is None or _takes(module.forward, arguments),
            f"{where}: {part}",
            "generation passes a cache as the last argument of forward",
            f"a {type(module).__name__}, which takes none",
            "wrap the module so that it passes all arguments on",
        )


def _takes(function: Any, arguments: int) -> bool:
    if is_own(function):
        return True
    try:
        inspect.signature(function, follow_wrapped=False).bind(*range(arguments))
    except TypeError:
        return False
    return True


class TooLongError(InvalidInputError):
    """Prompt and new tokens are more than the cache can hold of a sequence.

    Attributes:
        length: tokens of the prompt; new_tokens: most that were asked for; most: of both together.
    """

    def __init__(self, text: str, length: int, new_tokens: int, most: int) -> None:
        super().__init__(text)
        self.length, self.new_tokens, self.most = length, new_tokens, most

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (str(self), self.length, self.new_tokens, self.most)


def check_length(where: str, limits: InferenceConfig, length: int, max_new_tokens: int) -> int:
    """Check a prompt's length and the number of new tokens; returns that number.

    Raises:
        InvalidInputError: names `where` and the limit; a `TooLongError` if it is the cache's.
    """
    require(
        is_integer(max_new_tokens) and max_new_tokens >= -1,
        where,
        "max_new_tokens must be -1 or at least 0",
        repr(max_new_tokens),
        f"-1 stands for InferenceConfig.max_new_tokens={limits.max_new_tokens}",
    )
    steps = limits.max_new_tokens if max_new_tokens == -1 else operator.index(max_new_tokens)
    require(
        length > 0,
        where,
        "a prompt must have at least one token",
        "an empty one",
        "start it with a token such as the tokenizer's BOS, or leave the sequence out",
    )
    total, most = length + steps, limits.longest
    if total > most:
        if total > limits.max_length:
            rule = (
                "prompt and new tokens together must be at most "
                f"InferenceConfig.max_length={limits.max_length}"
            )
            came, size = f"{length} + {steps} = {total}", "max_length"
        else:
            rule = (
                f"a sequence must fit into InferenceConfig.num_pages={limits.total_pages} pages "
                f"of {limits.page_size} tokens"
            )
            needed = -(-total // limits.page_size)
            came, size = f"{length} + {steps} tokens, which need {needed}", "num_pages"
        advice = f"shorten the prompt, lower max_new_tokens or raise {size}"
        raise TooLongError(f"{where}: {rule}, got {came}; {advice}", length, steps, most)
    return steps


def check_prompt(where: str, prompt: Any) -> Tensor:
    """A prompt's tokens as a tensor [L], int64 or int32, where they are.

    Raises:
        InvalidInputError: names the dtype and shape, or what cannot be a tensor.
    """
    rule = "a prompt must be integers with shape [L], int64 or int32"
    if not isinstance(prompt, Tensor):
        try:
            if isinstance(prompt, list | tuple):
                if set(map(type, prompt)) == {int}:  # a long one must not hold up running steps
                    return torch.frombuffer(array("q", prompt), dtype=torch.int64)
                if any(map(is_bool, prompt)):
                    raise TypeError  # PyTorch takes a bool among integers for 0 or 1
            prompt = _native(prompt)
            empty = len(prompt) == 0
            prompt = torch.tensor(prompt, dtype=torch.int64 if empty else None, device="cpu")
        except (TypeError, ValueError, RuntimeError, OverflowError):
            shown = repr(prompt)
            shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
            raise InvalidInputError(f"{where}: {rule}, got {shown}; pass token numbers") from None
    require(
        is_dense(prompt) and prompt.dim() == 1 and prompt.dtype in PROMPT_DTYPES,
        where,
        rule,
        kind_of(prompt),
        "pass token numbers",
    )
    return prompt


def _native(prompt: Any) -> Any:
    """A NumPy array in this machine's byte order and in rows that PyTorch can read.

    Raises:
        TypeError: a kind of array of which PyTorch would read what it is not: masked values, bytes.
    """
    if isinstance(prompt, bytes | bytearray | memoryview) or hasattr(prompt, "mask"):
        raise TypeError
    if type(prompt).__module__ == "numpy" and hasattr(prompt, "strides"):
        return prompt.astype(prompt.dtype.newbyteorder("="), order="C")
    return prompt


def check_tokens(where: str, input_ids: Tensor, vocab_size: int) -> None:
    """Check that all tokens are in the vocabulary, wherever they are.

    Raises:
        InvalidInputError: names the values' range.
    """
    require(
        not input_ids.is_meta, where, "tokens must have values", "a meta tensor", "move it first"
    )
    if input_ids.shape[0] == 0:
        return
    low, high = torch.stack(input_ids.aminmax()).tolist()
    require(
        low >= 0 and high < vocab_size,
        where,
        f"input_ids must be from 0 to vocab_size-1={vocab_size - 1}",
        f"values from {low} to {high}",
        "check that the tokenizer belongs to the model",
    )


def vocabulary(model: Any) -> int:
    """Tokens that a model's embedding has, or its config says if another layer stands there."""
    embedding = getattr(model.model, "embed_tokens", None)
    if isinstance(embedding, nn.Embedding) and is_bare(embedding):
        return embedding.weight.shape[0]
    return model.config.vocab_size


def check_known_tokens(where: str, input_ids: Tensor, model: Any) -> None:
    """Check a forward's tokens where values are read, unless a hook, a wrapper or another layer may
    change them: a GPU is not waited for, and PyTorch fails there with an assertion of the device.

    Raises:
        InvalidInputError: names the values' range.
    """
    if torch.compiler.is_compiling() or not values_are_read(input_ids):
        return
    embedding = getattr(model, "embed_tokens", None)
    if isinstance(embedding, nn.Embedding) and is_bare(embedding) and is_bare(model):
        check_tokens(where, input_ids, embedding.weight.shape[0])


def check_stop_tokens(where: str, stop_tokens: Iterable[int]) -> frozenset[int]:
    """The stop tokens as a set; an iterator is read once.

    Raises:
        InvalidInputError: not an iterable of integers; names the first that is not one. More than
            MOST_STOPS.
    """
    advice = "pass token numbers such as [2], or leave it out"
    rule = "stop_tokens must be integers in a list or another iterable"
    if isinstance(stop_tokens, Tensor):
        readable = not stop_tokens.is_meta and is_dense(stop_tokens)
        kind = f"a tensor on {stop_tokens.device}: {kind_of(stop_tokens)}"
        require(readable, where, rule, kind, advice)
        stop_tokens = stop_tokens.tolist()
    try:
        if isinstance(stop_tokens, str | bytes | bytearray | memoryview):
            raise TypeError  # characters and bytes are not tokens
        tokens = iter(stop_tokens)
    except TypeError:
        raise InvalidInputError(f"{where}: {rule}, got {stop_tokens!r}; {advice}") from None
    stops = list(itertools.islice(tokens, MOST_STOPS + 1))
    require(len(stops) <= MOST_STOPS, where, rule, f"more than {MOST_STOPS} of them", advice)
    for token in stops:
        require(is_integer(token), where, rule, f"{token!r} among them", advice)
    return frozenset(operator.index(token) for token in stops)


def check_stream(where: str, stream: Any) -> None:
    """Check the function that gets new tokens.

    Raises:
        InvalidInputError: not callable, or calling it runs nothing: an async function, a generator.
    """
    require(
        stream is None or callable(stream),
        where,
        "stream must be a function of a NewToken, or None",
        repr(stream),
        "pass one, such as print",
    )
    kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
    for function in (stream, getattr(stream, "__call__", None)):  # noqa: B004  (not a test)
        require(
            not any(kind(function) for kind in kinds),
            where,
            "stream must be an ordinary function, which runs when it is called",
            repr(stream),
            "pass a function that puts the token into a queue, and await that",
        )


def check_cuda_graph(where: str, cuda_graph: Any) -> None:
    """Check the switch of captured steps.

    Raises:
        InvalidInputError: neither a bool nor None.
    """
    require(
        cuda_graph is None or isinstance(cuda_graph, bool),
        where,
        "cuda_graph must be True, False or None",
        repr(cuda_graph),
        "leave it out for InferenceConfig.cuda_graph",
    )


def check_keep(where: str, keep: Any) -> None:
    """Check the switch that keeps a sequence after its end.

    Raises:
        InvalidInputError: not a bool.
    """
    advice = "pass True to continue the sequence later"
    require(isinstance(keep, bool), where, "keep must be True or False", repr(keep), advice)


def check_sampling(where: str, sampling: Any) -> SamplingConfig:
    """The settings, or the default ones for None.

    Raises:
        InvalidInputError: something else.
    """
    require(
        sampling is None or isinstance(sampling, SamplingConfig),
        where,
        "sampling must be a SamplingConfig or None",
        repr(sampling),
        "build one, such as SamplingConfig(temperature=0.7)",
    )
    return sampling or SamplingConfig()


def check_samplings(where: str, sampling: Any, batch: int) -> Sequence[SamplingConfig]:
    """The settings of each of `batch` sequences, from one for all or one for each.

    Raises:
        InvalidInputError: the wrong number of settings, or a value of another type among them.
    """
    if sampling is None or isinstance(sampling, SamplingConfig):
        return [check_sampling(where, sampling)] * batch
    require(
        isinstance(sampling, Sequence) and len(sampling) == batch,
        where,
        f"sampling must be one SamplingConfig, or one for each of the {batch} sequences",
        str(len(sampling)) if isinstance(sampling, Sequence) else repr(sampling),
        "pass as many as cu_seqlens has sequences",
    )
    return [check_sampling(f"{where}: sequence {i}", one) for i, one in enumerate(sampling)]
