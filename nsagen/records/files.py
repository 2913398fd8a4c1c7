"""Files of tuning records: specs/tuned/<spec>/<device>.yaml."""

from __future__ import annotations

import functools
import hashlib
import logging
import re
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from datetime import datetime, timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
)

from nsagen.core.bucket import Bucket, Range
from nsagen.core.errors import InvalidInputError, NsagenError, SpecError
from nsagen.core.files import locked, replace_file
from nsagen.core.paths import visible
from nsagen.core.text import shown_keys
from nsagen.core.version import __version__
from nsagen.core.workload import Schedule, Workload
from nsagen.records.record import Objective, Timed, TuningRecord
from nsagen.spec.document import checked_events

DATE_FORMAT = "%Y-%m-%dT%H:%M:%SZ"

_Other = tuple[TuningRecord | None, dict[str, Any]]

_log = logging.getLogger("nsagen.records")

_QUOTED = re.compile(r'"(?:\\.|[^"\\])*"' + r"|'[^']*'")
_COMMENT = re.compile(r"(^|\s)#")

MAX_BYTES = 16 << 20
"""Largest size of a file of records: room for about ten thousand."""


class _Loader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):  # type: ignore[misc]
    """Refuses a key that occurs twice; YAML's own loader would keep the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"the key {str(key.value)[:60]!r} twice", problem_mark=key.start_mark
                )
            seen.add(str(key.value))
        return super().construct_mapping(node, deep)


@dataclass(frozen=True)
class DeviceRecords:
    """The records of one file.

    Attributes:
        device: its slug, e.g. "nvidia-h200"; "static-cuda-90" if nothing ran.
        target: the device's architecture.
        sha256: of the file's bytes.
        others: rows of other versions of nsagen as they are in the file, each with its record,
            or None if this version cannot read it.
        extra: what another version wrote beside the records; kept and not used.
        has_comments: whether the file has comments besides the first line that nsagen writes.
    """

    device: str
    target: str
    records: tuple[TuningRecord, ...] = ()
    path: Path = field(default=Path(), compare=False)
    sha256: str = ""
    others: tuple[_Other, ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    has_comments: bool = False


def load_records(path: Path) -> DeviceRecords:
    """Read a file of records.

    Raises:
        SpecError: not YAML, or not records; the text names the file and the key.
    """
    remedy = "fix or remove the record, and run nsagen tune"
    try:
        if path.exists() and not path.is_file():
            raise SpecError(f"{path}: must be a regular file; got another; {remedy}")
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise SpecError(f"{path}: must be at most {MAX_BYTES} bytes; got more; {remedy}")
        text = data.decode()
        deque(checked_events(text, str(path), _Loader), maxlen=0)
        content, others, extra = _of_other_versions(yaml.load(text, Loader=_Loader))
        rows = _FileRow.model_validate(content)
        records = tuple(row.record() for row in rows.records)
    except OSError as error:
        raise SpecError(f"{path}: must be readable; got {error.strerror}; fix that") from None
    except UnicodeDecodeError as error:
        came = f"byte 0x{data[error.start]:02x} at offset {error.start}"
        raise SpecError(f"{path}: must be UTF-8 text; got {came}; {remedy}") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise SpecError(
            f"{path}:{line}: must be valid YAML; got {error.problem}; {remedy}"
        ) from None
    except SpecError:
        raise
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"]) or "file"
        got = repr(first.get("input"))[:60]
        raise SpecError(f"{path}: {key}: {first['msg']}; got {got}; {remedy}") from None
    except (NsagenError, yaml.YAMLError, ValueError) as error:  # numbers with too many digits
        raise SpecError(f"{path}: {' '.join(str(error).split())}; {remedy}") from None
    records += tuple(record for record, _ in others if record is not None)
    if unread := sum(record is None for record, _ in others):
        _warn_once(
            "%s: %d records of another version of nsagen cannot be read here; they are kept and "
            "not used",
            path,
            unread,
        )
    unknown = {key for record, row in others if record is not None for key in row.keys() - _KEYS}
    if unknown := unknown | extra.keys():
        _warn_once(
            "%s: nsagen %s wrote %s, which is not understood here; it is kept and not used",
            path,
            ", ".join(sorted({row["nsagen"] for _, row in others})),
            shown_keys(unknown),
        )
    digest = hashlib.sha256(data).hexdigest()
    commented = any(_COMMENT.search(_QUOTED.sub("", line)) for line in text.splitlines()[1:])
    return DeviceRecords(rows.device, rows.target, records, path, digest, others, extra, commented)


@functools.cache
def _warn_once(text: str, *args: object) -> None:
    """A search reads its file again for each record."""
    _log.warning(text, *args)


def _of_other_versions(content: Any) -> tuple[Any, tuple[_Other, ...], dict[str, Any]]:
    """A file's content without other versions' records; those as far as readable; their keys.

    Records of this version must be exactly right; unknown keys in others are ignored.
    """
    if not (isinstance(content, dict) and isinstance(content.get("records"), list)):
        return content, (), {}

    def is_other(row: Any) -> bool:
        version = row.get("nsagen") if isinstance(row, dict) else None
        return isinstance(version, str) and version != __version__

    others = [row for row in content["records"] if is_other(row)]
    if not others:
        return content, (), {}
    known = {key: content[key] for key in _FileRow.model_fields if key in content}
    known["records"] = [row for row in content["records"] if not is_other(row)]
    extra = {key: value for key, value in content.items() if key not in known}
    return known, tuple((_read_other(row), row) for row in others), extra


def _read_other(row: dict[str, Any]) -> TuningRecord | None:
    try:
        return _RecordRow.model_validate({k: v for k, v in row.items() if k in _KEYS}).record()
    except (ValidationError, NsagenError, ValueError):
        return None


def load_folder(folder: Path) -> tuple[DeviceRecords, ...]:
    """The records of every device in a folder, by file name; empty if the folder is missing."""
    return tuple(load_records(path) for path in visible(folder.glob("*.yaml")))


def save_records(folder: Path, device: str, target: str, new: Iterable[TuningRecord]) -> Path:
    """Merge records into a device's file and keep its others. Safe under concurrent calls.

    Returns:
        the file's path, `folder/<device>.yaml`.
    """
    path = folder / f"{device}.yaml"
    with locked(folder, device):
        file = load_records(path) if path.exists() else DeviceRecords(device, target)
        known = {record.key: record for record in file.records}
        newest = max((r.date for r in known.values()), default="")
        changed = {record.key: _no_older(record, newest) for record in new}
        known |= changed
        others = [(r, row) for r, row in file.others if r is None or r.key not in changed]
        text = records_text(device, target, known.values(), others, file.extra)
        if replace_file(path, text) and file.has_comments:
            _log.warning("%s: nsagen writes this file; its comments were not kept", path)
    return path


def _no_older(record: TuningRecord, newest: str) -> TuningRecord:
    """The record, dated no earlier than the existing ones, even if a clock was set back.

    The newest record decides which buckets a build uses.
    """
    if record.date >= newest:
        return record
    try:
        after = datetime.strptime(newest, DATE_FORMAT) + timedelta(seconds=1)
    except ValueError:  # a date written by hand
        return record
    return replace(record, date=after.strftime(DATE_FORMAT))


def records_text(
    device: str,
    target: str,
    records: Iterable[TuningRecord],
    others: Iterable[_Other] = (),
    extra: Mapping[str, Any] = MappingProxyType({}),
) -> str:
    """A file's text: one record per workload, bucket, objective and sizes, in a fixed order.

    Args:
        others: rows that another version wrote; they stay exactly as they were read.
        extra: other keys of the file that another version wrote.
    """
    as_written = {record.key: row for record, row in others if record is not None}
    unread = [row for record, row in others if record is None]
    lines = [
        f"# Tuning records of {device}: written by nsagen tune, read by nsagen build.",
        f"device: {device}",
        f'target: "{target}"',
        *(f"{_flow(key)}: {_flow(value)}" for key, value in extra.items()),
        "records:",
    ]
    ordered = sorted(records, key=lambda r: (r.workload, _order(r.bucket), r.objective, r.sizes))
    plain = [as_written.get(record.key) or _plain(record) for record in ordered] + unread
    if not plain:
        lines[-1] += " []"
    for row in plain:
        rows = [f"{key}: {_flow(value)}" for key, value in row.items()]
        lines += [f"- {rows[0]}", *(f"  {row}" for row in rows[1:])]
    return "\n".join(lines) + "\n"


def _order(bucket: Bucket) -> tuple[int, int]:
    return (bucket.context[0] or 0, bucket.tokens[0] or 0)


def _plain(record: TuningRecord) -> dict[str, Any]:
    """A record as nested dicts, in the order of its fields."""
    row = {f.name: getattr(record, f.name) for f in fields(record)}
    workload, bucket = record.workload, record.bucket
    row["workload"] = {
        "op": workload.op,
        "pass": workload.pass_,
        "dtype": workload.dtype,
        "params": dict(workload.params),
    }
    row["bucket"] = {"tokens": list(bucket.tokens), "context": list(bucket.context)}
    row["schedule"] = _schedule(record.schedule)
    for name in ("default", "runner_up"):
        timed = row[name]
        row[name] = timed and {"schedule": _schedule(timed.schedule), "ms": timed.ms}
    return row


def _schedule(schedule: Schedule) -> dict[str, Any]:
    return {"algorithm": schedule.algorithm, "knobs": dict(schedule.knobs)}


def _flow(value: Any) -> str:
    """A value as YAML on one line; every text is quoted, so YAML never reads it as another type."""
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key}: {_flow(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_flow, value)) + "]"
    if isinstance(value, float):
        mantissa, exponent, power = f"{value:.6g}".partition("e")
        return (mantissa if "." in mantissa else f"{mantissa}.0") + exponent + power
    if isinstance(value, str):
        return '"' + re.sub(r'["\\]|[^ -~\u00a0-\ud7ff]', _escape, value) + '"'
    return {None: "null", True: "true", False: "false"}[value] if _is_word(value) else str(value)


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    return f"\\{character}" if character in '"\\' else f"\\U{ord(character):08x}"


def _is_word(value: object) -> bool:
    return value is None or isinstance(value, bool)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


_Range = Annotated[Range, BeforeValidator(lambda v: tuple(v) if isinstance(v, list) else v)]
_Values = dict[str, StrictBool | StrictInt | StrictStr]


class _WorkloadRow(_Strict):
    op: str
    pass_: str = Field(alias="pass")
    dtype: str
    params: _Values


class _BucketRow(_Strict):
    tokens: _Range
    context: _Range


class _ScheduleRow(_Strict):
    algorithm: str
    knobs: _Values

    def schedule(self) -> Schedule:
        return Schedule.of(self.algorithm, self.knobs)


class _TimedRow(_Strict):
    schedule: _ScheduleRow
    ms: float

    def timed(self) -> Timed:
        return Timed(self.schedule.schedule(), self.ms)


class _RecordRow(_Strict):
    workload: _WorkloadRow
    bucket: _BucketRow
    objective: Objective
    sizes: str
    schedule: _ScheduleRow
    fingerprint: str
    ms: float
    spread: float
    default: _TimedRow | None
    runner_up: _TimedRow | None
    measured: int
    failed: int
    of: int
    ended: str
    triton: str
    driver: str
    nsagen: str
    date: str

    def record(self) -> TuningRecord:
        """The record; raises InvalidInputError for an impossible workload or bucket."""
        row = {name: getattr(self, name) for name in type(self).model_fields}
        w = self.workload
        if own := {"op", "pass_", "dtype"} & w.params.keys():
            raise InvalidInputError(f"workload.params: must not name {', '.join(sorted(own))}")
        row["workload"] = Workload.of(w.op, w.pass_, dtype=w.dtype, **w.params)
        row["bucket"] = Bucket(self.bucket.tokens, self.bucket.context)
        row["schedule"] = self.schedule.schedule()
        row["default"] = self.default and self.default.timed()
        row["runner_up"] = self.runner_up and self.runner_up.timed()
        return TuningRecord(**row)


_KEYS = frozenset(one.alias or name for name, one in _RecordRow.model_fields.items())
"""Of a record that this version writes."""


class _FileRow(_Strict):
    device: str = Field(pattern="^[a-z0-9-]+$")
    target: str
    records: tuple[_RecordRow, ...]
