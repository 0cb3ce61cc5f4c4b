"""The report's charts: accuracy by stage, curves over steps, and bars of time or tokens by stage."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from megatron_lopd.evaluation.estimates import percent
from megatron_lopd.report.spacing import spread
from megatron_lopd.report.theme import LIGHT, printable, render, shorten

WIDTH = 330.0  # points: about a phone's width, so that a 10-point label stays about 10 pixels there
CURVE_HEIGHT = 190.0
SMOOTHING_FRACTION = 25  # the moving mean covers this part of the run: 1/25

_COLOURS = {"sft": LIGHT["before"], "lightning_opd": LIGHT["after"]}


@dataclass(frozen=True)
class Figure:
    """A chart, an `<svg>` element, under its title and a caption, if it needs one."""

    title: str
    svg: str
    caption: str = ""


@dataclass(frozen=True)
class Accuracy:
    """Share of `n` prompts answered correctly, in [0, 1], sampled and greedy, with standard errors if any."""

    stage: str
    title: str
    sampled: float
    sampled_error: float | None
    greedy: float
    greedy_error: float | None
    n: int


def accuracy_figure(name: str, accuracies: Sequence[Accuracy]) -> str:
    """Dots with one standard error each, in percent; filled is sampled, hollow is greedy."""
    lowest = min(min(each.sampled, each.greedy) for each in accuracies)
    left = max(0, math.floor(lowest * 10 - 0.5) * 10)

    def draw(axes: Any) -> None:
        for row, each in enumerate(accuracies):
            colour = _COLOURS.get(each.stage, LIGHT["muted"])
            for kind, share, error, y in (
                ("sampled", each.sampled, each.sampled_error, row - 0.18),
                ("greedy", each.greedy, each.greedy_error, row + 0.18),
            ):
                axes.errorbar(
                    100 * share,
                    y,
                    xerr=None if error is None else 100 * error,
                    fmt="o",
                    markersize=7,
                    capsize=3,
                    color=colour,
                    markerfacecolor=colour if kind == "sampled" else LIGHT["surface"],
                    clip_on=False,
                    zorder=3,
                )
                axes.text(
                    1.06,
                    y,
                    f"{kind} {percent(share, error)}",
                    transform=axes.get_yaxis_transform(),
                    va="center",
                    fontsize=9.5,
                    color=colour,
                )
        axes.set_yticks(range(len(accuracies)), [each.title for each in accuracies], color=LIGHT["ink"])
        axes.set_ylim(len(accuracies) - 0.5, -0.5)
        axes.set_xlim(left, 100)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=4, steps=[1, 2, 2.5, 5, 10]))
        axes.tick_params(axis="y", length=0)
        axes.spines["left"].set_visible(False)
        axes.grid(visible=False, axis="y")
        axes.set_xlabel("correct answers, %")

    label = "Accuracy: " + "; ".join(
        f"{each.title} {100 * each.sampled:.1f} % sampled, {100 * each.greedy:.1f} % greedy"
        for each in accuracies
    )
    return render(name, label, (WIDTH, 56 + 44 * len(accuracies)), draw)


def column(rows: Sequence[Mapping[str, Any]], key: str) -> NDArray[np.float64]:
    """`key` of every row, float64 [rows]; NaN, drawn as a gap, where a row has none or has null."""
    values = [row.get(key) for row in rows]
    return np.array([math.nan if value is None else float(value) for value in values], dtype=np.float64)


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Centred moving mean of the finite values, float64 [n]; the window shrinks at both ends."""
    n = len(values)
    if n < SMOOTHING_FRACTION:
        return values
    half = n // SMOOTHING_FRACTION // 2
    finite = np.isfinite(values)
    first, last = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)

    def in_window(of: NDArray[np.float64]) -> NDArray[np.float64]:
        """Sums over each window, as differences of running sums: a run's length does not multiply them."""
        running = np.concatenate([[0.0], np.cumsum(of)])
        sums: NDArray[np.float64] = running[last] - running[first]
        return sums

    number = in_window(finite.astype(np.float64))
    total = in_window(np.where(finite, values, 0.0))
    return np.where(number > 0, total / np.maximum(number, 1), math.nan)


@dataclass(frozen=True)
class Curve:
    """One metric over steps: its key in metrics.jsonl, the unit, and bounds the axis must reach."""

    key: str
    title: str
    unit: str
    caption: str
    reach: tuple[float, ...] = ()


