"""6. export: the trained student as a Hugging Face checkpoint that carries its lineage."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_lopd.artifacts.lineage import ModelLineage, artifact_parent
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.convert.quantize import quantize_fp8, require_modelopt
from megatron_lopd.pipeline import inputs
from megatron_lopd.pipeline.stage import Output, Plan, directory_of, parent_manifest
from megatron_lopd.pipeline.students import lineage_of, seal_model, write_student

EXACT, QUANTIZED = "model", "model-fp8"


def check(recipe: Recipe) -> list[str]:
    directory = directory_of(recipe, "export")
    lines = [f"write the trained student to {directory / EXACT}"]
    if recipe.export.quantization == "fp8":
        require_modelopt()
        samples = recipe.export.calibration_samples
        lines.append(f"and in FP8, calibrated on {samples} rollouts, to {directory / QUANTIZED}")
    return lines


def plan(recipe: Recipe) -> Plan:
    train = parent_manifest(recipe, "train")
    parents = {"train": artifact_parent("train", train)}
    if recipe.export.quantization == "fp8":  # calibration reads them again
        parents["rollout"] = artifact_parent("rollout", parent_manifest(recipe, "rollout"))
    return Plan(deciding(recipe.export), parents, train.lineage)


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
    exact = write_student(checkpoint, reference, directory / EXACT, recipe.export, lineage)
    files = [f"{EXACT}/{name}" for name in exact]
    if recipe.export.quantization == "fp8":
        files += [f"{QUANTIZED}/{name}" for name in _write_quantized(recipe, directory, lineage)]
    return Output(files, {"files": len(files)})


def _write_quantized(recipe: Recipe, directory: Path, lineage: ModelLineage) -> list[str]:
    """The exact model in FP8 beside it, with the same lineage but its own fingerprint; returns its files."""
    out_dir = directory / QUANTIZED
    if out_dir.exists():  # a killed attempt's
        shutil.rmtree(out_dir)
    samples = recipe.export.calibration_samples
    quantize_fp8(directory / EXACT, out_dir, directory_of(recipe, "rollout"), samples)
    return seal_model(out_dir, lineage)
