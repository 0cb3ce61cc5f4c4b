"""5. train: from the cached scores; no teacher, no sampler. Refused unless its lineage is proved."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.artifacts.manifest import LineageStatus, verify_files
from megatron_lopd.config import Recipe
from megatron_lopd.errors import RefreshDue
from megatron_lopd.mcore.capabilities import capabilities
from megatron_lopd.mcore.precision import require_fp8
from megatron_lopd.pipeline import inputs
from megatron_lopd.pipeline.rounds import (
    data_of,
    is_made,
    part_of,
    prove_round,
    record_rounds,
    require_engines,
    rounds_of,
)
from megatron_lopd.pipeline.stage import Output, Plan, directory_of, identity_of, parent_manifest
from megatron_lopd.pipeline.students import (
    check_budget,
    check_trainable,
    opd_job,
    train_to_checkpoint,
    training_settings,
)
from megatron_lopd.training.consensus import on_rank_zero
from megatron_lopd.training.job import Segment
from megatron_lopd.training.sources import CachedData


def check(recipe: Recipe) -> list[str]:
    config = inputs.train_config(recipe)
    if config.checkpoint is not None:
        check_trainable(Path(config.checkpoint), recipe)
    require_fp8(recipe.fp8, capabilities())
    check_budget(recipe, config)
    length = f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"
    work = f"{length} of {config.global_batch_size} samples"
    lines = [f"train with {config.objective} from the cached scores: {work}"]
    if refreshes := rounds_of(recipe)[1:]:
        require_engines(recipe)
        lines.append(f"the student is rolled out and scored anew {len(refreshes)} times, by lopd refresh")
    return lines


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
    job = opd_job(
        recipe,
        plan,
        _start(recipe),
        CachedData(directory_of(recipe, "rollout"), directory_of(recipe, "score")),
        directory,
        segment_at=partial(_segment_at, recipe, plan) if rounds_of(recipe) else None,
    )
    checkpoint, counts = train_to_checkpoint(job)
    while config.steps is not None and counts["steps"] < config.steps:
        checkpoint, counts = train_to_checkpoint(job)  # the next round's
    files = sorted(str(path.relative_to(directory)) for path in checkpoint.rglob("*") if path.is_file())
    return Output(files, counts)


def _segment_at(recipe: Recipe, plan: Plan, step: int) -> Segment:
    """The round that the step after `step` belongs to; every rank calls. RefreshDue when it is not made.

    Raises LineageError and DataError as `prove_round` does.
    """
    rounds = rounds_of(recipe)
    each = next((each for each in rounds if step < each.end_step), rounds[-1])

    def prove() -> LineageStatus:
        if not each.number:
            return plan.lineage
        if not is_made(recipe, each):
            raise RefreshDue(
                f"train: stopped after step {step} of {rounds[-1].end_step}, with the checkpoint saved, for "
                "the rollouts are to be refreshed: run lopd refresh RECIPE, then lopd train; or lopd run, "
                "which does both by itself"
            )
        proofs, manifests = prove_round(recipe, each, identity_of(plan))
        for part in ("rollout", "score"):
            verify_files(directory_of(recipe, each.stage(part)), manifests[part])
        record_rounds(recipe, each)
        return inputs.status_of(proofs, plan.lineage, *(manifest.lineage for manifest in manifests.values()))

    lineage = on_rank_zero(prove)
    return Segment(data_of(recipe, each), lineage, part_of(recipe, each))


def _start(recipe: Recipe) -> Path:
    checkpoint = inputs.train_config(recipe).checkpoint
    return Path(checkpoint) if checkpoint else inputs.reference_directory(recipe)
