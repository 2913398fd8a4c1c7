"""`nsagen verify`: runs a spec's kernels and compares every output with the float64 reference."""

from __future__ import annotations

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
    try:
        case: Case = cases_of(workload).make_case(workload, sizes_for(workload), device, seed)
        import_file(path).launch(*case.args)
        expected = case.expected()
    except Exception as error:  # any failure of a kernel is a finding about that kernel
        text = str(error).strip() or "no message"
        yield row | {
            "result": "failed",
            "note": f"{type(error).__name__}: {text.splitlines()[-1]}",
        }
        return
    for name, wanted in expected.items():
        yield row | {"output": name} | _compared(case.outputs[name], wanted)


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
