"""5. train: from the cached scores; no teacher, no sampler. Refused unless its lineage is proved."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.config import Recipe
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.mcore.capabilities import capabilities
from megatron_lopd.mcore.precision import require_fp8
from megatron_lopd.stages import inputs
from megatron_lopd.stages.base import Output, Plan, Stage, directory_of, parent_manifest
from megatron_lopd.stages.students import (
    check_budget,
    check_trainable,
    identity_of,
    preflight_of,
    train_to_checkpoint,
    training_settings,
)
from megatron_lopd.training.loop import TrainingJob


def check(recipe: Recipe) -> list[str]:
    config = inputs.train_config(recipe)
    if config.checkpoint is not None:
        check_trainable(Path(config.checkpoint), recipe)
    require_fp8(recipe.fp8, capabilities())
    check_budget(recipe, config)
    length = f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"
    work = f"{length} of {config.global_batch_size} samples"
    return [f"train with {config.objective} from the cached scores: {work}"]


def plan(recipe: Recipe) -> Plan:
    config = inputs.train_config(recipe)
    parent_manifest(recipe, "sft")  # or the error that says to run it
    student = inputs.parent_of_model(_start(recipe))
    proofs = inputs.prove_training(recipe, student)
    stages = ("sft", "rollout", "score")
    manifests = {stage: parent_manifest(recipe, stage) for stage in stages}
    return Plan(
        config=training_settings(recipe, config),
        parents={stage: artifact_parent(stage, manifests[stage]) for stage in stages} | {"student": student},
        lineage=inputs.status_of(proofs, *(manifest.lineage for manifest in manifests.values())),
    )


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    config = inputs.train_config(recipe)
    job = TrainingJob(
        name="train",
        identity=identity_of(plan),
        lineage=plan.lineage,
        config=config,
        objective=config.objective,
        parallel=recipe.parallel,
        precision=recipe.precision,
        fp8=recipe.fp8,
        seed=recipe.seed,
        model_dir=_start(recipe),
        data=TrainingData(directory_of(recipe, "rollout"), directory_of(recipe, "score")),
        work_dir=directory,
        preflight=preflight_of(recipe, config),
    )
    checkpoint, counts = train_to_checkpoint(job)
    files = sorted(str(path.relative_to(directory)) for path in checkpoint.rglob("*") if path.is_file())
    return Output(files, counts)


def _start(recipe: Recipe) -> Path:
    checkpoint = inputs.train_config(recipe).checkpoint
    return Path(checkpoint) if checkpoint else inputs.reference_directory(recipe)


STAGE = Stage(
    "train", "checkpoint", check, plan, run, distributed=True, needed=lambda recipe: recipe.train is not None
)
