"""What models alone tell about a run that would be refused later: said before anything is spent on it."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.lineage import WHOLE_MODEL, prove_same
from megatron_lopd.artifacts.manifest import Manifest, Parent
from megatron_lopd.config import SftConfig
from megatron_lopd.pipeline import proofs
from megatron_lopd.pipeline.carried import carried_lineage
from megatron_lopd.pipeline.resolved import Model, ResolvedRun
from megatron_lopd.pipeline.stage import Plan


def foresee(run: ResolvedRun, stage: str) -> None:
    """Raise LineageError before `stage` is begun, for teacher and students that score or train would refuse.

    The recipe decides: whatever it names and is there now. What is not there is for the stage that reads it.
    """
    recipe = run.recipe
    if recipe.train is None or recipe.teacher is None or recipe.sft is None or run.is_committed(stage):
        return
    if recipe.sft.data is None and recipe.sft.checkpoint is None and run.is_committed("generate"):
        return  # which is itself compared with the teacher, and says better what is another
    known = _known(run)
    if known is None or not run.teacher.directory.exists():
        return
    made, student = known
    scoring = run.teacher_parent("score")
    proofs.prove_teacher(run, made, scoring)
    proofs.prove_tokens(run, scoring, student)
    if recipe.train.checkpoint is not None and "student" in made.parents:
        prove_same(
            proofs.SAME_STUDENT,
            proofs.evidence(student, "the rollouts' student"),
            proofs.evidence(run.start.parent, "the student to train"),
            parts=WHOLE_MODEL,
            allow=recipe.allow_teacher_mismatch,
        )


def _known(run: ResolvedRun) -> tuple[Manifest | Plan, Parent] | None:
    """What sft made or would make, and the student after it; None where both follow from the teacher."""
    config = run.sft
    if run.is_committed("sft"):
        return run.unchanged_manifest("sft"), run.reference.parent
    if config.checkpoint is not None:
        plan = plan_elsewhere(run, config)
        return plan, plan.parents["student"]
    if config.data is not None and config.teacher is not None:
        declared = Model(Path(config.teacher), "sft.teacher").parent
        return Plan({}, {"teacher": declared}, "declared"), run.student_parent
    return None


def plan_elsewhere(run: ResolvedRun, config: SftConfig) -> Plan:
    """A checkpoint in its own run proves its teacher by its lineage; of another it is declared."""
    settings = run.training_settings(config)
    parents = {"student": run.reference.parent}
    declared = None if config.teacher is None else Model(Path(config.teacher), "sft.teacher").parent
    carried = carried_lineage(run.reference.directory)
    teacher = None if carried is None else carried.lineage.teacher
    if carried is None or teacher is None:
        if declared is not None:
            parents["teacher"] = declared
        return Plan(settings, parents, "declared")
    parents["teacher"] = teacher
    found = []
    if declared is not None:
        found.append(
            prove_same(
                "the declared teacher is the one the checkpoint was fine-tuned on",
                proofs.evidence(declared, "sft.teacher"),
                proofs.evidence(teacher, f"the lineage of {config.checkpoint}"),
                parts=WHOLE_MODEL,
                allow=run.recipe.allow_teacher_mismatch,
            )
        )
    return Plan(settings, parents, proofs.status_of(found, carried.status))
