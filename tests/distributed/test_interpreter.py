"""Shared sequences on kernels, in Triton's interpreter, against one process on the reference.

TRITON_INTERPRET=1 pytest tests/distributed/test_interpreter.py
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from nsagen.distributed import context_parallel, sparse_attention
from tests.distributed.ranks import on_ranks
from tests.distributed.test_context_parallel import Found, attention, passed
from tests.model.forms import EVERY
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


@pytest.mark.parametrize("form", ["weightedpool", "separate"])
def test_kernels_of_two_ranks_give_one_process_s_gradients(form: str) -> None:
    """Where branches share keys and values, none has a gradient of its own."""
    lengths = [21, 0, 3]

    expected = passed(attention(**EVERY[form]), lengths)  # float64 has no kernels

    def run(rank: int) -> tuple[Found, bool]:
        mine, taken = attention(**EVERY[form]).float(), list[bool]()
        takes = sparse_attention.takes_gated_branches

        def noted(*args: Any) -> bool:
            taken.append(takes(*args))
            return taken[-1]

        sparse_attention.takes_gated_branches = noted
        return passed(mine, lengths, context_parallel(mine)), taken == [True]

    for found, shared in on_ranks(2, run):
        assert shared == (form != "separate")
        for name, one in expected.items():
            other = found[name]
            if one is not None:
                assert other is not None
                assert float((other.double() - one).norm() / one.norm()) < 1e-5, name
