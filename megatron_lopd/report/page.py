"""The report as one self-contained HTML page: no scripts, nothing fetched, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from megatron_lopd.artifacts.lineage import worst
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.objectives.events import OVER_EVENTS
from megatron_lopd.registry import OBJECTIVES
from megatron_lopd.report.accuracy import CAPTION, accuracy_section, accuracy_sets, headline
from megatron_lopd.report.examples import Examples
from megatron_lopd.report.figures import (
    Curve,
    Figure,
    advantage_figure,
    bars_figure,
    curve_figure,
    has,
)
from megatron_lopd.report.lineage_graph import MARKS, LineageGraph, lineage_figure
from megatron_lopd.report.theme import css_variables

History = Sequence[Mapping[str, Any]]

STAGES = (
    *("generate", "sft", "rollout", "score", "refresh student", "refresh rollout", "refresh score"),
    *("train", "export", "evaluate"),
)
LINEAGE = {
    "proved": "Every claim about where these numbers come from was checked by content digest.",
    "declared": "Part of the lineage was stated by the user and could not be checked by digest.",
    "overridden": "The run went on although its lineage is broken: its gradient may carry a bias that no "
    "training removes.",
}
CURVES = {
    "sft": (
        Curve("loss", "SFT loss", "nats per token", "-log π(x) of the teacher's answers"),
        Curve("entropy", "Entropy", "nats per token", "of the student's next-token distribution"),
    ),
    "train": (
        Curve("loss", "OPD loss", "", ""),
        Curve(
            "reverse_kl_top_k",
            "Reverse KL over the top k",
            "nats per token",
            f"KL(π ‖ π_T) {OVER_EVENTS}",
            (0.0,),
        ),
        Curve(
            "reverse_kl_sampled",
            "Reverse KL of the tokens drawn",
            "nats per token",
            "mean of log π - log π_T of the token that was drawn",
            (0.0,),
        ),
        Curve(
            "forward_kl_top_k",
            "Forward KL over the top k",
            "nats per token",
            f"KL(π_T ‖ π) {OVER_EVENTS}",
            (0.0,),
        ),
        Curve(
            "drift_kl",
            "Drift KL",
            "nats per token",
            "KL(π_ref ‖ π) from the student that made the rollouts, by k3; a refresh starts it anew",
            (0.0,),
        ),
        Curve(
            "kept_mass",
            "Kept mass",
            "fraction",
            "the student's probability that is still on what was sampled; the drift guard watches it",
            (1.0,),
        ),
        Curve(
            "effective_sample_size",
            "Effective sample size",
            "fraction",
            "what importance weights of the drifted student leave of the rollouts",
            (0.0, 1.0),
        ),
        Curve("entropy", "Entropy", "nats per token", "of the student's next-token distribution"),
    ),
}
ADVANTAGE_CAPTION = "A = log π_T - log π; the band holds the middle 90 % of response tokens"


_TEMPLATES = Environment(
    loader=PackageLoader("megatron_lopd.report", "."), autoescape=True, undefined=StrictUndefined
)


@dataclass(frozen=True)
class TrainingFigures:
    """Charts of one stage's training, under a title and a note."""

    title: str
    note: str
    figures: Sequence[Figure]


def render_page(
    summary: dict[str, Any],
    histories: dict[str, list[dict[str, Any]]],
    lineage: LineageGraph,
    answers: Sequence[Examples] = (),
) -> str:
    """The report of a run as HTML, byte-identical for the same arguments.

    `summary` is summary.json: `accuracy` (of each set of prompts: sft and lightning_opd, optionally base and
    teacher: their Grades), `paired` (of each set: their Paired), `seconds` and `tokens` by stage, `lineage`,
    `seed`, optionally `settings` and `objective`. `histories` holds the rows of metrics.jsonl by stage
    (`sft`, `train`); a stage or a metric that is not there has no figure. `answers`: some of each model's.
    Raises DataError naming the key of `summary` that is missing or out of range, or when its lineage claims
    more than the proofs.
    """
    sets = accuracy_sets(_need(summary, "accuracy"))
    status = _need(summary, "lineage")
    if status not in LINEAGE:
        raise DataError(f"summary.json: lineage is {status!r}: it must be one of {', '.join(LINEAGE)}")
    for proof in lineage.proofs:
        if worst([status, proof.status]) != status:
            raise DataError(
                f"summary.json: lineage is {status!r}, but {proof.statement!r} is {proof.status}: "
                "write the summary again with lopd report"
            )
    seconds, tokens = _by_stage(_need(summary, "seconds")), _by_stage(_need(summary, "tokens"))
    return _TEMPLATES.get_template("page.html.j2").render(
        title=headline(sets, _need(summary, "paired")),
        colours=css_variables(),
        status=status,
        marks=MARKS,
        claim=LINEAGE[status],
        totals=f"{duration(sum(seconds.values()))} in all, {count(sum(tokens.values()))} tokens",
        seed=_need(summary, "seed"),
        accuracy=accuracy_section(sets),
        accuracy_caption=CAPTION,
        answers=answers,
        training=_training(histories, summary.get("objective", "")),
        cost=_cost(seconds, tokens),
        lineage_figure=_drawn(lineage),
        proofs=lineage.proofs,
        nodes=[(node.title, node.kind, node.digest, node.path) for node in lineage.nodes],
        settings=list(summary.get("settings", {}).items()),
    )


