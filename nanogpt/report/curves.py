"""Curves for report.html, as SVG with labels around it: small, printable, and the same size of letters in every window.

In: numbers by step. Out: a piece of HTML, and the same numbers for the script that shows them under the pointer.
The drawing is stretched to its place (its own coordinates go from 0 to 1,000), the labels are placed over it in per cent.
"""

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

POOLS = 240  # a curve of more points than that is drawn as means of neighbours, with a band from their lowest to their highest


@dataclass(frozen=True)
class Curve:
    """A line: its points, from left to right, and for each the lowest and highest of the values that it stands for. Single measurements have `dots`."""

    name: str
    colour: str  # a class of the style sheet
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)
    dots: bool = False


@dataclass(frozen=True)
class Axis:
    """A scale from `low` to `high`, linear or in the logarithm."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one."""
        low, high, value = (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        return (value - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers on the scale, at most `most` of them where it is linear."""
        if self.log:
            powers = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            for digits in ((1, 1.5, 2, 3, 4, 5, 7), (1, 2, 5), (1, 3), (1,)):
                found = [digit * 10.0**power for power in powers for digit in digits if self.low <= digit * 10.0**power <= self.high]
                if len(found) <= most:
                    break
            return found if len(found) > 1 else Axis(self.low, self.high).ticks(most)
        size = 10 ** math.floor(math.log10((self.high - self.low) / most))
        width = next(size * digit for digit in (1, 2, 5, 10, 20) if (self.high - self.low) / (size * digit) <= most)
        return [width * k for k in range(math.ceil(self.low / width - 1e-9), math.floor(self.high / width + 1e-9) + 1)]


def pooled(name: str, colour: str, x: Sequence[float], y: Sequence[float]) -> Curve:
    """A curve of at most `POOLS` points, each the mean of eight neighbours or more, where there are enough."""
    if len(x) <= POOLS // 4:
        return Curve(name, colour, list(x), list(y))
    n = min(POOLS, max(POOLS // 4, len(x) // 8))
    edges = [len(x) * k // n for k in range(n + 1)]
    parts = list(pairwise(edges))
    mean_x, mean_y = ([sum(values[a:b]) / (b - a) for a, b in parts] for values in (x, y))
    return Curve(name, colour, mean_x, mean_y, [min(y[a:b]) for a, b in parts], [max(y[a:b]) for a, b in parts])


def chart(
    title: str, unit: str, curves: Sequence[Curve], last: float, *, levels: dict[str, float] | None = None, right: tuple[str, float] | None = None,
    log: bool = False, zero: bool = False, tall: bool = False,
) -> str:  # fmt: skip
    """A figure: curves from step 0 to step `last`, with `levels` as lines across it; `right` names a second scale, so many times the first.

    `log` is for the vertical scale, `zero` has it begin there.
    """
    levels = levels or {}
    across, up, most = Axis(0, last), _vertical(curves, levels, log, zero), 6 if tall else 4
    drawing = [_grid(up, most)] + [f'<path class="level" d="M0 {_y(up, value)}H1000"/>' for value in levels.values()]
    for curve in curves:
        drawing += _line(curve, across, up)
    marks = [_label("y", 100 - 100 * up.place(value), short(value)) for value in up.ticks(most)]
    if right:
        scaled = Axis(up.low * right[1], up.high * right[1], up.log)
        marks += [_label("y right", 100 - 100 * scaled.place(value), short(value)) for value in scaled.ticks(most)]
    marks += [_label("x", 100 * across.place(value), short(value)) for value in across.ticks(most + 1 if tall or last < 10_000 else 3)]
    marks += [_label("name", place, name) for name, place in _apart({name: 100 - 100 * up.place(value) for name, value in levels.items()})]
    keys = "".join(f'<span class="key {curve.colour}">{html.escape(curve.name)} <output></output></span>' for curve in curves)
    second = f'<span class="unit right">{html.escape(right[0])}</span>' if right else ""
    told = "; ".join(f"{curve.name}: {short(curve.y[0])} at step {short(curve.x[0])}, {short(curve.y[-1])} at step {short(curve.x[-1])}" for curve in curves)
    told += "".join(f"; {name}: {short(value)}" for name, value in levels.items())
    return (
        f'<figure class="chart{" tall" if tall else ""}"><figcaption><b>{html.escape(title)}</b> <span class="unit">{html.escape(unit)}</span>{keys}{second}'
        f'</figcaption><div class="plot" role="img" aria-label="{html.escape(f"{title}, {unit}. {told}.")}"><svg viewBox="0 0 1000 1000" '
        f'preserveAspectRatio="none" aria-hidden="true">{"".join(drawing)}</svg>{"".join(marks)}<i class="cursor" hidden></i></div></figure>'
    )


def numbers(curves: Sequence[Curve], last: float) -> dict[str, object]:
    """What the script needs to know of a chart."""
    return {"last": last, "curves": [{"x": [round(x, 1) for x in curve.x], "y": [short(y) for y in curve.y]} for curve in curves]}


def short(value: float) -> str:
    """A number as a label, with four digits that count."""
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 0.001 or value == 0 else f"{value:.2g}".replace("e-0", "e-")


def _vertical(curves: Sequence[Curve], levels: dict[str, float], log: bool, zero: bool) -> Axis:
    """The scale that all values fit on, with some room."""
    values = [value for curve in curves for part in (curve.y, curve.low, curve.high) for value in part] + list(levels.values())
    low, high = min(values), max(values)
    if log and low > 0:
        room = max(1.02, (high / low) ** 0.04)
        return Axis(low / room, high * room, True)
    room = 0.05 * (high - low) or abs(high) * 0.05 or 1.0
    return Axis(0 if zero and low >= 0 else low - room, high + room)


def _y(up: Axis, value: float) -> str:
    return f"{1000 - 1000 * up.place(value):.1f}".removesuffix(".0")


def _points(x: Sequence[float], y: Sequence[float], across: Axis, up: Axis) -> list[str]:
    return [f"{1000 * across.place(a):.1f}".removesuffix(".0") + f" {_y(up, b)}" for a, b in zip(x, y, strict=True)]


def _line(curve: Curve, across: Axis, up: Axis) -> list[str]:
    points = _points(curve.x, curve.y, across, up)
    drawn = []
    if curve.low:
        outline = _points(curve.x, curve.high, across, up) + _points(curve.x, curve.low, across, up)[::-1]
        drawn.append(f'<path class="band {curve.colour}" d="M{"L".join(outline)}Z"/>')
    drawn.append(f'<path class="line {curve.colour}" d="M{"L".join(points)}"/>')
    if curve.dots or len(points) == 1:  # a line of no length with round ends
        drawn.append(f'<path class="dots {curve.colour}" d="{"".join(f"M{point}h0" for point in points)}"/>')
    return drawn


def _grid(up: Axis, most: int) -> str:
    lines = "".join(f"M0 {_y(up, value)}H1000" for value in up.ticks(most))
    return f'<path class="grid" d="{lines}"/>'


def _label(kind: str, place: float, text: str) -> str:
    side = "left" if kind == "x" else "top"
    return f'<i class="{kind}" style="{side}:{place:.2f}%">{html.escape(text)}</i>'


def _apart(places: dict[str, float], distance: float = 5.5) -> list[tuple[str, float]]:
    """Labels from the top down, moved apart where they would lie on each other; in per cent."""
    found: list[tuple[str, float]] = []
    for name, place in sorted(places.items(), key=lambda item: item[1]):
        found.append((name, max(place, found[-1][1] + distance) if found else place))
    return found
