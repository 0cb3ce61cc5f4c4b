"""1. generate: the teacher answers the SFT prompts. D_SFT = {(q, x) : x ~ pi_T(.|q)}."""

from __future__ import annotations

from pathlib import Path

from megatron_lopd.config import Recipe, deciding
from megatron_lopd.convert.hf_checkpoint import VOICE, copy_files
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
from megatron_lopd.pipeline.stage import Output, Plan
from megatron_lopd.pipeline.workers import make_parts


def check(recipe: Recipe) -> list[str]:
    prompts = inputs.prompts_of(recipe, "sft")[0]
    per_prompt = recipe.generate.sampling.samples_per_prompt
    teacher = inputs.teacher_directory(recipe)
    limit = inputs.longest_prompt(teacher, recipe.generate.sampling, recipe.sft)
    encode_prompts(prompts, Chat(str(teacher), recipe.generate.engine.trust_remote_code), limit)
    kind_of(recipe.generate.engine).require(recipe.generate.engine, "generate")
    return [f"{teacher} answers {len(prompts)} prompts, {per_prompt} each"]


def plan(recipe: Recipe) -> Plan:
    return Plan(
        config=deciding(recipe.generate) | {"seed": recipe.seed},
        parents={
            "prompts": inputs.prompts_of(recipe, "sft")[1],
            "teacher": inputs.teacher_parent(recipe, "generate"),
        },
        lineage="proved",
    )


def share(recipe: Recipe, plan: Plan, directory: Path) -> None:
    settings, teacher = recipe.generate, inputs.teacher_directory(recipe)
    job = SamplingJob(
        model_dir=teacher,
        prompts=inputs.prompts_of(recipe, "sft")[0],
        max_prompt_tokens=inputs.longest_prompt(teacher, settings.sampling, recipe.sft),
        sampling=settings.sampling,
        engine=settings.engine,
        seed=recipe.seed,
        stream="generate",
        label="generate",
    )
    make_parts([rollout_work(job, directory)])


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    voice = copy_files(inputs.teacher_directory(recipe), directory / "tokenizer", VOICE)
    files = [*shards_in(directory), *(f"tokenizer/{name}" for name in voice)]
    return Output(
        files, count_rollouts(directory), kind_of(recipe.generate.engine).versions(recipe.generate.engine)
    )
