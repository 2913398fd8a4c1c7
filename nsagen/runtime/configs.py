"""Tuned configurations of an exported package: a JSON file a device, beside its kernels.

    {"device": "nvidia-h200", "entries": [{"op": "rope", "pass": "forward", "dtype": "float16",
      "params": {"head_dim": 32}, "tokens": [null, 5792], "context": [null, null],
      "kernel": "rope_forward__f16_d32__0123abcd"}]}

Other keys, such as `schedule` and `evidence`, are for readers. An entry serves calls within its
ranges, both ends included, on GPUs of that name; the rest goes by the GPU's architecture.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from nsagen.core.bucket import Bucket, Entries
from nsagen.core.errors import InvalidInputError
from nsagen.core.workload import Workload


def read_configs(folder: Path) -> dict[str, dict[Workload, Entries]]:
    """Device's slug -> workload -> entries, from the JSON files of a folder, if it is there.

    Args:
        folder: `configs/` of the package; its kernels are in `kernels/` beside it.

    Raises:
        InvalidInputError: a file says something else, or names a kernel that is not there.
    """
    found: dict[str, dict[Workload, Entries]] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            tables: dict[Workload, Entries] = found.setdefault(_text(content["device"]), {})
            for entry in content["entries"]:
                workload, bucket, kernel = _read(entry, folder.parent / "kernels")
                tables[workload] = (*tables.get(workload, ()), (bucket, kernel))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise InvalidInputError(
                f"{path}: must list tuned kernels of a device as nsagen export writes them; "
                f"got {error!r}; install the package again, or remove the file"
            ) from error
    return found


def _read(entry: dict[str, Any], kernels: Path) -> tuple[Workload, Bucket, str]:
    params, kernel = entry["params"], _text(entry["kernel"])
    workload = Workload.of(entry["op"], entry["pass"], dtype=entry["dtype"], **params)
    if not (kernel.isidentifier() and (kernels / f"{kernel}.py").is_file()):
        raise ValueError(f"no kernel {kernel}")
    return workload, Bucket(_range(entry["tokens"]), _range(entry["context"])), kernel


def _range(limits: Any) -> tuple[int | None, int | None]:
    least, greatest = (None if end is None else int(end) for end in limits)
    return least, greatest


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value
