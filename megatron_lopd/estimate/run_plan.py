"""A recipe on a cluster: does it fit, in what layout, for how long; as a table for a person, or as JSON."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from megatron_lopd.config import ParallelConfig, Recipe, TrainingConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.estimate.gpu_kinds import GpuCluster
from megatron_lopd.estimate.hours import TokenWork
from megatron_lopd.estimate.layouts import SizedLayout, least_layout, own_layout, smallest_layout
from megatron_lopd.estimate.memory import Training
from megatron_lopd.estimate.micro_batches import LAUNCHING, MicroBatches, micro_batches
from megatron_lopd.estimate.saves import STAGING_RATE, WRITING_RATE, SaveEstimate, save_estimate
from megatron_lopd.estimate.stages import Sizing, StageEstimate
from megatron_lopd.families.memory_shapes import Shape

GB = 1e9
# What published hours of Lightning OPD hold: they start from an SFT checkpoint.
DISTILLATION = ("rollout", "score", "train")


@dataclass(frozen=True)
class TrainingPlan:
    """A stage that trains: the recipe's own layout, the smallest that fits, and what is wrong with the first.

    `own` is None where `parallel` cannot split the model or the GPUs, `smallest` where nothing fits;
    `problem` is then, or when `own` is too large, one line that says what to change. `save` is a checkpoint
    at `own`. `micro_batch_tokens` is the recipe's, `micro_batches` what `own` has room for, None where it has
    none.
    """

    stage: str
    own: SizedLayout | None
    smallest: SizedLayout | None
    problem: str | None
    save: SaveEstimate | None
    micro_batch_tokens: int
    micro_batches: MicroBatches | None = None


@dataclass(frozen=True)
class RunPlan:
    """Everything `lopd plan` says."""

    cluster: GpuCluster
    parallel: ParallelConfig
    models: dict[str, Shape]
    training: list[TrainingPlan]
    stages: list[StageEstimate]
    assumptions: list[str]

    @property
    def advice(self) -> list[str]:
        """Micro-batches by which stages would train faster, a line each: overrides, and why."""
        return [
            f"{part.stage}.micro_batch_tokens={part.micro_batches.largest}: the GPU waits for the CPU below "
            f"some {part.micro_batches.waits_below}, and so with {part.micro_batch_tokens}"
            for part in self.training
            if part.micro_batches is not None
            and part.micro_batch_tokens < min(part.micro_batches.waits_below, part.micro_batches.largest)
        ]

    @property
    def problems(self) -> list[str]:
        """What keeps stages from training as the recipe says, one line each, beginning with their names."""
        stages: dict[str, list[str]] = {}
        for part in self.training:
            if part.problem is not None:
                stages.setdefault(part.problem, []).append(part.stage)
        return [f"{', '.join(names)}: {problem}" for problem, names in stages.items()]


def make_plan(recipe: Recipe, cluster: GpuCluster, fill: float = 1.0) -> RunPlan:
    """Estimate `recipe` on `cluster`; `fill`: average response, as a share of `max_new_tokens`.

    Raises ConfigError for a model of unknown shape, prompts that cannot be counted, an engine whose model
    fits no node, or FP8 on a GPU that has none. A training layout that does not fit is in `RunPlan.problems`.
    """
    if not 0 < fill <= 1:
        raise ConfigError(f"--fill {fill:g}: a share of max_new_tokens is above 0 and at most 1")
    if recipe.fp8 is not None and not cluster.gpu.fp8:
        raise ConfigError(
            f"fp8: {cluster.gpu.name} has no FP8: drop the fp8 section, or plan for h100 or later"
        )
    sizing = Sizing(recipe, cluster, fill)
    stages = list(sizing.stages())
    if not stages:
        raise ConfigError("there is neither an sft nor a train section: nothing here takes a GPU")
    sizing.assume_rates()
    sizing.assume(
        f"checkpoints: each rank copies {STAGING_RATE / GB:g} GB/s to pinned host memory, and writes and "
        f"hashes {WRITING_RATE / GB:g} GB/s"
    )
    sections: dict[str, TrainingConfig | None] = {"sft": recipe.sft, "train": recipe.train}
    training = [
        _with_micro_batches(_plan_training(name, section, sizing), section, sizing, stage.work)
        for name, section in sections.items()
        if section is not None
        for stage in stages
        if stage.name == name
    ]
    used = {stage.model for stage in stages}
    models: dict[str, Shape] = {}
    if "teacher" in used:
        models["teacher"] = sizing.teacher
    if "student" in used:
        models["student"] = sizing.student
    return RunPlan(cluster, recipe.parallel, models, training, stages, sizing.assumptions)


def _plan_training(name: str, section: TrainingConfig, sizing: Sizing) -> TrainingPlan:
    recipe, cluster, arch = sizing.recipe, sizing.cluster, sizing.student.arch
    tokens = section.micro_batch_tokens
    training = Training(tokens, recipe.precision, recipe.fp8 is not None)
    smallest = smallest_layout(arch, cluster, training, section.global_batch_size)
    try:
        own = own_layout(arch, recipe.parallel, cluster, training)
    except ConfigError as error:
        return TrainingPlan(name, None, smallest, str(error), None, tokens)
    save = save_estimate(arch, own.parallel, cluster.count, cluster.node_size, training)
    if own.fits(cluster):
        return TrainingPlan(name, own, smallest, None, save, tokens)
    over = (own.memory.total - cluster.gpu.memory_bytes) / GB
    part = getattr(own.memory, own.memory.largest.replace("-", "_")) / GB
    problem = (
        f"parallel ({_axes(own)}) takes {own.memory.total / GB:.1f} GB of each GPU, {over:.1f} GB "
        f"more than {cluster.gpu.name} has, most of it {own.memory.largest} ({part:.1f} GB): "
    )
    if smallest is not None:
        remedy = f"set {overrides(smallest, recipe.parallel)}"
        return TrainingPlan(name, own, smallest, problem + remedy, save, tokens)
    least = least_layout(arch, cluster, training)
    assert least is not None  # `own` divides the model, and so do candidates
    still = (least.memory.total - cluster.gpu.memory_bytes) / GB
    remedy = (
        f"no layout fits; the least, {_axes(least)}, is {still:.1f} GB over: give more GPUs or larger ones"
    )
    if (least.memory.activations + least.memory.log_probs) / GB > still:
        remedy += ", or lower micro_batch_tokens"
    return TrainingPlan(name, own, None, problem + remedy, save, tokens)


def _with_micro_batches(
    part: TrainingPlan, section: TrainingConfig, sizing: Sizing, work: TokenWork
) -> TrainingPlan:
    if part.own is None:
        return part
    recipe, batch = sizing.recipe, replace(work, samples=section.global_batch_size)
    training = Training(section.micro_batch_tokens, recipe.precision, recipe.fp8 is not None)
    sizing.assume(
        f"micro-batches: Python launches a layer's kernels, forward and backward, in {LAUNCHING * 1e3:.1f} "
        "ms, as measured beside an H100"
    )
    arch, gpu = sizing.student.arch, sizing.cluster.gpu
    return replace(part, micro_batches=micro_batches(arch, part.own.parallel, gpu, training, batch))


def overrides(layout: SizedLayout, parallel: ParallelConfig) -> str:
    """What makes `layout` of a recipe's `parallel`, as overrides."""
    values, given = asdict(layout.parallel), asdict(parallel)
    return " ".join(
        f"parallel.{name}={'' if value is None else value}"
        for name, value in values.items()
        if value != given[name]
    )


