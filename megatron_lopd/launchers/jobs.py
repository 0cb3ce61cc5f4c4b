"""Which jobs a recipe needs on a cluster, and in what order. Each waits for the one before it."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_lopd.config import Cluster, EngineConfig, ParallelConfig, Recipe
from megatron_lopd.errors import ConfigError
from megatron_lopd.launchers.launcher import Job
from megatron_lopd.pipeline.resolved import ResolvedRun
from megatron_lopd.pipeline.rounds import is_made, rounds_of
from megatron_lopd.pipeline.stage import SharedStage
from megatron_lopd.stages.table import STAGES

SHARED = tuple(stage.name for stage in STAGES if isinstance(stage, SharedStage))


def jobs_of(recipe: Recipe, cluster: Cluster) -> list[Job]:
    """The jobs that are still to be run, in order; none when every stage is committed.

    Raises ConfigError when the recipe asks for no stage, or its layout does not fit the nodes' GPUs.
    """
    run = ResolvedRun(recipe)
    needed = [stage for stage in STAGES if stage.needed(run)]
    if not needed:
        raise ConfigError("the recipe asks for nothing: give a section sft, and train to go on to OPD")
    jobs: list[Job] = []
    for stage in needed:
        if not run.is_committed(stage.name):
            names = _rounds(run) if stage.name == "train" else [(stage.name, stage.name)]
            on_gpu = stage.on_gpu(run)
            jobs += [_job(name, command, on_gpu, recipe, cluster) for name, command in names]
    return jobs


def _rounds(run: ResolvedRun) -> Iterator[tuple[str, str]]:
    """Names and commands: train ends where its rollouts are used up, refresh makes more, train goes on."""
    yield "train", "train"
    for each in rounds_of(run)[1:]:
        if not is_made(run, each):
            yield f"refresh-{each.number}", "refresh"
            yield f"train-{each.number}", "train"


def _job(name: str, command: str, on_gpu: bool, recipe: Recipe, cluster: Cluster) -> Job:
    resources = getattr(cluster.stages, command)
    layout = _layout(command, recipe)
    if command in SHARED:
        _check_engine(command, getattr(recipe, command).engine, cluster)
    workers = resources.nodes if command in SHARED and layout is None else 0
    return Job(
        name=name,
        command=command,
        nodes=1 if workers else resources.nodes,
        workers=workers,
        ranks=_ranks(command, resources.nodes, layout, cluster) if layout is not None else 0,
        gpus=cluster.gpus_per_node if on_gpu else 0,
        minutes=resources.minutes,
        partition=resources.partition or cluster.partition,
    )


def _check_engine(command: str, engine: EngineConfig, cluster: Cluster) -> None:
    """Raise ConfigError when a node's workers ask for more GPUs than it has."""
    wanted = engine.options.devices * engine.workers
    if 0 < cluster.gpus_per_node < wanted:
        raise ConfigError(
            f"{command}.engine: {engine.options.devices} GPUs a worker x workers={engine.workers} takes "
            f"{wanted} GPUs, and gpus_per_node is {cluster.gpus_per_node}: lower one of them"
        )


def _layout(command: str, recipe: Recipe) -> ParallelConfig | None:
    """How the ranks of a command divide a model; None where it takes no ranks."""
    if command in ("sft", "train"):
        return recipe.parallel
    if command != "score":
        return None
    scoring = ResolvedRun(recipe).scoring
    second = scoring.agreement.engine if scoring.agreement is not None else None
    return scoring.engine.options.layout or (second.options.layout if second is not None else None)


def _ranks(command: str, nodes: int, parallel: ParallelConfig, cluster: Cluster) -> int:
    """Processes on each node. ConfigError when the parallel layout does not divide their number."""
    if not cluster.gpus_per_node:
        if parallel.processes % nodes:
            raise ConfigError(
                f"stages.{command}.nodes={nodes} does not divide parallel.processes={parallel.processes}: "
                "change one of them"
            )
        return parallel.processes // nodes
    ranks = nodes * cluster.gpus_per_node
    if ranks % parallel.ranks_multiple:
        raise ConfigError(
            f"stages.{command}.nodes={nodes} with gpus_per_node={cluster.gpus_per_node} makes {ranks} ranks, "
            f"not a multiple of {parallel.ranks_multiple} ({parallel.product}): change nodes, or the layout"
        )
    return cluster.gpus_per_node
