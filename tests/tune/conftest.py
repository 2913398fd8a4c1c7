"""A machine with a simulated GPU, and one op with a space of its own to search."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from nsagen.codegen import template
from nsagen.core import worker
from nsagen.core.worker import Reply
from nsagen.tune import evaluate, session
from nsagen.tune.search import Budget
from nsagen.tune.selection import Selection
from nsagen.tune.session import Places, Result
from nsagen.tune.settings import Settings, Step
from tests.one_op import SPEC, one_op
from tests.tune.fake import FakeCompiler, FakeMeasurer

__all__ = ["one_op"]  # a fixture

SPACE = """
from nsagen.codegen.space import Knob, PowerOfTwo, Rule, ScheduleSpace

SPACES = (
    ScheduleSpace(
        op="gated_sum",
        pass_="forward",
        algorithm="elementwise",
        knobs=(
            PowerOfTwo("block", 32, 1024, "elements a program"),
            Knob("num_warps", (1, 2, 4, 8), "threads"),
            Knob("num_stages", (1, 2, 3, 4), "loads in flight"),
        ),
        rules=(Rule("an element a thread", lambda w, s, t: s.block >= 32 * s.num_warps),),
        derive=lambda workload, schedule: {"mistake": ""},
        default=lambda workload, target: {"block": 256, "num_warps": 1, "num_stages": 1},
    ),
)
"""

USES_ALL_KNOBS = "# {{ num_warps }} warps, {{ num_stages }} stages\n"


class InlineWorker:
    """Answers as a Worker does, in this process: a kernel's death is an answer of one line."""

    def __init__(self, server: object, environment: Mapping[str, str] | None = None) -> None:
        self._server = server
        self.starts = 1
        self.alive = True

    def ask(self, method: str, *args: Any, limit_s: float) -> Reply:
        try:
            return Reply(getattr(self._server, method)(*args))
        except Exception as error:  # as a worker answers it
            reason = f"{type(error).__name__}: {error}"
            return Reply(reason=reason, of_system=isinstance(error, OSError))

    def spawn(self) -> None:
        pass

    def close(self) -> None:
        pass


class Silent:
    """Watches a run and remembers it."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def watched(self, address: str) -> None:
        pass

    def step(self, step: Step) -> None:
        self.steps.append(step)

    def decided(self, record: object, device: str) -> None:
        pass


class World:
    """A folder with a spec of one op, whose runs of `nsagen tune` meet the fake GPU."""

    def __init__(self, folder: Path, fake: Path) -> None:
        self.folder = folder
        self.spec = folder / "one.yaml"
        self.url = f"sqlite:///{folder / 'study.db'}"
        self._fake = fake
        one_size = SPEC.replace("DTYPE", "float16").replace("[32, 48]", "32")
        self.spec.write_text(one_size.replace("name: few", "name: one"))
        self.behave({})

    def behave(self, behaviours: Mapping[str, str]) -> None:
        """Let schedules whose text contains a key behave so."""
        self._fake.write_text(json.dumps(dict(behaviours)))

    def change_template(self, old: str, new: str) -> None:
        """Edit the op's template or its space."""
        for path in (self.folder / "templates" / "gated_sum").glob("*.*"):
            path.write_text(path.read_text().replace(old, new))
        forget_templates()

    @property
    def tuned(self) -> Path:
        return self.folder / "out" / "one"

    @property
    def records(self) -> Path:
        return self.tuned / "nvidia-h200.yaml"

    def tune(
        self,
        trials: int = 12,
        *,
        seqlens: tuple[int, ...] = (4096,),
        watcher: Silent | None = None,
        **settings: Any,
    ) -> Result:
        """Tune the op."""
        budget = settings.pop("budget", Budget(trials=trials))
        settings.setdefault("sampler", "random")  # quick; most tests do not ask for more
        settings.setdefault("ahead", 2)
        return session.tune(
            str(self.spec),
            Selection(seqlens=seqlens),
            Settings(budget=budget, **settings),
            Places(out=self.folder / "out", url=self.url, jobs=1),
            watcher or Silent(),
        )


def forget_templates() -> None:
    template.forget()
    evaluate.candidates_for.cache_clear()


@pytest.fixture
def world(one_op: Path, monkeypatch: pytest.MonkeyPatch) -> World:
    """Searches in this process alone."""
    folder = one_op / "templates" / "gated_sum"
    (folder / "space.py").write_text(SPACE)
    path = folder / "forward_elementwise.py.j2"
    path.write_text(path.read_text().replace("{{ header }}\n", "{{ header }}\n" + USES_ALL_KNOBS))
    path.write_text(path.read_text().replace("BLOCK = ", "WARPS = {{ num_warps }}\nBLOCK = "))
    path.write_text(path.read_text().replace("BLOCK = ", "STAGES = {{ num_stages }}\nBLOCK = "))
    forget_templates()
    monkeypatch.setenv("FAKE", str(one_op / "fake.json"))
    monkeypatch.setenv("NSAGEN_CACHE_DIR", str(one_op / "cache"))
    servers = {session.MEASURER: FakeMeasurer, session.COMPILER: FakeCompiler}
    for module in (session, worker):
        monkeypatch.setattr(
            module, "Worker", lambda name, environment=None: InlineWorker(servers[name]())
        )
    yield World(one_op, one_op / "fake.json")
    forget_templates()
