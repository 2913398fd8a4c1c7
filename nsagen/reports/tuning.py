"""`nsagen tune --report`: one self-contained HTML page about the searches."""

from __future__ import annotations

import html
import math
from collections import Counter
from pathlib import Path

import optuna
from optuna.importance import get_param_importances
from optuna.trial import FrozenTrial, TrialState

from nsagen.core.files import replace_file
from nsagen.core.installed import require_extra
from nsagen.records.record import TuningRecord
from nsagen.reports.page import check_free, page
from nsagen.tune.session import Result


def check_report(path: Path) -> None:
    """Refuse a page that could not be written after the search; call it before.

    Raises:
        InvalidInputError: plotly is missing, or a file exists that is not a page of nsagen.
    """
    require_extra("tune --report", "plot", "plotly")
    check_free(path, "choose another --out")


def write_report(path: Path, result: Result) -> None:
    """Write the page: history, importance, slices, parallel coordinates, default, failures.

    Raises:
        InvalidInputError: as `check_report`.
    """
    check_report(path)
    from plotly.offline import get_plotlyjs

    names = {str(study.study_name): study for study in result.studies}
    unit = "cost" if result.device.startswith("static-") else "ms"
    sections = [_section(study, unit, opened=len(names) == 1) for study in names.values()]
    style, script = (
        Path(__file__).with_name(f"tuning.{end}").read_text("utf-8") for end in ("css", "js")
    )
    intro = f"<style>{style}</style><script>{get_plotlyjs()}</script>{_summary(result, unit)}"
    sections.append(f"<script>{script}</script>")
    replace_file(path, page(f"Tuning on {result.device}", intro, *sections))


def _summary(result: Result, unit: str) -> str:
    rows = "".join(_record_row(record) for record in result.records)
    notes = "".join(f"<li>{_text(line)}</li>" for line in [*result.notes, *result.failures])
    head = f"<th>workload<th>sizes<th>winner<th>{unit}<th>default {unit}<th>gain"
    head += f"<th>runner-up {unit}<th>spread<th>tried"
    table = f'<div class="table"><table><tr>{head}</tr>{rows}</table></div>' if rows else ""
    return table + (f"<ul>{notes}</ul>" if notes else "")


def _record_row(record: TuningRecord) -> str:
    default, gain = "cannot run", ""
    if record.default is not None:
        default = f"{record.default.ms:.4g}"
        gain = f"{100 * (record.default.ms / record.ms - 1):+.1f}%"
        gain = "default" if record.default.schedule == record.schedule else gain
    cells = [f"{_text(record.workload)}, {_text(record.bucket)}", _text(record.sizes)]
    cells.append(f"<code>{_text(record.schedule)}</code>")
    numbers = [f"{record.ms:.4g}", default, gain]
    numbers.append(f"{record.runner_up.ms:.4g}" if record.runner_up else "")
    numbers += [f"{100 * record.spread:.1f}%", f"{record.measured} of {record.of}"]
    texts = "".join(f"<td>{cell}" for cell in cells)
    return f"<tr>{texts}{''.join(f'<td class=number>{n}' for n in numbers)}</tr>"


def _section(study: optuna.Study, unit: str, *, opened: bool) -> str:
    """A search's plots, drawn once the section is opened, and the reasons for its failures."""
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    good = [t for t in trials if t.user_attrs["outcome"]["ms"] is not None]
    failed = Counter(
        t.user_attrs["outcome"]["reason"] for t in trials if t.user_attrs["outcome"]["ms"] is None
    )
    title, _, _ = study.study_name.partition(" #")
    parts = [f"<details{' open' if opened else ''}><summary>{_text(title)}</summary>"]
    if good:
        figures = [_history(good, unit), _slices(good, unit), _parallel(good, unit)]
        figures += [_importance(study, unit)] if len(good) > 3 else []
        parts += map(_plot, figures)
    rows = "".join(
        f"<tr><td>{_text(reason)}<td class=number>{count}" for reason, count in failed.most_common()
    )
    table = f'<div class="table"><table><tr><th>failed<th>times</tr>{rows}</table></div>'
    parts.append(table if rows else "<p>None failed.</p>")
    return "".join(parts) + "</details>"


