"""The error of a call that no variant covers, with the spec lines that would cover it."""

from __future__ import annotations

from nsagen.core.errors import UnsupportedWorkloadError
from nsagen.core.workload import Param, Workload


def unsupported(
    workload: Workload, target: str, dispatcher: str, reason: str
) -> UnsupportedWorkloadError:
    """The error to raise if `dispatcher` has no kernel for `workload` on `target`."""
    return UnsupportedWorkloadError(
        f"dispatcher {dispatcher}: every call needs a variant; none covers {workload} "
        f"on {target}: {reason}; add to the spec and run nsagen build:\n"
        f"{spec_lines(workload, target)}"
    )


def spec_lines(workload: Workload, target: str) -> str:
    """The lines of a spec that name a workload and a target."""
    values: dict[str, Param] = {"dtype": workload.dtype, **dict(workload.params)}
    rows = [f"  {name}: {_yaml(value)}" for name, value in values.items()]
    return "\n".join(["attention:", *rows, f"passes: [{workload.pass_}]", f'targets: ["{target}"]'])


def _yaml(value: Param) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
