"""8. report: summary.json for programs, index.html for people."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lopd.artifacts.lineage import Proof, artifact_parent, worst
from megatron_lopd.artifacts.manifest import Manifest, committed_file, verify_files
from megatron_lopd.files.writing import atomic_file, atomic_write_json
from megatron_lopd.loggers import METRICS_FILE, read_steps
from megatron_lopd.pipeline import proofs as proved
from megatron_lopd.pipeline.execute import seconds_of
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.rounds import PARTS, prove_round, rounds_of, train_identity
from megatron_lopd.pipeline.stage import Output, Plan, Stage
from megatron_lopd.stages.evaluate import models_of

if TYPE_CHECKING:
    from megatron_lopd.report.examples import Examples
    from megatron_lopd.report.lineage_graph import LineageGraph

SUMMARY, PAGE = "summary.json", "index.html"
MADE_BEFORE = ("generate", "tokenize", "sft", "rollout", "score", "train", "export", "evaluate")


class ReportStage(Stage):
    """The summary and the page."""

    name, kind = "report", "report"

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.prompts.eval is not None and run.recipe.train is not None

    def on_gpu(self, run: ResolvedRun) -> bool:
        return False

    def check(self, run: ResolvedRun) -> list[str]:
        return [f"write {run.directory_of(self.name) / PAGE}"]

    def plan(self, run: ResolvedRun) -> Plan:
        evaluation = run.manifest("evaluate")
        parents = {"evaluation": artifact_parent("evaluate", evaluation)}
        return Plan({"seed": run.recipe.seed}, parents, evaluation.lineage)

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.report.page import render_page

        manifests, directory = _manifests(run), run.directory_of(self.name)
        for stage, manifest in manifests.items():  # what the page calls proved rests on hashed files
            verify_files(run.directory_of(stage), manifest)
        proofs = _proofs(run, manifests)
        summary = _summary(run, manifests, proofs)
        histories: dict[str, list[dict[str, Any]]] = {
            stage: _history(run.directory_of(stage), manifests[stage])
            for stage in ("sft", "train")
            if stage in manifests
        }
        page = render_page(summary, histories, _graph(run, manifests, proofs), _answers(run, manifests))
        atomic_write_json(directory / SUMMARY, summary)
        with atomic_file(directory / PAGE, "w") as stream:
            stream.write(page)
        return Output([SUMMARY, PAGE], {})


def headline(run: ResolvedRun) -> str:
    """What a finished run comes to, in a line."""
    directory = run.directory_of("report")
    summary = committed_file(directory, run.manifest("report"), SUMMARY).read_json()
    sets = _in_order(run, summary["accuracy"])
    shares = [
        f"{model}{f' on {name}' if len(sets) > 1 else ''} {100 * rows[model]['sampled']:.1f} % sampled, "
        f"{100 * rows[model]['greedy']:.1f} % greedy"
        for name, rows in sets.items()
        for model in models_of(run)
    ]
    return f"{'; '.join(shares)}; lineage {summary['lineage']}: {directory / PAGE}"


def _in_order(run: ResolvedRun, accuracy: dict[str, Any]) -> dict[str, Any]:
    """The sets as the recipe has them: a JSON file of ours has its keys sorted."""
    return {name: accuracy[name] for name in run.recipe.prompts.eval or ()}


def _manifests(run: ResolvedRun) -> dict[str, Manifest]:
    """What is committed of this run, in the order it was made."""
    made = {stage: run.manifest(stage) for stage in MADE_BEFORE if run.is_committed(stage)}
    if "train" in made:
        at = list(made).index("train")
        refreshed = [each.stage(part) for each in rounds_of(run)[1:] for part in PARTS]
        between = {stage: run.manifest(stage) for stage in refreshed}
        made = dict([*list(made.items())[:at], *between.items(), *list(made.items())[at:]])
    return made


def _proofs(run: ResolvedRun, manifests: dict[str, Manifest]) -> list[Proof]:
    if "train" not in manifests:
        return []
    proofs = proved.prove_training(run, manifests["train"].parents["student"])
    for each in rounds_of(run)[1:]:
        proofs += prove_round(run, each, train_identity(run))[0]
    return proofs


def _summary(run: ResolvedRun, manifests: dict[str, Manifest], proofs: list[Proof]) -> dict[str, Any]:
    evaluated = run.directory_of("evaluate")
    results = committed_file(evaluated, manifests["evaluate"], "results.json").read_json()
    statuses = [proof.status for proof in proofs] + [manifest.lineage for manifest in manifests.values()]
    seconds: dict[str, float] = {}
    tokens: Counter[str] = Counter()
    for stage, manifest in manifests.items():
        seconds[_work(stage)] = seconds.get(_work(stage), 0.0) + seconds_of(run.directory_of(stage))
        if "tokens" in manifest.counts:
            tokens[_work(stage)] += manifest.counts["tokens"]
    return {
        "accuracy": _in_order(run, results["accuracy"]),
        "paired": _in_order(run, results["paired"]),
        "unproved": ["seconds"],  # no manifest lists what a clock gave
        "seconds": {work: round(spent, 2) for work, spent in seconds.items()},
        "tokens": dict(tokens),
        "refreshes": len(rounds_of(run)[1:]) if "train" in manifests else 0,
        "lineage": worst(statuses),
        "proofs": [vars(proof) for proof in proofs],
        "seed": run.recipe.seed,
        "objective": manifests["train"].config["objective"] if "train" in manifests else "",
        "settings": _settings(run, manifests, results["teacher_answers"]),
    }


def _answers(run: ResolvedRun, manifests: dict[str, Manifest]) -> list[Examples]:
    """Some of what each model answered to each set."""
    from megatron_lopd.evaluation.answers import ANSWERS, read_answers
    from megatron_lopd.report.accuracy import MODELS
    from megatron_lopd.report.examples import examples

    directory, sets = run.directory_of("evaluate"), run.recipe.prompts.eval or {}
    return [
        examples(
            f"{MODELS.get(model, model)}{f' on {name}' if len(sets) > 1 else ''}",
            read_answers(committed_file(directory, manifests["evaluate"], f"{model}/{name}/{ANSWERS}")),
        )
        for name in sets
        for model in models_of(run)
    ]


def _work(stage: str) -> str:
    """What a stage's seconds and tokens are summed under: all refreshes' rollouts are one kind of work."""
    return f"refresh {stage.rpartition('/')[2]}" if "/" in stage else stage


def _settings(
    run: ResolvedRun, manifests: dict[str, Manifest], answers: dict[str, Any] | None
) -> dict[str, str]:
    """What a reader wants to know of the run, flat."""
    recipe = run.recipe
    layout = recipe.parallel
    settings = {
        "teacher": recipe.teacher.model if recipe.teacher else "none",
        "student": f"{recipe.student.model} ({recipe.student.init})" if recipe.student else "none",
        "precision": recipe.precision,
        "parallel": f"tensor {layout.tensor}, pipeline {layout.pipeline}, processes {layout.processes}",
    }
    for stage in ("sft", "train"):
        if stage in manifests:
            config, optimizer = manifests[stage].config, manifests[stage].config["optimizer"]
            settings[f"{stage}: steps"] = str(manifests[stage].counts["steps"])
            settings[f"{stage}: global batch"] = (
                f"{config['global_batch_size']} samples, {config['loss_normalization']}"
            )
            settings[f"{stage}: learning rate"] = f"{optimizer['lr']:g}, {optimizer['schedule']}"
    if "train" in manifests:
        settings["train: objective"] = manifests["train"].config["objective"]
        settings["rollouts"] = f"{manifests['rollout'].counts['samples']} samples"
        if refreshes := rounds_of(run)[1:]:
            sampled = sum(manifests[each.stage("rollout")].counts["samples"] for each in refreshes)
            every = manifests["train"].config["refresh_every"]
            settings["refreshes"] = f"{len(refreshes)}, every {every} steps, {sampled} samples in all"
    if answers is not None:
        settings["the teacher's SFT answers"] = f"{100 * answers['sampled']:.1f} % of {answers['n']} right"
        if ungraded := answers.get("ungraded"):
            settings["the teacher's SFT answers"] += f", {ungraded:,} ungraded"
    versions = next(iter(manifests.values())).versions
    return settings | {name: text for name, text in versions.items() if text != "absent"}


def _history(directory: Path, manifest: Manifest) -> list[dict[str, Any]]:
    """What a stage committed of its steps: nothing where it committed none."""
    if METRICS_FILE not in manifest.files:
        return []
    return read_steps(committed_file(directory, manifest, METRICS_FILE))


def _graph(run: ResolvedRun, manifests: dict[str, Manifest], proofs: list[Proof]) -> LineageGraph:
    """Of the refreshes the last alone is drawn: all are alike, and many would not fit."""
    from megatron_lopd.report.lineage_graph import Edge, LineageGraph, Node

    earlier = {each.stage(part) for each in rounds_of(run)[1:-1] for part in PARTS}
    manifests = {stage: manifest for stage, manifest in manifests.items() if stage not in earlier}
    nodes: dict[str, Node] = {}
    edges = []
    for stage, manifest in manifests.items():
        nodes[stage] = Node(stage, "artifact", stage, manifest.id, str(run.directory_of(stage)))
        made_from: dict[str, str] = {}  # the role of each, the first that it has
        for role, parent in manifest.parents.items():
            if parent.kind == "artifact" and parent.path in manifests:
                made_from.setdefault(parent.path, role)
            elif parent.kind == "model":
                maker, weights = _maker(parent.path, run, manifests), parent.digests["weights"]
                if maker is None:
                    nodes.setdefault(weights, Node(weights, "model", role, weights, parent.path))
                made_from.setdefault(maker or weights, role)
        edges += [Edge(parent, stage, role) for parent, role in made_from.items()]
    about = {
        proved.SAME_TEACHER: ("generate", "score"),
        proved.SAME_STUDENT: ("rollout", "train"),
        proved.SAME_TOKENS: ("rollout", "score"),
    }
    known = {proof.statement for proof in proofs}
    return LineageGraph(
        nodes=tuple(nodes.values()),
        edges=tuple(edges),
        proofs=tuple(proofs),
        about={name: tuple(n for n in ids if n in nodes) for name, ids in about.items() if name in known},
    )


def _maker(path: str, run: ResolvedRun, manifests: dict[str, Manifest]) -> str | None:
    """The stage of this run that wrote the model at `path`, if one did."""
    return next((stage for stage in manifests if path == str(run.directory_of(stage) / "model")), None)