def _axes(layout: SizedLayout) -> str:
    split = layout.parallel
    sizes = {
        "tensor": split.tensor,
        "pipeline": split.pipeline,
        "context": split.context,
        "expert": split.expert,
    }
    named = [f"{name} {size}" for name, size in sizes.items() if size > 1]
    return ", ".join([*named, f"data {layout.data}", f"recompute {split.recompute}"])


def as_json(plan: RunPlan) -> dict[str, Any]:
    """The plan as plain dicts and lists: bytes, FLOPs, hours, counts."""
    return {
        "gpu": asdict(plan.cluster.gpu),
        "gpus": plan.cluster.count,
        "models": {
            name: {"parameters": shape.parameters, "assumed": shape.assumed}
            for name, shape in plan.models.items()
        },
        "training": [
            {
                "stage": part.stage,
                "own": _layout_json(part.own, plan.cluster),
                "smallest": _layout_json(part.smallest, plan.cluster),
                "problem": part.problem,
                "save": None if part.save is None else asdict(part.save),
                "micro_batch_tokens": part.micro_batch_tokens,
                "micro_batches": None if part.micro_batches is None else asdict(part.micro_batches),
            }
            for part in plan.training
        ],
        "stages": [asdict(stage) | {"hours": stage.gpu_hours / plan.cluster.count} for stage in plan.stages],
        "gpu_hours": sum(stage.gpu_hours for stage in plan.stages),
        "disk_bytes": sum(stage.disk for stage in plan.stages),
        "advice": plan.advice,
        "assumptions": plan.assumptions,
    }


def _layout_json(layout: SizedLayout | None, cluster: GpuCluster) -> dict[str, Any] | None:
    if layout is None:
        return None
    memory = asdict(layout.memory) | {"total": layout.memory.total}
    return {
        "parallel": asdict(layout.parallel),
        "data": layout.data,
        "memory": memory,
        "fits": layout.fits(cluster),
    }


def table(plan: RunPlan) -> Iterator[str]:
    """The plan in lines, for a person."""
    gpu = plan.cluster.gpu
    peak = f"{gpu.flops / 1e12:.0f} TFLOP/s bf16"
    yield f"{plan.cluster.count} x {gpu.name}: {gpu.memory_bytes / GB:.0f} GB each, {peak}"
    for name, shape in plan.models.items():
        yield f"{name}: {shape.parameters / 1e6:,.1f} million weights"
    yield ""
    yield from _memory_table(plan)
    yield ""
    yield from _save_table(plan)
    yield ""
    yield from _engine_table(plan)
    yield ""
    yield from _stage_table(plan)
    yield ""
    yield "assumed:"
    yield from (f"  {text}" for text in plan.assumptions)


