"""`lopd online`: standard OPD, the baseline. Each step the student samples and a live teacher scores."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.artifacts.manifest import committed_file
from megatron_lopd.config import deciding
from megatron_lopd.engines import kind_of
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.files.writing import atomic_write_json
from megatron_lopd.pipeline import proofs
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, Stage, identity_of
from megatron_lopd.pipeline.text_checks import check_evaluated, check_sets, check_top_k, check_vocabularies
from megatron_lopd.registry import ENGINES
from megatron_lopd.runtime.display import say

if TYPE_CHECKING:
    from megatron_lopd.training.live import LiveData

RESULTS = "results.json"


class OnlineStage(Stage):
    """The student trained from what it samples as it goes, and its grades."""

    name, kind = "online", "model"

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.train is not None

    def processes(self, run: ResolvedRun) -> int:
        return run.recipe.parallel.processes

    def check(self, run: ResolvedRun) -> list[str]:
        from megatron_lopd.mcore.capabilities import capabilities
        from megatron_lopd.mcore.precision import require_fp8
        from megatron_lopd.pipeline.students import check_budget, check_trainable, length_of

        config, recipe, part = run.train, run.recipe, run.rollout
        _check_settings(run)
        prompts = part.prompts.prompts
        run.teacher.check()
        check_vocabularies(run)
        check_top_k(run)
        # Where sft has not run: the student will be shaped like the base.
        if run.reference.directory.exists():
            check_trainable(run.reference, recipe)
        else:
            check_trainable(run.student, recipe, run.student_config.init)
        require_fp8(recipe.fp8, capabilities())
        check_budget(recipe, config)
        if recipe.prompts.eval is not None:
            check_sets(run)
            check_evaluated(run)
        notes = part.check()
        return [
            f"train with {config.objective}, {run.teacher.directory} scoring what the student samples as it "
            f"goes: {length_of(config)} of {config.global_batch_size} samples of {len(prompts)} prompts, "
            f"{part.config.sampling.samples_per_prompt} each",
            *notes,
        ]

    def plan(self, run: ResolvedRun) -> Plan:
        if not run.is_committed("sft"):
            raise DataError(
                f"{run.directory_of('sft')}: not committed, and online starts from the model that sft makes: "
                "run `lopd sft` on this recipe first (or `lopd run`, which does that too)"
            )
        student, teacher = run.reference.parent, run.teacher_parent(self.name)
        sft, found = proofs.prove_reference(run, student)
        found += proofs.prove_teacher(run, sft, teacher)
        found.append(proofs.prove_tokens(run, teacher, student))
        recipe = run.recipe
        return Plan(
            config=run.training_settings(run.train)
            | {"rollout": deciding(recipe.rollout), "score": deciding(recipe.score)},
            parents={
                "prompts": run.rollout.prompts.parent,
                "sft": artifact_parent("sft", sft),
                "student": student,
                "teacher": teacher,
            },
            lineage=proofs.status_of(found, sft.lineage),
        )

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        from megatron_lopd.pipeline.students import lineage_of, listed_metrics, write_student

        checkpoint, counts = _train(run, plan)
        counts["teacher_tokens"] = counts["tokens"]  # it reads every sample whole, once
        directory = run.directory_of(self.name)
        lineage = lineage_of("online", plan.lineage, plan.parents["teacher"], {"sft": run.manifest("sft")})
        model = directory / "model"
        files = write_student(checkpoint, run.reference.directory, model, run.recipe.export, lineage)
        made = [*(f"model/{name}" for name in files), *_graded(run, plan, model, directory)]
        return Output([*made, *listed_metrics(directory, counts["steps"])], counts)

    def follow(self, run: ResolvedRun, plan: Plan) -> None:
        _train(run, plan)


def headline(run: ResolvedRun) -> str:
    """What a finished online run comes to, in a line."""
    directory = run.directory_of("online")
    manifest = run.manifest("online")
    if RESULTS not in manifest.files:
        return f"online: {directory / 'model'} (no prompts.eval to grade it on)"
    accuracy = committed_file(directory, manifest, RESULTS).read_json()["accuracy"]
    rows = {name: models["online_opd"] for name, models in accuracy.items()}
    shares = [
        f"{name} {100 * row['sampled']:.1f} % sampled, {100 * row['greedy']:.1f} % greedy"
        for name, row in rows.items()
    ]
    return f"online: {'; '.join(shares)}: {directory / 'model'}"


def _check_settings(run: ResolvedRun) -> None:
    """Raise ConfigError for what only the offline stages can do."""
    config, recipe = run.train, run.recipe
    if config.checkpoint is not None:
        raise ConfigError("train.checkpoint: online starts from the sft stage's model: drop that key")
    if config.refresh_every is not None:
        raise ConfigError(
            f"train.refresh_every={config.refresh_every}: online samples anew at every step: drop that key"
        )
    student, teacher = recipe.rollout.engine, recipe.score.engine
    if not kind_of(student).takes_weights:
        able = ", ".join(name for name, kind in ENGINES.things().items() if kind.takes_weights)
        raise ConfigError(
            f"rollout.engine.name={student.name}: it takes no new weights, which online hands over at every "
            f"step: set rollout.engine.name to one that does: {able}"
        )
    if teacher.options.over(recipe.parallel).layout is not None:
        raise ConfigError(
            f"score.engine.name={teacher.name}: each rank of online has a teacher of its own, and it is made "
            "of ranks: set another engine"
        )
    if teacher.options.devices > 1 and recipe.parallel.processes > 1:
        raise ConfigError(
            f"score.engine.name={teacher.name}: each rank of online has its teacher on its own GPU, and this "
            f"one takes {teacher.options.devices}: give it one, or set parallel.processes=1"
        )


def _train(run: ResolvedRun, plan: Plan) -> tuple[Path, dict[str, int]]:
    """The last checkpoint, and what was consumed. Every rank calls."""
    from megatron_lopd.pipeline.students import opd_job, train_to_checkpoint

    directory = run.directory_of("online")
    return train_to_checkpoint(opd_job(run, plan, run.reference.directory, _live_data(run), directory))


def _graded(run: ResolvedRun, plan: Plan, model: Path, directory: Path) -> list[str]:
    """Grade the student as `evaluate` grades the others, where the recipe has prompts for it: the files."""
    from megatron_lopd.evaluation.grading import grade_model
    from megatron_lopd.graders import open_grader

    settings, seed = run.recipe.evaluate, run.recipe.seed
    if run.recipe.prompts.eval is None:
        return []
    accuracy, files = {}, [RESULTS]
    with open_grader(settings.grader) as grader:
        for name, each in run.evaluation_sets.items():
            place, label = directory / "graded" / name, f"online on {name}"
            grades, shards = grade_model(
                model, each.prompts, settings, seed, place, label, grader, identity_of(plan)
            )
            files += [str(path.relative_to(directory)) for path in shards]
            accuracy[name] = {"online_opd": grades.plain()}
            say(f"lopd: {label}: {grades}")
    atomic_write_json(directory / RESULTS, {"accuracy": accuracy})
    return files


def _live_data(run: ResolvedRun) -> LiveData:
    """The prompts in the order that `rollout` would sample them in, and who answers and scores."""
    from megatron_lopd.pipeline.shard_jobs import sample_seed
    from megatron_lopd.training.live import LiveData, Question

    part, encoded = run.rollout, run.rollout.encoded

    def seed_of(step: int, sample_id: str, repeat: int) -> int:
        again = f" again {repeat}" if repeat else ""
        return sample_seed(run.recipe.seed, f"online {step}{again}", sample_id)

    return LiveData(
        questions=[
            Question(f"{prompt.id}/{index}", tokens)
            for prompt, tokens in zip(encoded.prompts, encoded.tokens, strict=True)
            for index in range(part.config.sampling.samples_per_prompt)
        ],
        sampling=part.config.sampling,
        end_tokens=encoded.end_tokens,
        seed_of=seed_of,
        student_dir=part.model.directory,
        engine=part.config.engine,
        teacher_dir=run.teacher.directory,
        score=run.recipe.score,
    )
