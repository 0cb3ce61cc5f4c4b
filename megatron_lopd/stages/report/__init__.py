"""8. report: summary.json for programs, index.html for people."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.files import atomic_file, atomic_write_json, read_json
from megatron_lopd.artifacts.lineage import Proof, artifact_parent, worst
from megatron_lopd.artifacts.manifest import Manifest, is_committed, load_manifest
from megatron_lopd.config import Recipe
from megatron_lopd.errors import DataError
from megatron_lopd.stages import inputs
from megatron_lopd.stages.base import Output, Plan, Stage, directory_of, parent_manifest, seconds_of
from megatron_lopd.stages.report.lineage_graph import Edge, LineageGraph, Node
from megatron_lopd.stages.report.page import render_page

SUMMARY, PAGE = "summary.json", "index.html"
MADE_BEFORE = ("generate", "tokenize", "sft", "rollout", "score", "train", "export", "evaluate")


def check(recipe: Recipe) -> list[str]:
    return [f"write {directory_of(recipe, 'report') / PAGE}"]


def plan(recipe: Recipe) -> Plan:
    evaluation = parent_manifest(recipe, "evaluate")
    return Plan(
        {"seed": recipe.seed}, {"evaluation": artifact_parent("evaluate", evaluation)}, evaluation.lineage
    )


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    manifests = _manifests(recipe)
    proofs = _proofs(recipe, manifests)
    summary = _summary(recipe, manifests, proofs)
    histories: dict[str, list[dict[str, Any]]] = {
        stage: _history(directory_of(recipe, stage)) for stage in ("sft", "train") if stage in manifests
    }
    page = render_page(summary, histories, _graph(recipe, manifests, proofs))
    atomic_write_json(directory / SUMMARY, summary)
    with atomic_file(directory / PAGE, "w") as stream:
        stream.write(page)
    return Output([SUMMARY, PAGE], {})


def headline(recipe: Recipe) -> str:
    """What a finished run comes to, in a line."""
    directory = directory_of(recipe, "report")
    summary = read_json(directory / SUMMARY)
    shares = [
        f"{model} {100 * row['sampled']:.1f} % sampled, {100 * row['greedy']:.1f} % greedy"
        for model, row in summary["accuracy"].items()
    ]
    return f"{'; '.join(reversed(shares))}; lineage {summary['lineage']}: {directory / PAGE}"


def _manifests(recipe: Recipe) -> dict[str, Manifest]:
    """What is committed of this run, in the order it was made."""
    directories = {stage: directory_of(recipe, stage) for stage in MADE_BEFORE}
    return {stage: load_manifest(path) for stage, path in directories.items() if is_committed(path)}


def _proofs(recipe: Recipe, manifests: dict[str, Manifest]) -> list[Proof]:
    if "train" not in manifests:
        return []
    return inputs.prove_training(recipe, manifests["train"].parents["student"])


def _summary(recipe: Recipe, manifests: dict[str, Manifest], proofs: list[Proof]) -> dict[str, Any]:
    results = read_json(directory_of(recipe, "evaluate") / "results.json")
    statuses = [proof.status for proof in proofs] + [manifest.lineage for manifest in manifests.values()]
    return {
        "accuracy": results["accuracy"],
        "seconds": {stage: round(seconds_of(directory_of(recipe, stage)), 2) for stage in manifests},
        "tokens": {
            stage: manifest.counts["tokens"]
            for stage, manifest in manifests.items()
            if "tokens" in manifest.counts
        },
        "lineage": worst(statuses),
        "proofs": [vars(proof) for proof in proofs],
        "seed": recipe.seed,
        "objective": manifests["train"].config["objective"] if "train" in manifests else "",
        "settings": _settings(recipe, manifests, results["teacher_answers"]),
    }


def _settings(
    recipe: Recipe, manifests: dict[str, Manifest], answers: dict[str, Any] | None
) -> dict[str, str]:
    """What a reader wants to know of the run, flat."""
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
    if answers is not None:
        settings["the teacher's SFT answers"] = f"{100 * answers['sampled']:.1f} % of {answers['n']} right"
    versions = next(iter(manifests.values())).versions
    return settings | {name: text for name, text in versions.items() if text != "absent"}


def _history(directory: Path) -> list[dict[str, Any]]:
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: damaged ({error}): remove it to draw the report without it") from None


def _graph(recipe: Recipe, manifests: dict[str, Manifest], proofs: list[Proof]) -> LineageGraph:
    nodes: dict[str, Node] = {}
    edges = []
    for stage, manifest in manifests.items():
        nodes[stage] = Node(stage, "artifact", stage, manifest.id, str(directory_of(recipe, stage)))
        for role, parent in manifest.parents.items():
            if parent.kind == "artifact":
                edges.append(Edge(parent.path, stage, role))
            elif parent.kind == "model":
                maker = _maker(parent.path, recipe, manifests)
                if maker is None:
                    weights = parent.digests["weights"]
                    nodes.setdefault(weights, Node(weights, "model", role, weights, parent.path))
                if maker not in {edge.parent for edge in edges if edge.child == stage}:
                    edges.append(Edge(maker or parent.digests["weights"], stage, role))
    about = {
        inputs.SAME_TEACHER: ("generate", "score"),
        inputs.SAME_STUDENT: ("rollout", "train"),
        inputs.SAME_TOKENS: ("rollout", "score"),
    }
    known = {proof.statement for proof in proofs}
    return LineageGraph(
        nodes=tuple(nodes.values()),
        edges=tuple(edges),
        proofs=tuple(proofs),
        about={name: tuple(n for n in ids if n in nodes) for name, ids in about.items() if name in known},
    )


def _maker(path: str, recipe: Recipe, manifests: dict[str, Manifest]) -> str | None:
    """The stage of this run that wrote the model at `path`, if one did."""
    return next((stage for stage in manifests if path == str(directory_of(recipe, stage) / "model")), None)


STAGE = Stage(
    "report",
    "report",
    check,
    plan,
    run,
    needed=lambda recipe: recipe.prompts.eval is not None and recipe.train is not None,
)
