"""What sft, train and export share: a training job to its last checkpoint, and that to a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, Literal

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.lineage import ModelLineage, write_model_lineage
from megatron_lopd.artifacts.manifest import LineageStatus, Manifest, Parent
from megatron_lopd.artifacts.places import without_places
from megatron_lopd.config import ExportConfig, Recipe, TrainConfig, TrainingConfig
from megatron_lopd.convert.hf_checkpoint import check_weights
from megatron_lopd.convert.offline import megatron_to_hf
from megatron_lopd.data.end_tokens import end_tokens, write_end_tokens
from megatron_lopd.data.vocabulary import load_tokenizer
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.families.architecture import check_layout
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import atomic_write_json, remove
from megatron_lopd.loggers import METRICS_FILE, require_every_step
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.gpus import require_one_kind, require_usable
from megatron_lopd.mcore.precision import check_precision, packed_padding
from megatron_lopd.mcore.recompute import check_recompute
from megatron_lopd.pipeline.resolved import Model, ResolvedRun
from megatron_lopd.pipeline.stage import Plan, identity_of
from megatron_lopd.runtime.display import say
from megatron_lopd.training.checkpoints import checkpoint_name
from megatron_lopd.training.data_sources import DataSource
from megatron_lopd.training.job import ModelSetup, Segment, TrainingJob
from megatron_lopd.training.loop import run_training
from megatron_lopd.training.preflight import TOLERANCES, Preflight


def check_trainable(
    model: Model, recipe: Recipe, init: Literal["pretrained", "random"] = "pretrained"
) -> None:
    """Raise ConfigError unless the model can be split and its numbers computed as the recipe says, here.

    And DataError where it begins with its weights, and they are not those of its config.json.
    """
    require_usable()
    require_one_kind(recipe.parallel.processes)
    architecture = model.architecture
    check_layout(architecture, recipe.parallel)
    check_precision(architecture, recipe.parallel, recipe.fp8)
    grouped = compat.takes_transformer_engine(recipe.precision)
    check_recompute(architecture, recipe.parallel, recipe.fp8, grouped=grouped)
    if init == "pretrained":
        check_weights(model.directory, architecture)


def check_budget(recipe: Recipe, config: TrainingConfig) -> None:
    """Raise ConfigError unless a micro-batch can hold the shortest sample there is, as the layout pads it."""
    least = packed_padding(recipe.parallel, recipe.fp8).least_budget(2)  # a prompt token and its answer
    if config.micro_batch_tokens < least:
        raise ConfigError(
            f"{config.section}.micro_batch_tokens={config.micro_batch_tokens} holds no sample: this layout "
            f"pads each micro-batch to a multiple of {least} tokens: raise it to at least {least}"
        )


def length_of(config: TrainingConfig) -> str:
    """How long is trained, in words."""
    return f"{config.steps} steps" if config.epochs is None else f"{config.epochs:g} epochs"


def _preflight_of(recipe: Recipe, config: TrainConfig) -> Preflight | None:
    """What train and online check before the first step; None for nothing."""
    if not config.preflight_samples:
        return None
    tolerance = config.preflight_tolerance
    if tolerance is None:  # that of the coarsest numbers among the trainer's and the sampler's
        precisions = {recipe.precision, recipe.rollout.engine.dtype}
        tolerance = max(TOLERANCES[name] for name in (*precisions, *(["fp8"] if recipe.fp8 else [])))
    return Preflight(config.preflight_samples, tolerance, recipe.rollout.sampling)


def model_setup(
    recipe: Recipe, directory: Path, init: Literal["pretrained", "random"] = "pretrained"
) -> ModelSetup:
    """How the recipe has a model trained."""
    return ModelSetup(directory, recipe.parallel, recipe.precision, recipe.seed, recipe.fp8, init)


def opd_job(
    run: ResolvedRun,
    plan: Plan,
    model_dir: Path,
    data: DataSource,
    work_dir: Path,
    segment_at: Callable[[int], Segment] | None = None,
) -> TrainingJob:
    """What train and online do, each from its own data; named after the stage, as `work_dir` is."""
    recipe, config = run.recipe, run.train
    return TrainingJob(
        name=work_dir.name,
        identity=identity_of(plan),
        work_dir=work_dir,
        model=model_setup(recipe, model_dir),
        config=config,
        objective=config.objective,
        segment=Segment(data, plan.lineage),
        segment_at=segment_at,
        preflight=_preflight_of(recipe, config),
        guard=config.guard,
    )


def train_to_checkpoint(job: TrainingJob) -> tuple[Path, dict[str, int]]:
    """Run `job`; its last checkpoint (a Megatron one), and what it consumed. Every rank calls."""
    progress = run_training(job)
    counts = {
        "steps": progress.step,
        "samples": progress.samples,
        "tokens": progress.tokens,
        "response_tokens": progress.response_tokens,
        "skipped_steps": progress.skipped_steps,
    }
    return job.work_dir / "checkpoints" / checkpoint_name(progress.step), counts


def listed_metrics(directory: Path, steps: int) -> list[str]:
    """The file of a job's metrics, to be committed with it; none where a step is missing, which is said."""
    try:
        require_every_step(directory, steps)
    except DataError as error:
        say(f"lopd: {error}: it is no part of the artifact, and the report is drawn without it")
        return []
    return [METRICS_FILE]


