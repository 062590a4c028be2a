"""Curves with bands as SVG, in the colors of the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

COLORS = ("#222222", "#c44e52", "#4c72b0", "#55a868", "#8172b3", "#ccb974", "#64b5cd", "#937860", "#da8bc3", "#8c8c8c")
WIDTH, HEIGHT, LEFT, TOP, BOTTOM, LEGEND = 430, 300, 46, 34, 40, 170
"""Pixels of a panel, its margins, and the legend."""


class Band(NamedTuple):
    """A curve: its mean and the range around it, at common places."""

    label: str
    x: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def common_band(label: str, curves: Sequence[tuple[Sequence[float], Sequence[float]]], points: int = 60) -> Band:
    """Return the mean and the range of curves, on a grid that all of them cover.

    Args:
        label: for the legend.
        curves: places, rising, and values of each.
        points: of the grid.
    """
    start, end = max(x[0] for x, _ in curves), min(x[-1] for x, _ in curves)
    grid = [start + (end - start) * i / (points - 1) for i in range(points)]
    columns = [[_at(x, y, place) for x, y in curves] for place in grid]
    means = [math.fsum(column) / len(column) for column in columns]
    return Band(label, grid, means, [min(column) for column in columns], [max(column) for column in columns])


def _at(x: Sequence[float], y: Sequence[float], place: float) -> float:
    for i in range(1, len(x)):
        if place <= x[i]:
            share = (place - x[i - 1]) / (x[i] - x[i - 1])
            return y[i - 1] + share * (y[i] - y[i - 1])
    return y[-1]


def draw(title: str, panels: Sequence[tuple[str, Sequence[Band]]], mark: float | None = None) -> str:
    """Return an SVG of panels side by side that share the vertical axis, and a legend.

    Args:
        title: above all.
        panels: the label of each horizontal axis, and its curves; a label has the same color in all.
        mark: of a horizontal line.
    """
    bands = [band for _, group in panels for band in group]
    low, high = min(min(band.low) for band in bands), max(max(band.high) for band in bands)
    pad = 0.05 * (high - low or 1)
    low, high = low - pad, high + pad
    labels = list(dict.fromkeys(band.label for band in bands))
    colors = {label: COLORS[number % len(COLORS)] for number, label in enumerate(labels)}
    width = WIDTH * len(panels) + LEGEND
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {HEIGHT}" font-family="sans-serif"'
        ' font-size="12">',
        f'<rect width="{width}" height="{HEIGHT}" fill="#fff"/>',
        f'<text x="{LEFT}" y="18" font-size="14">{escape(title)}</text>',
    ]
    for number, (label, group) in enumerate(panels):
        parts += _panel(WIDTH * number, label, group, (low, high), colors, mark)
    for number, label in enumerate(labels):
        y, x = TOP + 10 + 18 * number, WIDTH * len(panels) + 12
        parts.append(f'<line x1="{x}" x2="{x + 22}" y1="{y}" y2="{y}" stroke="{colors[label]}" stroke-width="2"/>')
        parts.append(f'<text x="{x + 28}" y="{y + 4}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    left: float,
    label: str,
    group: Sequence[Band],
    heights: tuple[float, float],
    colors: dict[str, str],
    mark: float | None,
) -> list[str]:
    low, high = heights
    end = max(band.x[-1] for band in group)
    inner, tall = WIDTH - LEFT - 14, HEIGHT - TOP - BOTTOM

    def across(x: float) -> str:
        return f"{left + LEFT + inner * x / end:.1f}"

    def up(y: float) -> str:
        return f"{TOP + tall * (high - y) / (high - low):.1f}"

    parts = []
    for tick in ticks(low, high):
        ends = f'x1="{across(0)}" x2="{across(end)}" y1="{up(tick)}" y2="{up(tick)}"'
        parts.append(f'<line {ends} stroke="#ddd"/>')
        parts.append(f'<text x="{left + LEFT - 6}" y="{float(up(tick)) + 4}" text-anchor="end">{tick:g}</text>')
    parts += [
        f'<text x="{across(tick)}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{tick:g}</text>'
        for tick in ticks(0, end)
    ]
    middle = left + LEFT + inner / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 6}" text-anchor="middle">{escape(label)}</text>')
    if mark is not None:
        ends = f'x1="{across(0)}" x2="{across(end)}" y1="{up(mark)}" y2="{up(mark)}"'
        parts.append(f'<line {ends} stroke="#888" stroke-dasharray="4"/>')
    for band in group:  # bands below all lines
        edge = [*zip(band.x, band.low, strict=True), *reversed(list(zip(band.x, band.high, strict=True)))]
        points = " ".join(f"{across(x)},{up(y)}" for x, y in edge)
        parts.append(f'<polygon points="{points}" fill="{colors[band.label]}" opacity="0.12"/>')
    for band in group:
        points = " ".join(f"{across(x)},{up(y)}" for x, y in zip(band.x, band.mean, strict=True))
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colors[band.label]}" stroke-width="1.6"/>')
    return parts


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers within an axis, about five."""
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (factor * step) <= 6)
    return [round(step * i, 10) for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
