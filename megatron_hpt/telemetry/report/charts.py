"""Charts as Vega-Lite specifications: plain data that the browser draws on the page, and vl-convert into the picture."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
Points = Sequence[dict[str, Any]]
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8c8c8c")
"""Okabe and Ito's palette, which colour-blind readers tell apart; grey for black and yellow, which vanish on one background."""
ORDERED = ("#8b4fb3", "#3f7fc4", "#21918c", "#4faf57", "#c9a400")
"""Viridis without its darkest and palest colours, for what has an order; it is seen on either background."""
DASHES = ([1, 0], [6, 3], [2, 2])
HEIGHT = 190
_HOVER = {"type": "point", "nearest": True, "on": "pointerover", "clear": "pointerout"}


def style(index: int) -> tuple[str, list[int]]:
    """Return colour and dashes of the n-th run; 21 runs differ."""
    return COLORS[index % len(COLORS)], DASHES[index // len(COLORS) % len(DASHES)]


def overlay(names: Sequence[str], unit: str, form: str, log: bool = False, share: bool = False) -> Spec:
    """Draw the curves of several runs over each other.

    Its data is points ``{x, y, series, lone}``: series is "s0", "s1" … in the order of names, and lone points are drawn as
    dots. The chart's parameter `hidden` lists series that are not drawn.
    """
    ids = _ids(names)
    styles = [style(index) for index in range(len(names))]
    color = {"field": "series", "scale": {"domain": ids, "range": [color for color, _ in styles]}, "legend": None}
    dash = {"field": "series", "scale": {"domain": ids, "range": [dash for _, dash in styles]}, "legend": None}
    y = _y(unit, log, share)
    return {
        "data": {"name": "points"},
        "height": HEIGHT,
        "params": [{"name": "hidden", "value": []}],
        "transform": [{"filter": "indexof(hidden, datum.series) < 0"}],
        "encoding": {"x": _x("step")},
        "layer": [
            {
                "mark": {"type": "line", "strokeWidth": 1.7, "strokeJoin": "round"},
                "encoding": {"y": y, "color": color, "strokeDash": dash},
            },
            {
                "transform": [{"filter": "datum.lone && isValid(datum.y)"}],
                "mark": {"type": "point", "filled": True, "size": 28, "opacity": 1},
                "encoding": {"y": y, "color": color},
            },
            _rule(names, form),
        ],
    }


def still(spec: Spec, points: Points, names: Sequence[str], title: str, width: int) -> Spec:
    """Turn an `overlay` into a chart for the picture: without what answers to a pointer, with a legend for several names."""
    line, dots, _ = spec["layer"]
    legend = _label(names) if len(names) > 1 else None
    line = {**line, "encoding": {**line["encoding"], "color": {**line["encoding"]["color"], "legend": legend}}}
    parts = {"encoding": spec["encoding"], "height": spec["height"], "width": width, "title": title}
    return {**parts, "layer": [line, dots], "data": {"values": list(points)}}


def lines(points: Points, colors: Mapping[str, str], unit: str, form: str, share: bool = False) -> Spec:
    """Draw several curves of one run, with a legend that can be clicked.

    Args:
        points: ``{x, y, series}``; series is "s0", "s1" … in the order of colors.
        colors: name → colour.
    """
    mark = {"type": "line", "strokeWidth": 1.7, "point": {"size": 14}}
    return _faded(points, colors, mark, {"y": _y(unit, False, share)}, form)


def stacked(points: Points, colors: Mapping[str, str], unit: str, form: str, share: bool = False) -> Spec:
    """Draw areas over each other, in the order of colors from the bottom; the arguments are those of `lines`."""
    y = {**_y(unit, False, share), "stack": "zero"}
    return _faded(points, colors, {"type": "area", "interpolate": "linear"}, {"y": y, "order": {"field": "series"}}, form)


def _faded(points: Points, colors: Mapping[str, str], mark: Spec, encoding: Spec, form: str) -> Spec:
    """Draw curves or areas of which those fade that are not chosen in the legend."""
    names = list(colors)
    scale = {"domain": _ids(names), "range": list(colors.values())}
    color = {"field": "series", "type": "nominal", "scale": scale, "legend": _label(names)}
    opacity = {"condition": {"param": "chosen", "value": 0.9}, "value": 0.08}
    return {
        "data": {"values": list(points)},
        "height": HEIGHT,
        "encoding": {"x": _x("step")},
        "layer": [
            {
                "params": [{"name": "chosen", "select": {"type": "point", "fields": ["series"]}, "bind": "legend"}],
                "mark": mark,
                "encoding": {**encoding, "color": color, "opacity": opacity},
            },
            _rule(names, form),
        ],
    }


def segments(values: Points, colors: Mapping[str, str], rows: int) -> Spec:
    """Draw a heat map with one line for each prompt, coloured by its state.

    Args:
        values: ``{row, start, end, state, prompt, visits, last}``.
    """
    shown = {
        "prompt": "prompt",
        "state": "state",
        "start": "from step",
        "to": "to step",
        "visits": "visits",
        "last": "last answers",
    }
    return {
        "data": {"values": list(values)},
        "height": rows * max(2, min(14, 420 // max(1, rows))),
        "transform": [{"calculate": "datum.row + 1", "as": "below"}, {"calculate": "datum.end - 1", "as": "to"}],
        "mark": {"type": "rect"},
        "encoding": {
            "x": {**_x("step"), "field": "start", "scale": {"nice": False}},
            "x2": {"field": "end"},
            "y": {
                "field": "row",
                "type": "quantitative",
                "scale": {"domain": [rows, 0], "nice": False},
                "axis": {"labels": False, "ticks": False, "grid": False, "title": "prompts, one line each"},
            },
            "y2": {"field": "below"},
            "color": {
                "field": "state",
                "scale": {"domain": list(colors), "range": list(colors.values())},
                "legend": {"title": None},
            },
            "tooltip": [{"field": field, "title": title} for field, title in shown.items()],
        },
    }


def matrix(values: Points, names: Sequence[str]) -> Spec:
    """Draw a matrix of the steps from state to state.

    Args:
        values: ``{before, after, share, count}``; shares add up to 1 in a row.
    """
    axes = {
        "x": {
            "field": "after",
            "type": "nominal",
            "sort": list(names),
            "axis": {"title": "at the next visit", "labelAngle": 0},
        },
        "y": {"field": "before", "type": "nominal", "sort": list(names), "axis": {"title": "at a visit"}},
    }
    scale = {"domain": [0, 1], "scheme": "blues"}
    return {
        "data": {"values": list(values)},
        "height": max(2, len(names)) * 34,
        "encoding": axes,
        "layer": [
            {
                "mark": {"type": "rect"},
                "encoding": {
                    "color": {"field": "share", "type": "quantitative", "scale": scale, "legend": None},
                    "tooltip": [
                        {"field": "before", "title": "at a visit"},
                        {"field": "after", "title": "at the next"},
                        {"field": "count", "type": "quantitative", "title": "prompts", "format": ","},
                        {"field": "share", "type": "quantitative", "title": "share of the row", "format": ".1%"},
                    ],
                },
            },
            {
                "mark": {"type": "text", "fontSize": 11},
                "encoding": {
                    "text": {"field": "share", "type": "quantitative", "format": ".0%"},
                    "color": {"condition": {"test": "datum.share > 0.55", "value": "white"}, "value": "#1c1c1c"},
                },
            },
        ],
    }


def _x(title: str) -> Spec:
    return {
        "field": "x",
        "type": "quantitative",
        "title": title,
        "axis": {"grid": False, "labelFlush": False},
        "scale": {"nice": False, "zero": False},
    }


def _y(unit: str, log: bool, share: bool) -> Spec:
    scale: Spec = {"type": "log"} if log else {"zero": False, "nice": True}
    if share:
        scale = {"domain": [0, 1]}
    axis: Spec = {"title": unit, "tickCount": 5}
    if log:
        axis |= {"format": ".2~g", "gridOpacity": 0.25}
    return {"field": "y", "type": "quantitative", "scale": scale, "axis": axis}


def _ids(names: Sequence[str]) -> list[str]:
    """Return the names of series, which are numbers: Vega reads dots and brackets in the name of a field as a path."""
    return [f"s{index}" for index in range(len(names))]


def _label(names: Sequence[str]) -> Spec:
    labels = f"{json.dumps(list(names))}[toNumber(slice(datum.label, 1))]"
    return {"title": None, "labelExpr": labels, "columns": max(1, 54 // (6 + max(map(len, names), default=0)))}


def _rule(names: Sequence[str], form: str) -> Spec:
    """Return the layer that draws a line under the pointer and shows every curve's value there."""
    values = [
        {"field": series, "type": "quantitative", "title": name, "format": form}
        for series, name in zip(_ids(names), names, strict=True)
    ]
    return {
        "transform": [{"filter": "isValid(datum.y)"}, {"pivot": "series", "value": "y", "groupby": ["x"]}],
        "mark": {"type": "rule", "strokeWidth": 1},
        "params": [{"name": "hover", "select": {**_HOVER, "fields": ["x"]}}],
        "encoding": {
            "opacity": {"condition": {"param": "hover", "empty": False, "value": 0.45}, "value": 0},
            "tooltip": [{"field": "x", "type": "quantitative", "title": "step"}, *values],
        },
    }


def theme(dark: bool) -> Spec:
    """Return the colours and fonts of all charts."""
    ink, faint, line = ("#d6d9dd", "#9aa0a8", "#3a4048") if dark else ("#24292f", "#57606a", "#d8dee4")
    text = {"labelColor": faint, "titleColor": faint, "labelFontSize": 11, "titleFontSize": 11, "titleFontWeight": "normal"}
    return {
        "background": None,
        "font": "system-ui, 'Segoe UI', 'Liberation Sans', Helvetica, Arial, sans-serif",
        "view": {"stroke": None},
        "axis": {**text, "domainColor": line, "tickColor": line, "gridColor": line, "gridOpacity": 0.6},
        "legend": {"labelColor": ink, "labelFontSize": 11, "orient": "bottom", "labelLimit": 260, "symbolType": "square"},
        "rule": {"color": ink},
        "title": {"color": ink, "anchor": "start", "fontSize": 12, "fontWeight": 600},
    }
