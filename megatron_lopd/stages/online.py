"""`lopd online`: standard OPD, the baseline. Each step the student samples and a live teacher scores."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from megatron_lopd.artifacts.files import atomic_write_json, read_json
from megatron_lopd.artifacts.lineage import artifact_parent
from megatron_lopd.artifacts.manifest import is_committed
from megatron_lopd.config import Recipe, deciding
from megatron_lopd.data.chat import Chat
from megatron_lopd.engines import kind_of
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.evaluation.grading import check_sets, grade_model
from megatron_lopd.graders.grader import open_grader
from megatron_lopd.mcore.capabilities import capabilities
from megatron_lopd.mcore.precision import require_fp8
from megatron_lopd.pipeline import inputs
from megatron_lopd.pipeline.shard_jobs import encode_prompts, sample_seed
from megatron_lopd.pipeline.stage import Output, Plan, directory_of, is_main_rank, parent_manifest
from megatron_lopd.pipeline.students import (
    check_budget,
    check_trainable,
    lineage_of,
    opd_job,
    train_to_checkpoint,
    training_settings,
    write_student,
)
from megatron_lopd.registry import ENGINES
from megatron_lopd.training.live import LiveData, Question

RESULTS = "results.json"


def check(recipe: Recipe) -> list[str]:
    config, sampling = inputs.train_config(recipe), recipe.rollout.sampling
    if config.checkpoint is not None:
        raise ConfigError("train.checkpoint: online starts from the sft stage's model: drop that key")
    if config.refresh_every is not None:
        raise ConfigError(
            f"train.refresh_every={config.refresh_every}: online samples anew at every step: drop that key"
        )
    _check_engines(recipe)
    prompts, teacher = inputs.prompts_of(recipe, "opd")[0], inputs.teacher_directory(recipe)
    inputs.check_model(teacher)
    inputs.check_top_k(recipe)
    student = inputs.reference_directory(recipe)
    if not student.exists():  # sft has not run: it will speak like the teacher, and be shaped like the base
        check_trainable(Path(inputs.base_student(recipe).model), recipe)
        student = teacher
    else:
        check_trainable(student, recipe)
    require_fp8(recipe.fp8, capabilities())
    check_budget(recipe, config)
    if recipe.prompts.eval is not None:
        check_sets(recipe)
    chat = Chat(str(student), recipe.rollout.engine.trust_remote_code)
    encode_prompts(prompts, chat, inputs.longest_prompt(student, sampling, config))
    length = f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"
    return [
        f"train with {config.objective}, {teacher} scoring what the student samples as it goes: {length} of "
        f"{config.global_batch_size} samples of {len(prompts)} prompts, {sampling.samples_per_prompt} each"
    ]


def _check_engines(recipe: Recipe) -> None:
    """Raise ConfigError unless the engines can do what online asks of them."""
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


def plan(recipe: Recipe) -> Plan:
    if not is_committed(directory_of(recipe, "sft")):
        raise DataError(
            f"{directory_of(recipe, 'sft')}: not committed, and online starts from the model that sft makes: "
            "run `lopd sft` on this recipe first (or `lopd run`, which does that too)"
        )
    student = inputs.parent_of_model(inputs.reference_directory(recipe))
    teacher = inputs.teacher_parent(recipe, "online")
    sft, proofs = inputs.prove_reference(recipe, student)
    proofs += inputs.prove_teacher(recipe, sft, teacher)
    proofs.append(inputs.prove_tokens(recipe, teacher, student))
    settings = training_settings(recipe, inputs.train_config(recipe))
    return Plan(
        config=settings | {"rollout": deciding(recipe.rollout), "score": deciding(recipe.score)},
        parents={
            "prompts": inputs.prompts_of(recipe, "opd")[1],
            "sft": artifact_parent("sft", sft),
            "student": student,
            "teacher": teacher,
        },
        lineage=inputs.status_of(proofs, sft.lineage),
    )


def run(recipe: Recipe, plan: Plan, directory: Path) -> Output:
    reference = inputs.reference_directory(recipe)
    job = opd_job(recipe, plan, reference, _live_data(recipe, reference), directory)
    checkpoint, counts = train_to_checkpoint(job)
    counts["teacher_tokens"] = counts["tokens"]  # it reads every sample whole, once
    if not is_main_rank():
        return Output([], counts)
    ancestors = {"sft": parent_manifest(recipe, "sft")}
    lineage = lineage_of("online", plan.lineage, plan.parents["teacher"], ancestors)
    model = directory / "model"
    files = [f"model/{name}" for name in write_student(checkpoint, reference, model, recipe.export, lineage)]
    return Output([*files, *_graded(recipe, model, directory)], counts)


def _graded(recipe: Recipe, model: Path, directory: Path) -> list[str]:
    """Grade the student as `evaluate` grades the others, where the recipe has prompts for it: the files."""
    if recipe.prompts.eval is None:
        return []
    accuracy = {}
    with open_grader(recipe.evaluate.grader) as grader:
        for name, (prompts, _) in inputs.evaluation_sets(recipe).items():
            place, label = directory / "graded" / name, f"online on {name}"
            grades = grade_model(model, prompts, recipe.evaluate, recipe.seed, place, label, grader)
            accuracy[name] = {"online_opd": asdict(grades)}
            print(f"lopd: {label}: {grades}", flush=True)
    atomic_write_json(directory / RESULTS, {"accuracy": accuracy})
    shards = (directory / "graded").rglob("*.arrow")
    return [RESULTS, *sorted(str(path.relative_to(directory)) for path in shards)]


def headline(recipe: Recipe) -> str:
    """What a finished online run comes to, in a line."""
    directory = directory_of(recipe, "online")
    if not (directory / RESULTS).is_file():
        return f"online: {directory / 'model'} (no prompts.eval to grade it on)"
    accuracy = read_json(directory / RESULTS)["accuracy"]
    rows = {name: models["online_opd"] for name, models in accuracy.items()}
    shares = [
        f"{name} {100 * row['sampled']:.1f} % sampled, {100 * row['greedy']:.1f} % greedy"
        for name, row in rows.items()
    ]
    return f"online: {'; '.join(shares)}: {directory / 'model'}"


def _live_data(recipe: Recipe, student: Path) -> LiveData:
    """The prompts in the order that `rollout` would sample them in, and who answers and scores."""
    settings = recipe.rollout
    chat = Chat(str(student), settings.engine.trust_remote_code)
    prompts = inputs.prompts_of(recipe, "opd")[0]
    limit = inputs.longest_prompt(student, settings.sampling, recipe.train)
    encoded = encode_prompts(prompts, chat, limit)
    return LiveData(
        questions=[
            Question(f"{prompt.id}/{index}", tokens)
            for prompt, tokens in zip(prompts, encoded, strict=True)
            for index in range(settings.sampling.samples_per_prompt)
        ],
        sampling=settings.sampling,
        end_tokens=chat.end_tokens,
        seed_of=lambda step, sample_id, repeat: sample_seed(
            recipe.seed, f"online {step}" + f" again {repeat}" * (repeat > 0), sample_id
        ),
        student_dir=student,
        engine=settings.engine,
        teacher_dir=inputs.teacher_directory(recipe),
        score=recipe.score,
    )
