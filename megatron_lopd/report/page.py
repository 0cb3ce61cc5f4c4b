"""The report as one self-contained HTML page: no scripts, nothing fetched, readable on a phone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from megatron_lopd.artifacts.lineage import worst
from megatron_lopd.artifacts.manifest import LineageStatus
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.registry import OBJECTIVES
from megatron_lopd.report.accuracy import accuracy_section, accuracy_sets, headline
from megatron_lopd.report.figures import (
    Curve,
    advantage_figure,
    bars_figure,
    curve_figure,
    has,
)
from megatron_lopd.report.html import figure, table
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
        Curve("reverse_kl", "Reverse KL", "nats per token", "", (0.0,)),
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

CSS = """
*{box-sizing:border-box}
body{margin:0;background:var(--page);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main{max-width:72rem;margin:0 auto;padding:1.25rem 1rem 3rem}
h1{font-size:clamp(1.3rem,4.5vw,2rem);line-height:1.25;margin:.3rem 0 .6rem;text-wrap:balance}
h2{font-size:1.15rem;margin:2.2rem 0 .6rem}
h3{font-size:1rem;margin:0}
p{margin:.3rem 0;max-width:46rem}
.quiet,figcaption{color:var(--muted);font-size:.875rem}
.grid{display:grid;gap:.9rem;grid-template-columns:repeat(auto-fill,minmax(min(100%,20rem),1fr))}
figure,.card{margin:0;padding:.8rem .9rem;background:var(--surface);border:1px solid var(--rule);
border-radius:.6rem;min-width:0}
svg{display:block;width:100%;height:auto;margin-top:.4rem}
svg *{stroke-linejoin:round;stroke-linecap:butt}
svg text{font-family:system-ui,sans-serif!important}
.lead{max-width:40rem}
.lineage{display:grid;gap:.9rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,24rem),1fr));
align-items:start}
.lineage svg{max-width:36rem;margin-inline:auto}
ol{list-style:none;margin:0;padding:0}
li{display:grid;grid-template-columns:2.6rem 1fr;padding:.5rem 0;border-top:1px solid var(--rule)}
li:first-child{border-top:0}
.proved{color:var(--proved)}.declared{color:var(--declared)}.overridden{color:var(--overridden)}
.mark{font-weight:700}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:.85rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;padding:.35rem .3rem;border-top:1px solid var(--rule);white-space:nowrap}
th:first-child,td:first-child,.text td{text-align:left}
.text td{white-space:normal;overflow-wrap:anywhere}
thead th{border-top:0;color:var(--muted);font-weight:500}
details{margin-top:.9rem}
summary{cursor:pointer}
code{font-size:.85em;overflow-wrap:anywhere}
"""


def render_page(
    summary: dict[str, Any], histories: dict[str, list[dict[str, Any]]], lineage: LineageGraph
) -> str:
    """The report of a run as HTML, byte-identical for the same arguments.

    `summary` is summary.json: `accuracy` (of each set of prompts: sft and lightning_opd, optionally base and
    teacher: their Grades), `seconds` and `tokens` by stage, `lineage`, `seed`, optionally `settings` and
    `objective`. `histories` holds the rows of metrics.jsonl by stage (`sft`, `train`); a stage or a metric
    that is not there has no figure. Raises DataError naming the key of `summary` that is missing or out of
    range, or when its lineage claims more than the proofs.
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
    title = headline(sets)
    head = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{css_variables()}{CSS}</style></head><body><main>"
    )
    body = [
        '<p class="quiet">Lightning OPD on Megatron-Core</p>',
        f"<h1>{escape(title)}</h1>",
        f"<p>{_mark(status)} Lineage {escape(status)}. {escape(LINEAGE[status])}</p>",
        f'<p class="quiet">{_totals(seconds, tokens)}; seed {escape(str(_need(summary, "seed")))}.</p>',
        accuracy_section(sets),
        _training(histories, summary.get("objective", "")),
        _cost(seconds, tokens),
        _lineage(lineage),
        _settings(summary.get("settings", {})),
    ]
    return head + "".join(body) + "</main></body></html>\n"


def _need(summary: Mapping[str, Any], key: str) -> Any:
    if key not in summary:
        raise DataError(f"summary.json: {key} is missing: write the summary again with lopd report")
    return summary[key]


