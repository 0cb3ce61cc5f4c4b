"""Between two rounds of train: the current student is written out, rolled out and scored anew."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.artifacts.manifest import Parent
from megatron_lopd.config import AgreementConfig, deciding
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.pipeline import proofs
from megatron_lopd.pipeline.encoded import encode
from megatron_lopd.pipeline.resolved import Model, ResolvedRun
from megatron_lopd.pipeline.rounds import (
    Round,
    checkpoint_of,
    missing_round,
    part_of,
    prove_student,
    require_engines,
    rounds_of,
    train_identity,
)
from megatron_lopd.pipeline.stage import Output, Plan, Stage, identity_of
from megatron_lopd.stages.rollout import RolloutStage
from megatron_lopd.stages.score import ScoreStage

if TYPE_CHECKING:
    from megatron_lopd.pipeline.shard_jobs import SamplingJob


def check(run: ResolvedRun) -> list[str]:
    """What `lopd refresh` would do next. ConfigError when the recipe asks for none, or cannot have one."""
    if not rounds_of(run):
        raise ConfigError("train.refresh_every is not set: there is nothing to refresh")
    require_engines(run)
    each = missing_round(run)
    if each is None:
        return ["nothing: every refresh is made"]
    return [
        f"the student at step {each.first_step} samples what steps {each.first_step + 1} to {each.end_step} "
        f"visit, and {run.teacher.directory} scores it"
    ]


def stages_of(each: Round) -> tuple[Stage, ...]:
    """The three stages that make a round's artifacts, in order."""
    return RefreshStudentStage(each), RefreshRolloutStage(each), RefreshScoreStage(each)


class RefreshStudentStage(Stage):
    """The student as it is where the round begins."""

    kind = "model"

    def __init__(self, each: Round) -> None:
        self.round, self.name = each, each.stage("student")

    def check(self, run: ResolvedRun) -> list[str]:
        return check(run)

    def plan(self, run: ResolvedRun) -> Plan:
        config = deciding(run.recipe.export) | {"step": self.round.first_step}
        student = run.reference.parent
        sft, found = proofs.prove_reference(run, student)  # whose config.json and tokenizer are copied
        if run.is_committed(self.name):  # train may have removed the checkpoint since
            made, _ = prove_student(run, self.round, train_identity(run))
            checkpoint, lineage = made.parents["checkpoint"], made.lineage
        else:
            path, manifest = checkpoint_of(run, self.round, rehash=False)  # `commit` reads it, and does
            digests = {"id": manifest.id, "identity": manifest.config["identity"]}
            checkpoint = Parent("checkpoint", str(path.relative_to(run.directory)), digests)
            lineage = manifest.lineage
        parents = {"checkpoint": checkpoint, "sft": artifact_parent("sft", sft), "student": student}
        return Plan(config, parents, proofs.status_of(found, sft.lineage, lineage))

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.pipeline.students import lineage_of, write_student

        path, _ = checkpoint_of(run, self.round, rehash=True)
        ancestors = {stage: run.manifest(stage) for stage in ("sft", "rollout", "score")}
        lineage = lineage_of(self.name, plan.lineage, ancestors["score"].parents["teacher"], ancestors)
        model = run.directory_of(self.name) / "model"
        files = write_student(path, run.reference.directory, model, run.recipe.export, lineage)
        return Output([f"model/{name}" for name in files], {"files": len(files)})


class RefreshRolloutStage(RolloutStage):
    """The answers of the student as it then is. What will not be trained on is not sampled."""

    def __init__(self, each: Round) -> None:
        self.round, self.name = each, each.stage("rollout")

    def check(self, run: ResolvedRun) -> list[str]:
        return check(run)

    def plan(self, run: ResolvedRun) -> Plan:
        made, student = prove_student(run, self.round, train_identity(run))
        steps = {"first_step": self.round.first_step, "end_step": self.round.end_step}
        return Plan(
            config=self.settings(run) | steps,
            parents={
                "prompts": run.rollout.prompts.parent,
                "model": artifact_parent(self.round.stage("student"), made),
                "student": student,
            },
            lineage=made.lineage,
        )

    def job(self, run: ResolvedRun, plan: Plan) -> SamplingJob:
        """The responses that this round's steps visit, and no others."""
        from megatron_lopd.pipeline.shard_jobs import SamplingJob, sample_name

        part, settings = run.rollout, run.rollout.config
        prompts, per_prompt = part.prompts.prompts, settings.sampling.samples_per_prompt
        steps = part_of(run, self.round)
        if steps.plan.num_samples != len(prompts) * per_prompt:
            raise DataError(
                f"{part.directory} holds {steps.plan.num_samples} samples, and the recipe asks for "
                f"{len(prompts)} x {per_prompt}: undo that"
            )
        wanted = [divmod(int(position), per_prompt) for position in steps.visited]
        asked = [prompts[prompt] for prompt in sorted({prompt for prompt, _ in wanted})]
        model = Model(run.directory_of(self.round.stage("student")) / "model")
        trust = settings.engine.trust_remote_code
        return SamplingJob(
            model_dir=model.directory,
            prompts=encode(asked, model.directory, part.limit(model), trust),
            sampling=settings.sampling,
            engine=settings.engine,
            seed=run.recipe.seed,
            stream=f"rollout {self.round.number}",
            label=self.name,
            plan=identity_of(plan),
            only=frozenset(sample_name(prompts[prompt], index) for prompt, index in wanted),
        )


class RefreshScoreStage(ScoreStage):
    """The teacher's log-probs of those answers."""

    def __init__(self, each: Round) -> None:
        self.round, self.name, self.rollouts = each, each.stage("score"), each.stage("rollout")

    def check(self, run: ResolvedRun) -> list[str]:
        return check(run)

    def plan(self, run: ResolvedRun) -> Plan:
        teacher, rollout = run.teacher_parent(self.name), run.manifest(self.rollouts)
        found = [
            *proofs.prove_teacher(run, run.manifest("sft"), teacher),
            proofs.prove_tokens(run, teacher, rollout.parents["student"]),
        ]
        return Plan(
            config=self.settings(run),
            parents={"rollouts": artifact_parent(self.rollouts, rollout), "teacher": teacher},
            lineage=proofs.status_of(found, rollout.lineage),
        )

    def share(self, run: ResolvedRun, plan: Plan) -> None:
        self.score_shards(run, plan)  # in this one process: `require_engines` has seen to that

    def gate(self, run: ResolvedRun) -> AgreementConfig | None:
        return None  # the engines have agreed on the first rollouts
