"""7. evaluate: how good the student's answers are before and after OPD, and the teacher's, on each set."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.config import deciding
from megatron_lopd.engines import kind_of
from megatron_lopd.files.writing import atomic_write_json
from megatron_lopd.pipeline.encoded import longest_prompt
from megatron_lopd.pipeline.proofs import prove_exported, prove_reference, status_of
from megatron_lopd.pipeline.resolved import ONLY_SET, Model, ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, SharedStage, identity_of
from megatron_lopd.pipeline.text_checks import check_evaluated, check_sets
from megatron_lopd.runtime.display import say

if TYPE_CHECKING:
    from megatron_lopd.graders import Grader
    from megatron_lopd.pipeline.workers import Work
    from megatron_lopd.prompts.prompt import Prompt

RESULTS = "results.json"


class EvaluateStage(SharedStage):
    """The models' answers, and their grades."""

    name, kind = "evaluate", "evaluation"

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.prompts.eval is not None and run.recipe.sft is not None

    def workers(self, run: ResolvedRun) -> int:
        return run.recipe.evaluate.engine.workers

    def check(self, run: ResolvedRun) -> list[str]:
        models, k = ", ".join(models_of(run)), run.recipe.evaluate.sampling.samples_per_prompt
        kind_of(run.recipe.evaluate.engine).require(run.recipe.evaluate.engine, "evaluate")
        notes = check_evaluated(run) if run.recipe.sft is not None else []
        lines = [
            f"grade {models} on {len(prompts)} prompts of {name}, {k} sampled and 1 greedy each"
            for name, prompts in check_sets(run).items()
        ]
        return lines + notes

    def plan(self, run: ResolvedRun) -> Plan:
        parents = {_role(name): each.parent for name, each in run.evaluation_sets.items()}
        for name, model in models_of(run).items():
            parents[name] = run.teacher_parent(self.name) if name == "teacher" else model.parent
        sft, found = prove_reference(run, parents["sft"])
        made = {"sft": sft}
        if run.recipe.train is not None:
            made["export"], proof = prove_exported(run, parents["lightning_opd"])
            found.append(proof)
        if _teacher_prompts(run):
            made["generate"] = run.manifest("generate")
        parents |= {f"{stage} stage": artifact_parent(stage, each) for stage, each in made.items()}
        return Plan(
            config=deciding(run.recipe.evaluate) | {"seed": run.recipe.seed},
            parents=parents,
            lineage=status_of(found, *(each.lineage for each in made.values())),
        )

    def share(self, run: ResolvedRun, plan: Plan) -> None:
        from megatron_lopd.evaluation.grading import answering
        from megatron_lopd.pipeline.workers import make_parts

        settings, seed, directory = run.recipe.evaluate, run.recipe.seed, run.directory_of(self.name)
        works: list[Work] = []
        for model, where in models_of(run).items():
            limit = longest_prompt(where.directory, settings.sampling, None, "evaluate")
            for name in run.evaluation_sets:
                place, label = directory / model / name, f"{model} on {name}"
                prompts = run.encoded_set(name, where, limit)
                works += answering(where.directory, prompts, settings, seed, place, label, identity_of(plan))
        make_parts(works + _teacher_grading(run))

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.evaluation.answers import ANSWERS
        from megatron_lopd.evaluation.estimates import paired
        from megatron_lopd.evaluation.grading import answers_in, grade_answers
        from megatron_lopd.graders import open_grader
        from megatron_lopd.pipeline.shard_jobs import count_rollouts, say_cut

        settings, directory = run.recipe.evaluate, run.directory_of(self.name)
        accuracy: dict[str, dict[str, Any]] = {}
        compared: dict[str, dict[str, Any]] = {}
        counts: Counter[str] = Counter()
        files: list[str] = []
        with open_grader(settings.grader) as grader:
            for name, each in run.evaluation_sets.items():
                counts["prompts"] += len(each.prompts)
                accuracy[name] = {}
                shares: dict[str, list[float]] = {}
                for model, where in models_of(run).items():
                    place = directory / model / name
                    answers = answers_in(place, each.prompts, settings, identity_of(plan))
                    grades, shares[model] = grade_answers(
                        answers, place, where.directory, each.prompts, settings, grader
                    )
                    say(f"lopd: {model} on {name}: {grades}")
                    accuracy[name][model] = grades.plain()
                    counts["ungraded"] += grades.ungraded
                    files.append(str((place / ANSWERS).relative_to(directory)))
                    for mode, reader in answers.items():
                        made = count_rollouts(reader)
                        counts["tokens"] += made["tokens"]
                        files += [str(path.relative_to(directory)) for path in reader.paths]
                        say_cut(f"{model} on {name}, {mode}", made, self.name, settings.sampling)
                if "lightning_opd" in shares:
                    compared[name] = asdict(paired(shares["sft"], shares["lightning_opd"]))
            of_teacher = _teacher_answers(run, grader)
        results = {
            "accuracy": accuracy,
            "paired": compared,
            "grader": settings.grader,
            "teacher_answers": of_teacher,
        }
        atomic_write_json(directory / RESULTS, results)
        return Output([*files, RESULTS], dict(counts), kind_of(settings.engine).versions(settings.engine))


