"""Decoding calls are checked once for all that look alike, and each that differs anew."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from nsagen import ops
from nsagen.errors import InvalidInputError
from nsagen.ops import _calls
from nsagen.ops._calls import KnownCalls, signature
from nsagen.runtime import Dispatcher

from .inputs import STATICS, Cached


class Counter(Dispatcher):
    """Serves every call with nothing, and counts how often it was asked for a kernel."""

    def __init__(self) -> None:
        super().__init__("counter", "", {})
        self.asked = 0

    def launcher(self, *args: object, **keywords: object) -> Callable[..., None]:
        self.asked += 1
        return lambda *args: None


@pytest.fixture
def counter(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    return Counter()


def append(x: Cached, counter: Counter, **changes: Tensor | None) -> Tensor:
    names = ("q", "k", "v", "cos", "sin", "w_k", "w_v", "pe", "positions", "slots")
    inputs = dict(zip(names, x.append_inputs(), strict=True)) | changes
    sizes = {"compress_type": "linear", "kernel_size": 8, "kernel_stride": 4}
    return ops.cache_append(*inputs.values(), *x.caches(), **sizes, dispatcher=counter)


def test_calls_that_look_alike_are_looked_up_once(counter: Counter) -> None:
    for _ in range(3):
        x = Cached()  # new tensors of the same shapes
        q = append(x, counter)
        o, topk_idx = ops.compressed_attention_decode(
            *(q, x.ck_cache, x.cv_cache, *x.rows), **STATICS, dispatcher=counter
        )
        args = (q, x.k_cache, x.v_cache, topk_idx, *x.rows, o, x.gate)
        ops.native_sparse_attention_decode(*args, block_size=8, window_size=9, dispatcher=counter)
    assert counter.asked == 3
    append(x, counter, pe=None)
    assert counter.asked == 4


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("positions", lambda x: x.long()),
        ("slots", lambda x: x[:2]),
        ("k", lambda x: x.half()),
        ("k", lambda x: x.mT.contiguous().mT),
        ("w_v", lambda x: None),
        ("cos", lambda x: x.t().contiguous().t()),
    ],
)
def test_a_call_that_was_right_once_is_checked_again_when_it_differs(
    counter: Counter, name: str, change: Callable[[Tensor], Tensor | None]
) -> None:
    x = Cached()
    append(x, counter)
    tensors = dict(zip(("positions", "slots"), x.rows, strict=True))
    with pytest.raises(InvalidInputError):
        append(x, counter, **{name: change(tensors.get(name, getattr(x, name, None)))})


def test_without_kernels_nothing_is_remembered(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU that interprets no longer takes the reference, whatever it did before."""
    x = Cached()
    append(x, counter)
    monkeypatch.delenv("TRITON_INTERPRET")
    q = append(x, counter)
    assert counter.asked == 1
    assert not q[1].any()  # the reference: 0 in the idle row


def test_signatures_tell_what_checks_see() -> None:
    x = torch.zeros(4, 6)
    same = torch.ones(4, 6)
    assert signature([x], 1) == signature([same], 1)
    others = (x[:3], x.t(), x.double(), torch.zeros(4, 12)[:, :6], x.to("meta").long())
    assert len({signature([x], 1), *(signature([other], 1) for other in others)}) == 6
    assert signature([x], 1) != signature([x], 2)


def test_too_many_calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "_MAX_CALLS", 2)
    calls = KnownCalls()
    for number in range(3):
        calls.add(number, print)
    assert [calls.get(number) for number in range(3)] == [None, None, print]
