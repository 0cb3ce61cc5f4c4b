"""3. rollout: pi_ref answers the OPD prompts, once; token ids and log pi_ref(a_t|s_t) are kept."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.config import deciding
from megatron_lopd.engines import kind_of
from megatron_lopd.pipeline import proofs
from megatron_lopd.pipeline.foreseen import foresee
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, SharedStage
from megatron_lopd.pipeline.text_checks import check_vocabularies

if TYPE_CHECKING:
    from megatron_lopd.pipeline.shard_jobs import SamplingJob


class RolloutStage(SharedStage):
    """The student's answers."""

    name, kind = "rollout", "rollouts"

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.train is not None

    def workers(self, run: ResolvedRun) -> int:
        return run.rollout.config.engine.workers

    def check(self, run: ResolvedRun) -> list[str]:
        part = run.rollout
        check_vocabularies(run)
        notes = part.check()
        foresee(run, self.name)
        kind_of(part.config.engine).require(part.config.engine, "rollout")
        count, each = len(part.prompts.prompts), part.config.sampling.samples_per_prompt
        return [f"the student after SFT answers {count} prompts, {each} each, once", *notes]

    def plan(self, run: ResolvedRun) -> Plan:
        run.manifest("sft")  # or the error that says to run it
        student = run.reference.parent
        sft, found = proofs.prove_reference(run, student)
        teacher = sft.parents.get("teacher")
        if teacher is not None:
            found.append(proofs.prove_tokens(run, teacher, student))
        return Plan(
            config=self.settings(run),
            parents={
                "prompts": run.rollout.prompts.parent,
                "sft": artifact_parent("sft", sft),
                "student": student,
            },
            lineage=proofs.status_of(found, sft.lineage),
        )

    def settings(self, run: ResolvedRun) -> dict[str, object]:
        """What decides the answers, beside the models and prompts."""
        return deciding(run.rollout.config) | {"seed": run.recipe.seed}

    def share(self, run: ResolvedRun, plan: Plan) -> None:
        from megatron_lopd.pipeline.shard_jobs import rollout_work
        from megatron_lopd.pipeline.workers import make_parts

        make_parts([rollout_work(self.job(run, plan), run.directory_of(self.name))])

    def job(self, run: ResolvedRun, plan: Plan) -> SamplingJob:
        """What is sampled."""
        from megatron_lopd.pipeline.shard_jobs import answering_job

        return answering_job(run.rollout, plan)

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.pipeline.shard_jobs import rollout_output, say_cut

        config = run.rollout.config
        made = rollout_output(self.job(run, plan), run.directory_of(self.name))
        say_cut(self.name, made.counts, "rollout", config.sampling)
        return replace(made, versions=kind_of(config.engine).versions(config.engine))