def _role(name: str) -> str:
    """What a set is called among the parents: only the one that has no name of its own is just prompts."""
    return "prompts" if name == ONLY_SET else f"prompts {name}"


def models_of(run: ResolvedRun) -> dict[str, Model]:
    """Who is graded, by name."""
    models = {"sft": run.reference}
    if run.recipe.train is not None:
        models["lightning_opd"] = Model(run.directory_of("export") / "model")
    if run.recipe.evaluate.teacher:
        models["teacher"] = run.teacher
    return models


def _teacher_prompts(run: ResolvedRun) -> list[Prompt]:
    """The prompts of what SFT learned from, the teacher's answers; none where they cannot be graded."""
    if run.recipe.prompts.sft is None or not run.is_committed("generate"):
        return []
    prompts = run.sft_prompts.prompts
    return [] if any(prompt.answer is None for prompt in prompts) else prompts


def _teacher_grading(run: ResolvedRun) -> list[Work]:
    """The work of grading the teacher's answers; none where they cannot be."""
    from megatron_lopd.evaluation.grading import grading_of

    prompts, rollouts = _teacher_prompts(run), run.directory_of("generate")
    if not prompts:
        return []
    place = run.directory_of("evaluate")
    return [grading_of(rollouts, prompts, run.recipe.evaluate, place)]


def _teacher_answers(run: ResolvedRun, grader: Grader) -> dict[str, Any] | None:
    """How often the teacher's answers that SFT learned from are right; None where they cannot be graded.

    Generate did not run, or its prompts have no answers to grade by: all of them, or some, which is told.
    """
    from megatron_lopd.evaluation.grading import verdicts_on

    prompts, rollouts = _teacher_prompts(run), run.directory_of("generate")
    if not prompts:
        if run.recipe.prompts.sft is not None and run.is_committed("generate"):
            _say_lacking(run.sft_prompts.prompts)
        return None
    place = run.directory_of("evaluate")
    found = verdicts_on(rollouts, prompts, run.recipe.evaluate, grader, place)
    ungraded = sum(each.ungraded for each in found)
    share = sum(each.right for each in found) / len(found)
    return {"sampled": share, "n": len(found)} | ({"ungraded": ungraded} if ungraded else {})


def _say_lacking(prompts: Sequence[Prompt]) -> None:
    lacking = [prompt for prompt in prompts if prompt.answer is None]
    if len(lacking) < len(prompts):
        say(
            f"lopd: what generate answered is not graded: {len(lacking):,} of {len(prompts):,} prompts of "
            f"prompts.sft have no answer to grade by, first {lacking[0].id}"
        )
