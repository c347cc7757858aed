"""Line charts as SVG for the written pages: the report and the comparison plot.

The drawing is stretched to its box, with coordinates from 0 to 1,000. The labels are HTML placed
over it in percent, so that text has the same size in every window.
"""

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from markupsafe import Markup

from nanogpt.render.html import TEMPLATES, render

# Longer curves are drawn as means of neighbouring points, with a band from minimum to maximum.
MAX_POINTS = 240


@dataclass(frozen=True)
class Curve:
    """A line through points from left to right.

    Args:
        name: Name in the legend.
        colour: CSS class that sets the colour.
        x: Positions of the points.
        y: Values of the points.
        low: Minimum of the values that each point averages; empty without averaging.
        high: Maximum of these values.
        markers: True to mark each point, for single measurements.
    """

    name: str
    colour: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    markers: bool = False


@dataclass(frozen=True)
class Axis:
    """A linear or logarithmic scale from `low` to `high`."""

    low: float
    high: float
    log: bool = False

    def position(self, value: float) -> float:
        """Return where a value lies between the low end (0) and the high end (1)."""
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)

    def percent_from_top(self, value: float) -> float:
        """Return the position of a value on a vertical axis as a CSS percentage."""
        return 100 - 100 * self.position(value)

    def ticks(self, max_ticks: int) -> list[float]:
        """Return round numbers on the scale, at most `max_ticks` if it is linear."""
        if self.log:
            return self._log_ticks(max_ticks)
        size = 10 ** math.floor(math.log10((self.high - self.low) / max_ticks))
        spacings = (size * digit for digit in (1, 2, 5, 10, 20))
        spacing = next(s for s in spacings if (self.high - self.low) / s <= max_ticks)
        first = math.ceil(self.low / spacing - 1e-9)
        last = math.floor(self.high / spacing + 1e-9)
        return [spacing * k for k in range(first, last + 1)]

    def _log_ticks(self, max_ticks: int) -> list[float]:
        powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
        ticks: list[float] = []
        for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
            values = (digit * 10.0**power for power in powers for digit in digits)
            ticks = [value for value in values if self.low <= value <= self.high]
            if len(ticks) <= max_ticks:
                break
        return ticks if len(ticks) > 1 else Axis(self.low, self.high).ticks(max_ticks)


@dataclass(frozen=True)
class Chart:
    """The content and the options of a chart.

    Args:
        title: Heading of the chart.
        unit: Unit of the vertical axis.
        curves: At least one curve.
        x_max: Right end of the horizontal axis, which starts at 0.
        x_name: Name of the horizontal axis in the text alternative.
        reference_lines: Values by name, drawn as horizontal lines.
        right_unit: Unit of a second vertical axis, "" for none.
        right_scale: Value on the second axis per unit of the first.
        log: True for a logarithmic vertical axis.
        from_zero: True to start the vertical axis at 0.
        large: True for a chart over the full width of the page.
    """

    title: str
    unit: str
    curves: Sequence[Curve]
    x_max: float
    x_name: str = "step"
    reference_lines: dict[str, float] = field(default_factory=dict)
    right_unit: str = ""
    right_scale: float = 1.0
    log: bool = False
    from_zero: bool = False
    large: bool = False

    @property
    def x_axis(self) -> Axis:
        """The horizontal axis."""
        return Axis(0, self.x_max)

    @property
    def y_axis(self) -> Axis:
        """The vertical axis, which covers all values with a margin."""
        values = [
            v for curve in self.curves for part in (curve.y, curve.low, curve.high) for v in part
        ]
        values += self.reference_lines.values()
        low, high = min(values), max(values)
        if self.log and low > 0:
            factor = max(1.02, (high / low) ** 0.04)
            return Axis(low / factor, high * factor, log=True)
        margin = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
        return Axis(0 if self.from_zero and low >= 0 else low - margin, high + margin)

    @property
    def alt_text(self) -> str:
        """The text alternative for screen readers."""
        parts = [
            f"{curve.name}: {format_tick(curve.y[0])} at {self.x_name} {format_tick(curve.x[0])}, "
            f"{format_tick(curve.y[-1])} at {self.x_name} {format_tick(curve.x[-1])}"
            for curve in self.curves
        ]
        parts += [f"{name}: {format_tick(value)}" for name, value in self.reference_lines.items()]
        return f"{self.title}, {self.unit}. {'; '.join(parts)}."

    def to_html(self) -> Markup:
        """Return the chart as an HTML figure."""
        return Markup(render("chart.html", chart=self, paths=_paths(self), labels=_labels(self)))

    def cursor_data(self) -> dict[str, object]:
        """Return the values that charts.js shows at the cursor."""
        curves = [
            {"x": [round(x, 1) for x in curve.x], "y": [format_tick(y) for y in curve.y]}
            for curve in self.curves
        ]
        return {"axis": self.x_name, "max": self.x_max, "curves": curves}


