"""`nsagen tune --watch`: a page of the studies that lives as long as the search."""

from __future__ import annotations

import json
import socket
import urllib.request

import optuna
import pytest

from nsagen.cli.app import main
from nsagen.tune.watch import watched


def test_a_page_on_loopback_shows_the_studies_and_ends_with_the_block() -> None:
    pytest.importorskip("optuna_dashboard")
    storage = optuna.storages.InMemoryStorage()
    study = optuna.create_study(storage=storage, study_name="rope forward")
    with watched(storage) as address:
        study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=2)
        assert address.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(address, timeout=30) as answer:
            assert b"<html" in answer.read()
        with urllib.request.urlopen(f"{address}api/studies", timeout=30) as answer:
            (shown,) = json.load(answer)["study_summaries"]
        assert shown["study_name"] == "rope forward"
    port = int(address.rstrip("/").rpartition(":")[2])
    with socket.socket() as free:
        assert free.connect_ex(("127.0.0.1", port)) != 0


@pytest.mark.parametrize(
    "options", [("--record-exhaustive", "x.jsonl.gz"), ("--simulate", "x.jsonl.gz")]
)
def test_it_is_refused_where_no_study_is_kept(
    options: tuple[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("optuna_dashboard")
    with pytest.raises(SystemExit) as ended:
        main(["tune", "tiny", "--watch", *options])
    assert ended.value.code == 2
    assert f"got {options[0]}" in capsys.readouterr().err
