"""`nsagen tune --report`: one HTML page about the searches, whole in itself."""

from __future__ import annotations

import html
import math
from collections import Counter
from pathlib import Path

import optuna
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from nsagen.codegen.files import replace_file
from nsagen.errors import TuneError
from nsagen.picture.page import ALGORITHM_HUES, page
from nsagen.tune.record import TuningRecord
from nsagen.tune.session import Result


def write_report(path: Path, result: Result) -> None:
    """Write the page: history, importance, slices, parallel coordinates, default, failures.

    Raises:
        TuneError: plotly is missing.
    """
    try:
        from plotly.offline import get_plotlyjs
    except ImportError:
        raise TuneError(
            "tune: --report needs plotly, which is not installed; pip install 'nsagen[plot]'"
        ) from None
    names = {str(study.study_name): study for study in result.studies}
    sections = [_section(study, i) for i, study in enumerate(names.values())]
    library = f"<script>{get_plotlyjs()}</script>"
    title = f"Tuning on {result.device}"
    replace_file(path, page(title, library + _summary(result), *sections))


def _summary(result: Result) -> str:
    rows = "".join(_record_row(record) for record in result.records)
    notes = "".join(f"<li>{_text(line)}</li>" for line in [*result.notes, *result.failures])
    head = "<th>workload<th>sizes<th>winner<th>ms<th>default ms<th>gain<th>runner-up ms<th>spread"
    head += "<th>tried"
    return _table(f"<tr>{head}</tr>{rows}" if rows else "") + (f"<ul>{notes}</ul>" if notes else "")


def _table(rows: str) -> str:
    return f'<div class="table"><table>{rows}</table></div>' if rows else ""


def _record_row(record: TuningRecord) -> str:
    default, gain = "cannot run", ""
    if record.default is not None:
        default = f"{record.default.ms:.4g}"
        gain = f"{100 * (record.default.ms / record.ms - 1):+.1f}%"
    cells = [f"{_text(record.workload)}, {_text(record.bucket)}", _text(record.sizes)]
    cells.append(f"<code>{_text(record.schedule)}</code>")
    numbers = [f"{record.ms:.4g}", default, gain]
    numbers.append(f"{record.runner_up.ms:.4g}" if record.runner_up else "")
    numbers += [f"{100 * record.spread:.1f}%", f"{record.measured} of {record.of}"]
    texts = "".join(f"<td>{cell}" for cell in cells)
    return f"<tr>{texts}{''.join(f'<td class=number>{n}' for n in numbers)}</tr>"