def _by_stage(values: Mapping[str, float]) -> dict[str, float]:
    order = [*(s for s in STAGES if s in values), *(s for s in values if s not in STAGES)]
    return {stage: values[stage] for stage in order}


def _caption(stage: str, curve: Curve, objective: str) -> str:
    """The curve's own, or where it is a loss or a measure that `objective` defines, what that says of it."""
    if stage != "train" or curve.caption:
        return curve.caption
    try:
        known = OBJECTIVES[objective.partition(" ")[0]]  # a user's has its file's digest after it
    except ConfigError:  # an earlier release's, or a user's that this command does not import
        return ""
    return str(known.caption if curve.key == "loss" else known.captions.get(curve.key, ""))


def _training(histories: Mapping[str, History], objective: str) -> str:
    parts = []
    for stage, title in (("sft", "SFT"), ("train", "Lightning OPD training")):
        rows = histories.get(stage, ())
        figures = [
            figure(curve.title, curve_figure(stage, curve, rows), _caption(stage, curve, objective))
            for curve in CURVES[stage]
            if has(rows, curve.key)
        ]
        advantage = ("advantage_p05", "advantage_mean", "advantage_p95")
        if stage == "train" and all(has(rows, key) for key in advantage):
            figures.insert(2, figure("Advantage spread", advantage_figure(rows), ADVANTAGE_CAPTION))
        if figures:
            skipped = sum(1 for row in rows if row.get("skipped"))
            note = f"Steps: {len(rows):,}; skipped for gradients that were not finite: {skipped:,}."
            parts.append(f'<h2>{title}</h2><p class="quiet">{note}</p>')
            parts.append(f'<div class="grid">{"".join(figures)}</div>')
    return "".join(parts)


def _cost(seconds: Mapping[str, float], tokens: Mapping[str, float]) -> str:
    figures = []
    if seconds:
        texts = {stage: duration(value) for stage, value in seconds.items()}
        figures.append(figure("Time", bars_figure("seconds", seconds, texts, "wall-clock seconds"), ""))
    if tokens:
        texts = {stage: count(value) for stage, value in tokens.items()}
        figures.append(figure("Tokens", bars_figure("tokens", tokens, texts, "tokens processed"), ""))
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
    rows_table = table(("stage", "time", "tokens", "tokens/s"), rows)
    return (
        f'<h2>Time and tokens by stage</h2><div class="grid">{"".join(figures)}'
        f'<div class="card scroll">{rows_table}</div></div>'
    )


def _lineage(graph: LineageGraph) -> str:
    proofs = "".join(
        f'<li><span class="mark {proof.status}">{MARKS[proof.status]} {number}</span><div>'
        f"{escape(proof.statement)}<br>"
        f'<span class="quiet"><span class="{proof.status}">{proof.status}</span>: {escape(proof.detail)}'
        "</span></div></li>"
        for number, proof in enumerate(graph.proofs, start=1)
    )
    rows = [(node.title, node.kind, node.digest, node.path) for node in graph.nodes]
    caption = "Round: models. Square: artifacts. A mark carries the number of the claim it stands for."
    drawn = figure("Made from", lineage_figure(graph), caption) if graph.nodes else ""
    return (
        f'<h2>Lineage</h2><div class="lineage">{drawn}'
        f'<div class="card"><h3>Claims and their evidence</h3><ol>{proofs}</ol></div></div>'
        '<details class="card"><summary>Digests and paths</summary><div class="scroll">'
        f"{table(('what', 'kind', 'digest', 'path'), rows, text=True)}</div></details>"
    )


def _settings(settings: Mapping[str, str]) -> str:
    if not settings:
        return ""
    rows_table = table(("setting", "value"), settings.items(), text=True)
    return f'<h2>Settings</h2><div class="card scroll">{rows_table}</div>'


def _mark(status: LineageStatus) -> str:
    return f'<span class="mark {status}">{MARKS[status]}</span>'


def _totals(seconds: Mapping[str, float], tokens: Mapping[str, float]) -> str:
    return f"{duration(sum(seconds.values()))} in all, {count(sum(tokens.values()))} tokens"


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
