"""Shared sequences on kernels, in Triton's interpreter, against one process on the reference.

TRITON_INTERPRET=1 pytest tests/distributed/test_interpreter.py
"""

from __future__ import annotations

import cProfile
import os
import pstats
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from nsagen.distributed import context_parallel, gathering, sparse_attention
from nsagen.distributed.gathering import Gathering
from nsagen.model import ToyNSALlama
from nsagen.ops import _checks, _op
from nsagen.ops._calls import forget
from tests.distributed.ranks import on_ranks
from tests.distributed.test_context_parallel import (
    Found,
    Names,
    attention,
    exchanges_of,
    offsets_of,
    passed,
)
from tests.model.forms import EVERY
from tests.model.tiny import nsa_config
from tests.support import one_thread

__all__ = ["one_thread"]  # a fixture

pytestmark = [
    pytest.mark.interpreter,
    pytest.mark.kernel,
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(
        os.environ.get("TRITON_INTERPRET") != "1", reason="needs TRITON_INTERPRET=1"
    ),
]


@pytest.fixture(autouse=True)
def _own_kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels are built anew, not taken from the user's cache."""
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("small", [gathering.SMALL_BYTES, 0])
@pytest.mark.parametrize("form", ["weightedpool", "separate"])
def test_kernels_of_two_ranks_give_one_process_s_gradients(form: str, small: int) -> None:
    """Where branches share keys and values, none has a gradient of its own; if these are small,
    all are one op."""
    lengths = [21, 0, 3]

    expected = passed(attention(**EVERY[form]), lengths)  # float64 has no kernels

    def run(rank: int) -> tuple[Found, list[str]]:
        mine, happened = attention(**EVERY[form]).float(), list[str]()
        gathering.SMALL_BYTES = small

        def noted(owner: Any, name: str) -> None:
            function = getattr(owner, name)

            def call(*args: Any) -> Any:
                happened.append(name)
                return function(*args)

            setattr(owner, name, call)

        noted(Gathering, "sum_gradients")
        noted(sparse_attention, "compressed_attention_backward")
        noted(sparse_attention, "add_windows_gradient")
        noted(sparse_attention, "branches_backward")
        noted(sparse_attention, "sum_together")
        return passed(mine, lengths, context_parallel(mine)), happened

    # The tokens' gradients are summed over the ranks while the windows' are computed; where a
    # branch has its own, these are computed while tokens are gathered.
    order = ["sum_gradients", "add_windows_gradient", "sum_gradients"]
    if form == "weightedpool" and small:
        order = ["branches_backward", "sum_together"]
    elif form == "separate":
        order = ["compressed_attention_backward", "sum_gradients", "sum_gradients"]
    for found, happened in on_ranks(2, run):
        assert happened == order
        for name, one in expected.items():
            other = found[name]
            if one is not None:
                assert other is not None
                assert float((other.double() - one).norm() / one.norm()) < 1e-5, name


def test_a_shared_layer_costs_the_host_little_more_than_a_whole_one() -> None:
    """Operations and Python calls of a layer's training, as on a GPU: kernels launch nothing here,
    and no value is read. It exchanges five times."""
    tokens = 256

    def cost(step: Callable[[], object]) -> Tensor:
        for _ in range(2):  # what is learned about calls
            step()
        with Names() as mode:
            step()
        profile = cProfile.Profile()
        with torch.autograd.set_multithreading_enabled(False):
            profile.runcall(step)
        calls: int = vars(pstats.Stats(profile))["total_calls"]
        return torch.tensor([mode.names.total(), calls, exchanges_of(mode.names)])

    def of_a_layer(shared: bool) -> Tensor:
        found = []
        for layers in (1, 3):
            model, ids = ToyNSALlama(nsa_config(num_hidden_layers=layers)), torch.arange(tokens)
            layout: Any = offsets_of([tokens])
            if shared:
                layout = context_parallel(model).shard(layout)
                ids = layout.take(ids)

            def step(model: Any = model, ids: Tensor = ids, layout: Any = layout) -> None:
                model(ids, layout).sum().backward()
                model.zero_grad()

            found.append(cost(step))
        return (found[1] - found[0]) / 2

    def run(rank: int) -> tuple[Tensor, Tensor]:
        forget()  # calls that earlier tests of this process made, which launch kernels
        _op._Kernel.find = lambda *args: lambda *args: None  # type: ignore[method-assign]
        for module in (_op, _checks):
            module.values_are_read = lambda x: False
        return of_a_layer(shared=True), of_a_layer(shared=False)

    for shared, whole in on_ranks(2, run):
        operations, calls, _ = shared / whole
        assert operations < 1.4
        assert calls < 1.2
        assert shared[2] == 5
