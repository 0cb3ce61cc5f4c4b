"""The report on how good the models are: a headline, and for each set of prompts a chart and a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_lopd.errors import DataError
from megatron_lopd.evaluation.estimates import percent
from megatron_lopd.report.figures import Accuracy, Figure, accuracy_figure

MODELS = {"base": "Base", "sft": "SFT", "lightning_opd": "Lightning OPD", "teacher": "Teacher"}
SIGNIFICANT = 0.05  # what a change comes by chance less often than, to be called one
Rows = Mapping[str, Mapping[str, Any]]  # of a set: the model -> its Grades, plain

CAPTION = (
    "avg@k: the mean over prompts of the share of a prompt's k samples that are right; pass@k: of prompts "
    "with a right one among k samples, unbiased (Chen et al. 2021); maj@k: of prompts whose commonest answer "
    "is right. In %, ± one standard error over prompts. Entropy: nats a token. Length: tokens. Cut: the "
    "responses cut at the horizon, in %. Ungraded: those the grader failed at. Both count as wrong. p: the "
    "exact two-sided sign test's, over the problems that the two students differ on."
)


def accuracy_sets(measured: Mapping[str, Rows]) -> dict[str, dict[str, Mapping[str, Any]]]:
    """The rows of each set, its models in the order they are made in.

    Raises DataError where a set lacks a model that every report has, or a share is none.
    """
    if not measured:
        raise DataError("summary.json: accuracy holds no set: run lopd evaluate first")
    sets = {}
    for name, rows in measured.items():
        for model in ("sft", "lightning_opd"):
            if model not in rows:
                raise DataError(f"summary.json: accuracy.{name}.{model} is missing: run lopd evaluate first")
        for model, row in rows.items():
            if not (0 <= row["sampled"] <= 1 and 0 <= row["greedy"] <= 1 and row["n"] >= 1):
                raise DataError(
                    f"summary.json: accuracy.{name}.{model} needs shares in [0, 1] and n >= 1, has {row}"
                )
        sets[name] = {model: rows[model] for model in dict.fromkeys((*MODELS, *rows)) if model in rows}
    return sets


def headline(sets: Mapping[str, Rows], compared: Mapping[str, Mapping[str, Any]]) -> str:
    """What OPD did to the first set's sampled accuracy, as far as its problems can tell.

    `compared`: of each set, how the two models do on the same problems (estimates.Paired, plain).
    """
    name, rows = next(iter(sets.items()))
    if name not in compared:
        raise DataError(f"summary.json: paired.{name} is missing: run lopd evaluate first")
    before, after, test = rows["sft"], rows["lightning_opd"], compared[name]
    gain = round(100 * after["sampled"], 1) - round(100 * before["sampled"], 1)
    is_told = test["p"] < SIGNIFICANT and gain * (test["better"] - test["worse"]) > 0

    def share(row: Mapping[str, Any]) -> str:
        error = row["sampled_error"]
        spread = "" if error is None else f", standard error\u00a0{100 * error:.1f}"
        return f"{100 * row['sampled']:.1f}\u00a0% (n\u00a0=\u00a0{row['n']:,}{spread})"

    where = f" on {name}" if len(sets) > 1 else ""
    change = f"from {share(before)} to {share(after)}"
    chance = "p < 0.001" if test["p"] < 0.001 else f"p = {test['p']:.2g}"
    if not is_told:
        return (
            f"Lightning OPD and sampled accuracy{where}: {change}: no difference that {test['problems']:,} "
            f"problems can show ({chance})"
        )
    verb = "raised" if gain > 0 else "lowered"
    return f"Lightning OPD {verb} sampled accuracy{where} {change} ({gain:+.1f} points, {chance})"


@dataclass(frozen=True)
class AccuracyOfSet:
    """A chart of one set of prompts, and a table: a line a measure, a column a model."""

    figure: Figure
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


def accuracy_section(sets: Mapping[str, Rows]) -> list[AccuracyOfSet]:
    """A chart and a table of each set."""
    parts = []
    for number, (name, rows) in enumerate(sets.items()):
        title = f"Share of correct answers{f': {name}' if len(sets) > 1 else ''}"
        drawn = accuracy_figure(f"accuracy{number or ''}", [_accuracy(*row) for row in rows.items()])
        parts.append(AccuracyOfSet(Figure(title, drawn, _chart_caption(rows)), *_table(rows)))
    return parts


def _accuracy(model: str, row: Mapping[str, Any]) -> Accuracy:
    shares = (row["sampled"], row["sampled_error"], row["greedy"], row["greedy_error"])
    return Accuracy(model, MODELS.get(model, model), *shares, row["n"])


def _chart_caption(rows: Rows) -> str:
    counts = sorted({row["n"] for row in rows.values()})
    return (
        f"n = {' and '.join(f'{n:,}' for n in counts)} prompts each; bars are one standard error over "
        "prompts. Filled: sampled at the recipe's temperature. Hollow: greedy."
    )


def _table(rows: Rows) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    """The header and the lines."""
    columns = {MODELS.get(model, model): _measures(row) for model, row in rows.items()}
    measures = list(dict.fromkeys(measure for column in columns.values() for measure in column))
    lines = [(name, *(column.get(name, "") for column in columns.values())) for name in measures]
    return ("", *columns), lines


def _measures(row: Mapping[str, Any]) -> dict[str, str]:
    """A model's numbers by name, in the order of the table's lines."""
    k = row["k"]
    vote = row["majority"]
    return {
        f"avg@{k}": percent(row["sampled"], row["sampled_error"]),
        **{f"pass@{fewer}": percent(**each) for fewer, each in _ascending(row["pass_at"]) if int(fewer) > 1},
        **({} if vote is None else {f"maj@{k}": percent(**vote)}),
        "greedy": percent(row["greedy"], row["greedy_error"]),
        "prompts": f"{row['n']:,}",
        "length": f"{row['length']:,.1f}",
        "entropy": f"{row['entropy']:.3f}",
        "cut": f"{100 * row['cut']:.1f}",
        "ungraded": f"{row['ungraded']:,}" + (f", {row['late']:,} late" if row.get("late") else ""),
    }


def _ascending(pass_at: Mapping[str, Any]) -> Sequence[tuple[str, Any]]:
    """JSON's keys are text, in the order of text where they were sorted."""
    return sorted(pass_at.items(), key=lambda item: int(item[0]))