def _section(study: optuna.Study, number: int) -> str:
    """A search's plots and the reasons of what failed."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    good = [t for t in trials if t.user_attrs["outcome"]["ms"] is not None]
    failed = Counter(
        t.user_attrs["outcome"]["reason"] for t in trials if t.user_attrs["outcome"]["ms"] is None
    )
    title, _, _ = study.study_name.partition(" #")
    parts = [f"<section><h2>{_text(title)}</h2>"]
    if good:
        parts += [f"<h3>History</h3>{_plot(_history(good), f's{number}h')}"]
        parts += ["<h3>Slices: ms by each knob's value</h3>", _slices(good, f"s{number}s")]
        wide = f'<div style="min-width: 44rem">{_plot(_parallel(good), f"s{number}p")}</div>'
        parts += [f'<h3>Parallel coordinates</h3><div class="table">{wide}</div>']
        if len(good) > 3:
            shares = _plot(_importance(study), f"s{number}i")
            parts += [f"<h3>Importance of each knob: share of the variance of log ms</h3>{shares}"]
    rows = "".join(
        f"<tr><td>{_text(reason)}<td class=number>{count}" for reason, count in failed.most_common()
    )
    parts.append(f"<h3>Failed</h3>{_table(rows)}" if rows else "<p>None failed.</p>")
    return "".join(parts) + "</section>"


def _ms(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["outcome"]["ms"])


def _history(trials: list[FrozenTrial]):  # plotly is optional
    import plotly.graph_objects as go

    numbers = [t.number for t in trials]
    best, least = [], math.inf
    for trial in trials:
        least = min(least, _ms(trial))
        best.append(least)
    texts = [t.user_attrs["schedule"] for t in trials]
    points = go.Scatter(x=numbers, y=[_ms(t) for t in trials], text=texts, mode="markers")
    line = go.Scatter(x=numbers, y=best, mode="lines", line_shape="hv", name="best so far")
    figure = go.Figure([points.update(name="measured"), line])
    default = trials[0]
    figure.add_hline(y=_ms(default), line_dash="dot", annotation_text="first (the default)")
    figure.update_layout(xaxis_title="trial", yaxis_title="ms", yaxis_type="log")
    figure.update_layout(legend={"orientation": "h", "y": 1.12})
    return figure


def _slices(trials: list[FrozenTrial], identity: str) -> str:
    """A small plot a knob, as many beside each other as there is room for."""
    import plotly.graph_objects as go

    panels = []
    texts = [t.user_attrs["schedule"] for t in trials]
    for i, name in enumerate(trials[0].params):
        values = [_shown(t, name) for t in trials]
        known = sorted(set(values), key=lambda v: (len(v), v))
        points = go.Scatter(x=values, y=[_ms(t) for t in trials], text=texts, mode="markers")
        figure = go.Figure(points.update(marker_color=ALGORITHM_HUES[i % len(ALGORITHM_HUES)]))
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=known)
        figure.update_yaxes(type="log")
        plot = _plot(figure, f"{identity}{i}", height=200)
        panels.append(f"<figure><strong>{_text(name)}</strong>{plot}</figure>")
    # auto-fill: each plot measures its panel when there are no others beside it yet.
    columns = "grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr))"
    return f'<div class="panels" style="{columns}">{"".join(panels)}</div>'


def _parallel(trials: list[FrozenTrial]):
    import plotly.graph_objects as go

    dimensions = []
    for name in trials[0].params:
        values = [_shown(t, name) for t in trials]
        known = sorted(set(values), key=lambda v: (len(v), v))
        axis = {"label": name, "values": [known.index(v) for v in values]}
        dimensions.append({**axis, "tickvals": list(range(len(known))), "ticktext": known})
    times = [_ms(t) for t in trials]
    dimensions.append({"label": "ms", "values": times})
    colours = [[0.0, ALGORITHM_HUES[1]], [1.0, ALGORITHM_HUES[-1]]]  # fast ones stand out
    line = {"color": [math.log(ms) for ms in times], "colorscale": colours}
    return go.Figure(go.Parcoords(line=line, dimensions=dimensions))


def _importance(study: optuna.Study):
    import plotly.graph_objects as go

    found = get_param_importances(study)
    return go.Figure(go.Bar(x=list(found.values()), y=list(found), orientation="h"))


def _shown(trial: FrozenTrial, name: str) -> str:
    """A knob's own value, which the study codes as an index; `-` if the algorithm lacks it."""
    algorithm, _, knobs = trial.user_attrs["schedule"].rstrip(")").partition("(")
    if name == "algorithm":
        return algorithm
    values = dict(knob.split("=", 1) for knob in knobs.split(", ") if knob)
    return values.get(name, "-")


def _plot(figure, identity: str, height: int = 320) -> str:
    """A plot in the page's colours; its style sheet has those of text and lines."""
    clear = "rgba(0, 0, 0, 0)"
    figure.update_layout(template="none", paper_bgcolor=clear, plot_bgcolor=clear, height=height)
    figure.update_layout(colorway=ALGORITHM_HUES, font_family="system-ui, DejaVu Sans, sans-serif")
    parallel = figure.data[0].type == "parcoords"
    figure.update_layout(
        margin={"l": 64, "r": 48 if parallel else 16, "t": 40 if height > 200 else 10, "b": 40}
    )
    figure.update_xaxes(automargin=True)
    figure.update_yaxes(automargin=True)
    shown = {"displayModeBar": False, "responsive": True}
    made = figure.to_html(full_html=False, include_plotlyjs=False, div_id=identity, config=shown)
    return f'<div class="plot">{made}</div>'


def _text(value: object) -> str:
    return html.escape(str(value))
