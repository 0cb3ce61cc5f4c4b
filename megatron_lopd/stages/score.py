"""4. score: the SAME teacher scores every rollout token, once. After this the teacher is gone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

from megatron_lopd.artifacts.lineage import artifact_parent, prove_parent
from megatron_lopd.config import AgreementConfig, EngineConfig, deciding
from megatron_lopd.engines import EngineKind, kind_of
from megatron_lopd.pipeline import proofs
from megatron_lopd.pipeline.foreseen import foresee
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, SharedStage, identity_of
from megatron_lopd.pipeline.text_checks import check_top_k, check_vocabularies


class ScoreStage(SharedStage):
    """The teacher's log-probs of the rollouts."""

    name, kind = "score", "scores"
    rollouts = "rollout"  # the stage that made what is scored

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.train is not None

    def workers(self, run: ResolvedRun) -> int:
        return run.recipe.score.engine.workers

    def processes(self, run: ResolvedRun) -> int:
        """As many as the larger of its engines wants."""
        return max(each.options.layout.processes if each.options.layout else 1 for each in _engines(run))

    def check(self, run: ResolvedRun) -> list[str]:
        from megatron_lopd.pipeline.engine_gate import check_engine

        teacher, top_k, gate = run.teacher.directory, run.scoring.top_k, run.scoring.agreement
        foresee(run, self.name)
        if teacher.exists():  # once it has scored, it may be gone
            check_vocabularies(run)
            check_top_k(run)
            for engine in _engines(run):
                check_engine(engine, teacher)
        elif not run.is_committed(self.name):
            run.teacher.require()
        kept = f", and its {top_k} likeliest tokens at each are kept" if top_k else ""
        lines = [f"{teacher} scores every rollout token, once{kept}"]
        if gate is not None:
            names = f"{run.scoring.engine.name} and {gate.engine.name}"
            lines.append(f"{names} must agree on {gate.samples} rollouts first")
            kind_of(gate.engine).require(gate.engine, "score.agreement")
        kind_of(run.scoring.engine).require(run.scoring.engine, "score")
        return lines + kind_of(run.scoring.engine).score_advice(run.scoring.engine)

    def plan(self, run: ResolvedRun) -> Plan:
        teacher = run.teacher_parent("score")
        sft, rollout = run.manifest("sft"), run.manifest("rollout")
        found = [
            prove_parent("rollout", "sft", rollout.parents["sft"], sft, run.directory_of("sft")),
            *proofs.prove_teacher(run, sft, teacher),
            proofs.prove_tokens(run, teacher, rollout.parents["student"]),
        ]
        return Plan(
            config=self.settings(run),
            parents={"rollouts": artifact_parent("rollout", rollout), "teacher": teacher},
            lineage=proofs.status_of(found, rollout.lineage),
        )

    def settings(self, run: ResolvedRun) -> dict[str, object]:
        """What decides the scores, beside the teacher; of an engine of ranks, a user's own families too."""
        families = run.own_families if _of_ranks(run) is not None else {}
        return deciding(run.recipe.score) | ({"families": families} if families else {})

    def share(self, run: ResolvedRun, plan: Plan) -> None:
        ranks = _of_ranks(run)
        with ranks.leading() if ranks is not None else nullcontext():
            self.score_shards(run, plan)

    def score_shards(self, run: ResolvedRun, plan: Plan) -> None:
        """A score of every rollout; first, where the recipe wants that, the agreement of two engines."""
        from megatron_lopd.pipeline.engine_gate import check_agreement
        from megatron_lopd.pipeline.shard_jobs import score_work
        from megatron_lopd.pipeline.workers import make_parts

        scoring, teacher = run.scoring, run.teacher.directory
        rollouts, directory = run.directory_of(self.rollouts), run.directory_of(self.name)
        gate = self.gate(run)
        if gate is not None:
            check_agreement(scoring, gate, teacher, rollouts, directory, identity_of(plan))
        make_parts([score_work(teacher, scoring, rollouts, directory, identity_of(plan))])

    def gate(self, run: ResolvedRun) -> AgreementConfig | None:
        """A second engine that must agree first, if there is to be one."""
        return run.scoring.agreement

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.pipeline.engine_gate import AGREEMENT_FILE
        from megatron_lopd.pipeline.shard_jobs import score_output

        rollouts, directory = run.directory_of(self.rollouts), run.directory_of(self.name)
        output = score_output(run.scoring.top_k, rollouts, directory, identity_of(plan))
        gate = [AGREEMENT_FILE] if self.gate(run) is not None else []
        versions = kind_of(run.scoring.engine).versions(run.scoring.engine)
        return replace(output, files=[*output.files, *gate], versions=versions)

    def follow(self, run: ResolvedRun, plan: Plan) -> None:
        """Take part in the engines that are made of ranks; in any other these have no part."""
        ranks = _of_ranks(run)
        if ranks is not None:
            ranks.serve()


def _of_ranks(run: ResolvedRun) -> EngineKind | None:
    """The engine that is made of ranks, which rank 0 leads; of any other, the other ranks have no part."""
    return next((kind_of(each) for each in _engines(run) if each.options.layout is not None), None)


def _engines(run: ResolvedRun) -> list[EngineConfig]:
    scoring = run.scoring
    return [scoring.engine, *([scoring.agreement.engine] if scoring.agreement else [])]
