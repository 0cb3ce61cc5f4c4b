"""6. export: the trained student as a Hugging Face checkpoint that carries its lineage."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.stages import inputs
from megatron_lopd.stages.base import Output, Plan, Stage, directory_of, parent_manifest
from megatron_lopd.stages.students import lineage_of, write_student


def check(recipe: Recipe) -> list[str]:
    return [f"write the trained student to {directory_of(recipe, 'export') / 'model'}"]


def plan(recipe: Recipe) -> Plan:
    train = parent_manifest(recipe, "train")
    return Plan(deciding(recipe.export), {"train": artifact_parent("train", train)}, train.lineage)


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    train = parent_manifest(recipe, "train")
    (checkpoint,) = {
        (directory_of(recipe, "train") / name).parent for name in train.files if name.endswith(".metadata")
    }
    ancestors = {stage: parent_manifest(recipe, stage) for stage in ("sft", "rollout", "score")} | {
        "train": train
    }
    lineage = lineage_of("train", plan.lineage, ancestors["score"].parents["teacher"], ancestors)
    reference = inputs.reference_directory(recipe)
    files = write_student(checkpoint, reference, directory / "model", recipe.export, lineage)
    return Output([f"model/{name}" for name in files], {"files": len(files)})


STAGE = Stage("export", "model", check, plan, run, needed=lambda recipe: recipe.train is not None)
