"""The scales of FP8's delayed scaling before step 1: they come from values seen before, and there are none.

With scales of 1, gradients of a loss averaged over many tokens lie below what e5m2 can hold, and become 0.
What is behind them sees zeros, and finds no scale either.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from megatron_lopd.data.collate import MicroBatch
from megatron_lopd.mcore.optimizer import Optimization, zero_gradients
from megatron_lopd.objectives import Objective
from megatron_lopd.training.step import run_micro_batches

# Between two places where a gradient comes in through the residual stream, in bf16, it passes two products:
# the first finds its scale in the first pass, and what it then lets through, the second's in the second.
PASSES = 2


def find_scales(
    optimization: Optimization,
    objective: Objective,
    micro_batches: Sequence[MicroBatch],
    token_budget: int,
    device: torch.device,
) -> None:
    """Forward and backward over `micro_batches`, PASSES times; every rank calls with as many.

    What is kept are the scales: gradients are zeroed, weights and moments are not touched.
    """
    for _ in range(PASSES):
        zero_gradients(optimization)
        run_micro_batches(optimization.chunks, objective, micro_batches, token_budget, device)
    zero_gradients(optimization)
