"""`nsagen verify`: runs a spec's kernels and compares every output with the float64 reference."""

from __future__ import annotations

import inspect
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from nsagen.cases.base import THRESHOLDS, Case, cases_of, relative_error
from nsagen.cases.sizes import sizes_for
from nsagen.codegen.build import build
from nsagen.codegen.plan import Variant
from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.core.importing import import_file
from nsagen.core.releases import installed_release
from nsagen.runtime.device import interpreting, target_of
from nsagen.spec import Spec

Row = dict[str, Any]
"""op, pass, workload, variant, output, error, threshold, result (ok, failed, skipped), note."""


def verify(
    spec: Spec,
    *,
    ops: Sequence[str] | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] | None = None,
) -> list[Row]:
    """Build the spec's kernels in a temporary folder, run those for this device, and compare.

    Args:
        ops: only these ops; all by default.
        progress: called with (what was done, how many are done, how many in all).

    Returns:
        one row per output of each kernel, in the order of the kernels' names.

    Raises:
        InvalidInputError: the spec does not have an op.
        UnsupportedWorkloadError: no GPU and no interpreter, or a GPU that the spec omits.
    """
    known = sorted({workload.op for workload in spec.workloads()})
    for op in ops or ():
        if op not in known:
            raise InvalidInputError(
                f"verify: op must be one of {', '.join(known)}; got {op!r}; choose one of them"
            )
    device, target = _device(spec)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="nsagen-verify-") as folder:
        result = build(spec, Path(folder))
        chosen = [
            v
            for v in result.variants
            if (not ops or v.workload.op in ops) and (target is None or target in v.targets)
        ]
        for done, variant in enumerate(chosen, 1):
            path = result.folder / "kernels" / f"{variant.name}.py"
            rows += _verified(variant, path, device, seed)
            if progress:
                progress(str(variant.workload), done, len(chosen))
    return rows


def _device(spec: Spec) -> tuple[torch.device, str | None]:
    """Where kernels run, and the target whose variants run; None for all, in the interpreter."""
    if interpreting():
        return torch.device("cpu"), None
    if not torch.cuda.is_available():
        raise UnsupportedWorkloadError(
            "verify: needs a GPU or Triton's interpreter; found neither; "
            "set TRITON_INTERPRET=1 to run on the CPU"
        )
    device = torch.device("cuda", torch.cuda.current_device())
    target = target_of(device)
    if target not in spec.targets:
        raise UnsupportedWorkloadError(
            f"verify: the spec must name this GPU's target; it has {', '.join(spec.targets)}, "
            f"the GPU is {target}; add it to targets"
        )
    return device, target


def _verified(variant: Variant, path: Path, device: torch.device, seed: int) -> Iterator[Row]:
    workload = variant.workload
    row: Row = {
        "op": workload.op,
        "pass": workload.pass_,
        "workload": workload.label,
        "variant": variant.name,
        "output": "",
        "error": None,
        "threshold": None,
        "result": "skipped",
        "note": "",
    }
    if device.type == "cpu" and workload.dtype == "bfloat16":
        yield row | {"note": "the interpreter computes bfloat16 wrongly; needs a GPU"}
        return
    if not variant.runs_with(installed_release()):
        yield row | {
            "note": f"needs Triton {variant.triton}; the installed one gets another kernel"
        }
        return
    rows: dict[str, Row] = {}
    try:
        launch = import_file(path).launch
        for apart in (False, True):
            case: Case = cases_of(workload).make_case(workload, sizes_for(workload), device, seed)
            views = launch_strided(launch, case) if apart else launch(*case.args)
            for name, wanted in case.expected().items():
                compared = _compared(case.outputs[name], wanted)
                if views and compared["result"] == "failed":
                    compared["note"] = f"with the rows of {', '.join(views)} apart"
                if name not in rows or rows[name]["result"] == "ok":
                    rows[name] = row | {"output": name} | compared
    except Exception as error:  # any failure of a kernel is a finding about that kernel
        text = str(error).strip() or "no message"
        yield row | {
            "result": "failed",
            "note": f"{type(error).__name__}: {text.splitlines()[-1]}",
        }
        return
    yield from rows.values()


CONTIGUOUS = {"cos", "sin", "w_k", "w_v", "w_k2", "w_v2", "pe", "pe_v"}
"""Tables and weights, which ops refuse in strides; cache_append's kernel leaves that to its op."""


def launch_strided(launch: Callable[..., None], case: Case) -> list[str]:
    """Launch with inputs whose rows lie apart, with NaN between them, where the kernel takes them.

    A kernel that needs a tensor contiguous must say so, and gets it.

    Returns:
        the names of the tensors that it took so.
    """
    args = list(case.args)
    written = {id(x) for x in case.outputs.values()}
    apart: dict[str, int] = {}
    for place, name in enumerate(list(inspect.signature(launch).parameters)[: len(args)]):
        x = args[place]
        if (
            isinstance(x, torch.Tensor)
            and x.dtype in THRESHOLDS
            and x.ndim > 1
            and x.numel()
            and id(x) not in written
            and name not in CONTIGUOUS
        ):
            args[place] = _rows_apart(x)
            apart[name] = place
    while True:
        try:
            launch(*args)
            return list(apart)
        except ValueError as error:
            refused = apart.keys() & set(re.findall(r"\w+", str(error)))
            if not refused:
                raise
            for name in refused:
                place = apart.pop(name)
                args[place] = case.args[place]


def _rows_apart(x: torch.Tensor) -> torch.Tensor:
    """A view of x's numbers in wider rows; 16 bytes or more, which bulk copies can step over."""
    width = x.shape[-1]
    wide = x.new_full((*x.shape[:-1], width + 8), float("nan"))
    wide[..., :width] = x
    return wide[..., :width]


def _compared(out: torch.Tensor, wanted: torch.Tensor) -> Row:
    if out.shape != wanted.shape:
        return {"result": "failed", "note": f"shape {tuple(out.shape)}, not {tuple(wanted.shape)}"}
    if out.dtype.is_floating_point:
        error, threshold = relative_error(out, wanted), THRESHOLDS[out.dtype]
    else:  # indices: the share that differs, which must be 0
        differ = out.cpu() != wanted.cpu()
        error, threshold = (differ.double().mean().item() if differ.numel() else 0.0), 0.0
    return {
        "error": error,
        "threshold": threshold,
        "result": "ok" if error <= threshold else "failed",
    }
