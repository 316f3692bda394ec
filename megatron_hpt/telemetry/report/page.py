"""The HTML page: one file that loads nothing from outside, and has the browser hold it to that (Content-Security-Policy)."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping, Sequence
from importlib import resources
from string import Template
from typing import Any

from megatron_hpt.objective.gate import Choice
from megatron_hpt.telemetry.report import charts
from megatron_hpt.telemetry.report.panels import STATE_COLORS
from megatron_hpt.telemetry.report.visits import State

VEGA_LITE = "6.4"
"""The version of Vega-Lite, one of those that vl-convert brings."""
CHOICES = {
    Choice.DEMONSTRATION: {"name": "demonstration (SFT)", "color": "#a86f00"},
    Choice.ROLLOUTS: {"name": "its own answers (RL)", "color": STATE_COLORS[State.RL]},
    Choice.OFF_POLICY: {"name": "demonstration by off-policy RL", "color": "#a8507c"},
    Choice.BOTH: {"name": "both", "color": "#1f7fb0"},
    Choice.SKIPPED: {"name": "nothing", "color": "#6b6b6b"},
}
"""How the page names and colours what a prompt learnt from; the colours are dark enough for white text."""
_SCRIPTS = ("base.js", "charts.js", "answers.js", "page.js")
_SETTINGS = Template('<details class="config"><summary>configuration of $name</summary><pre>$text</pre></details>')


def page(title: str, subtitle: str, payload: Mapping[str, Any], settings: Sequence[tuple[str, str]]) -> str:
    """Return the whole page.

    Args:
        payload: what the scripts show.
        settings: name and configuration of every run.
    """
    import vl_convert

    constants = {"themes": {"light": charts.theme(False), "dark": charts.theme(True)}, "choices": CHOICES}
    return Template(_part("page.html")).substitute(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        style=_part("page.css"),
        settings="".join(_SETTINGS.substitute(name=html.escape(name), text=html.escape(text)) for name, text in settings),
        vega=_script(vl_convert.javascript_bundle(vl_version=VEGA_LITE)),
        payload=_script(json.dumps({**payload, **constants}, ensure_ascii=False, allow_nan=False, separators=(",", ":"))),
        script=f"(() => {{\n'use strict';\n{''.join(map(_part, _SCRIPTS))}}})();",
    )


def _part(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _script(text: str) -> str:
    """Escape a script so that nothing in it ends its element, or opens a comment in which the end would be overlooked.

    Such text stands in strings only, whose meaning the escapes keep.
    """
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--").replace("<script", "<\\u0073cript")
