"""What sft, train and export share: a training job to its last checkpoint, and that to a model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron_lopd.artifacts.fingerprint import CACHE_NAME, fingerprint_model
from megatron_lopd.artifacts.lineage import ModelLineage, write_model_lineage
from megatron_lopd.artifacts.manifest import LineageStatus, Manifest, Parent
from megatron_lopd.config import ExportConfig, Recipe, TrainConfig, TrainingConfig, deciding
from megatron_lopd.convert.offline import megatron_to_hf
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.errors import ConfigError
from megatron_lopd.families.architecture import check_layout, read_architecture
from megatron_lopd.families.family import own_families
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.gpus import require_one_kind, require_usable
from megatron_lopd.mcore.precision import check_precision, packed_padding
from megatron_lopd.mcore.recompute import check_recompute
from megatron_lopd.pipeline.inputs import train_config
from megatron_lopd.pipeline.stage import Plan, identity_of
from megatron_lopd.training.checkpoints import checkpoint_name
from megatron_lopd.training.live import LiveData
from megatron_lopd.training.loop import Segment, TrainingJob, run_training
from megatron_lopd.training.preflight import TOLERANCES, Preflight


def check_trainable(model_dir: Path, recipe: Recipe) -> None:
    """Raise ConfigError unless the model can be split and its numbers computed as the recipe says, here."""
    require_usable()
    require_one_kind(recipe.parallel.processes)
    architecture = read_architecture(model_dir)
    check_layout(architecture, recipe.parallel)
    check_precision(architecture, recipe.parallel, recipe.fp8)
    grouped = compat.takes_transformer_engine(recipe.precision)
    check_recompute(architecture, recipe.parallel, recipe.fp8, grouped=grouped)


def check_budget(recipe: Recipe, config: TrainingConfig) -> None:
    """Raise ConfigError unless a micro-batch can hold the shortest sample there is, as the layout pads it."""
    least = packed_padding(recipe.parallel, recipe.fp8).least_budget(2)  # a prompt token and its answer
    if config.micro_batch_tokens < least:
        raise ConfigError(
            f"{config.section}.micro_batch_tokens={config.micro_batch_tokens} holds no sample: this layout "
            f"pads each micro-batch to a multiple of {least} tokens: raise it to at least {least}"
        )


def training_settings(recipe: Recipe, config: Any) -> dict[str, Any]:
    """What decides the numbers of sft and train, for their plans."""
    fp8 = None if recipe.fp8 is None else deciding(recipe.fp8)
    families = {"families": own} if (own := own_families()) else {}
    return deciding(config) | {"seed": recipe.seed, "precision": recipe.precision, "fp8": fp8} | families


def _preflight_of(recipe: Recipe, config: TrainConfig) -> Preflight | None:
    """What train and online check before the first step; None for nothing."""
    if not config.preflight_samples:
        return None
    tolerance = config.preflight_tolerance
    if tolerance is None:  # that of the coarsest numbers among the trainer's and the sampler's
        precisions = {recipe.precision, recipe.rollout.engine.dtype}
        tolerance = max(TOLERANCES[name] for name in (*precisions, *(["fp8"] if recipe.fp8 else [])))
    return Preflight(config.preflight_samples, tolerance, recipe.rollout.sampling)


def opd_job(
    recipe: Recipe,
    plan: Plan,
    model_dir: Path,
    data: TrainingData | LiveData,
    work_dir: Path,
    segment_at: Callable[[int], Segment] | None = None,
) -> TrainingJob:
    """What train and online do, each from its own data; named after the stage, as `work_dir` is."""
    config = train_config(recipe)
    return TrainingJob(
        name=work_dir.name,
        identity=identity_of(plan),
        lineage=plan.lineage,
        config=config,
        objective=config.objective,
        parallel=recipe.parallel,
        precision=recipe.precision,
        fp8=recipe.fp8,
        seed=recipe.seed,
        model_dir=model_dir,
        data=data,
        work_dir=work_dir,
        preflight=_preflight_of(recipe, config),
        segment_at=segment_at,
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


def write_student(
    checkpoint: Path, hf_dir: Path, out_dir: Path, export: ExportConfig, lineage: ModelLineage
) -> list[str]:
    """Write a checkpoint's model as a Hugging Face directory that carries its lineage.

    `hf_dir` gives config.json and the tokenizer's files. `lineage.model` is filled in here. What a
    killed attempt left in `out_dir` is replaced. Returns the files, relative to `out_dir`.
    """
    if out_dir.exists():
        shutil.rmtree(out_dir)
    megatron_to_hf(checkpoint, out_dir, export.max_shard_bytes, hf_dir)
    return seal_model(out_dir, lineage)


def seal_model(out_dir: Path, lineage: ModelLineage) -> list[str]:
    """Write the lineage of the model in `out_dir`, with its fingerprint; returns its files, relative."""
    model = fingerprint_model(out_dir).parts()
    write_model_lineage(out_dir, ModelLineage(**(vars(lineage) | {"model": model})))
    files = (path for path in out_dir.rglob("*") if path.is_file() and path.name != CACHE_NAME)
    return sorted(str(path.relative_to(out_dir)) for path in files)


def lineage_of(
    stage: str, plan_lineage: LineageStatus, teacher: Parent | None, ancestors: dict[str, Manifest]
) -> ModelLineage:
    """What a model made by `stage` will say of itself, but for its own fingerprint."""
    chain: dict[str, dict[str, Any]] = {}
    for name, manifest in ancestors.items():
        parents = {role: asdict(parent) for role, parent in manifest.parents.items()}
        chain[name] = {"id": manifest.id, "lineage": manifest.lineage, "parents": parents}
    return ModelLineage(model={}, made_by=stage, status=plan_lineage, teacher=teacher, chain=chain)
