"""Requests are checked whole, and copied, before anything is taken for them."""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from nsagen.core.errors import CapacityError, InvalidInputError
from nsagen.model import (
    ContinuousBatch,
    InferenceConfig,
    SamplingConfig,
    ToyLlama,
    ToyNSALlama,
    requests,
)
from tests.model.tiny import dense_config, nsa_model, packed_batch

LIMITS = InferenceConfig(2, 64, 4, paged=True, page_size=16)
PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture
def model() -> ToyNSALlama:
    return nsa_model(LIMITS)


def room(batch: ContinuousBatch) -> tuple[int, int]:
    """Free slots and pages."""
    assert batch.cache.pages is not None
    return batch.free_slots, batch.cache.pages.free_pages


def shown(value: object) -> str:
    """A test's name that is the same in every process: without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value))


BAD_STOPS: list[tuple[Any, str]] = [
    (None, "stop_tokens must be integers .*got None; pass token numbers such as"),
    ([None], "got None among them"),
    (2, "got 2; pass"),
    ("</s>", "got '</s>'; pass"),
    (["</s>"], "got '</s>' among them"),
    ([1, 2.0], "got 2.0 among them"),
    ([True], "got True among them"),
    (torch.tensor([0.5]), "got 0.5 among them"),
    (torch.tensor([2], device="meta"), "got a tensor on meta"),
    (torch.tensor([2]).to_sparse(), "with layout torch.sparse_coo"),
    (bytearray(b"ab"), "got bytearray"),
    (memoryview(b"ab"), "got <memory"),
    (np.array(3), r"got array\(3\); pass"),
    ([torch.tensor([3])], r"got tensor\(\[3\]\) among them"),
    (range(1 << 40), "got more than 1048576 of them"),
]

BAD_PROMPTS: list[tuple[Any, str]] = [
    ([0.5], "got torch.float32"),
    ([True, False], r"got \[True, False\]"),
    ([True, 3], r"got \[True, 3\]"),
    (np.array([True]), "got torch.bool"),
    (torch.zeros(3, dtype=torch.uint8), "got torch.uint8"),
    (torch.zeros(1, 3, dtype=torch.int64), r"with shape \[1, 3\]"),
    ([[1, 2]], r"with shape \[1, 2\]"),
    ([[1], [2, 3]], r"got \[\[1\], \[2, 3\]\]"),
    ("text", "got 'text'"),
    (None, "got None"),
    (7, "got 7"),
    ([2**70], "got "),
    ([torch.tensor(True), torch.tensor(2)], "got "),
    (b"abc", "got b'abc'; pass token numbers"),
    (np.ma.masked_equal([1, 2], 2), "got masked_array"),
    (np.array([True, False]), "got torch.bool with shape"),
    (np.array([[1, 2]]), r"got torch.int64 with shape \[1, 2\]"),
    (np.array([1.0]), "got torch.float64"),
    (np.array([1, "2"], object), "got array"),
    ([-1], "values from -1 to -1"),
    ([512], "values from 512 to 512; check that the tokenizer belongs"),
    (torch.zeros(3, dtype=torch.int64, device="meta"), "tokens must have values"),
    (torch.tensor([1, 0]).to_sparse(), "got torch.int64 with layout torch.sparse_coo"),
    (torch.nested.nested_tensor([torch.tensor([1, 2])]), "got a nested tensor of torch.int64"),
]

BAD_REST: list[tuple[dict[str, Any], str]] = [
    ({"max_new_tokens": True}, "max_new_tokens must be -1 or at least 0, got True"),
    ({"max_new_tokens": 2.0}, "got 2.0"),
    ({"max_new_tokens": "3"}, "got '3'"),
    ({"max_new_tokens": None}, "got None"),
    ({"max_new_tokens": torch.tensor([3])}, r"got tensor\(\[3\]\)"),
    ({"max_new_tokens": 60}, "max_length=64, got 5 . 60"),
    ({"sampling": 0.7}, "sampling must be a SamplingConfig or None, got 0.7"),
    ({"sampling": {"temperature": 1.0}}, "sampling must be a SamplingConfig or None, got {"),
]


@pytest.mark.parametrize(
    ("request_", "text"),
    [((PROMPT, {"stop_tokens": stops}), text) for stops, text in BAD_STOPS]
    + [((prompt, {}), text) for prompt, text in BAD_PROMPTS]
    + [((PROMPT, settings), text) for settings, text in BAD_REST],
    ids=shown,
)
def test_a_refused_request_costs_nothing(
    model: ToyNSALlama, request_: tuple[Any, dict[str, Any]], text: str
) -> None:
    batch = ContinuousBatch(model)
    before = room(batch)
    prompt, settings = request_
    with pytest.raises(InvalidInputError, match=rf"ContinuousBatch: sequence 0: .*{text}"):
        batch.add(prompt, **settings)
    assert room(batch) == before
    assert batch.idle
    assert batch.add(PROMPT) == 0


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"stop_tokens": stops}, text) for stops, text in BAD_STOPS]
    + BAD_REST[:6]
    + [
        ({"sampling": 0.7}, "sampling must be one SamplingConfig, or one for each .*got 0.7"),
        ({"sampling": [None, 3]}, "sequence 1: sampling must be a SamplingConfig or None, got 3"),
        ({"stream": 3}, "stream must be a function of a NewToken, or None, got 3"),
        ({"cuda_graph": "yes"}, "cuda_graph must be True, False or None, got 'yes'"),
        ({"cuda_graph": np.ones(2)}, r"cuda_graph must be True, False or None, got array\("),
    ],
    ids=shown,
)
def test_generate_refuses_before_it_takes_a_cache(
    model: ToyNSALlama, settings: dict[str, Any], text: str
) -> None:
    with pytest.raises(InvalidInputError, match=f"generate: .*{text}"):
        model.generate(*packed_batch([5, 5]), **settings)
    assert not model._idle_batches, "nothing may be allocated before the checks"


async def waits(new: object) -> None:
    """Called, it runs nothing until something awaits it."""


def pauses(new: object) -> Iterator[object]:
    """Called, it runs nothing until something iterates it."""
    yield new


class Waits:
    async def __call__(self, new: object) -> None:
        pass


@pytest.mark.parametrize(
    "stream", [waits, pauses, Waits(), partial(waits)], ids=lambda s: type(s).__name__
)
def test_a_callback_that_would_not_run_is_refused(model: ToyNSALlama, stream: Any) -> None:
    with pytest.raises(InvalidInputError, match="stream must be an ordinary function, which runs"):
        model.generate(*packed_batch([5, 5]), stream=stream)
    assert not model._idle_batches


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ([1, 2, 3], "must be a tensor, got list"),
        (np.array([1, 2, 3]), "must be a tensor, got ndarray"),
        (torch.tensor([0, 1, 3]).to_sparse(), "must be dense, got torch.int64 with layout torch.s"),
        (torch.nested.nested_tensor([torch.tensor([1, 2])]), "must be dense, got a nested tensor"),
    ],
    ids=["list", "array", "sparse", "nested"],
)
def test_models_take_dense_tensors_alone(model: ToyNSALlama, ids: Any, text: str) -> None:
    for call in (model.generate, model, ToyLlama(dense_config()).double()):
        with pytest.raises(InvalidInputError, match=f"(generate|forward): input_ids {text}"):
            call(ids, torch.tensor([0, 3]))
        with pytest.raises(InvalidInputError, match=f"(generate|forward): cu_seqlens {text}"):
            call(torch.tensor([1, 2, 3]), ids)


def test_an_embedding_of_another_size_counts_everywhere(model: ToyNSALlama) -> None:
    """The model has the tokens that its embedding has, as after a change of the vocabulary."""
    model.model.embed_tokens = torch.nn.Embedding(300, 64).double().requires_grad_(False)
    text = "the head must choose among tokens .* got a head of 512 and an embedding of 300; change"
    with pytest.raises(InvalidInputError, match=f"generate: {text}"):
        model.generate(*packed_batch([5]))
    for rows, token in ((600, 599), (300, 299)):
        model.model.embed_tokens = torch.nn.Embedding(rows, 64).double().requires_grad_(False)
        model.lm_head = torch.nn.Linear(64, rows, bias=False).double().requires_grad_(False)
        ends = torch.tensor([0, 2])
        for call in (model, model.generate):
            call(torch.tensor([1, token]), ends)
            with pytest.raises(InvalidInputError, match=f"vocab_size-1={token}, got values from"):
                call(torch.tensor([1, token + 1]), ends)


@pytest.mark.parametrize("size", [2**40, 2**60])
def test_a_cache_larger_than_the_memory_is_refused_by_its_bytes(size: int) -> None:
    limits = InferenceConfig(size, 64, 4)
    model = ToyLlama(dense_config(), limits)
    needed = limits.cache_bytes(model.config, torch.float32)
    text = f"KVCache: the cache must fit into the memory of cpu, got {needed} bytes to allocate; l"
    with pytest.raises(CapacityError, match=text):
        model.generate(*packed_batch([5]))


def test_ends_and_ids_without_values_or_beyond_int32_are_refused(model: ToyNSALlama) -> None:
    ids, dense = torch.arange(5), ToyLlama(dense_config()).double()
    wrapping = torch.tensor([0, 2**32 + 5])  # as int32, this is [0, 5]
    for call in (model.generate, model, dense):
        with pytest.raises(InvalidInputError, match=r"from 0 to N=5 .*got \[0, 4294967301\]"):
            call(ids, wrapping)
    with pytest.raises(InvalidInputError, match=r"input_ids must be where the weights are, got m"):
        model.generate(ids.to("meta"), wrapping.to("meta"))


@pytest.mark.parametrize("token", [-1, 512])
def test_forward_refuses_tokens_beyond_the_vocabulary(model: ToyNSALlama, token: int) -> None:
    ids, ends = torch.tensor([1, token, 3]), torch.tensor([0, 3])
    for one in (model, ToyLlama(dense_config()).double()):
        name = rf"{type(one).__name__}\.forward"
        text = f"{name}: input_ids must be from 0 to vocab_size-1=511, got values from"
        with pytest.raises(InvalidInputError, match=text):
            one(ids, ends)
        assert one(ids[:0], ends[:1]).shape == (0, 512)
        for hooked in (one.model.embed_tokens, one.model):
            handle = hooked.register_forward_pre_hook(lambda _, args: (args[0] % 512, *args[1:]))
            assert one(ids, ends).shape == (3, 512), "a hook may take any token"
            handle.remove()


def test_switches_and_limits_of_another_kind_are_refused(model: ToyNSALlama) -> None:
    with pytest.raises(InvalidInputError, match=r"run: prompts_first must be True .*got 'yes'"):
        next(ContinuousBatch(model).run("yes"))  # pyright: ignore[reportArgumentType]
    with pytest.raises(InvalidInputError, match=r"ContinuousBatch: cuda_graph must .*got 'yes'"):
        ContinuousBatch(model, cuda_graph="yes")  # pyright: ignore[reportArgumentType]
    limits: Any = {"max_batch_size": 2}
    with pytest.raises(InvalidInputError, match="inference_config must be an InferenceConfig"):
        ToyLlama(dense_config(), limits)


@pytest.mark.parametrize("which", [None, "0", 0.0, True, [0], torch.tensor(0.0)])
def test_only_a_number_cancels(model: ToyNSALlama, which: Any) -> None:
    batch = ContinuousBatch(model)
    batch.add(PROMPT)
    with pytest.raises(InvalidInputError, match="cancel: sequence must be an integer, got"):
        batch.cancel(which)
    assert batch.waiting == 1
    batch.cancel(torch.tensor(0))  # pyright: ignore[reportArgumentType]
    assert batch.idle


def test_prompts_and_stops_of_every_kind_that_holds_integers(model: ToyNSALlama) -> None:
    batch, tokens = ContinuousBatch(model), []
    for prompt in (
        PROMPT,
        tuple(PROMPT),
        np.array(PROMPT),
        np.array(PROMPT[::-1])[::-1],
        np.array(PROMPT, ">i4"),
        np.array([PROMPT, PROMPT]).T[:, 1],
        torch.tensor(PROMPT).int(),
    ):
        number = batch.add(prompt, stop_tokens=np.array([600, -1]))
        tokens.append([new.token for new in batch.run() if new.sequence == number])
    assert all(same == tokens[0] for same in tokens)
    stop = tokens[0][0]
    for stops in (
        {stop},
        iter([stop]),
        torch.tensor([stop]),
        [np.int32(stop)],
        range(stop, stop + 1),
    ):
        batch.add(PROMPT, stop_tokens=stops)
        assert [new.finished for new in batch.run()] == ["stop"]


def test_tokens_of_a_long_prompt_are_not_looked_at_one_by_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """That takes a fifth of a second for 65536, in which no running sequence gets a token."""
    monkeypatch.setattr(requests, "is_bool", lambda token: pytest.fail("one was"))
    for prompt in ([5] * 1000, tuple([5] * 1000)):
        tokens = requests.check_prompt("here", prompt)
        assert (tokens.dtype, tokens.tolist()) == (torch.int64, list(prompt))


@pytest.mark.parametrize("prompt", [[1, True], [1 << 63], [-(1 << 63) - 1], [1, 2.5], [1, None]])
def test_a_list_of_something_else_is_refused(prompt: list[Any]) -> None:
    with pytest.raises(InvalidInputError, match="here: a prompt must be integers"):
        requests.check_prompt("here", prompt)


def test_a_prompt_that_is_far_too_long_is_refused_before_it_is_read(model: ToyNSALlama) -> None:
    """A server gets such prompts, and reading one takes seconds."""

    class Unread(list[int]):
        def __iter__(self) -> Iterator[int]:
            raise AssertionError("it was read")

    with pytest.raises(InvalidInputError, match=r"max_length=64, got 1000 \+ 4 = 1004") as refused:
        ContinuousBatch(model).add(Unread([1] * 1000))
    again = pickle.loads(pickle.dumps(refused.value))
    assert str(again) == str(refused.value)
    assert (again.length, again.new_tokens, again.most) == (1000, 4, 64)


def test_what_cannot_be_reserved_is_not_taken(
    model: ToyNSALlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A failure while pages are written down, as for want of memory on the device."""
    batch = ContinuousBatch(model)
    before = room(batch)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "tensor", _out_of_memory)
        with pytest.raises(MemoryError):
            batch.add(torch.zeros(5, dtype=torch.int64))
    assert room(batch) == before
    assert batch.add(PROMPT) == 0


