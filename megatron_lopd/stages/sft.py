"""2. sft: pi_base is fine-tuned on the teacher's answers -> pi_ref, as a Hugging Face checkpoint."""

from __future__ import annotations

import shutil
from pathlib import Path

from megatron_lopd.artifacts.lineage import WHOLE_MODEL, artifact_parent, prove_same, read_model_lineage
from megatron_lopd.config import Recipe, SftConfig
from megatron_lopd.convert.hf_checkpoint import VOICE, copy_files
from megatron_lopd.data.chat import Chat
from megatron_lopd.errors import ConfigError
from megatron_lopd.pipeline import inputs
from megatron_lopd.pipeline.stage import (
    Output,
    Plan,
    directory_of,
    identity_of,
    is_main_rank,
    parent_manifest,
)
from megatron_lopd.pipeline.students import (
    check_budget,
    check_trainable,
    lineage_of,
    model_setup,
    train_to_checkpoint,
    training_settings,
    write_student,
)
from megatron_lopd.training.job import Segment, TrainingJob
from megatron_lopd.training.sources import CachedData


def check(recipe: Recipe) -> list[str]:
    config = inputs.sft_config(recipe)
    if config.checkpoint is not None:
        _check_elsewhere(recipe, config)
        return [f"take {config.checkpoint} as the student after SFT"]
    student = inputs.base_student(recipe)
    Chat(student.model)
    check_trainable(Path(student.model), recipe)
    check_budget(recipe, config)
    if config.data is not None and config.teacher is None and recipe.train is not None:
        raise ConfigError(
            f"sft.data: {config.data} does not say which teacher wrote its answers, and the same one must "
            "score: declare it with sft.teacher=PATH"
        )
    if config.data is None:
        inputs.prove_tokenizer(
            recipe, inputs.teacher_parent(recipe, "generate"), inputs.base_student_parent(recipe)
        )
    length = f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"
    source = config.data or "the teacher's answers"
    work = f"{length} of {config.global_batch_size} samples"
    return [f"fine-tune {student.model} ({student.init}) on {source}: {work}"]


def plan(recipe: Recipe) -> Plan:
    config = inputs.sft_config(recipe)
    if config.checkpoint is not None:
        return _plan_elsewhere(recipe, config)
    student = inputs.base_student_parent(recipe)
    data = parent_manifest(recipe, data_stage(config))
    parents = {"data": artifact_parent(data_stage(config), data), "student": student}
    proofs = []
    teacher = data.parents.get("teacher")
    if teacher is not None:
        parents["teacher"] = teacher
        proofs.append(inputs.prove_tokenizer(recipe, teacher, student))
    return Plan(training_settings(recipe, config), parents, inputs.status_of(proofs, data.lineage))


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    config = inputs.sft_config(recipe)
    if config.checkpoint is not None:
        return Output([], {"tokens": 0, "steps": 0})
    data = parent_manifest(recipe, data_stage(config))
    data_dir = directory_of(recipe, data_stage(config))
    student = inputs.base_student(recipe)
    job = TrainingJob(
        name="sft",
        identity=identity_of(plan),
        work_dir=directory,
        model=model_setup(recipe, Path(student.model), student.init),
        config=config,
        objective="sft",
        segment=Segment(CachedData(data_dir), plan.lineage),
    )
    checkpoint, counts = train_to_checkpoint(job)
    if not is_main_rank():
        return Output([], counts)
    # The student speaks the language it was taught in: its teacher's template and end token.
    hf_dir = directory / "hf"
    voice = copy_files(data_dir / "tokenizer", hf_dir, VOICE)
    shutil.copyfile(Path(student.model) / "config.json", hf_dir / "config.json")
    lineage = lineage_of("sft", plan.lineage, plan.parents.get("teacher"), {data_stage(config): data})
    files = write_student(checkpoint, hf_dir, directory / "model", recipe.export, lineage)
    assert set(voice) <= set(files)
    return Output([f"model/{name}" for name in files], counts)


def data_stage(config: SftConfig) -> str:
    """The stage whose artifact is trained on."""
    return "generate" if config.data is None else "tokenize"


def _check_elsewhere(recipe: Recipe, config: SftConfig) -> None:
    assert config.checkpoint is not None
    inputs.check_model(Path(config.checkpoint))
    check_trainable(Path(config.checkpoint), recipe)
    if config.teacher is None and read_model_lineage(config.checkpoint) is None:
        raise ConfigError(
            f"sft.checkpoint: {config.checkpoint} does not say which teacher it was fine-tuned on: "
            "declare it with sft.teacher=PATH"
        )


def _plan_elsewhere(recipe: Recipe, config: SftConfig) -> Plan:
    """A checkpoint of this project proves its teacher by its lineage file; another is declared."""
    assert config.checkpoint is not None
    parents = {"student": inputs.parent_of_model(Path(config.checkpoint))}
    declared = None if config.teacher is None else inputs.parent_of_model(Path(config.teacher))
    carried = read_model_lineage(config.checkpoint)
    if carried is None or carried.teacher is None:
        if declared is not None:
            parents["teacher"] = declared
        return Plan(training_settings(recipe, config), parents, "declared")
    parents["teacher"] = carried.teacher
    proofs = []
    if declared is not None:
        proofs.append(
            prove_same(
                "the declared teacher is the one the checkpoint was fine-tuned on",
                inputs.evidence(declared, "sft.teacher"),
                inputs.evidence(carried.teacher, f"the lineage of {config.checkpoint}"),
                parts=WHOLE_MODEL,
                allow=recipe.allow_teacher_mismatch,
            )
        )
    return Plan(training_settings(recipe, config), parents, inputs.status_of(proofs, carried.status))
