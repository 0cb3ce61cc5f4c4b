"""How many tokens a training micro-batch may hold, and from how many on the GPU no longer waits for the CPU.

A GPU is given its kernels one after another by Python, at one rate however many tokens they work on. In a
small model, or one split over many ranks, it is done with each before it is given the next. LAUNCHING is the
time of a layer's kernels, forward and backward: a step of Qwen3-0.6B's shape on an H100 with Transformer
Engine, 28 layers and two micro-batches of 16,384 tokens, takes 0.477 s, and its GPU's work half of that at
the REACHED share of peak, which is that of an 8-layer cut of Qwen3-8B there. All of the step is counted as
launching: it is at most that.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from megatron_lopd.config import ParallelConfig
from megatron_lopd.estimate.gpu_kinds import Gpu
from megatron_lopd.estimate.hours import TokenWork, forward_flops
from megatron_lopd.estimate.memory import Training, training_memory
from megatron_lopd.families.architecture import Architecture

STEP = 1024  # tokens between one size and the next: a multiple of what any layout pads to
LAUNCHING = 0.477 / (28 * 2)  # seconds a layer and micro-batch
REACHED = 0.53  # of bf16 peak
# Micro-batches a pipeline stage, lest the others wait for them longer than a quarter of the time (`bubble`).
A_STAGE = 4


@dataclass(frozen=True)
class MicroBatches:
    """`largest`: tokens that fit and that a step can fill; `count` of them make a rank's step, `fill` full.

    `waits_below`: tokens below which the GPU waits for the CPU.
    """

    largest: int
    count: int
    fill: float
    waits_below: int


def fitting_tokens(
    arch: Architecture, parallel: ParallelConfig, training: Training, memory_bytes: float, most: int
) -> int | None:
    """The most tokens of a micro-batch that fit GPUs of `memory_bytes`, a multiple of STEP.

    On `parallel.processes` of them. At most `most`, rounded up to such a multiple; `training.tokens` counts
    for nothing. None where not even STEP tokens fit.
    """
    for tokens in range(math.ceil(most / STEP) * STEP, 0, -STEP):
        if _total(arch, parallel, replace(training, tokens=tokens)) <= memory_bytes:
            return tokens
    return None


def _total(arch: Architecture, parallel: ParallelConfig, training: Training) -> float:
    return training_memory(arch, parallel, parallel.processes, training).total


def micro_batches(
    arch: Architecture, parallel: ParallelConfig, gpu: Gpu, training: Training, batch: TokenWork
) -> MicroBatches | None:
    """What fits on each of `parallel.processes` GPUs; None where nothing does.

    `batch`: the samples of a step, those of all data parallel ranks. At `pipeline` stages a rank's step is
    left in A_STAGE x `pipeline` micro-batches, where it has as many STEPs.
    """
    model = parallel.tensor * parallel.pipeline * parallel.context
    tokens = batch.samples * batch.length / (parallel.processes // model)
    pieces = A_STAGE * parallel.pipeline if parallel.pipeline > 1 else 1
    most = max(STEP, math.ceil(tokens / pieces))
    largest = fitting_tokens(arch, parallel, training, gpu.memory_bytes, most)
    if largest is None:
        return None
    count = math.ceil(tokens / largest)
    # A rank's share of a token's work, forward and backward, against the launching of its layers.
    seconds = 3 * forward_flops(arch, batch) / (batch.samples * batch.length) / model / (gpu.flops * REACHED)
    waits_below = LAUNCHING * arch.num_layers / parallel.pipeline / seconds
    return MicroBatches(largest, count, tokens / (count * largest), math.ceil(waits_below / STEP) * STEP)
