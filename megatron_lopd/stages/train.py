"""5. train: from the cached scores; no teacher, no sampler. Refused unless its lineage is proved."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.artifacts.manifest import MANIFEST, LineageStatus, load_manifest, verify_files
from megatron_lopd.errors import RefreshDue
from megatron_lopd.pipeline import proofs
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.rounds import (
    data_of,
    is_made,
    part_of,
    prove_round,
    record_rounds,
    require_engines,
    rounds_of,
    with_rounds,
)
from megatron_lopd.pipeline.stage import Output, Plan, Stage, identity_of

if TYPE_CHECKING:
    from megatron_lopd.training.job import Segment


class TrainStage(Stage):
    """The last checkpoint of OPD."""

    name, kind = "train", "checkpoint"

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.train is not None

    def processes(self, run: ResolvedRun) -> int:
        return run.recipe.parallel.processes

    def check(self, run: ResolvedRun) -> list[str]:
        from megatron_lopd.mcore.capabilities import capabilities
        from megatron_lopd.mcore.precision import require_fp8
        from megatron_lopd.pipeline.students import check_budget, check_trainable, length_of

        config = run.train
        if config.checkpoint is not None:
            check_trainable(run.start, run.recipe)
        require_fp8(run.recipe.fp8, capabilities())
        check_budget(run.recipe, config)
        work = f"{length_of(config)} of {config.global_batch_size} samples"
        lines = [f"train with {config.objective} from the cached scores: {work}"]
        if refreshes := rounds_of(run)[1:]:
            require_engines(run)
            times = len(refreshes)
            lines.append(f"the student is rolled out and scored anew {times} times, by lopd refresh")
        return lines

    def plan(self, run: ResolvedRun) -> Plan:
        run.manifest("sft")  # or the error that says to run it
        student = run.start.parent
        found = proofs.prove_training(run, student)
        manifests = {stage: run.manifest(stage) for stage in ("sft", "rollout", "score")}
        parents = {stage: artifact_parent(stage, manifest) for stage, manifest in manifests.items()}
        return Plan(
            config=run.training_settings(run.train),
            parents=parents | {"student": student},
            lineage=proofs.status_of(found, *(manifest.lineage for manifest in manifests.values())),
        )

    def complete(self, run: ResolvedRun, plan: Plan) -> Plan:
        return with_rounds(run, plan)

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.pipeline.students import listed_metrics

        checkpoint, counts = _train(run, plan)
        directory = run.directory_of(self.name)
        place = checkpoint.relative_to(directory)
        files = [f"{place}/{name}" for name in (MANIFEST, *load_manifest(checkpoint).files)]
        return Output([*files, *listed_metrics(directory, counts["steps"])], counts)

    def follow(self, run: ResolvedRun, plan: Plan) -> None:
        _train(run, plan)


def _train(run: ResolvedRun, plan: Plan) -> tuple[Path, dict[str, int]]:
    """Train through every round; the last checkpoint, and what was consumed. Every rank calls."""
    from megatron_lopd.pipeline.students import opd_job, train_to_checkpoint
    from megatron_lopd.training.data_sources import CachedData

    job = opd_job(
        run,
        plan,
        run.start.directory,
        CachedData(run.directory_of("rollout"), run.directory_of("score")),
        run.directory_of("train"),
        segment_at=partial(_segment_at, run, plan) if rounds_of(run) else None,
    )
    checkpoint, counts = train_to_checkpoint(job)
    while run.train.steps is not None and counts["steps"] < run.train.steps:
        checkpoint, counts = train_to_checkpoint(job)  # the next round's
    return checkpoint, counts


def _segment_at(run: ResolvedRun, plan: Plan, step: int) -> Segment:
    """The round that the step after `step` belongs to; every rank calls. RefreshDue when it is not made.

    Raises LineageError and DataError as `prove_round` does.
    """
    from megatron_lopd.training.consensus import on_rank_zero
    from megatron_lopd.training.job import Segment

    rounds = rounds_of(run)
    each = next((each for each in rounds if step < each.end_step), rounds[-1])

    def prove() -> LineageStatus:
        if not each.number:
            return plan.lineage
        if not is_made(run, each):
            raise RefreshDue(
                f"train: stopped after step {step} of {rounds[-1].end_step}, with the checkpoint saved, for "
                "the rollouts are to be refreshed: run lopd refresh RECIPE, then lopd train; or lopd run, "
                "which does both by itself"
            )
        found, manifests = prove_round(run, each, identity_of(plan))
        for part in ("rollout", "score"):
            verify_files(run.directory_of(each.stage(part)), manifests[part])
        record_rounds(run, each)
        return proofs.status_of(found, plan.lineage, *(manifest.lineage for manifest in manifests.values()))

    lineage = on_rank_zero(prove)
    return Segment(data_of(run, each), lineage, part_of(run, each))
