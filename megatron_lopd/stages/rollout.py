"""3. rollout: pi_ref answers the OPD prompts, once; token ids and log pi_ref(a_t|s_t) are kept."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.data.chat import Chat
from megatron_lopd.engines import kind_of
from megatron_lopd.pipeline import inputs
from megatron_lopd.pipeline.shard_jobs import (
    SamplingJob,
    count_rollouts,
    encode_prompts,
    rollout_work,
    shards_in,
)
from megatron_lopd.pipeline.stage import Output, Plan, parent_manifest
from megatron_lopd.pipeline.workers import make_parts


def check(recipe: Recipe) -> list[str]:
    prompts, sampling = inputs.prompts_of(recipe, "opd")[0], recipe.rollout.sampling
    student = inputs.reference_directory(recipe)
    if not student.exists():  # sft has not run: it will speak like the teacher, and be shaped like the base
        inputs.longest_prompt(Path(inputs.base_student(recipe).model), sampling, recipe.train)
        student = inputs.teacher_directory(recipe)
    chat = Chat(str(student), recipe.rollout.engine.trust_remote_code)
    encode_prompts(prompts, chat, inputs.longest_prompt(student, sampling, recipe.train))
    kind_of(recipe.rollout.engine).require(recipe.rollout.engine, "rollout")
    return [f"the student after SFT answers {len(prompts)} prompts, {sampling.samples_per_prompt} each, once"]


def plan(recipe: Recipe) -> Plan:
    parent_manifest(recipe, "sft")  # or the error that says to run it
    student = inputs.parent_of_model(inputs.reference_directory(recipe))
    sft, proofs = inputs.prove_reference(recipe, student)
    teacher = sft.parents.get("teacher")
    if teacher is not None:
        proofs.append(inputs.prove_tokens(recipe, teacher, student))
    return Plan(
        config=deciding(recipe.rollout) | {"seed": recipe.seed},
        parents={
            "prompts": inputs.prompts_of(recipe, "opd")[1],
            "sft": artifact_parent("sft", sft),
            "student": student,
        },
        lineage=inputs.status_of(proofs, sft.lineage),
    )


def share(recipe: Recipe, plan: Plan, directory: Path) -> None:
    settings, student = recipe.rollout, inputs.reference_directory(recipe)
    job = SamplingJob(
        model_dir=student,
        prompts=inputs.prompts_of(recipe, "opd")[0],
        max_prompt_tokens=inputs.longest_prompt(student, settings.sampling, recipe.train),
        sampling=settings.sampling,
        engine=settings.engine,
        seed=recipe.seed,
        stream="rollout",
        label="rollout",
    )
    make_parts([rollout_work(job, directory)])


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    return Output(
        shards_in(directory),
        count_rollouts(directory),
        kind_of(recipe.rollout.engine).versions(recipe.rollout.engine),
    )
