"""An export changes what an export wrote and nothing else; the command says what it did."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from nsagen.cli.app import main
from nsagen.codegen.build import build
from nsagen.core.errors import BuildError
from nsagen.export.write import export
from nsagen.spec import load_spec
from tests.bad.support import contents
from tests.export.small import NSA, exported


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.yaml").write_text(NSA.replace("NAME", "mine"))
    return tmp_path


def run(*words: str, code: int = 0) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["export", *words])
    assert ended.value.code == code


def test_a_second_export_writes_nothing(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("mine.yaml", "--json")
    first = json.loads(capsys.readouterr().out)
    assert first["package"] == "nsagen_mine"
    assert Path(first["folder"]) == Path("exported/nsagen_mine")
    assert "nsagen_mine/dispatcher.py" in first["written"]
    run("mine.yaml")
    said = capsys.readouterr().out
    assert "0 files written, 0 removed" in said
    assert "pip wheel --no-deps exported/nsagen_mine" in said


def test_files_of_another_layout_go_and_files_of_the_users_stay(home: Path) -> None:
    folder = exported(home, NSA, "mine").folder
    (folder / "notes.txt").write_text("mine")
    result = exported(home, NSA, "mine", layout="kernels")
    assert "pyproject.toml" in result.removed
    assert not (folder / "pyproject.toml").exists()
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "build/torch-cuda/metadata.json").is_file()


@pytest.mark.parametrize("name", ["README.md", "pyproject.toml", "nsagen_mine/ops/rope.py"])
def test_an_edited_file_is_refused_until_it_is_moved_away(home: Path, name: str) -> None:
    """Such as a README with the user's own results: another release would drop them."""
    folder = exported(home, NSA, "mine").folder
    edited = folder / name
    edited.write_text(edited.read_text() + "# more\n")
    before = contents(home)
    with pytest.raises(BuildError, match=rf"must be as nsagen wrote it; got {name}, edited since"):
        exported(home, NSA, "mine", release=2)
    assert contents(home) == before
    edited.rename(home / "kept")
    assert name in exported(home, NSA, "mine", release=2).written


def test_an_edited_file_of_another_layout_stays(home: Path) -> None:
    folder = exported(home, NSA, "mine", layout="kernels").folder
    (folder / "build.toml").write_text("# mine\n")
    result = exported(home, NSA, "mine")
    assert (folder / "build.toml").read_text() == "# mine\n"
    assert "build.toml" not in result.removed
    assert not (folder / "torch-ext").exists()  # empty folders go


def test_hashes_of_a_later_version_are_not_guessed(home: Path) -> None:
    """Its manifest may say more of a file; what is already right is written over nothing."""
    folder = exported(home, NSA, "mine").folder
    manifest = folder / "export.json"
    content = json.loads(manifest.read_text())
    content["files"] = {path: {"sha256": was} for path, was in content["files"].items()}
    manifest.write_text(json.dumps({**content, "nsagen": "9.0", "more": [1]}))
    before = contents(home)
    with pytest.raises(BuildError, match=r"must be as nsagen wrote it; got .*README\.md"):
        exported(home, NSA, "mine", release=2)
    assert contents(home) == before
    assert exported(home, NSA, "mine").written == ("export.json",)


@pytest.mark.parametrize("name", ["train.py", "pyproject.toml", "export.json", "nsagen_mine"])
def test_a_folder_of_the_users_is_refused_before_a_byte_is_written(home: Path, name: str) -> None:
    (home / "out/nsagen_mine").mkdir(parents=True)
    (home / "out/nsagen_mine" / name).write_text("{}")
    before = contents(home)
    with pytest.raises(BuildError, match=rf"export: .* got {name}, which it did not write"):
        exported(home, NSA, "mine")
    assert contents(home) == before


