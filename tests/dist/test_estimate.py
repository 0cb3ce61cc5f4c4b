"""What `lopd plan` counts on a rank against the tensors of real models on gloo, at several layouts."""

from __future__ import annotations

from dataclasses import asdict, replace

import pytest
from gloo import run_ranks

from megatron_lopd.config import OptimizerConfig, ParallelConfig
from megatron_lopd.estimate.memory import Training, training_memory, weights_on
from megatron_lopd.families.architecture import Architecture
from tools.bench.plan import DENSE, EXPERTS, state_bytes

# Over two ranks; the data parallel size is what is left.
LAYOUTS = {
    "data": (DENSE, ParallelConfig(processes=2)),
    "tensor": (DENSE, ParallelConfig(tensor=2, processes=2)),
    "pipeline": (DENSE, ParallelConfig(pipeline=2, processes=2)),
    "context": (replace(DENSE, tied=False, qkv_bias=True), ParallelConfig(context=2, processes=2)),
    "expert": (EXPERTS, ParallelConfig(expert=2, processes=2)),
    "expert tensor": (EXPERTS, ParallelConfig(tensor=2, processes=2)),
    "expert data": (EXPERTS, ParallelConfig(tensor=2, expert_tensor=1, processes=2)),
}


def measure(arch: Architecture, parallel: ParallelConfig) -> tuple[int, int, int]:
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.optimizer import build_optimization
    from megatron_lopd.mcore.process_groups import model_parallel

    with model_parallel(parallel, seed=0):
        model = build_model(arch, parallel, "bf16")
        return state_bytes(build_optimization(model, OptimizerConfig(), "bf16", total_steps=10))


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_rank_holds_what_the_plan_says(name: str) -> None:
    arch, parallel = LAYOUTS[name]
    ranks = run_ranks(2, measure, arch, parallel)
    predicted = []
    for rank in range(2):
        weights = weights_on(arch, parallel, stage=rank if parallel.pipeline > 1 else 0)
        predicted.append(2 * (weights.dense + weights.experts))
    assert [weights for weights, _, _ in ranks] == predicted
    assert [gradients for _, gradients, _ in ranks] == [2 * count for count in predicted]  # fp32 of bf16
    # The optimizer cuts its buffer where it may, not at a half: all ranks together hold it exactly.
    whole = training_memory(arch, parallel, 2, Training(64, "bf16", fp8=False))
    if parallel.pipeline == 1:
        assert sum(state for *_, state in ranks) == 2 * whole.optimizer
    else:
        # Each rank all of its own: fp32 weights and two moments, 12 bytes where a weight is 2.
        assert [state for *_, state in ranks] == [6 * count for count in predicted]
    assert whole.weights in predicted, asdict(parallel)