def _need(summary: Mapping[str, Any], key: str) -> Any:
    if key not in summary:
        raise DataError(f"summary.json: {key} is missing: write the summary again with lopd report")
    return summary[key]


def _by_stage(values: Mapping[str, float]) -> dict[str, float]:
    order = [*(s for s in STAGES if s in values), *(s for s in values if s not in STAGES)]
    return {stage: values[stage] for stage in order}


def _caption(stage: str, curve: Curve, objective: str) -> str:
    """The curve's own, or of the loss that `objective` defines, what that says of it."""
    if stage != "train" or curve.key != "loss":
        return curve.caption
    try:
        known = OBJECTIVES[objective.partition(" ")[0]]  # a user's has its file's digest after it
    except ConfigError:  # an earlier release's, or a user's that this command does not import
        return ""
    return str(known.caption)


def _training(histories: Mapping[str, History], objective: str) -> list[TrainingFigures]:
    sections = []
    for stage, title in (("sft", "SFT"), ("train", "Lightning OPD training")):
        rows = histories.get(stage, ())
        figures = [
            Figure(curve.title, curve_figure(stage, curve, rows), _caption(stage, curve, objective))
            for curve in CURVES[stage]
            if has(rows, curve.key)
        ]
        advantage = ("advantage_p05", "advantage_mean", "advantage_p95")
        if stage == "train" and all(has(rows, key) for key in advantage):
            figures.insert(2, Figure("Advantage spread", advantage_figure(rows), ADVANTAGE_CAPTION))
        if figures:
            skipped = sum(1 for row in rows if row.get("skipped"))
            note = f"Steps: {len(rows):,}; skipped for gradients that were not finite: {skipped:,}."
            sections.append(TrainingFigures(title, note, figures))
    return sections


def _cost(seconds: Mapping[str, float], tokens: Mapping[str, float]) -> dict[str, Any]:
    """The charts of what each stage took, and the lines of a table."""
    figures = []
    if seconds:
        texts = {stage: duration(value) for stage, value in seconds.items()}
        figures.append(
            Figure(
                "Time",
                bars_figure("seconds", seconds, texts, "wall-clock seconds, which no digest stands for"),
            )
        )
    if tokens:
        texts = {stage: count(value) for stage, value in tokens.items()}
        figures.append(Figure("Tokens", bars_figure("tokens", tokens, texts, "tokens processed")))
    rows = []
    for stage in _by_stage({**tokens, **seconds}):
        took, processed = seconds.get(stage), tokens.get(stage)
        rows.append(
            (
                stage,
                "" if took is None else duration(took),
                "" if processed is None else f"{processed:,.0f}",
                f"{processed / took:,.0f}" if took and processed else "",
            )
        )
    return {"figures": figures, "rows": rows}


def _drawn(graph: LineageGraph) -> Figure | None:
    caption = "Round: models. Square: artifacts. A mark carries the number of the claim it stands for."
    return Figure("Made from", lineage_figure(graph), caption) if graph.nodes else None


def duration(seconds: float) -> str:
    """A wall-clock time as a person says it: 0.8 s, 3 min 12 s, 20 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"


def count(value: float) -> str:
    """A count to three figures: 950, 12.3 k, 1.25 M, 3.1 G."""
    for size, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if value >= size:
            return f"{value / size:.3g}{suffix}"
    return f"{value:.0f}"
