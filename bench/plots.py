"""SVG drawings of the results: bars, curves, and strips of dots. Written by hand, so that they are small and change little.

Each brings its own background, and colours for light and dark mode that the viewer's setting chooses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

LIGHT = {"back": "#ffffff", "text": "#1f2328", "soft": "#59636e", "grid": "#d1d9e0", "peer": "#9aa5b1"}
LIGHT |= {
    "chest": "#0a62c4",
    "ahead": "#d9730d",
    "c1": "#b3420b",
    "c2": "#1a7f37",
    "c3": "#8250df",
    "c4": "#7a6a00",
    "c5": "#59636e",
}
DARK = {"back": "#0d1117", "text": "#e6edf3", "soft": "#9198a1", "grid": "#30363d", "peer": "#5b6570"}
DARK |= {
    "chest": "#4c9bff",
    "ahead": "#f0984a",
    "c1": "#ff9b5e",
    "c2": "#4ac26b",
    "c3": "#b78aff",
    "c4": "#d6bd3d",
    "c5": "#9198a1",
}
CHAR = 5.9  # the width of a character at 11 px, a little generous
ROW, GAP, HEAD, FOOT = 16, 26, 24, 22


class Bar(NamedTuple):
    name: str
    best: float
    median: float
    kind: str  # "chest", "ahead" (of chest), "peer" or "limit"


class Line(NamedTuple):
    name: str
    points: list[tuple[float, float]]
    kind: str  # "chest", or c1 to c5
    dashed: bool = False


def number(value: float) -> str:
    """Three digits, as one reads them."""
    size = abs(value)
    if size >= 99.5:
        return f"{value:,.0f}"
    if size >= 9.95:
        return f"{value:.1f}"
    return f"{value:.2f}" if size >= 0.0995 or not size else f"{value:.3f}"


def svg(width: float, height: float, body: Sequence[str], label: str) -> str:
    def rules(colours: dict[str, str]) -> str:
        found = [f".{name}{{fill:{colour}}}" for name, colour in colours.items()]
        found += [f".s-{name}{{stroke:{colour};fill:none}}" for name, colour in colours.items()]
        return "".join(found)

    style = "text{font:11px system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif}.t{font-weight:600;font-size:12px}"
    style += rules(LIGHT)
    style += f"@media(prefers-color-scheme:dark){{{rules(DARK)}}}"
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}" role="img" aria-label="{escape(label)}">',
            f"<style>{style}</style>",
            f'<rect class="back" width="{width:.0f}" height="{height:.0f}" rx="6"/>',
            *body,
            "</svg>\n",
        ]
    )


def _text(x: float, y: float, text: str, kind: str = "text", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _line(x1: float, y1: float, x2: float, y2: float, kind: str, width: float = 1) -> str:
    return f'<line class="s-{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke-width="{width:g}"/>'


def _decades(values: list[float], pad: float = 1.0) -> tuple[int, int]:
    low, high = math.floor(math.log10(min(values) / pad)), math.ceil(math.log10(max(values) * pad))
    return low, max(high, low + 1)


def _power(exponent: int) -> str:
    if -2 <= exponent <= 3:
        return f"{10**exponent:g}".replace("1000", "1,000")
    for at, letter in ((9, "G"), (6, "M"), (3, "k")):
        if exponent >= at:
            return f"{10 ** (exponent - at):g}{letter}"
    return f"1e{exponent}"


def bars(panels: list[tuple[str, list[Bar]]], label: str) -> str:
    """A panel for each column, the shortest bar first, on a logarithmic axis; the line behind a bar ends at the median."""
    panels = [(title, sorted(rows, key=lambda bar: bar.best)) for title, rows in panels if rows]
    names = CHAR * max(len(bar.name) for _, rows in panels for bar in rows) + 8
    across = min(len(panels), 3 if names < 150 else 2)
    width, room = 1000 / across, 1000 / across - names - 76
    body = []
    top = 8.0
    for start in range(0, len(panels), across):
        shown = panels[start : start + across]
        depth = max(len(rows) for _, rows in shown) * ROW
        for place, (title, rows) in enumerate(shown):
            left = place * width + 12
            body += [_text(left, top + 16, title, "text t"), *_bars(rows, left, top + HEAD, names, room)]
        top += HEAD + depth + GAP
    body += _legend(top + 4)
    return svg(1000, top + FOOT, body, label)


def _bars(rows: list[Bar], left: float, top: float, names: float, room: float) -> list[str]:
    positive = [value for bar in rows for value in (bar.best, bar.median) if value > 0]
    low, high = _decades(positive or [1.0])
    zero, bottom = left + names, top + len(rows) * ROW

    def x(value: float) -> float:
        return zero + room * (math.log10(value) - low) / (high - low) if value > 0 else zero

    body = []
    step = max(1, math.ceil((high - low) / (room / 34)))
    for exponent in range(low, high + 1, step):
        at = x(10.0**exponent)
        body += [_line(at, top, at, bottom, "grid"), _text(at, bottom + 11, _power(exponent), "soft", "middle")]
    for i, bar in enumerate(rows):
        y = top + i * ROW
        body.append(_text(zero - 6, y + 12, bar.name, "text" if bar.kind != "limit" else "soft", "end"))
        shape = f'x="{zero:.1f}" y="{y + 3:.1f}" width="{max(1.0, x(bar.best) - zero):.1f}" height="{ROW - 6}"'
        body.append(
            f'<rect class="s-soft" stroke-dasharray="2 2" {shape}/>'
            if bar.kind == "limit"
            else f'<rect class="{bar.kind}" {shape}/>'
        )
        end = x(max(bar.best, bar.median))
        if end - x(bar.best) > 1:
            body += [_line(x(bar.best), y + 8, end, y + 8, "soft"), _line(end, y + 4, end, y + 12, "soft")]
        body.append(_text(end + 4, y + 12, number(bar.best), bar.kind if bar.kind in ("chest", "ahead") else "soft"))
    return body


def _legend(y: float) -> list[str]:
    body, x = [], 12.0
    for kind, text in (
        ("chest", "chest"),
        ("peer", "slower than chest"),
        ("ahead", "faster or smaller than chest"),
        ("limit", "no library: what the machine allows"),
    ):
        shape = f'x="{x}" y="{y}" width="14" height="10"'
        body.append(
            f'<rect class="s-soft" stroke-dasharray="2 2" {shape}/>' if kind == "limit" else f'<rect class="{kind}" {shape}/>'
        )
        body.append(_text(x + 19, y + 9, text, "soft"))
        x += 19 + CHAR * len(text) + 16
    body.append(_text(x, y + 9, "less is better, log scale, thin line: median", "soft"))
    return body


def curves(panels: list[tuple[str, list[Line]]], label: str) -> str:
    """A panel for each column, both axes logarithmic, one legend for all."""
    panels = [(title, lines) for title, lines in panels if lines]
    across, width, depth = 3, 1000 / 3, 190
    body: list[str] = []
    legend = {line.name: line for _, lines in panels for line in lines}
    x, y = 12.0, 10.0
    for line in legend.values():
        if x + 32 + CHAR * len(line.name) > 990:
            x, y = 12.0, y + 18
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        body.append(
            f'<path class="s-{line.kind}" d="M{x} {y + 5}h22" stroke-width="{3 if line.kind == "chest" else 2}"{dash}/>'
        )
        body.append(_text(x + 27, y + 9, line.name))
        x += 27 + CHAR * len(line.name) + 18
    top = y + 22
    for start in range(0, len(panels), across):
        for place, (title, lines) in enumerate(panels[start : start + across]):
            left = place * width + 12
            body += [_text(left, top + 16, title, "text t"), *_curves(lines, left + 38, top + HEAD, width - 66, depth - 40)]
        top += HEAD + depth
    return svg(1000, top + 8, body, label)


def _curves(lines: list[Line], left: float, top: float, room: float, depth: float) -> list[str]:
    xs = [x for line in lines for x, _ in line.points]
    ys = [max(y, 1e-6) for line in lines for _, y in line.points]
    (x0, x1), (y0, y1) = _decades(xs), _decades(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        return left + room * (math.log10(x) - x0) / (x1 - x0), top + depth * (1 - (math.log10(max(y, 1e-6)) - y0) / (y1 - y0))

    body = []
    for exponent in range(y0, y1 + 1):
        y = at(10.0**x0, 10.0**exponent)[1]
        body += [_line(left, y, left + room, y, "grid"), _text(left - 5, y + 4, _power(exponent), "soft", "end")]
    for exponent in range(x0, x1 + 1):
        body.append(_text(at(10.0**exponent, 10.0**y0)[0], top + depth + 14, _power(exponent), "soft", "middle"))
    for line in sorted(lines, key=lambda line: line.kind == "chest"):
        found = [at(*point) for point in sorted(line.points)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in found)
        thick = 3 if line.kind == "chest" else 2
        dash = ' stroke-dasharray="4 3"' if line.dashed else ""
        body.append(f'<path class="s-{line.kind}" d="{path}" stroke-width="{thick}"{dash}/>')
        body += [f'<circle class="{line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="{thick}"/>' for x, y in found]
    return body


def strips(rows: list[tuple[str, list[float], float]], label: str, ours: str, bound: float) -> str:
    """For each name all its values as dots and their mean as a bar, on a logarithmic axis around 1."""
    left, room, high = 110.0, 800.0, 26
    low_x, high_x = min(v for _, values, _ in rows for v in values), max(v for _, values, _ in rows for v in values)
    low_x, high_x = min(low_x, 0.5) * 0.95, max(high_x, 1.5) * 1.05
    bottom = 30 + len(rows) * high

    def x(value: float) -> float:
        return left + room * math.log(value / low_x) / math.log(high_x / low_x)

    body = [_text(12, 18, label, "text t")]
    for tick in (0.1, 0.2, 0.3, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 3, 5, 7, 10, 20, 50):
        if low_x <= tick <= high_x:
            kind = "soft" if tick == 1 else "ahead" if tick == bound else "grid"
            body += [_line(x(tick), 28, x(tick), bottom, kind), _text(x(tick), bottom + 14, f"{tick:g}", "soft", "middle")]
    for i, (name, values, mean) in enumerate(rows):
        y = 30 + i * high + high / 2
        kind = "chest" if name.startswith(ours) else "peer"
        body.append(_text(left - 8, y + 4, name, "text", "end"))
        body += [f'<circle class="{kind}" cx="{x(value):.1f}" cy="{y:.1f}" r="3" fill-opacity=".45"/>' for value in values]
        body.append(f'<rect class="{kind}" x="{x(mean) - 2:.1f}" y="{y - 10:.1f}" width="4" height="20"/>')
        body.append(_text(left + room + 8, y + 4, f"{number(mean)}, worst {number(max(values))}", "text"))
    return svg(1040, bottom + 26, body, label)
