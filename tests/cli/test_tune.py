"""What `nsagen tune` says; the searches themselves have tests under tests/tune."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from nsagen.cli.app import main
from nsagen.cli.tune_progress import print_result
from nsagen.core.errors import TuneError
from nsagen.core.worker import Reply
from nsagen.tune import session
from nsagen.tune.session import Result
from nsagen.tune.settings import Settings


@pytest.mark.parametrize(
    ("options", "seconds"),
    [
        ((), None),
        (("--objective", "static"), 120.0),
        (("--objective", "static", "--time", "1h"), 3600.0),
    ],
)
def test_ranking_without_a_gpu_has_a_limit_of_its_own(
    options: tuple[str, ...], seconds: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    found: list[Settings] = []

    def tune(name: str, chosen: Any, settings: Settings, *_: Any) -> Result:
        found.append(settings)
        return Result("fake")

    monkeypatch.setattr(session, "tune", tune)
    with pytest.raises(SystemExit) as ended:
        main(["tune", "tiny", *options])
    assert ended.value.code == 0
    assert [settings.seconds for settings in found] == [seconds]


def test_without_a_gpu_it_says_what_to_do() -> None:
    class Worker:
        def ask(self, *_: Any, **__: Any) -> Reply:
            return Reply({})  # what the measuring process answers where PyTorch sees no GPU

    with pytest.raises(TuneError, match=r"PyTorch sees none here; .* --objective static"):
        session.identify(Worker())  # type: ignore[arg-type]


def test_a_user_cache_that_is_no_folder_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    cache.touch()
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(cache))
    static = ("--objective", "static", "--target", "cuda:90", "--out", str(tmp_path / "records"))
    with pytest.raises(SystemExit) as ended:
        main(["tune", "tiny", "--op", "rope", *static])
    assert ended.value.code == 1
    assert capsys.readouterr().err.endswith(
        f"tune: the user cache, {cache}, must be a folder that can be written, because it keeps "
        f"the studies; got Not a directory: {cache}; set NSAGEN_CACHE_DIR to another, or name a "
        "storage with --study\n"
    )


def test_many_failures_of_one_reason_are_counted(capsys: pytest.CaptureFixture[str]) -> None:
    late = [f"task {i}: not begun; the time is up" for i in range(70)]
    result = Result("fake", failures=[*late, "task 70: no schedule ran; out of memory: 3 GiB"])
    print_result(result)
    assert capsys.readouterr().err.splitlines() == [
        *(f"nsagen: tune: {line}" for line in late[:3]),
        "nsagen: tune: 67 more: not begun; the time is up",
        "nsagen: tune: task 70: no schedule ran; out of memory: 3 GiB",
    ]
