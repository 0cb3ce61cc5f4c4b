"""What each rank of two stages: its share, nothing gathered; and that Megatron-Core's own loader reads it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run_ranks
from numpy.typing import NDArray

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.estimate.memory import Training
from megatron_lopd.estimate.saves import staged_bytes
from megatron_lopd.families.architecture import Architecture
from tests.training_zoo import save_now
from tools.bench.plan import DENSE, EXPERTS

LAYOUTS = {
    "data": (DENSE, ParallelConfig(processes=2)),
    "tensor": (DENSE, ParallelConfig(tensor=2, processes=2)),
    "pipeline": (DENSE, ParallelConfig(pipeline=2, processes=2)),
    "context": (replace(DENSE, tied=False, qkv_bias=True), ParallelConfig(context=2, processes=2)),
    "expert": (EXPERTS, ParallelConfig(expert=2, processes=2)),
    "expert data": (EXPERTS, ParallelConfig(tensor=2, expert_tensor=1, processes=2)),
}
BF16 = Training(64, "bf16", fp8=False)
COLLECTIVES = ("all_gather", "gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "scatter")


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_stage_what_the_plan_says_gathering_nothing(name: str, tmp_path: Path) -> None:
    arch, parallel = LAYOUTS[name]
    ranks = run_ranks(2, _save, arch, parallel, tmp_path)
    staged, held = zip(*ranks, strict=True)
    stages = range(2) if parallel.pipeline > 1 else (0, 0)
    predicted = [staged_bytes(arch, parallel, 2, BF16, stage) for stage in stages]
    if parallel.tensor == 1:
        assert sum(staged) == sum(predicted)
    else:  # what all tensor-parallel ranks have copies of the first one writes
        assert staged[1] < staged[0]
        assert staged[0] == predicted[0] or parallel.expert_tensor_size == 1
    if parallel.pipeline > 1:
        assert list(staged) == predicted
    else:  # the optimizer cuts its buffer where it may, not at a half
        assert max(staged) == pytest.approx(predicted[0], rel=0.1)
    for bytes_staged, bytes_held in zip(staged, held, strict=True):
        assert bytes_staged <= bytes_held < 1.05 * bytes_staged


@pytest.mark.release
def test_megatron_cores_own_loader_reads_it_at_another_layout(tmp_path: Path) -> None:
    arch = DENSE
    run_ranks(2, _save, arch, ParallelConfig(processes=2), tmp_path)
    for parallel in (ParallelConfig(), ParallelConfig(tensor=2, processes=2)):
        for ours, theirs in run_ranks(parallel.processes, _load_both_ways, arch, parallel, tmp_path):
            assert ours.keys() == theirs.keys()
            for key, tensor in ours.items():
                assert np.array_equal(theirs[key], tensor), key


# ---- in the ranks


def _build(arch: Architecture, parallel: ParallelConfig) -> Any:
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.optimizer import build_optimization

    model = build_model(arch, parallel, "bf16", seed=0)
    return build_optimization(model, OptimizerConfig(), "bf16", total_steps=10)


def _save(arch: Architecture, parallel: ParallelConfig, directory: Path) -> tuple[int, int]:
    """Bytes staged, and bytes of host memory taken."""
    import torch.distributed as dist

    from megatron_lopd.checkpoint import sharded as checkpoint
    from megatron_lopd.mcore.process_groups import model_parallel
    from megatron_lopd.checkpoint.tensor_shards import ShardedModel
    from megatron_lopd.checkpoint.staging import HostBuffer

    stage_state, sizes = checkpoint.stage_state, []

    def stage_alone(*arguments: Any) -> Any:
        def refused(*unused: Any, **also_unused: Any) -> None:
            raise AssertionError("a collective while staging")

        before = {name: getattr(dist, name) for name in COLLECTIVES}
        for name in COLLECTIVES:
            setattr(dist, name, refused)
        try:
            staged = stage_state(*arguments)
        finally:
            for name, function in before.items():
                setattr(dist, name, function)
        sizes.append(sum(box.elements.nbytes for file in staged.files for box in file.boxes))
        sizes.append(HostBuffer(ShardedModel(arguments[1]).own_boxes()).nbytes)
        return staged

    checkpoint.stage_state = stage_alone
    with model_parallel(parallel, seed=0) as ranks:
        optimization = _build(arch, parallel)
        _fill(optimization, 1.0 + ranks.rank)
        save_now(directory, optimization, ranks)
    checkpoint.stage_state = stage_state
    return sizes[0], sizes[1]


@torch.no_grad()
def _fill(optimization: Any, scale: float) -> None:
    for part in optimization.optimizer.chained_optimizers:
        for master, moments in part.optimizer.state.items():
            for number, name in enumerate(("exp_avg", "exp_avg_sq")):
                count = moments[name].numel()
                moments[name].copy_(scale * (torch.arange(count, dtype=torch.float32) + number).sin())
            master.add_(0.001)


def _load_both_ways(arch: Architecture, parallel: ParallelConfig, directory: Path) -> Any:
    """This rank's state as `load_state` reads it, and as Megatron-Core's optimizer and loader do."""
    from megatron.core import dist_checkpointing

    from megatron_lopd.checkpoint.sharded import load_state
    from megatron_lopd.mcore.process_groups import model_parallel

    with model_parallel(parallel, seed=0) as ranks:
        ours, theirs = _build(arch, parallel), _build(arch, parallel)
        load_state(directory, ours, ranks, same_layout=False)
        module = theirs.chunks[0].module
        model_state = module.sharded_state_dict()
        (part,) = theirs.optimizer.chained_optimizers
        metadata = {"distrib_optim_sharding_type": "fully_reshardable"}
        state = {
            "model": {"0": model_state},
            "optimizer": part.sharded_state_dict(model_state, is_loading=True, metadata=metadata),
        }
        loaded = dist_checkpointing.load(state, str(directory))
        module.load_state_dict(loaded["model"]["0"])
        for moments in part.optimizer.state.values():
            del moments["step"]  # torch's AdamW has it there, and Megatron-Core would look for it in the file
        part.load_parameter_state_from_fully_reshardable(loaded["optimizer"]["param_state"])
        return _tensors(ours), _tensors(theirs)


def _tensors(optimization: Any) -> dict[str, NDArray[np.float32]]:
    (part,) = optimization.optimizer.chained_optimizers
    found = {name: value for name, value in optimization.chunks[0].named_parameters()}
    for number, group in enumerate(part.optimizer.param_groups):
        for order, master in enumerate(group["params"]):
            for name in ("exp_avg", "exp_avg_sq"):
                found[f"{number}.{order}.{name}"] = part.optimizer.state[master][name]
            found[f"{number}.{order}"] = master
    return {name: value.detach().float().flatten().numpy() for name, value in found.items()}