def has(rows: Sequence[Mapping[str, Any]], key: str) -> bool:
    """Whether any row holds a finite `key`."""
    return bool(np.isfinite(column(rows, key)).any())


def curve_figure(stage: str, curve: Curve, rows: Sequence[Mapping[str, Any]]) -> str:
    """The raw line faint, its moving mean over it, and the last mean as a number."""
    colour = LIGHT["before"] if stage == "sft" else LIGHT["after"]

    def draw(axes: Any) -> None:
        steps, values = column(rows, "step"), column(rows, curve.key)
        trend = _trend(axes, steps, values, colour)
        for bound in curve.reach:
            axes.axhline(bound, color=LIGHT["rule"], linewidth=0.7)
        _finish_steps(axes, curve.unit)
        _label_ends(axes, [(_last(trend), f"{_last(trend):.3g}", colour)])

    return render(f"{stage}-{curve.key}", f"{curve.title} over steps", (WIDTH, CURVE_HEIGHT), draw)


def advantage_figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """The mean advantage within the band that holds the middle 90 % of response tokens, nats."""

    def draw(axes: Any) -> None:
        steps = column(rows, "step")
        low, high = smooth(column(rows, "advantage_p05")), smooth(column(rows, "advantage_p95"))
        axes.fill_between(steps, low, high, color=LIGHT["after"], alpha=0.18, linewidth=0)
        mean = _trend(axes, steps, column(rows, "advantage_mean"), LIGHT["after"])
        axes.axhline(0, color=LIGHT["muted"], linewidth=0.7)
        _finish_steps(axes, "nats")
        _label_ends(
            axes,
            [
                (_last(low), "p05", LIGHT["muted"]),
                (_last(mean), f"mean {_last(mean):.2g}", LIGHT["after"]),
                (_last(high), "p95", LIGHT["muted"]),
            ],
        )

    return render("train-advantage", "Advantage over steps", (WIDTH, CURVE_HEIGHT), draw)


def _trend(
    axes: Any, steps: NDArray[np.float64], values: NDArray[np.float64], colour: str
) -> NDArray[np.float64]:
    trend = smooth(values)
    if trend is not values:
        axes.plot(steps, values, color=colour, alpha=0.3, linewidth=0.8)
    axes.plot(steps, trend, color=colour, marker="o" if len(steps) == 1 else "")
    return trend


def _last(values: NDArray[np.float64]) -> float:
    return float(values[np.isfinite(values)][-1])


def _finish_steps(axes: Any, unit: str) -> None:
    axes.set_title(unit)
    axes.set_xlabel("optimizer step")
    axes.margins(x=0.01)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.grid(visible=False, axis="x")
    axes.spines["left"].set_visible(False)


def _label_ends(axes: Any, labels: Sequence[tuple[float, str, str]]) -> None:
    """Names right of the lines' ends, lowest first, moved apart where they would touch."""
    bottom, top = axes.get_ylim()
    axes.set_ylim(bottom, top)
    line_height = 0.11  # of the axes' height, at this figure's height and font size
    heights = spread(
        [(value - bottom) / (top - bottom) for value, _, _ in labels], [line_height] * (len(labels) - 1)
    )
    for height, (_, text, colour) in zip(heights, labels, strict=True):
        axes.text(1.02, height, text, transform=axes.transAxes, va="center", color=colour, fontsize=9.5)


def bars_figure(name: str, values: Mapping[str, float], texts: Mapping[str, str], unit: str) -> str:
    """One bar a stage, longest value setting the scale, each with its value written at its end."""
    stages = list(values)

    def draw(axes: Any) -> None:
        axes.barh(range(len(stages)), [values[s] for s in stages], color=LIGHT["before"], height=0.62)
        for row, stage in enumerate(stages):
            axes.annotate(
                texts[stage],
                (values[stage], row),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=9.5,
            )
        titles = [shorten(printable(stage), 14) for stage in stages]
        axes.set_yticks(range(len(stages)), titles, color=LIGHT["ink"])
        axes.set_ylim(len(stages) - 0.45, -0.55)
        axes.set_xlim(0, max(*values.values(), 1e-9) * 1.28)
        axes.tick_params(length=0)
        axes.set_xticks([])
        axes.spines["bottom"].set_visible(False)
        axes.grid(visible=False)
        axes.set_title(unit)

    label = f"{unit} by stage: " + "; ".join(f"{stage} {texts[stage]}" for stage in stages)
    return render(name, label, (WIDTH, 34 + 23 * len(stages)), draw)
