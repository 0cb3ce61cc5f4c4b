"""1. generate: the teacher answers the SFT prompts. D_SFT = {(q, x) : x ~ pi_T(.|q)}."""

from __future__ import annotations

from megatron_lopd.config import deciding
from megatron_lopd.engines import kind_of
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, SharedStage
from megatron_lopd.pipeline.text_checks import check_vocabularies


class GenerateStage(SharedStage):
    """The teacher's answers, with its tokenizer."""

    name, kind = "generate", "rollouts"

    def needed(self, run: ResolvedRun) -> bool:
        sft = run.recipe.sft
        return sft is not None and sft.data is None and sft.checkpoint is None

    def workers(self, run: ResolvedRun) -> int:
        return run.generate.config.engine.workers

    def check(self, run: ResolvedRun) -> list[str]:
        part = run.generate
        check_vocabularies(run)
        notes = part.check()
        kind_of(part.config.engine).require(part.config.engine, "generate")
        count, each = len(part.prompts.prompts), part.config.sampling.samples_per_prompt
        return [f"{part.model.directory} answers {count} prompts, {each} each", *notes]

    def plan(self, run: ResolvedRun) -> Plan:
        return Plan(
            config=deciding(run.generate.config) | {"seed": run.recipe.seed},
            parents={"prompts": run.generate.prompts.parent, "teacher": run.teacher_parent("generate")},
            lineage="proved",
        )

    def share(self, run: ResolvedRun, plan: Plan) -> None:
        from megatron_lopd.pipeline.shard_jobs import answering_job, rollout_work
        from megatron_lopd.pipeline.workers import make_parts

        make_parts([rollout_work(answering_job(run.generate, plan), run.generate.directory)])

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.convert.hf_checkpoint import copy_voice
        from megatron_lopd.pipeline.shard_jobs import answering_job, rollout_output, say_cut

        directory, config = run.generate.directory, run.generate.config
        made = rollout_output(answering_job(run.generate, plan), directory)
        say_cut(self.name, made.counts, "generate", config.sampling)
        voice = copy_voice(run.teacher.directory, directory / "tokenizer", run.generate.encoded.end_tokens)
        files = [*made.files, *(f"tokenizer/{name}" for name in voice)]
        return Output(files, made.counts, kind_of(config.engine).versions(config.engine))