def _out_of_memory(*args: Any, **kwargs: Any) -> None:
    raise MemoryError


@pytest.mark.parametrize("chunk", [None, 3])
def test_a_prompt_is_copied(chunk: int | None) -> None:
    model = nsa_model(InferenceConfig(3, 64, 4, prefill_chunk_size=chunk))
    batch, buffer = ContinuousBatch(model), torch.empty(9, dtype=torch.int64)
    prompts = packed_batch([9, 9, 9])[0].split(9)
    for prompt in prompts:
        batch.add(buffer.copy_(prompt))
    buffer.fill_(10**6)
    tokens: list[list[int]] = [[], [], []]
    for new in batch.run():
        tokens[new.sequence].append(new.token)
    for prompt, got in zip(prompts, tokens, strict=True):
        assert model.generate(prompt, torch.tensor([0, 9])).tolist() == [got]


def test_a_prompt_may_change_while_generate_streams(model: ToyNSALlama) -> None:
    ids, cu_seqlens = packed_batch([20, 9])
    expected = model.generate(ids, cu_seqlens)
    given = ids.clone()
    assert torch.equal(model.generate(given, cu_seqlens, stream=lambda _: given.fill_(0)), expected)


def test_a_failed_admission_gives_back_what_the_others_took(model: ToyNSALlama) -> None:
    model.inference_config = InferenceConfig(3, 64, 4, paged=True, page_size=16, num_pages=5)
    with pytest.raises(CapacityError, match="generate: sequence 2"):
        model.generate(*packed_batch([20, 30, 20]))
    (idle,) = model._idle_batches
    assert room(idle) == (3, 5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_autocast_computes_products_in_its_dtype(dtype: torch.dtype) -> None:
    """Caches and the residual stream keep the weights' dtype; PyTorch casts no float64."""
    model, (given, cu_seqlens) = nsa_model(LIMITS, dtype), packed_batch([5])
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        new = model.generate(given, cu_seqlens, 4)
        whole = torch.cat([given, new[0]])
        logits = model(whole, torch.tensor([0, len(whole)], dtype=torch.int32))[4:-1]
        model.to(torch.bfloat16).generate(given, cu_seqlens)
    chosen = logits.gather(1, new.T)
    assert (logits.max(1, keepdim=True).values - chosen).max() < 0.1  # all but ties


def test_weights_without_memory_are_refused() -> None:
    model = nsa_model(LIMITS).to("meta")
    with pytest.raises(InvalidInputError, match=r"got lm_head\.weight on the meta device; load"):
        model.generate(*packed_batch([5]))


@pytest.fixture
def _elsewhere() -> Iterator[None]:
    """A default device that has no values, and another default dtype."""
    dtype = torch.get_default_dtype()
    torch.set_default_dtype(torch.float16)
    with torch.device("meta"):
        yield
    torch.set_default_dtype(dtype)


def test_defaults_of_the_program_change_nothing(
    model: ToyNSALlama, request: pytest.FixtureRequest
) -> None:
    sampling = SamplingConfig(0.8, 20, 0.9, seed=5)
    batch = packed_batch([5, 20])
    expected = model.generate(*batch, sampling=sampling)
    fresh = nsa_model(LIMITS)
    request.getfixturevalue("_elsewhere")
    assert fresh.generate(*batch, sampling=sampling).tolist() == expected.tolist()
    serving = ContinuousBatch(fresh)
    serving.add(PROMPT)
    assert len(list(serving.run())) == 4


def test_inference_mode_and_its_end() -> None:
    """What is kept between calls must not belong to inference mode."""
    model, batch = nsa_model(LIMITS), packed_batch([5, 20])
    with torch.inference_mode():
        first = model.generate(*batch)
    assert torch.equal(model.generate(*batch), first)
    with torch.inference_mode():
        assert torch.equal(model.generate(*batch), first)
    model(*batch).sum().backward()
