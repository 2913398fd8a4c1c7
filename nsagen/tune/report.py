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
from nsagen.tune.record import TuningRecord
from nsagen.tune.session import Result

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 1em }
table { border-collapse: collapse } td, th { padding: .2em .8em; border-bottom: 1px solid #ddd }
th { text-align: left } td.number { text-align: right; font-variant-numeric: tabular-nums }
code { font-size: 90% } section { margin-top: 3em }
"""


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
    page = f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>nsagen tune: {_text(result.device)}</title>
<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>
<h1>Tuning on {_text(result.device)}</h1>
{_summary(result)}
{"".join(sections)}
</body></html>
"""
    replace_file(path, page)


def _summary(result: Result) -> str:
    rows = "".join(_record_row(record) for record in result.records)
    notes = "".join(f"<li>{_text(line)}</li>" for line in [*result.notes, *result.failures])
    head = "<th>workload<th>sizes<th>winner<th>ms<th>default ms<th>gain<th>runner-up ms<th>spread"
    head += "<th>tried"
    table = f"<table><tr>{head}</tr>{rows}</table>" if rows else ""
    return table + (f"<ul>{notes}</ul>" if notes else "")


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
        figures = [_history(good), _slices(good), _parallel(good)]
        figures += [_importance(study)] if len(good) > 3 else []
        parts += [_plot(figure, f"s{number}p{i}") for i, figure in enumerate(figures)]
    rows = "".join(
        f"<tr><td>{_text(reason)}<td class=number>{count}" for reason, count in failed.most_common()
    )
    parts.append(f"<h3>Failed</h3><table>{rows}</table>" if rows else "<p>None failed.</p>")
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
    figure.update_layout(title="History", xaxis_title="trial", yaxis_title="ms", yaxis_type="log")
    return figure


def _slices(trials: list[FrozenTrial]):
    import plotly.graph_objects as go
    from plotly.subplots import make_subplots

    names = list(trials[0].params)
    figure = make_subplots(rows=1, cols=len(names), shared_yaxes=True, subplot_titles=names)
    for column, name in enumerate(names, 1):
        values = [_shown(t, name) for t in trials]
        texts = [t.user_attrs["schedule"] for t in trials]
        points = go.Scatter(x=values, y=[_ms(t) for t in trials], text=texts, mode="markers")
        figure.add_trace(points, row=1, col=column)
    figure.update_xaxes(type="category", categoryorder="category ascending")
    figure.update_yaxes(type="log")
    figure.update_layout(title="Slices: ms by each knob's value", showlegend=False)
    return figure


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
    line = {"color": [math.log(ms) for ms in times], "colorscale": "Viridis", "reversescale": True}
    figure = go.Figure(go.Parcoords(line=line, dimensions=dimensions))
    figure.update_layout(title="Parallel coordinates")
    return figure


def _importance(study: optuna.Study):
    import plotly.graph_objects as go

    found = get_param_importances(study)
    figure = go.Figure(go.Bar(x=list(found.values()), y=list(found), orientation="h"))
    figure.update_layout(title="Importance of each knob (share of the variance of log ms)")
    return figure


def _shown(trial: FrozenTrial, name: str) -> str:
    """A knob's own value, which the study codes as an index; `-` if the algorithm lacks it."""
    algorithm, _, knobs = trial.user_attrs["schedule"].rstrip(")").partition("(")
    if name == "algorithm":
        return algorithm
    values = dict(knob.split("=", 1) for knob in knobs.split(", ") if knob)
    return values.get(name, "-")


def _plot(figure, identity: str) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, div_id=identity)


def _text(value: object) -> str:
    return html.escape(str(value))
