"""Table and figures of the study, from results.json alone.

    python examples/miniature/draw.py

Writes figures/*.svg and the tables between the markers of README.md here and of docs/objectives.md, so that
every number in them is the study's. Means over seeds, with the standard error of the mean; differences
are paired by seed, since conditions of one seed share student, rollouts and draws.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
BEGIN, END = "<!-- study: {} -->", "<!-- end of study -->"
SCHEDULES = {
    "full": "",
    "half": ", half the steps",
    "decayed": ", with SFT's weight decay",
}
HALF, DECAYED = SCHEDULES["half"], SCHEDULES["decayed"]
Run = dict[str, Any]

SETTINGS = {
    "strong start": ("strong", "equals", "equals"),
    "weak start": ("weak", "equals", "equals"),
    "strong, SFT on `equals`, scored by `terse`": ("strong", "equals", "terse"),
    "strong, SFT on `terse`, scored by `equals`": ("strong", "terse", "equals"),
}
METHODS = (
    ("sft", 0),
    ("sft_continued", 0),
    ("sft_continued" + DECAYED, 0),
    ("sampled_reverse_kl", 0),
    ("sampled_reverse_kl+clipped", 0),
    ("topk_reverse_kl", 1),
    ("topk_reverse_kl", 2),
    ("topk_reverse_kl", 4),
    ("topk_reverse_kl", 8),
    ("topk_reverse_kl" + HALF, 4),
    ("topk_forward_kl", 4),
    ("refresh", 4),
    ("online_sampled_reverse_kl", 0),
    ("online_topk_reverse_kl", 4),
    ("fixed_negative", 0),
)
OFFLINE = [each for each in METHODS if each[0].startswith(("sampled", "topk"))]


class Study:
    """The runs, found by setting and method, in the order of the seeds."""

    def __init__(self, results: dict[str, Any]) -> None:
        self.results = results
        self._runs: dict[tuple[Any, ...], list[Run]] = {}
        for run in sorted(results["conditions"], key=lambda run: run["seed"]):
            setting = (run["start"], run["answered_by"], run["scored_by"])
            method = run["method"] + SCHEDULES[run["schedule"]]
            self._runs.setdefault((setting, method, run["k"]), []).append(run)

    def runs(self, setting: str, method: tuple[str, int]) -> list[Run]:
        """One run a seed; none where the setting leaves the method out."""
        return self._runs.get((SETTINGS[setting], *method), [])

    def values(self, setting: str, method: tuple[str, int], of: Callable[[Run], float]) -> list[float]:
        return [of(run) for run in self.runs(setting, method)]


def label(method: tuple[str, int]) -> str:
    name, k = method
    plain = name.partition(",")[0]
    return f"{plain}, k = {k}{name.removeprefix(plain)}" if k else name


def percent(run: Run) -> float:
    return 100.0 * run["sampled"]


def left_alone(run: Run) -> float:
    """Percent, of the run as it ended or, where the guard stopped it, would have ended."""
    return 100.0 * run.get("unguarded", run["sampled"])


def total_seconds(run: Run) -> float:
    return float(sum(run["seconds"].values()))


def mean_and_error(values: Sequence[float], digits: int = 1) -> str:
    """`82.3 (1.5)`: the mean and its standard error."""
    mean = f"{statistics.fmean(values):.{digits}f}"
    return f"{mean} ({_error(values):.{digits}f})" if len(values) > 1 else mean


def _error(values: Sequence[float]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0


def summary_table(study: Study) -> str:
    """Sampled accuracy of every method in every setting."""
    head = ["method", *SETTINGS]
    rows = []
    for method in METHODS:
        cells = [study.values(setting, method, percent) for setting in SETTINGS]
        stops = [sum(run["stopped_by_guard"] for run in study.runs(s, method)) for s in SETTINGS]
        ends = [study.values(setting, method, left_alone) for setting in SETTINGS]
        texts = [
            mean_and_error(cell)
            + (f", stopped {stop} of {len(cell)} (left alone {mean_and_error(end)})" if stop else "")
            if cell
            else ""
            for cell, stop, end in zip(cells, stops, ends, strict=True)
        ]
        rows.append([label(method), *texts])
    return _table(head, rows)


def setting_table(study: Study, setting: str) -> str:
    """All that was measured in one setting."""
    head = ["method", "sampled %", "minus SFT", "greedy %", "pass@4 %", "entropy", "tokens"]
    head += ["rollout s", "teacher s", "train s", "teacher tokens, thousands", "stopped", "without guard %"]
    rows = []
    for method in METHODS:
        runs = study.runs(setting, method)
        if not runs:
            continue
        sft = study.values(setting, ("sft", 0), percent)
        gain = [run - start for run, start in zip(map(percent, runs), sft, strict=True)]

        def column(key: str, scale: float = 1.0, digits: int = 1, runs: list[Run] = runs) -> str:
            return mean_and_error([scale * run[key] for run in runs], digits)

        seconds = [
            f"{statistics.fmean(run['seconds'][part] for run in runs):.1f}"
            for part in ("rollout", "teacher", "train")
        ]
        stopped = [run for run in runs if run["stopped_by_guard"]]
        without = mean_and_error([100 * run["unguarded"] for run in stopped]) if stopped else ""
        steps = ", ".join(str(run["stopped_at_step"]) for run in stopped)
        rows.append(
            [
                label(method),
                column("sampled", 100),
                "" if method[0] == "sft" else mean_and_error(gain),
                column("greedy", 100),
                column("pass_at_k", 100),
                column("entropy", 1, 3),
                column("length"),
                *seconds,
                f"{statistics.fmean(run['teacher_tokens'] for run in runs) / 1000:.0f}",
                f"{len(stopped)} of {len(runs)}, at step {steps}" if stopped else "",
                without,
            ]
        )
    return _table(head, rows)


def claims(study: Study) -> str:
    """The comparisons that the study was made for, each with what it says."""
    strong, weak, first, second = SETTINGS
    ours = ("topk_reverse_kl", 4)
    lines = []
    online_methods = (("online_sampled_reverse_kl", 0), ("online_topk_reverse_kl", 4))
    for offline, online in itertools.product((ours, (ours[0] + HALF, ours[1])), online_methods):
        gain = _difference(study, strong, offline, online)
        ratios = [
            total_seconds(a) / total_seconds(b)
            for a, b in zip(study.runs(strong, offline), study.runs(strong, online), strict=True)
        ]
        lines.append(
            f"Strong start: `{label(offline)}` minus `{label(online)}`: {mean_and_error(gain, 2)} points, in "
            f"{statistics.median(ratios):.2f} of its time (median; teacher and rollouts included)."
        )
    for other in (("sft", 0), ("sft_continued", 0), ("sft_continued" + DECAYED, 0)):
        gain = _difference(study, strong, ("sampled_reverse_kl", 0), other)
        lines.append(
            f"Strong start: `sampled_reverse_kl` minus `{label(other)}`: {mean_and_error(gain, 2)}, "
            f"above it in {sum(each > 0 for each in gain)} of {len(gain)} seeds."
        )
    best = max(OFFLINE, key=lambda each: statistics.fmean(study.values(weak, each, percent)))
    for other in (("sft", 0), ("online_sampled_reverse_kl", 0), ("online_topk_reverse_kl", 4)):
        gain = _difference(study, weak, best, other)
        lines.append(
            f"Weak start: the best offline objective, `{label(best)}`, minus `{label(other)}`: "
            f"{mean_and_error(gain, 2)} points."
        )
    for setting in (strong, weak):
        gain = _difference(study, setting, ours, ("fixed_negative", 0), left_alone)
        lines.append(
            f"{setting}, left alone: `{label(ours)}` minus `fixed_negative`: {mean_and_error(gain, 2)}."
        )
    lines += [_guard(study, setting) for setting in SETTINGS]
    for setting in (first, second):
        cost = ", ".join(
            f"`{label(each)}` {mean_and_error(_difference(study, setting, each, ('sft', 0), left_alone))}"
            for each in METHODS
            if each[0] not in ("sft", "fixed_negative") and study.runs(setting, each)
        )
        lines.append(f"Inconsistent ({setting}), points from its SFT student, left alone: {cost}.")
    return "\n".join(f"- {line}" for line in lines)


def _guard(study: Study, setting: str) -> str:
    """Did the guard stop what went below its SFT start, in time, and leave the rest alone?"""
    sft = {run["seed"]: percent(run) for run in study.runs(setting, ("sft", 0))}
    stopped, harmful, missed, below = 0, 0, [], 0
    for method in (each for each in METHODS if not each[0].startswith("sft")):
        for run in study.runs(setting, method):
            end = left_alone(run)
            fell = end < sft[run["seed"]]
            harmful += fell
            stopped += run["stopped_by_guard"]
            below += run["stopped_by_guard"] and percent(run) < sft[run["seed"]]
            if fell and not run["stopped_by_guard"]:
                missed.append(f"`{label(method)}` seed {run['seed']} ({end - sft[run['seed']]:+.1f})")
    needless = sum(
        run["stopped_by_guard"] and 100 * run["unguarded"] >= sft[run["seed"]]
        for method in (each for each in METHODS if not each[0].startswith("sft"))
        for run in study.runs(setting, method)
    )
    tail = f"; not stopped: {', '.join(missed)}" if missed else ""
    return (
        f"Guard, {setting}: {harmful} runs end below their SFT start if left alone; {stopped} were stopped, "
        f"{below} of them with weights below the start, {needless} that would have ended above it{tail}."
    )


def _difference(
    study: Study,
    setting: str,
    a: tuple[str, int],
    b: tuple[str, int],
    of: Callable[[Run], float] = percent,
) -> list[float]:
    """Sampled accuracy of `a` minus that of `b`, points, by seed."""
    pairs = zip(study.values(setting, a, of), study.values(setting, b, of), strict=True)
    return [one - other for one, other in pairs]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def accuracy_figure(study: Study) -> Any:
    """A panel a setting: each seed a dot, the mean a line."""
    figure, axes = plt.subplots(1, len(SETTINGS), figsize=(13, 4.6), sharey=True)
    for axis, setting in zip(axes, SETTINGS, strict=True):
        for row, method in enumerate(reversed(METHODS)):
            values = study.values(setting, method, percent)
            if not values:
                continue
            stopped = [run["stopped_by_guard"] for run in study.runs(setting, method)]
            colours = ["#b4472e" if each else "#2c6a8f" for each in stopped]
            axis.scatter(values, [row] * len(values), s=14, c=colours, alpha=0.7, linewidths=0)
            mean = statistics.fmean(values)
            axis.plot([mean, mean], [row - 0.35, row + 0.35], color="#1f2430", linewidth=1.5)
        start = study.values(setting, ("sft", 0), percent)
        axis.axvline(statistics.fmean(start), color="#8a8f98", linewidth=0.8, linestyle=":")
        axis.set_title(setting.replace("`", "").replace(", SFT", ",\nSFT"), fontsize=9)
        axis.set_xlim(-2, 102)
        axis.set_xlabel("sampled accuracy, %", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(METHODS)), [label(each) for each in reversed(METHODS)])
    figure.text(0.01, 0.01, "dots: seeds (red: stopped by the guard); dotted: the SFT student", fontsize=8)
    figure.tight_layout(rect=(0, 0.03, 1, 1))
    return figure


def time_figure(study: Study) -> Any:
    """Accuracy against seconds, rollouts and teacher included, where teacher and student are consistent."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2))
    for axis, setting in zip(axes, list(SETTINGS)[:2], strict=True):
        for method in METHODS:
            runs = study.runs(setting, method)
            if not runs or method[0] in ("sft", "fixed_negative"):
                continue
            x = statistics.fmean(map(total_seconds, runs))
            values = [percent(run) for run in runs]
            colour = "#2c6a8f" if method[0] in ("topk_reverse_kl", "topk_forward_kl") else "#8a5a00"
            colour = "#5b3f8c" if method[0].startswith("online") else colour
            axis.errorbar(x, statistics.fmean(values), _error(values), fmt="o", color=colour, markersize=4)
            axis.annotate(label(method), (x, statistics.fmean(values)), fontsize=7, xytext=(5, 3),
                          textcoords="offset points")  # fmt: skip
        axis.set_title(setting, fontsize=9)
        axis.set_xlim(left=0)
        axis.set_xlabel("seconds after SFT: rollouts, teacher and training", fontsize=8)
        axis.set_ylabel("sampled accuracy, %", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    return figure


def between_markers(text: str, name: str, content: str) -> str:
    """`text` with what stands between the markers of `name` replaced."""
    begin = BEGIN.format(name)
    head, rest = text.split(begin)
    _, tail = rest.split(END, 1)
    return f"{head}{begin}\n{content}\n{END}{tail}"


def pages(study: Study, here: str, objectives: str) -> tuple[str, str]:
    """README.md here and docs/objectives.md, with their tables drawn anew."""
    for number, setting in enumerate(SETTINGS, start=1):
        here = between_markers(here, f"setting {number}", setting_table(study, setting))
    here = between_markers(here, "claims", claims(study))
    about = f"`{study.results['command']}`, seeds {', '.join(map(str, study.results['seeds']))}, on: "
    here = between_markers(here, "machine", about + study.results["machine"])
    return here, between_markers(objectives, "summary", summary_table(study))


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Tables and figures of the study.")
    parser.add_argument("--results", type=Path, default=HERE / "results.json", help="what study.py wrote")
    parser.add_argument("--figures", type=Path, default=HERE / "figures", help="where the figures go")
    arguments = parser.parse_args(given)
    study = Study(json.loads(arguments.results.read_text()))
    arguments.figures.mkdir(exist_ok=True)
    mpl.rcParams.update({"svg.hashsalt": "miniature", "font.family": "sans-serif"})
    for name, draw in (("accuracy", accuracy_figure), ("time", time_figure)):
        draw(study).savefig(arguments.figures / f"{name}.svg", metadata={"Date": None})
    paths = (HERE / "README.md", HERE.parents[1] / "docs" / "objectives.md")
    drawn = pages(study, *(path.read_text() for path in paths))
    for path, text in zip(paths, drawn, strict=True):
        path.write_text(text)


if __name__ == "__main__":
    main()
