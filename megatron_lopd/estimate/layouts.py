"""Which layouts a model can be trained in on so many GPUs, and the smallest that fits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from megatron_lopd.config import ParallelConfig, Recompute
from megatron_lopd.errors import ConfigError
from megatron_lopd.estimate.gpu_kinds import GpuCluster
from megatron_lopd.estimate.memory import Training, TrainingMemory, training_memory
from megatron_lopd.families.architecture import Architecture, check_layout

SIZES = (1, 2, 4, 8, 16, 32, 64)
RECOMPUTE: tuple[Recompute, ...] = ("none", "selective", "full")  # from what costs no time to what costs most


@dataclass(frozen=True)
class SizedLayout:
    """A split over all GPUs of a cluster, and what it takes of each."""

    parallel: ParallelConfig
    memory: TrainingMemory

    @property
    def data(self) -> int:
        """Data parallel size: what the model's own axes leave."""
        split = self.parallel
        return split.processes // (split.tensor * split.pipeline * split.context)

    def fits(self, cluster: GpuCluster) -> bool:
        """Whether a GPU holds it."""
        return self.memory.total <= cluster.gpu.memory_bytes


def own_layout(
    arch: Architecture, parallel: ParallelConfig, cluster: GpuCluster, training: Training
) -> SizedLayout:
    """The recipe's `parallel` on all of `cluster`. Raises ConfigError when it cannot split model or GPUs."""
    check_layout(arch, parallel)
    if cluster.count % parallel.ranks_multiple:
        raise ConfigError(
            f"--gpus {cluster.gpu.name}:{cluster.count}: {cluster.count} GPUs are not a multiple of "
            f"{parallel.ranks_multiple} ({parallel.product}): give a multiple of it, or lower those sizes"
        )
    return _layout(arch, replace(parallel, processes=cluster.count), training)


def smallest_layout(
    arch: Architecture, cluster: GpuCluster, training: Training, batch: int
) -> SizedLayout | None:
    """The layout that fits with the fewest model-parallel ranks (tensor x pipeline x context), if one does.

    Among equals first what recomputes least, then fewer pipeline stages, context and expert ranks, which
    cost bubbles and traffic between nodes. Tensor parallelism stays within a node. Data parallel ranks are at
    most the `batch`'s samples.
    """
    fitting = [
        layout
        for parallel in candidates(arch, cluster)
        if (layout := _layout(arch, parallel, training)).data <= batch and layout.fits(cluster)
    ]
    return min(fitting, key=lambda layout: _cost(layout.parallel), default=None)


def least_layout(arch: Architecture, cluster: GpuCluster, training: Training) -> SizedLayout | None:
    """The layout that takes the least memory, fitting or not; None where nothing divides the model."""
    layouts = (_layout(arch, parallel, training) for parallel in candidates(arch, cluster))
    return min(layouts, key=lambda layout: layout.memory.total, default=None)


def candidates(arch: Architecture, cluster: GpuCluster) -> Iterator[ParallelConfig]:
    """Every layout of powers of two on all of `cluster` that `check_layout` takes."""
    tensors = [size for size in SIZES if size <= cluster.node_size]
    experts = SIZES if arch.experts else (1,)
    for tensor, pipeline, context, expert, recompute in product(tensors, SIZES, SIZES, experts, RECOMPUTE):
        if cluster.count % (tensor * pipeline * context) or cluster.count % (pipeline * expert):
            continue
        parallel = ParallelConfig(
            tensor=tensor,
            pipeline=pipeline,
            context=context,
            expert=expert,
            expert_tensor=1 if arch.experts else None,
            recompute=recompute,
            processes=cluster.count,
        )
        try:
            check_layout(arch, parallel)
        except ConfigError:
            continue
        yield parallel


def _layout(arch: Architecture, parallel: ParallelConfig, training: Training) -> SizedLayout:
    return SizedLayout(parallel, training_memory(arch, parallel, parallel.processes, training))


def _cost(parallel: ParallelConfig) -> tuple[int, ...]:
    ranks = parallel.tensor * parallel.pipeline * parallel.context
    return (
        ranks,
        RECOMPUTE.index(parallel.recompute),
        parallel.pipeline,
        parallel.context,
        parallel.expert,
    )
