"""The proofs that a stage needs before it spends anything: who its models are, what they were made from."""

from __future__ import annotations

from megatron_lopd.artifacts.lineage import (
    LINEAGE_FILE,
    WHOLE_MODEL,
    Evidence,
    Proof,
    prove_parent,
    prove_same,
    read_model_lineage,
    short,
    worst,
)
from megatron_lopd.artifacts.manifest import LineageStatus, Manifest, Parent
from megatron_lopd.errors import DataError, LineageError
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Plan

SAME_TEACHER = "the teacher that scores is the teacher that answered"
SAME_STUDENT = "the student that sampled is the student being trained"
SAME_TOKENS = "teacher and student share one tokenizer and one chat template"


def evidence(parent: Parent, who: str) -> Evidence:
    """A recorded parent as evidence: who it was, and where."""
    return Evidence(parent.digests, f"{who} ({parent.path})")


def prove_reference(run: ResolvedRun, reference: Parent) -> tuple[Manifest, list[Proof]]:
    """The sft manifest, with the proofs that `reference` (pi_ref) is its model, and of whose answers.

    Raises LineageError when something does not hold, DataError when sft has not run or is damaged.
    """
    sft = run.unchanged_manifest("sft")
    made = sft.parents["student"] if run.sft.checkpoint else _made_by(run, "sft")
    proofs = [
        prove_same(
            "the reference student is what sft made",
            evidence(reference, "the reference student"),
            evidence(made, "sft's model"),
            parts=WHOLE_MODEL,
            allow=False,
        )
    ]
    data = sft.parents.get("data")
    if data is not None:
        stage = data.path  # generate or tokenize
        made_data = run.manifest(stage)
        proofs.append(prove_parent("sft", stage, data, made_data, run.directory_of(stage)))
        if "teacher" in sft.parents:
            proofs.append(
                prove_same(
                    f"the SFT data's teacher is the one of {stage}",
                    evidence(sft.parents["teacher"], "sft's teacher"),
                    evidence(made_data.parents["teacher"], f"{stage}'s teacher"),
                    parts=WHOLE_MODEL,
                    allow=False,
                )
            )
    return sft, proofs


def prove_exported(run: ResolvedRun, model: Parent) -> tuple[Manifest, Proof]:
    """The export manifest, with the proof that `model` is what export made. Raises as `prove_reference`."""
    export = run.unchanged_manifest("export")
    proof = prove_same(
        "the trained student is what export made",
        evidence(model, "the trained student"),
        evidence(_made_by(run, "export"), "export's model"),
        parts=WHOLE_MODEL,
        allow=False,
    )
    return export, proof


def _made_by(run: ResolvedRun, stage: str) -> Parent:
    directory = run.directory_of(stage) / "model"
    lineage = read_model_lineage(directory)
    if lineage is None:
        raise DataError(
            f"{directory / LINEAGE_FILE}: missing: restore it, or remove {directory.parent} to make it again"
        )
    return Parent("model", str(directory), lineage.model)


def prove_teacher(run: ResolvedRun, sft: Manifest | Plan, scoring: Parent) -> list[Proof]:
    """Teacher consistency (arXiv 2604.13010): who scores is who answered. LineageError when not.

    `sft`: what sft has made, or what it would make.
    """
    answered = sft.parents.get("teacher")
    if answered is None:
        raise LineageError(
            "refused: nothing says which teacher the SFT data came from: declare it with sft.teacher=PATH"
        )
    proof = prove_same(
        SAME_TEACHER,
        evidence(scoring, "the scoring teacher"),
        evidence(answered, "the SFT data's teacher"),
        parts=WHOLE_MODEL,
        allow=run.recipe.allow_teacher_mismatch,
    )
    return [Proof(proof.statement, worst([proof.status, sft.lineage]), proof.detail)]


def prove_tokenizer(run: ResolvedRun, teacher: Parent, base: Parent) -> Proof:
    """The base student must read the same text as the same tokens; sft teaches it the chat template."""
    return prove_same(
        "teacher and base student share one tokenizer",
        evidence(teacher, "the teacher"),
        evidence(base, "the base student"),
        parts=("tokenizer",),
        allow=run.recipe.allow_teacher_mismatch,
    )


def prove_tokens(run: ResolvedRun, teacher: Parent, student: Parent) -> Proof:
    """Teacher and student must read the same text as the same tokens."""
    return prove_same(
        SAME_TOKENS,
        evidence(teacher, "the teacher"),
        evidence(student, "the student"),
        parts=("tokenizer", "chat_template"),
        allow=run.recipe.allow_teacher_mismatch,
    )


def prove_training(run: ResolvedRun, student: Parent) -> list[Proof]:
    """Everything `train` stands on, walked from the scores back to the teacher's answers.

    `student` is the model about to be trained. Raises LineageError at the first thing that does not
    hold, DataError for a damaged file.
    """
    sft, proofs = prove_reference(run, run.reference.parent)
    rollout, score = run.unchanged_manifest("rollout"), run.unchanged_manifest("score")
    proofs.append(prove_parent("rollout", "sft", rollout.parents["sft"], sft, run.directory_of("sft")))
    proofs.append(
        prove_parent("score", "rollout", score.parents["rollouts"], rollout, run.directory_of("rollout"))
    )
    proofs.append(
        prove_same(
            SAME_STUDENT,
            evidence(rollout.parents["student"], "the rollouts' student"),
            evidence(student, "the student to train"),
            parts=WHOLE_MODEL,
            allow=run.recipe.allow_teacher_mismatch,
        )
    )
    proofs += prove_teacher(run, sft, score.parents["teacher"])
    proofs.append(prove_tokens(run, score.parents["teacher"], rollout.parents["student"]))
    names = f"sft {short(sft.id)}, rollout {short(rollout.id)}, score {short(score.id)}"
    proofs.append(Proof("every file is what its manifest says", "proved", names))
    return proofs


def status_of(proofs: list[Proof], *inherited: LineageStatus) -> LineageStatus:
    """What an artifact that rests on `proofs` and on its parents' lineage may say of itself."""
    return worst([*(proof.status for proof in proofs), *inherited])
