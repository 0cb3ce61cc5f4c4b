"""Between two rounds of train: the current student is written out, rolled out and scored anew."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.artifacts.manifest import Parent, is_committed
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.engines import kind_of
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.pipeline import inputs
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
from megatron_lopd.pipeline.shard_jobs import (
    SamplingJob,
    count_rollouts,
    rollout_work,
    sample_name,
    score_output,
    score_work,
    shards_in,
)
from megatron_lopd.pipeline.stage import Output, Plan, Stage, directory_of, parent_manifest
from megatron_lopd.pipeline.students import lineage_of, write_student
from megatron_lopd.pipeline.workers import make_parts


def check(recipe: Recipe) -> list[str]:
    """What `lopd refresh` would do next. ConfigError when the recipe asks for none, or cannot have one."""
    if not rounds_of(recipe):
        raise ConfigError("train.refresh_every is not set: there is nothing to refresh")
    require_engines(recipe)
    each = missing_round(recipe)
    if each is None:
        return ["nothing: every refresh is made"]
    return [
        f"the student at step {each.first_step} samples what steps {each.first_step + 1} to {each.end_step} "
        f"visit, and {inputs.teacher_directory(recipe)} scores it"
    ]


def stages_of(each: Round) -> tuple[Stage, ...]:
    """The three stages that make a round's artifacts, in order."""
    return (
        _stage(each, "student", "model", _plan_student, _run_student),
        _stage(each, "rollout", "rollouts", _plan_rollout, _run_rollout, _share_rollout),
        _stage(each, "score", "scores", _plan_score, _run_score, _share_score),
    )


def _stage(
    each: Round,
    part: str,
    kind: str,
    plan: Callable[[Recipe, Round], Plan],
    run: Callable[[Recipe, Round, Plan, Path], Output],
    share: Callable[[Recipe, Round, Path], None] | None = None,
) -> Stage:
    return Stage(
        each.stage(part),
        kind,
        check,
        lambda recipe: plan(recipe, each),
        lambda recipe, made, directory: run(recipe, each, made, directory),
        share=share and (lambda recipe, made, directory: share(recipe, each, directory)),
    )


def _plan_student(recipe: Recipe, each: Round) -> Plan:
    config = deciding(recipe.export) | {"step": each.first_step}
    stage = each.stage("student")
    if is_committed(directory_of(recipe, stage)):  # train may have removed the checkpoint since
        made, _ = prove_student(recipe, each, train_identity(recipe))
        return Plan(config, {"checkpoint": made.parents["checkpoint"]}, made.lineage)
    path, checkpoint = checkpoint_of(recipe, each, rehash=False)  # `_run_student` reads it, and does
    digests = {"id": checkpoint.id, "identity": checkpoint.config["identity"]}
    where = str(path.relative_to(recipe.run_dir))
    return Plan(config, {"checkpoint": Parent("checkpoint", where, digests)}, checkpoint.lineage)


def _run_student(recipe: Recipe, each: Round, plan: Plan, directory: Path) -> Output:
    path, _ = checkpoint_of(recipe, each, rehash=True)
    ancestors = {stage: parent_manifest(recipe, stage) for stage in ("sft", "rollout", "score")}
    lineage = lineage_of(
        each.stage("student"), plan.lineage, ancestors["score"].parents["teacher"], ancestors
    )
    reference = inputs.reference_directory(recipe)
    files = write_student(path, reference, directory / "model", recipe.export, lineage)
    return Output([f"model/{name}" for name in files], {"files": len(files)})


def _plan_rollout(recipe: Recipe, each: Round) -> Plan:
    made, student = prove_student(recipe, each, train_identity(recipe))
    steps = {"first_step": each.first_step, "end_step": each.end_step}
    return Plan(
        config=deciding(recipe.rollout) | {"seed": recipe.seed} | steps,
        parents={
            "prompts": inputs.prompts_of(recipe, "opd")[1],
            "model": artifact_parent(each.stage("student"), made),
            "student": student,
        },
        lineage=made.lineage,
    )


def _share_rollout(recipe: Recipe, each: Round, directory: Path) -> None:
    """What will not be trained is not sampled: the responses that this round's steps visit, and no others."""
    settings, model = recipe.rollout, directory_of(recipe, each.stage("student")) / "model"
    prompts, per_prompt = inputs.prompts_of(recipe, "opd")[0], settings.sampling.samples_per_prompt
    part = part_of(recipe, each)
    if part.plan.num_samples != len(prompts) * per_prompt:
        raise DataError(
            f"{directory_of(recipe, 'rollout')} holds {part.plan.num_samples} samples, and the recipe asks "
            f"for {len(prompts)} x {per_prompt}: undo that"
        )
    wanted = [divmod(int(position), per_prompt) for position in part.visited]
    asked = sorted({prompt for prompt, _ in wanted})
    job = SamplingJob(
        model_dir=model,
        prompts=[prompts[prompt] for prompt in asked],
        max_prompt_tokens=inputs.longest_prompt(model, settings.sampling, recipe.train),
        sampling=settings.sampling,
        engine=settings.engine,
        seed=recipe.seed,
        stream=f"rollout {each.number}",
        label=each.stage("rollout"),
        only=frozenset(sample_name(prompts[prompt], index) for prompt, index in wanted),
    )
    make_parts([rollout_work(job, directory)])


def _run_rollout(recipe: Recipe, each: Round, plan: Plan, directory: Path) -> Output:
    versions = kind_of(recipe.rollout.engine).versions(recipe.rollout.engine)
    return Output(shards_in(directory), count_rollouts(directory), versions)


def _plan_score(recipe: Recipe, each: Round) -> Plan:
    stage = each.stage("score")
    teacher = inputs.teacher_parent(recipe, stage)
    rollout = parent_manifest(recipe, each.stage("rollout"))
    proofs = [
        *inputs.prove_teacher(recipe, parent_manifest(recipe, "sft"), teacher),
        inputs.prove_tokens(recipe, teacher, rollout.parents["student"]),
    ]
    return Plan(
        config=deciding(recipe.score),
        parents={"rollouts": artifact_parent(each.stage("rollout"), rollout), "teacher": teacher},
        lineage=inputs.status_of(proofs, rollout.lineage),
    )


def _share_score(recipe: Recipe, each: Round, directory: Path) -> None:
    stage, teacher = each.stage("rollout"), inputs.teacher_directory(recipe)
    files = list(parent_manifest(recipe, stage).files)
    scoring = inputs.scoring_of(recipe)
    make_parts([score_work(teacher, scoring, directory_of(recipe, stage), files, directory)])


def _run_score(recipe: Recipe, each: Round, plan: Plan, directory: Path) -> Output:
    stage = each.stage("rollout")
    output = score_output(parent_manifest(recipe, stage), directory_of(recipe, stage), directory)
    return replace(output, versions=kind_of(recipe.score.engine).versions(recipe.score.engine))
