"""What templates call to turn values into words and looks."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from markupsafe import Markup

from recipes.data.visible import visible
from recipes.run.metrics import METRICS, key_of
from tools.reporting.compare import Missing
from tools.reporting.curves import Curve, CurveChart
from tools.reporting.numbers import BROAD, NARROW, short, written
from tools.reporting.runs import Run
from tools.reporting.samples import BOUNDS, CUT, Token

__all__ = ["exact", "shown", "words_for"]

VALUE = 600  # characters of a configuration's value


def words_for(runs: Sequence[Run]) -> dict[str, Any]:
    """By the name that templates know them by."""
    functions: dict[str, Callable[..., str | list[str]]] = {
        "columns": partial(_columns, runs=runs), "exact": exact, "look": partial(_look, runs=len(runs)),
        "phase": _phase, "phase_names": _phase_names, "short": short, "signed": _signed, "token_look": _token_look,
        "token_text": _token_text, "token_title": _token_title,
        "unit": partial(_unit, algorithms={run.algorithm for run in runs}), "value_text": _value_text, "written": written,
    }  # fmt: skip
    return {"runs": runs, "narrow": NARROW, "broad": BROAD, "bounds": BOUNDS, **functions}


def shown(value: Any) -> Any:
    """Of every value that a template writes: no character of it may act on what shows it."""
    return visible(value, keep="\n") if isinstance(value, str) and not isinstance(value, Markup) else value


def exact(value: float) -> str:
    """All digits, as metrics.jsonl has them."""
    return json.dumps(value)


def _signed(value: float) -> str:
    return ("+" if value > 0 else "") + written(value)


def _look(curve: Curve, runs: int) -> str:
    """A companion has the colour of its run; of a single run its own."""
    return f"r{curve.run if runs > 1 else int(curve.companion)}"


def _columns(chart: CurveChart, runs: Sequence[Run]) -> list[str]:
    """Of the table of its curves."""
    return [_column(chart, curve, runs) for curve in chart.curves]


def _column(chart: CurveChart, curve: Curve, runs: Sequence[Run]) -> str:
    names = [curve.metric] * (len(chart.metrics) > 1) + [runs[curve.run].name] * (len(runs) > 1)
    return " · ".join(names) or chart.title


def _phase(timer: str) -> str:
    return timer.removeprefix("timers/")


def _phase_names(timers: Sequence[str]) -> list[str]:
    return [_phase(timer) for timer in timers]


def _unit(metric: str, algorithms: set[str | None]) -> str:
    """Where the table says in which recipe it has one, only there; of a held-out set's number that of all answers'."""
    key = key_of(metric)
    if key == "val_rollouts/*":
        key = f"val_rollouts/{metric.rpartition('/')[2]}"
    whole = METRICS[key].unit if key in METRICS else "share" if key else ""
    unit, only, where = whole.partition(" in ")
    return "" if unit == "none" or (only and algorithms != {where.partition(",")[0]}) else unit


def _value_text(value: Any) -> str:
    """As YAML would have it, but for what is long."""
    text = str(value) if isinstance(value, str | Missing) else json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= VALUE else text[:VALUE] + " …"


def _token_look(token: Token) -> str:
    if token.observed:
        return "t seen"
    if token.level is None:
        return "t unknown"
    return f"t {'p' if token.apart > 0 else 'n'}{token.level}" if token.level else "t"


def _token_title(token: Token) -> str:
    known = {"sampler": token.sampler, "trainer": token.trainer}
    parts = [f"token {token.place}, id {token.id}"]
    parts += [f"{name} {value:.6g}" for name, value in known.items() if value is not None]
    if token.apart is not None:
        parts.append(f"trainer - sampler {token.apart:+.2e}")
    return ", ".join(parts)


def _token_text(token: Token) -> str:
    """What cannot be seen is marked, and a line break breaks the line, too."""
    if token.text is None:
        return f" {token.id} "
    return token.text.replace("\n", "↵\n").replace(CUT, "▯")
