"""Nothing that a spec says, nor its path, becomes code in what is generated."""

from __future__ import annotations

import ast
import shlex
from pathlib import Path

import pytest

from nsagen.codegen.build import build
from nsagen.codegen.template import default_schedule, kernel_fingerprint
from nsagen.core.bucket import Bucket
from nsagen.core.errors import BuildError, SpecError
from nsagen.core.target import KNOWN_TARGETS
from nsagen.records.files import save_records
from nsagen.records.record import Timed, TuningRecord
from nsagen.spec import load_spec
from tests.bad.support import FOLDER, contents
from tests.one_op import TEMPLATE, one_op

__all__ = ["one_op"]  # a fixture

PAYLOADS = (
    "\nimport pwned\n#",
    "\rimport pwned\r#",
    '"""\nimport pwned\n"""',
    "'); import pwned; ('",
    "{{ pwned() }}",
    "{% set pwned %}{% endset %}",
    "\\nimport pwned",
    "# \x0cimport pwned",
    "\u2028import pwned",
)


def code(folder: Path) -> dict[str, str]:
    """What Python makes of each generated file."""
    files = contents(folder / "generated")
    return {path: ast.dump(ast.parse(text)) for path, text in files.items() if path.endswith(".py")}


def yaml_text(text: str) -> str:
    escaped = "".join(f"\\u{ord(c):04x}" if not c.isalnum() else c for c in text)
    return f'"{escaped}"'


@pytest.mark.parametrize("payload", PAYLOADS)
def test_a_value_of_a_spec(one_op: Path, payload: str) -> None:
    """In each place that takes text: refused, or kept out of the files."""
    text = (one_op / "few.yaml").read_text()
    evil = yaml_text(f"few{payload}")
    attempts = [
        text.replace("name: few", f"name: {evil}"),
        text.replace("float32", evil),
        text.replace("avgpool", evil),
        text.replace("head_dim: 32", f"head_dim: {evil}"),
        text.replace("window_size", evil),
        f"{text}targets: {evil}\n",
        f"{text}passes: {evil}\n",
    ]
    for attempt in attempts:
        assert attempt != text
        (one_op / "few.yaml").write_text(attempt)
        with pytest.raises(SpecError):
            load_spec("few.yaml")
    (one_op / "few.yaml").write_text(f"{text}description: {evil}\n")
    assert "pwned" in load_spec("few.yaml").description


def test_a_description(one_op: Path) -> None:
    text = (one_op / "few.yaml").read_text()
    (one_op / "few.yaml").write_text(f"{text}description: {yaml_text(''.join(PAYLOADS))}\n")
    build(load_spec("few.yaml"), Path("generated"))
    assert not any(b"pwned" in data for data in contents(one_op / "generated").values())


def test_a_path(one_op: Path) -> None:
    """It stands in comments; what could end one is refused."""
    build(load_spec("few.yaml"), Path("generated"))
    usual = code(one_op)
    (one_op / "pyproject.toml").touch()  # so that the path below it is named, not only the file
    for payload in ("import pwned", *PAYLOADS):
        path = one_op / f"{payload.replace('/', '')} few.yaml"
        path.write_text((one_op / "few.yaml").read_text())
        if not path.name.isprintable():
            with pytest.raises(SpecError, match="a path must be printable text"):
                load_spec(path)
            continue
        build(load_spec(path), Path("generated"))
        assert code(one_op) == usual
        assert shlex.quote(path.name) in (one_op / "generated" / "few" / "__init__.py").read_text()


def test_a_folder_that_is_not_named_in_the_call(
    one_op: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (one_op / "pyproject.toml").touch()
    folder = one_op / "a\nimport pwned"
    folder.mkdir()
    (one_op / "few.yaml").rename(folder / "few.yaml")
    monkeypatch.chdir(folder)
    with pytest.raises(SpecError, match=r"printable text; got 'a\\nimport pwned/few.yaml'"):
        load_spec("few.yaml")


TEXTS = ("sizes", "ended", "driver", "triton", "nsagen", "date", "fingerprint")


def test_texts_of_a_tuning_record(one_op: Path) -> None:
    """A record that a build uses, with payloads in all of its texts."""
    spec = load_spec("few.yaml")
    build(spec, Path("generated"))
    usual = code(one_op)
    (workload, *_) = spec.workloads()
    schedule = default_schedule(workload, KNOWN_TARGETS["cuda:90"])
    for payload in PAYLOADS:
        texts = dict.fromkeys(TEXTS, payload)
        texts["fingerprint"] = kernel_fingerprint(workload, schedule)
        timed = Timed(schedule, 1.0)
        record = TuningRecord(
            **{"workload": workload, "bucket": Bucket(), "objective": "time", "ms": 1.0},
            **{"schedule": schedule, "default": timed, "runner_up": None, "spread": 0.0},
            **{"measured": 1, "failed": 0, "of": 1, **texts},
        )
        save_records(spec.tuned_folder, "gpu", "cuda:90", [record])
        assert build(spec, Path("generated")).notes == ()
        assert code(one_op) == usual
    kernels = contents(one_op / "generated" / "few" / "kernels").values()
    assert sum(b"tuned on gpu" in text for text in kernels) == 1


@pytest.mark.parametrize("value", ["16 + pwned()", "${pwned}", "", True, -64, 2**70, 48])
def test_knobs_of_a_tuning_record(one_op: Path, value: str | int) -> None:
    """A value that the schedule space does not list is not used, and the build says so."""
    (one_op / "tuned" / "few").mkdir(parents=True)
    text = (FOLDER / "record.yaml").read_text().replace("{block: 64}", f"{{block: {value!r}}}", 1)
    (one_op / "tuned" / "few" / "gpu.yaml").write_text(text.replace("True", "true"))
    spec = load_spec("few.yaml")
    (note,) = build(spec, Path("generated")).notes
    assert "gpu.yaml: 1 outdated and not used" in note
    assert not any(b"pwned" in data for data in contents(one_op / "generated").values())


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__",
        "kernel_name.__init__.__globals__",
        "block.__class__.__base__.__subclasses__()",
        "cycler.__init__.__globals__.os",
        "'{0.__class__}'.format(block) | attr('__class__') | attr('mro')",
        "self.__init__.__globals__",
        "lipsum.__globals__",
    ],
)
def test_a_template_reaches_no_python_behind_its_values(one_op: Path, expression: str) -> None:
    path = one_op / "templates" / "gated_sum" / "forward_elementwise.py.j2"
    path.write_text(f"{TEMPLATE}\n# {{{{ {expression} }}}}\n")
    with pytest.raises(BuildError, match="gated_sum/forward_elementwise"):
        build(load_spec("few.yaml"), Path("generated"))
    assert not (one_op / "generated").exists()
