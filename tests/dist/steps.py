"""A few optimizer steps in a rank, and the whole first gradient from what all ranks hold of it."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch

# (this rank's place in the group that splits it, axis it is split along or None, blocks along it, gradient)
Shard = tuple[int, int | None, int, torch.Tensor]


@dataclass(frozen=True)
class Trained:
    """What one rank saw: each step's loss and gradient norm, and the first step's gradients by name.

    `clipped`: the first step's norm after clipping.
    """

    losses: list[float]
    norms: list[float]
    clipped: float
    gradients: dict[str, Shard]


def whole_gradients(trained: list[Trained], vocab_size: int) -> dict[str, torch.Tensor]:
    """Put the shards of every gradient together again, without the rows that pad the vocabulary."""
    shards: dict[str, dict[int, Shard]] = defaultdict(dict)
    for rank in trained:
        for name, shard in rank.gradients.items():
            known = shards[name].setdefault(shard[0], shard)
            torch.testing.assert_close(shard[3], known[3], rtol=0, atol=0)  # replicas move alike
    whole = {}
    for name, by_place in shards.items():
        ordered = [by_place[place] for place in range(len(by_place))]
        _, axis, blocks, gradient = ordered[0]
        if axis is not None:
            parts = [shard[3].unflatten(axis, (blocks, -1)) for shard in ordered]
            gradient = torch.cat(parts, axis + 1).flatten(axis, axis + 1)
        whole[name] = gradient[:vocab_size] if "word_embeddings" in name or "output" in name else gradient
    return whole


def train_steps(model: Any, arch: Any, loader: Any, objective_name: str, ranks: Any, steps: int) -> Trained:
    """Train the chunks of `model` on what `loader` holds; called in every rank."""
    from megatron_lopd.data.batch_plan import BatchPlan
    from megatron_lopd.mcore import compat
    from megatron_lopd.mcore.optimizer import build_optimization, guarded_step, zero_gradients
    from megatron_lopd.objectives import get_objective
    from megatron_lopd.training.metrics import Counts, summarize
    from megatron_lopd.training.step import run_micro_batches

    config = loader.config
    optimization = build_optimization(model, config.optimizer, "fp32", steps)
    plan = BatchPlan(len(loader.data), config.global_batch_size, seed=0)
    objective, device = get_objective(objective_name, config), compat.device()
    losses, norms, clipped, gradients = [], [], 0.0, {}
    for step in range(steps):
        batches = loader.micro_batches(plan.samples(step).tolist())
        zero_gradients(optimization)
        parts = run_micro_batches(optimization.chunks, objective, batches, config.micro_batch_tokens, device)
        gradients = gradients or _gradients(optimization.chunks, arch)
        norms.append(guarded_step(optimization)[0])
        clipped = clipped or optimization.optimizer.get_grad_norm()
        losses.append(summarize(parts, Counts.of(batches, device), objective, ranks, device)["loss"])
    return Trained(losses, norms, clipped, gradients)


def _gradients(chunks: Any, arch: Any) -> dict[str, Shard]:
    from megatron_lopd.mcore.experts import tensor_split
    from megatron_lopd.mcore.names import parameters_by_name

    shards = {}
    for chunk in chunks:
        _make_whole(chunk)
        for name, weight in parameters_by_name(chunk.module, arch).items():
            is_split = getattr(weight, "tensor_model_parallel", False)
            shards[name] = (
                tensor_split(weight)[0] if is_split else 0,
                weight.partition_dim if is_split else None,
                getattr(weight, "partition_stride", 1),
                weight.main_grad.clone(),
            )
    return shards


def _make_whole(chunk: Any) -> None:
    """Gather every gradient: the distributed optimizer leaves each rank its part of the buffers."""
    for buffer in (*chunk.buffers, *chunk.expert_parallel_buffers):
        group = buffer.data_parallel_group
        for bucket in buffer.buckets:
            parts = list(bucket.grad_data.chunk(group.size()))
            torch.distributed.all_gather(parts, parts[group.rank()].clone(), group=group)