def downsample(name: str, colour: str, x: Sequence[float], y: Sequence[float]) -> Curve:
    """Return a curve of at most `MAX_POINTS` points, as means of neighbours if necessary."""
    if len(x) <= MAX_POINTS // 4:
        return Curve(name, colour, list(x), list(y))
    n = min(MAX_POINTS, max(MAX_POINTS // 4, len(x) // 8))
    edges = [len(x) * k // n for k in range(n + 1)]
    buckets = list(pairwise(edges))
    mean_x, mean_y = ([sum(values[a:b]) / (b - a) for a, b in buckets] for values in (x, y))
    low = [min(y[a:b]) for a, b in buckets]
    high = [max(y[a:b]) for a, b in buckets]
    return Curve(name, colour, mean_x, mean_y, low, high)


def format_tick(value: float) -> str:
    """Return a number with four significant digits."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    if abs(value) >= 0.001 or value == 0:
        return f"{value:.4g}"
    return f"{value:.2g}".replace("e-0", "e-")


def separate_labels(positions: dict[str, float], distance: float = 5.5) -> list[tuple[str, float]]:
    """Move overlapping labels down until they are `distance` percent apart; sort from the top."""
    labels: list[tuple[str, float]] = []
    for name, position in sorted(positions.items(), key=lambda item: item[1]):
        labels.append((name, max(position, labels[-1][1] + distance) if labels else position))
    return labels


def _paths(chart: Chart) -> list[tuple[str, str]]:
    """Return the CSS classes and the path data of everything drawn."""
    x_axis, y_axis = chart.x_axis, chart.y_axis
    grid = "".join(f"M0 {_y(y_axis, value)}H1000" for value in y_axis.ticks(_max_ticks(chart)))
    paths = [("grid", grid)]
    for value in chart.reference_lines.values():
        paths.append(("level", f"M0 {_y(y_axis, value)}H1000"))
    for curve in chart.curves:
        points = _points(curve.x, curve.y, x_axis, y_axis)
        if curve.low:
            outline = _points(curve.x, curve.high, x_axis, y_axis)
            outline += _points(curve.x, curve.low, x_axis, y_axis)[::-1]
            paths.append((f"band {curve.colour}", f"M{'L'.join(outline)}Z"))
        paths.append((f"line {curve.colour}", f"M{'L'.join(points)}"))
        if curve.markers or len(points) == 1:
            # A line of length zero with round caps is a dot.
            paths.append((f"dots {curve.colour}", "".join(f"M{point}h0" for point in points)))
    return paths


def _labels(chart: Chart) -> list[tuple[str, str, str, str]]:
    """Return CSS class, side, position in percent, and text of each label."""
    x_axis, y_axis = chart.x_axis, chart.y_axis
    max_ticks = _max_ticks(chart)
    labels = [
        ("y", "top", y_axis.percent_from_top(value), format_tick(value))
        for value in y_axis.ticks(max_ticks)
    ]
    if chart.right_unit:
        low, high = y_axis.low * chart.right_scale, y_axis.high * chart.right_scale
        right_axis = Axis(low, high, y_axis.log)
        labels += [
            ("y right", "top", right_axis.percent_from_top(value), format_tick(value))
            for value in right_axis.ticks(max_ticks)
        ]
    max_x_ticks = max_ticks + 1 if chart.large or chart.x_max < 10_000 else 3
    labels += [
        ("x", "left", 100 * x_axis.position(value), format_tick(value))
        for value in x_axis.ticks(max_x_ticks)
    ]
    levels = {name: y_axis.percent_from_top(v) for name, v in chart.reference_lines.items()}
    labels += [("name", "top", position, name) for name, position in separate_labels(levels)]
    return [(kind, side, f"{position:.2f}", text) for kind, side, position, text in labels]


def _max_ticks(chart: Chart) -> int:
    return 6 if chart.large else 4


def _points(x: Sequence[float], y: Sequence[float], x_axis: Axis, y_axis: Axis) -> list[str]:
    pairs = zip(x, y, strict=True)
    return [f"{_coordinate(x_axis.position(a))} {_y(y_axis, b)}" for a, b in pairs]


def _y(axis: Axis, value: float) -> str:
    return _coordinate(1 - axis.position(value))


def _coordinate(position: float) -> str:
    return f"{1000 * position:.1f}".removesuffix(".0")


def render_chart_page(template: str, charts: Sequence[Chart], assets: str, **values: Any) -> str:
    """Render a self-contained page with charts, which can neither load nor run anything else.

    Args:
        template: A template that extends `chart_page.html`; it gets the charts as `charts`.
        charts: All charts of the page, in order.
        assets: Name of the page's own style sheet and script, "" if it has none.
        values: Further variables of the template, `title` among them.
    """
    style, script = _asset("page.css"), _asset("charts.js")
    if assets:
        style += _asset(f"{assets}.css")
        script += _asset(f"{assets}.js")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    data = json.dumps([chart.cursor_data() for chart in charts], separators=(",", ":"))
    return render(
        template,
        charts=[chart.to_html() for chart in charts],
        chart_data=Markup(data.replace("<", "\\u003c")),
        style=Markup(style),
        script=Markup(script),
        policy=policy,
        **values,
    )


def _asset(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")
