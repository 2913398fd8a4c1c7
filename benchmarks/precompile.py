"""Fill the caches on disk with what side_by_side.py and training_table.py run, on all cores.

    python benchmarks/precompile.py --seconds 60

Each process makes all short calls, but compiles only its share of their kernels, and launches none.
Others compile FlashAttention-4 and the example's models, by steps on the GPU. Processes that have
not ended by then are ended; what is missing is compiled while it is measured.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest import mock

# What takes seconds to import is imported by the processes, side by side.
LAYERS = ("Llama 3.1 8B", "the guide")

DEVICE = "cuda"


@contextmanager
def compiling(index: int, processes: int) -> Iterator[dict[tuple[str, str], bool]]:
    """Kernels are compiled where it is this process's turn, and never launched.

    Yields:
        of each kernel so far, whether this process compiles it.
    """
    import triton

    from nsagen.ops import _op

    run, mine = triton.JITFunction.run, {}

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **more: Any) -> Any:
        name = (self.fn.__code__.co_filename, self.__name__)
        if mine.setdefault(name, len(mine) % processes == index):
            return run(self, *args, grid=grid, warmup=True, **more)
        return None

    # A repeated call would launch what this process compiled, on what others have not computed.
    with (
        mock.patch.object(triton.JITFunction, "run", compile_only),
        mock.patch.object(_op, "replays", return_value=False),
    ):
        yield mine


def sparse_calls() -> dict[str, Callable[[], object]]:
    """Short calls of all kernels of this project that are measured."""
    import side_by_side
    import torch
    import training_table
    from training_table import STEPS, Case

    calls = side_by_side.short_calls(replace(side_by_side.Run(), device=DEVICE))
    for name, config in STEPS.items():
        STEPS[name] = replace(config, batch_tokens=config.seq_len)  # a single sequence
    some = [Case("layer", name, "nsa", "eager", 4096) for name in LAYERS]
    some += [Case("step", name, "nsa", "eager", 4096) for name in list(STEPS)[:2]]
    device = torch.device(DEVICE)
    for case in some:
        name = f"{case.what} {case.name}"
        calls[name] = functools.partial(
            training_table.measure, case, device, 1, training_table.once
        )
    return calls


def compile_share(index: int, processes: int) -> None:
    start = time.monotonic()
    calls = sparse_calls()
    print(f"process {index}: begins after {time.monotonic() - start:.0f} s", flush=True)
    with compiling(index, processes) as mine:
        for name, call in calls.items():
            try:
                call()
            except Exception:  # the others may be compiled
                print(f"{name}:\n{traceback.format_exc(limit=-3)}", flush=True)
        print(f"process {index}: {sum(mine.values())} of {len(mine)} kernels", flush=True)


def compile_dense(name: str | None) -> None:
    """FlashAttention-4's kernels of the shape, or of a layer."""
    import side_by_side

    if name is None:
        side_by_side.dense_call(side_by_side.Run(), "FlashAttention-4")
    else:
        measure_once("layer", name, "dense", "eager", 4096)


def compile_model(kind: Any, place: int = 0) -> None:
    """Every second model of a kind, from `place` on: what is compiled depends on its sequences."""
    import training_table

    for name, config in list(training_table.STEPS.items())[place::2]:
        measure_once("step", name, kind, "compiled", config.seq_len)
        training_table.tidy()


def measure_once(*case: Any) -> None:
    import torch
    import training_table

    found = training_table.Case(*case)
    training_table.measure(found, torch.device(DEVICE), 1, training_table.once)


def timed(what: str, call: Callable[..., None], *args: Any) -> None:
    start = time.monotonic()
    try:
        call(*args)
        print(f"{what}: {time.monotonic() - start:.0f} s", flush=True)
    except Exception:
        print(f"{what}:\n{traceback.format_exc(limit=-3)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument(
        "--processes", type=int, default=12, help="that share this project's kernels"
    )
    args = parser.parse_args()
    end = time.monotonic() + args.seconds
    jobs: list[tuple[Any, ...]] = [
        (f"share {i}", compile_share, i, args.processes) for i in range(args.processes)
    ]
    jobs += [(f"FlashAttention-4, {n or 'the table'}", compile_dense, n) for n in (None, *LAYERS)]
    jobs += [
        (f"steps, {kind}, compiled, {place}", compile_model, kind, place)
        for kind in ("nsa", "dense")
        for place in (0, 1)
    ]
    spawn = multiprocessing.get_context("spawn")
    found = [spawn.Process(target=timed, args=job, name=job[0], daemon=True) for job in jobs]
    for process in found:
        process.start()
    for process in found:
        process.join(max(0.0, end - time.monotonic()))
        if process.is_alive():
            print(f"{process.name}: has not ended in time", flush=True)
            process.kill()


if __name__ == "__main__":
    main()