def test_built_and_exported_packages_are_never_taken_for_each_other(home: Path) -> None:
    spec = load_spec("mine.yaml")
    built = build(spec, home / "out").folder
    before = contents(built)
    with pytest.raises(BuildError, match="which it did not write"):
        exported(home, NSA, "mine", name="mine")
    assert contents(built) == before
    folder = exported(home, NSA, "mine", name="other").folder
    (home / "other.yaml").write_text(NSA.replace("NAME", "other"))
    before = contents(folder)
    with pytest.raises(BuildError, match="which it did not write"):
        build(load_spec("other.yaml"), home / "out")
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--layout", "conda"], "--layout must be one of package, kernels; got 'conda'"),
        (["--name", "My-Kernels"], "--name must be at least two lower-case letters"),
        (["--name", "x"], "--name must be at least two lower-case letters"),
        (["--name", "json"], "got 'json', which is another"),
        (["--name", "numpy"], "got 'numpy', which is another"),
        (["--name", "torch"], "got 'torch', which is another"),
        (["--name", "class"], "no keyword of Python; got 'class'"),
        (["--release", "0"], "--release must be at least 1; got 0"),
        (["--repo-id", "a/b"], "--repo-id is for --layout kernels"),
        (["--layout", "kernels", "--repo-id", "b"], "must be organization/name; got 'b'"),
        (["--tuned", "nowhere"], "export: --tuned must be a folder of tuning records"),
    ],
)
def test_wrong_usage_exits_with_2_and_writes_nothing(
    home: Path, capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    before = contents(home)
    run("mine.yaml", *words, code=2)
    assert said in capsys.readouterr().err
    assert contents(home) == before


def test_a_folder_in_the_way_exits_with_1(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (home / "exported").write_text("a file")
    run("mine.yaml", code=1)
    assert "export: must be able to write" in capsys.readouterr().err


def test_the_help_has_an_example(capsys: pytest.CaptureFixture[str]) -> None:
    run("--help")
    assert "Example: nsagen export tiny --out exported" in " ".join(capsys.readouterr().out.split())


RECORDS = """
device: {device}
target: "cuda:80"
records:
- workload: {{op: "rope", pass: "forward", dtype: "float32", params: {{head_dim: 16}}}}
  bucket: {{tokens: [null, 5792], context: [null, null]}}
  objective: "time"
  sizes: "1 x 2048 tokens, 8 kv heads"
  schedule: {schedule}
  fingerprint: "{fingerprint}"
  ms: 0.03
  spread: 0.02
  default: null
  runner_up: null
  measured: 4
  failed: 0
  of: 40
  ended: "done"
  triton: "3.6.0"
  driver: "580"
  nsagen: "0.1.0"
  date: "{date}"
"""


def test_what_was_tuned_on_each_device_is_a_file_that_the_dispatcher_follows(home: Path) -> None:
    """Two devices of one architecture: each has its own, where a build takes the newer."""
    from nsagen.codegen.template import default_schedule, kernel_fingerprint, space_for
    from nsagen.core.target import parse_target
    from nsagen.core.workload import Schedule, Workload

    workload = Workload.of("rope", "forward", dtype="float32", head_dim=16)
    target = parse_target("cuda:80")
    default = default_schedule(workload, target)
    space = space_for(workload, default.algorithm)
    knobs = dict(default.knobs)
    others = [
        {**knobs, "num_warps": warps} for warps in (1, 2, 4, 8) if warps != knobs["num_warps"]
    ]
    valid = [Schedule.of(default.algorithm, one) for one in others]
    valid = [one for one in valid if not space.violations(workload, one, target)]
    devices = dict(zip(("nvidia-a100", "nvidia-a800"), valid, strict=False))
    (home / "tuned/mine").mkdir(parents=True)
    for number, (device, schedule) in enumerate(devices.items()):
        text = RECORDS.format(
            device=device,
            schedule=json.dumps({"algorithm": schedule.algorithm, "knobs": dict(schedule.knobs)}),
            fingerprint=kernel_fingerprint(workload, schedule),
            date=f"2026-11-2{number}T09:47:18Z",
        )
        (home / "tuned/mine" / f"{device}.yaml").write_text(text.lstrip())
    result = exported(home, NSA, "mine")
    assert not result.notes
    package = result.folder / "nsagen_mine"
    kernels: dict[str, Any] = {}
    for device in devices:
        content = json.loads((package / f"configs/{device}.json").read_text())
        (entry,) = content["entries"]
        assert (content["device"], entry["tokens"]) == (device, [None, 5792])
        assert entry["evidence"].startswith(f"tuned on {device}: 0.03 ms")
        assert (package / f"kernels/{entry['kernel']}.py").is_file()
        kernels[device] = entry["kernel"]
    assert kernels["nvidia-a100"] != kernels["nvidia-a800"]
    table = (package / "dispatcher.py").read_text()
    assert kernels["nvidia-a800"] in table  # the newer one serves the architecture's other devices
    assert kernels["nvidia-a100"] not in table


def test_an_export_is_made_again_with_its_records(home: Path) -> None:
    records = home / "own" / "mine" / "gpu.yaml"  # as `nsagen tune --out own` writes them
    records.parent.mkdir(parents=True)
    records.write_text('device: gpu\ntarget: "cuda:90"\nrecords: []\n')
    run("mine.yaml", "--tuned", "own")
    manifest = json.loads((home / "exported/nsagen_mine/export.json").read_text())
    assert list(manifest["tuned"]) == ["gpu.yaml"]
    assert manifest["records"] == {"path": "../../own/mine", "with_shipped": False}
    assert not list(home.rglob(".*.lock"))
    assert exported_again() == ()
    records.unlink()
    records.parent.rmdir()
    with pytest.raises(BuildError, match="export: exported/nsagen_mine: its tuning records must"):
        exported_again()


def exported_again() -> tuple[str, ...]:
    return export(load_spec("mine.yaml"), Path("exported")).written
