"""`nsagen verify`: runs a spec's kernels and compares every output with the float64 reference."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import torch

from nsagen.cases.base import THRESHOLDS, Case, cases_of, relative_error
from nsagen.cases.sizes import Sizes, sizes_for, takes_lists
from nsagen.codegen.build import build
from nsagen.codegen.plan import Variant
from nsagen.codegen.template import kernel_name, render, space_for
from nsagen.core.errors import InvalidInputError, UnsupportedWorkloadError
from nsagen.core.files import scratch_folder
from nsagen.core.importing import import_file
from nsagen.core.releases import installed_release
from nsagen.core.text import nearest
from nsagen.core.workload import Schedule, Workload
from nsagen.runtime.device import interpreting, target_of
from nsagen.spec import Spec

Row = dict[str, Any]
"""op, pass, workload, variant, output, error, threshold, result (ok, failed, skipped), note."""

Ran = dict[tuple[str, int], list[Row]]
"""The rows of what the interpreter has run, by its code and its lists' topk."""


_OF_CHUNKS = ("selected_attention", "block_selection", "sliding_window_attention")
"""Ops that take the last tokens of sequences as queries, and have a program for a few tokens and a
head, which the interpreter runs one after another."""

MOST_TOKENS, FEW_TOKENS, FEW_QUERIES = 200, 12, 2
"""In the interpreter: tokens up to which a call is whole; beyond, tokens of a short sequence, and
the last ones of a long one that are queries."""

FEW_BLOCKS, MOST_KEYS = 4, 8192
"""In the interpreter: blocks of short sequences' lists, and the keys of a long list up to which
two key/value heads read one."""

MOST_PROGRAMS = 32
"""In the interpreter: of kernels that launch enough programs to fill a GPU."""

Calls = tuple[tuple[bool, Sizes], ...]
"""Whether the rows of inputs lie apart, and a call's sizes."""


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
    known = sorted({w.op for w in (*spec.workloads(), *chain(*spec.forced_once()))})
    for op in ops or ():
        if op not in known:
            raise InvalidInputError(
                f"verify: op must be one of {', '.join(known)}; got {op!r}; {nearest(op, known)}"
            )
    device, target = _device(spec)
    rows: list[Row] = []
    ran: Ran = {}
    with scratch_folder("verify") as folder:
        result = build(spec, folder)
        chosen = [
            v
            for v in result.variants
            if (not ops or v.workload.op in ops) and (target is None or target in v.targets)
        ]
        for done, variant in enumerate(chosen, 1):
            path = result.folder / "kernels" / f"{variant.name}.py"
            rows += _verified(variant, path, device, spec.topk_of(variant.workload), seed, ran)
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


def _verified(
    variant: Variant, path: Path, device: torch.device, topk: int, seed: int, ran: Ran
) -> Iterator[Row]:
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
    interpreted = device.type == "cpu"
    if interpreted and (note := not_interpreted(variant)):
        yield row | {"note": note}
        return
    if not variant.runs_with(installed_release()):
        yield row | {
            "note": f"needs Triton {variant.triton}; the installed one gets another kernel"
        }
        return
    rows: dict[str, Row] = {}
    key: tuple[str, int] | None = None
    try:
        if interpreted:
            if workload.dtype == "bfloat16":
                row["note"] = "in float16, as the interpreter computes bfloat16 wrongly"
            workload, path, code = for_interpreter(variant, path.parent)
            key = (code, topk)
            if same := ran.get(key):
                row["note"] += f"{'; ' if row['note'] else ''}ran as {same[0]['variant']}"
                kept = ("output", "error", "threshold", "result")
                yield from (row | {name: one[name] for name in kept} for one in same)
                return
        launch = import_file(path).launch
        calls = calls_interpreted if interpreted else calls_on_gpu
        for apart, sizes in calls(workload, topk):
            case: Case = cases_of(workload).make_case(workload, sizes, device, seed)
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
    if key:
        ran[key] = list(rows.values())
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


def not_interpreted(variant: Variant) -> str:
    """Why Triton's interpreter cannot run a variant; empty if it can."""
    workload = variant.workload
    if variant.triton is not None:
        return "Triton's interpreter runs no Gluon; needs a GPU"
    one = replace(workload, dtype="float16")
    if workload.dtype == "bfloat16" and not space_for(
        workload, variant.schedule.algorithm
    ).supports(one):
        return "the interpreter computes bfloat16 wrongly; needs a GPU"
    return ""


def for_interpreter(variant: Variant, folder: Path) -> tuple[Workload, Path, str]:
    """What the interpreter runs of a variant: workload, file, and code by which to know it.

    bfloat16 becomes float16, the other dtype of two bytes. Programs are few, because they run one
    after another. Kernels that then differ in warps and stages alone have the same code.
    """
    workload, knobs = variant.workload, dict(variant.schedule.knobs)
    if workload.dtype == "bfloat16":
        workload = replace(workload, dtype="float16")
    if "programs" in knobs:
        knobs["programs"] = min(int(knobs["programs"]), MOST_PROGRAMS)
    schedule = Schedule.of(variant.schedule.algorithm, knobs)
    name = kernel_name(workload, schedule)
    source = render(workload, schedule, header="# for Triton's interpreter")
    path = folder / f"{name}_interpreted.py"
    path.write_text(source, encoding="utf-8")
    code = re.sub(r"\b(num_warps|num_stages)=\d+", r"\1", source.replace(name, "kernel"))
    return workload, path, code


def calls_on_gpu(workload: Workload, topk: int) -> Calls:
    """The calls that a kernel is verified with.

    Args:
        topk: blocks of a list, where calls decide it.
    """
    sizes = sizes_for(workload, topk)
    return (False, sizes), (True, sizes)


def calls_interpreted(workload: Workload, topk: int) -> Calls:
    """The same edges in fewer programs: short sequences whole, and of the long one the last tokens.

    These lie in two blocks, see more blocks than they select, and read lists of topk blocks; by
    one key/value head where these have very many keys.
    """
    sizes = sizes_for(workload, topk)
    by_token = workload.pass_ != "decode" and workload.op in (*_OF_CHUNKS, "index_loss")
    if not by_token or sizes.tokens <= MOST_TOKENS:
        return calls_on_gpu(workload, topk)
    if workload.named().get("score_heads") == "each" and int(workload.gqa_ratio) > 1:
        sizes = replace(sizes, kv_heads=1)  # the heads of an index share one key head
    few = max(FEW_TOKENS, min(int(workload.named().get("kernel_size", 0)) + 4, 3 * FEW_TOKENS))
    if takes_lists(workload):  # a step is a part of a block, however few of its tokens are there
        few = min(few, max(2, MOST_KEYS // int(workload.block_size)))
    lengths = tuple(dict.fromkeys(min(length, few) for length in sizes.seqlens))
    short = replace(sizes, seqlens=lengths)
    if workload.op in _OF_CHUNKS:
        short = replace(short, topk=min(sizes.topk, FEW_BLOCKS))
        long = (0, max(sizes.seqlens) - 4, 1)  # the last block has one token
        if takes_lists(workload) and topk * int(workload.block_size) > MOST_KEYS:
            sizes = replace(sizes, kv_heads=1)
        return (False, short), (True, replace(sizes, seqlens=long, queries=FEW_QUERIES))
    # The index loss takes whole sequences: a list of one block chooses among two.
    two = (*lengths, int(workload.block_size) + 3)
    return (False, short), (True, replace(sizes, seqlens=two, topk=1))


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
