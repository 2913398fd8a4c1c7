"""One kernel on one call, compared with the float64 reference: for tests, and for reproducing them.

    TRITON_INTERPRET=1 python -m nsagen.cases.reproduce "rope forward float32 head_dim=72" --seed 1

runs what the failure of a drawn shape names: the default schedule of a workload for a target,
on a GPU or in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch

from nsagen.cases.base import THRESHOLDS, Case, Sizes, cases_of, relative_error
from nsagen.codegen.template import default_schedule, kernel_name, render, space_for
from nsagen.core.errors import InvalidInputError
from nsagen.core.files import scratch_folder
from nsagen.core.importing import import_file
from nsagen.core.releases import installed_release
from nsagen.core.target import KNOWN_TARGETS
from nsagen.core.workload import Param, Schedule, Workload


@dataclass(frozen=True)
class Reproduction:
    """A workload, an algorithm, the target whose default schedule to take, and a call's sizes.

    Attributes:
        algorithm: None for the target's default one.
        sizes: of the call; in decode, positions of the new tokens.
        seed: of the random inputs.
    """

    workload: Workload
    target: str
    sizes: Sizes
    algorithm: str | None = None
    seed: int = 0

    @property
    def command(self) -> str:
        """A shell command that runs exactly this again."""
        sizes = self.sizes
        seqlens = ",".join(map(str, sizes.seqlens))
        options = f"--target {self.target} --seqlens={seqlens} --kv-heads {sizes.kv_heads}"
        if self.workload.pass_ == "decode":
            options += f" --capacity {sizes.capacity}"
            options += f" --page-size {sizes.page_size}" if sizes.page_size else ""
        options += f" --algorithm {self.algorithm}" if self.algorithm else ""
        text = shlex.quote(workload_text(self.workload))
        return f"python -m nsagen.cases.reproduce {text} {options} --seed {self.seed}"

    @property
    def schedule(self) -> Schedule:
        """The schedule that runs.

        Raises:
            UnsupportedWorkloadError: the algorithm has no schedule for the workload and target.
        """
        target = KNOWN_TARGETS[self.target]
        if self.algorithm is None:
            return default_schedule(self.workload, target, installed_release())
        space = space_for(self.workload, self.algorithm)
        return space.default_schedule(self.workload, target)

    def run(self) -> list[str]:
        """What is wrong with the kernel's outputs; empty if all agree with the reference."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        cases = cases_of(self.workload)
        case: Case = cases.make_case(self.workload, self.sizes, device, self.seed)
        schedule = self.schedule
        source = render(self.workload, schedule, f"# {self.workload}: {schedule}")
        with scratch_folder("reproduce") as folder:
            path = folder / f"{kernel_name(self.workload, schedule)}.py"
            path.write_text(source, encoding="utf-8")
            import_file(path).launch(*case.args)
        expected = case.expected()
        found = (_difference(name, case.outputs[name], right) for name, right in expected.items())
        return [text for text in found if text]


def _difference(name: str, out: torch.Tensor, right: torch.Tensor) -> str:
    """Empty if an output is as near to the reference as its dtype allows."""
    if out.shape != right.shape:
        return f"{name} has shape {tuple(out.shape)}, not {tuple(right.shape)}"
    if not out.dtype.is_floating_point:
        differ = int((out.cpu() != right.cpu()).sum())
        return f"{name}: {differ} of {out.numel()} indices differ" if differ else ""
    error, most = relative_error(out, right), THRESHOLDS[out.dtype]
    return f"{name}: relative error {error:.2e}, over {most:.0e}" if error > most else ""


def workload_text(workload: Workload) -> str:
    """`rope forward float32 head_dim=72`."""
    params = " ".join(f"{name}={value}" for name, value in workload.params)
    return f"{workload.op} {workload.pass_} {workload.dtype} {params}"


def parse_workload(text: str) -> Workload:
    """The workload that `workload_text` names.

    Raises:
        InvalidInputError: it names no workload.
    """
    op, pass_, dtype, *rest = (*text.split(), "", "", "")
    params = dict(part.partition("=")[::2] for part in rest if part)
    return Workload.of(op, pass_, dtype=dtype, **{k: _value(v) for k, v in params.items()})


def _value(text: str) -> Param:
    if text in ("True", "False"):
        return text == "True"
    return int(text) if text.isdecimal() else text


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(",") if part)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the call that the command line names; 0 if the kernel agrees with the reference."""
    parser = argparse.ArgumentParser(prog="python -m nsagen.cases.reproduce", description=__doc__)
    parser.add_argument("workload", help="e.g. 'rope forward float32 head_dim=72'")
    parser.add_argument("--target", choices=KNOWN_TARGETS, default="cuda:90")
    parser.add_argument("--algorithm", help="by default the one that the target uses")
    parser.add_argument("--seqlens", type=_numbers, default=(0, 3, 40), help="e.g. 3,0,17")
    parser.add_argument("--kv-heads", type=int, default=1)
    parser.add_argument("--capacity", type=int, default=256, help="decode: tokens of a cache")
    parser.add_argument("--page-size", type=int, help="decode: tokens of a cache page")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args(arguments)
    sizes = Sizes(given.seqlens, given.kv_heads, given.capacity, given.page_size)
    try:
        workload = parse_workload(cast(str, given.workload))
    except InvalidInputError as error:
        print(f"nsagen: {error}", file=sys.stderr)
        return 2
    wrong = Reproduction(workload, given.target, sizes, given.algorithm, given.seed).run()
    print("\n".join(wrong) or "agrees with the reference")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