def _memory_table(plan: RunPlan) -> Iterator[str]:
    """Training memory by part."""
    layouts = [
        (part.stage, whose, layout)
        for part in plan.training
        for whose, layout in (("recipe", part.own), ("smallest", part.smallest))
        if layout is not None
    ]
    if not layouts:
        return
    parts = [part.name for part in fields(layouts[0][2].memory)]
    yield "GB of each GPU, training:"
    yield f"  {'':16}" + "".join(f"{part.replace('_', '-'):>13}" for part in parts) + f"{'total':>9}  layout"
    for stage, whose, layout in layouts:
        values = "".join(f"{getattr(layout.memory, part) / GB:13.1f}" for part in parts)
        verdict = "" if layout.fits(plan.cluster) else ": DOES NOT FIT"
        yield f"  {stage:6}{whose:10}{values}{layout.memory.total / GB:9.1f}  {_axes(layout)}{verdict}"
    for part in plan.training:
        if part.smallest is not None and part.smallest != part.own:
            yield f"  smallest for {part.stage}: {overrides(part.smallest, plan.parallel)}"
    yield ""
    yield from _micro_batch_table(plan)


def _micro_batch_table(plan: RunPlan) -> Iterator[str]:
    """Tokens of a micro-batch: the recipe's, and the most that the recipe's layout has room and use for."""
    yield "tokens of a micro-batch, the recipe's layout:"
    yield f"  {'':6}{'recipe':>10}{'largest':>10}{'of a step':>12}{'full':>8}{'GPU waits below':>18}"
    for part in plan.training:
        made = part.micro_batches
        if made is not None:
            yield (
                f"  {part.stage:6}{part.micro_batch_tokens:10d}{made.largest:10d}{made.count:12d}"
                f"{made.fill:8.2f}{made.waits_below:18d}"
            )
    yield from (f"  faster: {line}" for line in plan.advice)


def _save_table(plan: RunPlan) -> Iterator[str]:
    """Checkpoints of the recipe's layout."""
    saves = [(part.stage, part.save) for part in plan.training if part.save is not None]
    if not saves:
        return
    yield "a checkpoint: GB that a rank stages, host memory it keeps a node, GPU memory it takes, seconds:"
    yield f"  {'':16}{'rank':>13}{'node':>13}{'GPU':>13}{'step waits':>13}{'writing':>13}"
    for stage, save in saves:
        sizes = (save.rank_bytes, save.node_bytes, save.gpu_bytes)
        yield (
            f"  {stage:16}"
            + "".join(f"{size / GB:13.1f}" for size in sizes)
            + f"{save.blocked_seconds:13.1f}{save.writing_seconds:13.1f}"
        )


def _engine_table(plan: RunPlan) -> Iterator[str]:
    """Engine memory, and how many sequences run at once."""
    yield "GB of each GPU, engines:"
    yield f"  {'':10}{'model':>9}{'weights':>10}{'KV cache':>10}{'GPUs':>6}{'sequences at once':>20}"
    for stage in plan.stages:
        engine = stage.engine
        if engine is not None:
            running = f"{engine.running} of {engine.asked}"
            yield (
                f"  {stage.name:10}{stage.model:>9}{engine.weights / GB:10.1f}{engine.kv_cache / GB:10.1f}"
                f"{engine.tensor:6d}{running:>20}"
            )


def _stage_table(plan: RunPlan) -> Iterator[str]:
    """Work, hours and disk by stage."""
    count, gpu = plan.cluster.count, plan.cluster.gpu.name
    yield f"work (GPU-hours: of one {gpu}; wall hours: with all {count} at work all the time):"
    yield (
        f"  {'':10}{'model':>9}{'samples':>10}{'tokens':>10}{'EFLOP':>10}{'GPU-hours':>11}{'wall hours':>12}"
        f"{'disk GB':>10}"
    )
    for stage in plan.stages:
        yield (
            f"  {stage.name:10}{stage.model:>9}{stage.work.samples:10.0f}"
            f"{stage.work.samples * stage.work.length / GB:9.2f}G{stage.flops / 1e18:10.2f}"
            f"{_hours_and_disk([stage], count)}"
        )
    yield f"  {'total':49}{_hours_and_disk(plan.stages, count)}"
    distillation = [stage for stage in plan.stages if stage.name in DISTILLATION]
    if distillation:
        yield f"  {'of it ' + ', '.join(DISTILLATION):49}{_hours_and_disk(distillation, count)}"


def _hours_and_disk(stages: Sequence[StageEstimate], gpus: int) -> str:
    hours, disk = (sum(getattr(stage, name) for stage in stages) for name in ("gpu_hours", "disk"))
    return f"{hours:11.1f}{hours / gpus:12.2f}{disk / GB:10.1f}"
