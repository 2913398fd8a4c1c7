"""Decoding calls that look alike are checked once; a call that differs is checked again."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from nsagen import ops
from nsagen.core.errors import InvalidInputError
from nsagen.ops import _calls
from nsagen.ops._calls import KnownCalls, unobserved
from nsagen.runtime import Dispatcher

from .inputs import STATICS, Cached


class Counter(Dispatcher):
    """Serves every call with a kernel that does nothing, and counts look-ups."""

    def __init__(self) -> None:
        super().__init__("counter", "", {})
        self.asked = 0
        self.launched: list[tuple[object, ...]] = []

    def launcher(self, *args: object, **keywords: object) -> Callable[..., None]:
        self.asked += 1
        return lambda *args: self.launched.append(args)


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
    """A CPU that stops interpreting takes the reference, even for calls it has seen."""
    x = Cached()
    append(x, counter)
    monkeypatch.delenv("TRITON_INTERPRET")
    q = append(x, counter)
    assert counter.asked == 1
    assert not q[1].any()  # the reference: 0 in the idle row


Y = torch.zeros(3)


@pytest.fixture(params=["guards", "in Python"])
def calls(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> KnownCalls[str]:
    """Calls of (a tensor, a number, a tensor or None, a tensor)."""
    if request.param == "in Python":
        monkeypatch.setattr(_calls, "TensorGuards", None)
    return known_calls()


def known_calls() -> KnownCalls[str]:
    return KnownCalls((True, False, True, True))


def test_known_calls_tell_what_checks_see(calls: KnownCalls[str]) -> None:
    x = torch.zeros(4, 6)
    calls.learn((x, 1, None, Y), "known")
    assert calls.find((torch.ones(4, 6), 1, None, Y)) == "known"

    class Subclass(Tensor): ...

    others = (
        *(x[:3], x.t(), x.double(), torch.zeros(4, 12)[:, :6], x.to("meta"), x[None]),
        x.as_subclass(Subclass),
    )
    assert all(calls.find((other, 1, None, Y)) is None for other in others)
    assert calls.find((x, 2, None, Y)) is None
    assert calls.find((x, 1, x.clone(), Y)) is None


def test_a_wrapper_that_outlived_a_transform_is_not_known() -> None:
    """Known calls go by what would unwrap it."""
    calls, wrappers = known_calls(), list[Tensor]()
    x = torch.zeros(4, 6)
    calls.learn((x, 1, None, Y), "known")
    torch.func.grad(lambda x: (wrappers.append(x), x.sum())[1])(x)
    assert calls.find((x, 1, None, Y)) == "known"
    assert calls.find((wrappers[0], 1, None, Y)) is None


def test_one_tensor_may_come_twice(calls: KnownCalls[str]) -> None:
    x, y = torch.zeros(4, 6), torch.zeros(4, 6)
    calls.learn((x, 1, x, Y), "known")
    assert calls.find((x, 1, x, Y)) == "known"
    assert calls.find((y, 1, y, Y)) == "known"


def test_calls_that_differ_in_shape_alone_are_kept_beside_each_other(
    calls: KnownCalls[str],
) -> None:
    for rows in (1, 2, 3):
        calls.learn((torch.zeros(rows, 6), 1, None, Y), f"first {rows}")
        calls.learn((torch.zeros(3, 6), 1, None, torch.zeros(rows)), f"last {rows}")
    for rows in (1, 3, 3, 2, 1):
        assert calls.find((torch.zeros(3, 6), 1, None, torch.zeros(rows))) == f"last {rows}"
        if rows < 3:
            assert calls.find((torch.zeros(rows, 6), 1, None, Y)) == f"first {rows}"


def test_subclasses_are_not_remembered(counter: Counter) -> None:
    class Subclass(Tensor): ...

    x = Cached()
    for _ in range(2):
        attend(x, counter, x.gate.as_subclass(Subclass))
    assert counter.asked == 2


def test_a_known_call_makes_new_outputs(counter: Counter) -> None:
    x = Cached()
    outputs = [attend(x, counter) for _ in range(4)]
    assert len({o.data_ptr() for o in outputs}) == 4
    assert {o.shape for o in outputs} == {x.o_compressed.shape}
    assert [args[8] is o for args, o in zip(counter.launched, outputs, strict=True)] == [True] * 4


def test_values_are_checked_in_known_calls_too(counter: Counter) -> None:
    """On a CPU, as everywhere under NSAGEN_CHECK_VALUES, a value that is wrong is never used."""
    x = Cached()
    for _ in range(2):
        attend(x, counter)
    x.rows = (torch.tensor([99, -1, 6], dtype=torch.int32), x.rows[1])
    with pytest.raises(InvalidInputError, match="positions must be from -1"):
        attend(x, counter)


def test_too_many_calls_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_calls, "_MAX_CALLS", 2)
    calls, x = known_calls(), torch.zeros(4, 6)
    for number in range(3):
        calls.learn((x, number, None, Y), "known")
    found = [calls.find((x, number, None, Y)) is not None for number in range(3)]
    assert found == [False, False, True]


def test_few_calls_are_kept_that_only_their_guards_tell_apart(calls: KnownCalls[str]) -> None:
    """They are compared in turn, and the oldest are dropped."""
    x = torch.zeros(4, 6)
    for size in range(40):
        calls.learn((x, 1, None, torch.zeros(size)), "known")
    found = [calls.find((x, 1, None, torch.zeros(size))) is not None for size in range(40)]
    assert found == [False] * 24 + [True] * 16


def counted(calls: list[str]) -> TorchDispatchMode:
    class Counting(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            calls.append(str(func))
            return func(*args, **(kwargs or {}))

    return Counting()


def attend(x: Cached, counter: Counter, gate: Tensor | None = None) -> Tensor:
    gate = x.gate if gate is None else gate
    args = (x.q, x.k_cache, x.v_cache, x.topk_idx, *x.rows, x.o_compressed, gate)
    return ops.native_sparse_attention_decode(
        *args, block_size=8, window_size=9, dispatcher=counter
    )


def test_known_calls_skip_the_dispatcher_unless_observed(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Modes, profilers and autograd see every call of an op."""
    x, seen = Cached(), list[str]()
    with torch.no_grad():
        attend(x, counter)
        with counted(seen):
            attend(x, counter)
            attend(x, counter)
        assert seen.count("nsagen.native_sparse_attention_decode.default") == 2
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            attend(x, counter)
        names = {event.key for event in profiler.key_averages()}
        assert "nsagen::native_sparse_attention_decode" in names
    assert unobserved()
    with torch.inference_mode():
        assert unobserved()
        assert not torch.func.vmap(lambda x: x * unobserved())(torch.ones(2)).any()
        with torch.device("cpu"):
            assert not unobserved()
    assert counter.asked == 2  # tensors look different under a mode


def test_a_subclass_sees_every_call(counter: Counter) -> None:
    seen: list[str] = []

    class Seeing(Tensor):
        @classmethod
        def __torch_function__(
            cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return super().__torch_function__(func, types, args, kwargs or {})

    x = Cached()
    with torch.no_grad():
        attend(x, counter)
        for _ in range(2):
            seen.clear()
            attend(x, counter, x.gate.as_subclass(Seeing))
            assert any("native_sparse_attention_decode" in name for name in seen)


def test_gradients_are_left_to_the_dispatcher(
    counter: Counter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A direct call is looked up once, a call through the dispatcher twice."""
    looked_up: list[object] = []
    find = KnownCalls.find
    monkeypatch.setattr(
        KnownCalls, "find", lambda self, args: looked_up.append(args) or find(self, args)
    )
    x, gate = Cached(), Cached().gate.requires_grad_()
    for grad_mode, argument, times in (
        (torch.no_grad, gate, 1),
        (torch.no_grad, x.gate, 1),
        (torch.enable_grad, x.gate, 1),
        (torch.enable_grad, gate, 2),
    ):
        with grad_mode():
            attend(x, counter, argument)
            looked_up.clear()
            attend(x, counter, argument)
        assert len(looked_up) == times