def _ms(trial: FrozenTrial) -> float:
    return float(trial.user_attrs["outcome"]["ms"])


def _history(trials: list[FrozenTrial], unit: str):  # plotly is optional
    import plotly.graph_objects as go

    numbers = [t.number for t in trials]
    best, least = [], math.inf
    for trial in trials:
        least = min(least, _ms(trial))
        best.append(least)
    texts = [t.user_attrs["schedule"] for t in trials]
    points = go.Scatter(x=numbers, y=[_ms(t) for t in trials], text=texts, mode="markers")
    line = go.Scatter(x=numbers, y=best, mode="lines", line_shape="hv", name="best so far")
    first = go.Scatter(x=[numbers[0], numbers[-1]], y=[_ms(trials[0])] * 2, mode="lines")
    first.update(name="first (the default)", line={"dash": "dot", "color": "#8a94a3"})
    figure = go.Figure([points.update(name="evaluated"), line, first])
    figure.update_layout(title="History", xaxis_title="trial", yaxis_title=unit, yaxis_type="log")
    return figure


def _slices(trials: list[FrozenTrial], unit: str):
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = list(trials[0].params)
    figure = make_subplots(rows=1, cols=len(names), shared_yaxes=True, subplot_titles=names)
    for column, name in enumerate(names, 1):
        values = [_shown(t, name) for t in trials]
        texts = [t.user_attrs["schedule"] for t in trials]
        points = go.Scatter(x=values, y=[_ms(t) for t in trials], text=texts, mode="markers")
        figure.add_trace(points, row=1, col=column)
        order = sorted(set(values), key=_place)
        figure.update_xaxes(type="category", categoryarray=order, row=1, col=column)
    figure.update_yaxes(type="log")
    figure.update_layout(title=f"Slices: {unit} by each knob's value", showlegend=False)
    return figure


def _parallel(trials: list[FrozenTrial], unit: str):
    import plotly.graph_objects as go

    dimensions = []
    for name in trials[0].params:
        values = [_shown(t, name) for t in trials]
        known = sorted(set(values), key=_place)
        axis = {"label": name, "values": [known.index(v) for v in values]}
        dimensions.append({**axis, "tickvals": list(range(len(known))), "ticktext": known})
    times = [_ms(t) for t in trials]
    dimensions.append({"label": unit, "values": times})
    line = {"color": [math.log(ms) for ms in times], "colorscale": "Viridis", "reversescale": True}
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions))
    figure.update_layout(title="Parallel coordinates", margin_l=150)
    return figure


def _importance(study: optuna.Study, unit: str):
    import plotly.graph_objects as go

    found = get_param_importances(study)
    figure = go.Figure(go.Bar(x=list(found.values()), y=list(found), orientation="h"))
    figure.update_layout(title=f"Importance of each knob (share of the variance of log {unit})")
    return figure


def _place(value: str) -> tuple[int, str]:
    """Where a knob's value goes among others: numbers by size, then words."""
    return (int(value), "") if value.lstrip("-").isdecimal() else (1 << 62, value)


def _shown(trial: FrozenTrial, name: str) -> str:
    """A knob's own value, which the study encodes as an index; `-` if the algorithm lacks it."""
    algorithm, _, knobs = trial.user_attrs["schedule"].rstrip(")").partition("(")
    if name == "algorithm":
        return algorithm
    values = dict(knob.split("=", 1) for knob in knobs.split(", ") if knob)
    return values.get(name, "-")


def _plot(figure) -> str:
    """A plot's container and data, on the page's own background."""
    clear = "rgba(0, 0, 0, 0)"
    figure.update_layout(template="none", paper_bgcolor=clear, plot_bgcolor=clear)
    figure.update_layout(margin={"r": 40, "t": 90, "b": 60})
    figure.update_yaxes(automargin=True)
    data = figure.to_json().replace("</", "<\\/")  # nothing in it may end the script
    return (
        '<div class="table"><div class="plot"></div>'
        f'<script type="application/json">{data}</script></div>'
    )


def _text(value: object) -> str:
    return html.escape(str(value))