def write_student(
    checkpoint: Path, hf_dir: Path, out_dir: Path, export: ExportConfig, lineage: ModelLineage
) -> list[str]:
    """Write a checkpoint's model as a Hugging Face directory that carries its lineage.

    `hf_dir` gives config.json and the tokenizer's files; the end tokens that they name are named in each of
    them. `lineage.model` is filled in here. What a killed attempt left in `out_dir` is replaced. Returns the
    files, relative to `out_dir`.
    """
    remove(out_dir)
    megatron_to_hf(checkpoint, out_dir, export.max_shard_bytes, hf_dir)
    write_end_tokens(out_dir, end_tokens(hf_dir, load_tokenizer(hf_dir)))
    return seal_model(out_dir, lineage)


def seal_model(out_dir: Path, lineage: ModelLineage) -> list[str]:
    """Write the lineage of the model in `out_dir`, with its fingerprint; returns its files, relative."""
    for path in out_dir.rglob("*config.json"):
        _forget_places(path)
    model = fingerprint_model(out_dir).parts()
    write_model_lineage(out_dir, ModelLineage(**(vars(lineage) | {"model": model})))
    files = (path for path in out_dir.rglob("*") if path.is_file())
    return sorted(str(path.relative_to(out_dir)) for path in files)


def _forget_places(path: Path) -> None:
    """Leave the last name alone of each place that a library has noted as where it read something from."""
    noted = read_json(path)
    without = without_places(noted)
    if without != noted:
        atomic_write_json(path, without)


def lineage_of(
    stage: str, plan_lineage: LineageStatus, teacher: Parent | None, ancestors: dict[str, Manifest]
) -> ModelLineage:
    """What a model made by `stage` will say of itself, but for its own fingerprint."""
    chain: dict[str, dict[str, Any]] = {}
    for name, manifest in ancestors.items():
        parents = {role: asdict(_named(parent)) for role, parent in manifest.parents.items()}
        chain[name] = {"id": manifest.id, "lineage": manifest.lineage, "parents": parents}
    named = teacher and _named(teacher)
    return ModelLineage(model={}, made_by=stage, status=plan_lineage, teacher=named, chain=chain)


def _named(parent: Parent) -> Parent:
    """A parent by its name alone: a model is given away, and its maker's folders are nobody's business."""
    return parent if parent.kind == "artifact" else replace(parent, path=Path(parent.path).name)
