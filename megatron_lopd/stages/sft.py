"""2. sft: pi_base is fine-tuned on the teacher's answers -> pi_ref, as a Hugging Face checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_lopd.artifacts.lineage import artifact_parent, read_model_lineage
from megatron_lopd.artifacts.manifest import copy_committed
from megatron_lopd.config import SftConfig, TrainingConfig
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.pipeline import proofs
from megatron_lopd.pipeline.foreseen import foresee, plan_elsewhere
from megatron_lopd.pipeline.resolved import Model, ResolvedRun
from megatron_lopd.pipeline.stage import Output, Plan, Stage, identity_of
from megatron_lopd.pipeline.text_checks import check_vocabularies
from megatron_lopd.runtime.display import say

if TYPE_CHECKING:
    from megatron_lopd.training.job import TrainingJob


class SftStage(Stage):
    """The student after SFT: trained here, or a checkpoint made elsewhere."""

    name, kind = "sft", "model"

    def needed(self, run: ResolvedRun) -> bool:
        return run.recipe.sft is not None

    def processes(self, run: ResolvedRun) -> int:
        return run.recipe.parallel.processes

    def check(self, run: ResolvedRun) -> list[str]:
        from megatron_lopd.data.chat import Chat
        from megatron_lopd.pipeline.students import check_budget, check_trainable, length_of

        config = run.sft
        if config.teacher is not None:
            Model(Path(config.teacher), "sft.teacher").check()
        if config.checkpoint is not None:
            _check_elsewhere(run, config)
            foresee(run, self.name)
            idle = ", ".join(f"sft.{name}" for name in _idle_keys(config))
            said = f"; nothing is trained: {idle} will do nothing" if idle else ""
            return [f"take {config.checkpoint} as the student after SFT, as it is{said}"]
        student = run.student
        student.require()
        with student.naming():
            Chat(str(student.directory))
        check_vocabularies(run)
        check_trainable(student, run.recipe, run.student_config.init)
        check_budget(run.recipe, config)
        if config.data is not None and config.teacher is None and run.recipe.train is not None:
            raise ConfigError(
                f"sft.data: {config.data} does not say which teacher wrote its answers, and the same one "
                "must score: declare it with sft.teacher=PATH"
            )
        if config.data is None:
            proofs.prove_tokenizer(run, run.teacher_parent("generate"), run.student_parent)
        foresee(run, self.name)
        source = config.data or "the teacher's answers"
        work = f"{length_of(config)} of {config.global_batch_size} samples"
        return [f"fine-tune {student.directory} ({run.student_config.init}) on {source}: {work}"]

    def plan(self, run: ResolvedRun) -> Plan:
        config = run.sft
        if config.checkpoint is not None:
            return plan_elsewhere(run, config)
        student = run.student_parent
        data = run.manifest(_data_stage(config))
        _require_ends(run, data.counts)
        parents = {"data": artifact_parent(_data_stage(config), data), "student": student}
        found = []
        teacher = data.parents.get("teacher")
        if teacher is not None:
            parents["teacher"] = teacher
            found.append(proofs.prove_tokenizer(run, teacher, student))
        return Plan(run.training_settings(config), parents, proofs.status_of(found, data.lineage))

    def commit(self, run: ResolvedRun, plan: Plan) -> Output:
        config = run.sft
        if config.checkpoint is not None:
            return Output([], {"tokens": 0, "steps": 0})
        from megatron_lopd.convert.hf_checkpoint import copy_config
        from megatron_lopd.pipeline.students import (
            lineage_of,
            listed_metrics,
            train_to_checkpoint,
            write_student,
        )

        stage = _data_stage(config)
        _say_cut(config, run.manifest(stage).counts)
        checkpoint, counts = train_to_checkpoint(_job(run, plan))
        directory = run.directory_of(self.name)
        # The student speaks the language it was taught in: its teacher's template and end token.
        hf_dir = directory / "hf"
        voice = copy_committed(run.directory_of(stage), run.manifest(stage), "tokenizer", hf_dir)
        copy_config(run.student.directory, hf_dir)
        lineage = lineage_of("sft", plan.lineage, plan.parents.get("teacher"), {stage: run.manifest(stage)})
        files = write_student(checkpoint, hf_dir, directory / "model", run.recipe.export, lineage)
        assert set(voice) <= set(files)
        metrics = listed_metrics(directory, counts["steps"])
        return Output([*(f"model/{name}" for name in files), *metrics], counts)

    def follow(self, run: ResolvedRun, plan: Plan) -> None:
        if run.sft.checkpoint is None:
            from megatron_lopd.pipeline.students import train_to_checkpoint

            train_to_checkpoint(_job(run, plan))


def _job(run: ResolvedRun, plan: Plan) -> TrainingJob:
    from megatron_lopd.pipeline.students import model_setup
    from megatron_lopd.training.data_sources import CachedData
    from megatron_lopd.training.job import Segment, TrainingJob

    recipe = run.recipe
    return TrainingJob(
        name="sft",
        identity=identity_of(plan),
        work_dir=run.directory_of("sft"),
        model=model_setup(recipe, run.student.directory, run.student_config.init),
        config=run.sft,
        objective="sft",
        segment=Segment(
            CachedData(run.directory_of(_data_stage(run.sft)), leave_out_cut=run.sft.leave_out_cut),
            plan.lineage,
        ),
    )


def _require_ends(run: ResolvedRun, counts: Mapping[str, int]) -> None:
    """Raise DataError where leaving out what was cut leaves nothing."""
    if run.sft.leave_out_cut and counts["cut_at_horizon"] == counts["samples"]:
        raise DataError(
            f"sft.leave_out_cut: each of the {counts['samples']:,} answers was cut at the horizon of "
            f"{run.recipe.generate.sampling.max_new_tokens} tokens, and none is left: raise "
            f"generate.sampling.max_new_tokens and remove {run.directory_of('generate')}"
        )


def _say_cut(config: SftConfig, counts: Mapping[str, int]) -> None:
    """Print that answers have no end, and what is done with them."""
    cut, samples = counts["cut_at_horizon"], counts["samples"]
    if not cut:
        return
    done = "they are left out"
    if not config.leave_out_cut:
        stopping = " and no other shows the student how to stop" if cut == samples else ""
        done = f"they are trained on as they are{stopping} (sft.leave_out_cut=true leaves them out)"
    say(f"lopd: sft: {cut:,} of {samples:,} answers were cut and have no end: {done}")


def _idle_keys(config: SftConfig) -> list[str]:
    """The keys that were given for the training which a checkpoint made elsewhere stands in for."""
    plain = SftConfig(checkpoint=config.checkpoint)
    return [
        item.name
        for item in fields(TrainingConfig)
        if getattr(config, item.name) != getattr(plain, item.name)
    ]


def _data_stage(config: SftConfig) -> str:
    """The stage whose artifact is trained on."""
    return "generate" if config.data is None else "tokenize"


def _check_elsewhere(run: ResolvedRun, config: SftConfig) -> None:
    from megatron_lopd.pipeline.students import check_trainable

    run.reference.check()
    check_vocabularies(run)
    check_trainable(run.reference, run.recipe)
    if config.teacher is None and read_model_lineage(run.reference.directory) is None:
        raise ConfigError(
            f"sft.checkpoint: {config.checkpoint} does not say which teacher it was fine-tuned on: "
            "declare it with sft.teacher=PATH"
        )
