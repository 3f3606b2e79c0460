"""Templates with what is put into them, which they escape and make visible: one file, that asks no other host for anything."""

from __future__ import annotations

import base64
import datetime
import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from tools.reporting.words import shown

__all__ = ["filled", "now"]

HERE = Path(__file__).parent


def filled(
    template: str,
    styles: Sequence[str],
    script: str | None = None,
    policy: str = "",
    words: Mapping[str, Any] | None = None,
    **values: Any,
) -> str:
    """
    Args:
        template: that extends base.html.
        styles, script: files beside it; the page's policy allows them and nothing else.
        policy: what else it allows.
        words: functions that templates may call.
        values: `title` and `kicker`, and what the template's blocks want.
    """
    templates = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, finalize=shown, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    templates.globals.update(words or {})
    style = "".join(map(_read, styles))
    code = "" if script is None else _read(script)
    allowed = policy + (f"; script-src '{_hash(code)}'" if code else "")
    return templates.get_template(template).render(
        style=Markup(style), style_hash=_hash(style), script=Markup(code), policy=Markup(allowed), **values
    )


def now() -> str:
    """For `kicker`."""
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")


def _read(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    """For the policy of the page: no style and no script but these."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
