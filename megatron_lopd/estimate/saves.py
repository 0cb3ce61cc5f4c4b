"""What a checkpoint takes: bytes that a rank stages, memory, how long a step waits, how long it is written.

Of each weight that a rank keeps the state of, the weight itself, its fp32 master and Adam's two moments are
staged: w + 12 bytes (w: 2 in bf16, 4 in fp32). The D ranks that share an optimizer (data x context parallel
for dense weights, expert data parallel for experts') share these out; of weights that tensor-parallel ranks
have copies of (norms, routers) one writes, and of tied embeddings at both ends of a pipeline the first stage.
A rank copies them to host memory while the step waits, and keeps that memory. It takes none of the GPU's.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.config import ParallelConfig
from megatron_lopd.estimate.memory import Training, Weights, weights_on
from megatron_lopd.estimate.stages import CHECKPOINT
from megatron_lopd.families.architecture import Architecture

# Bytes/s that a rank copies from its GPU to pinned memory, all ranks of a node at once. An assumption: a
# sixth of what PCI Express 5.0 x16 is specified for.
STAGING_RATE = 10e9
# Bytes/s that a rank writes and hashes in the background, all ranks of a node at once. An assumption, of the
# disk above all: hashing goes on in several threads.
WRITING_RATE = 1e9
# Seconds of a save that are not copying: describing the state, and rank 0's making of the directory and of
# the index. An assumption.
FIXED_SECONDS = 1.0


@dataclass(frozen=True)
class SaveEstimate:
    """A checkpoint at a layout: bytes that the fullest rank stages; host bytes of a node, kept between saves;
    GPU bytes taken for it; seconds that a step waits; seconds until it is written, while steps go on."""

    rank_bytes: float
    node_bytes: float
    gpu_bytes: float
    blocked_seconds: float
    writing_seconds: float


def save_estimate(
    arch: Architecture, parallel: ParallelConfig, world: int, node_size: int, training: Training
) -> SaveEstimate:
    """A save on `world` ranks split as `parallel` says, `node_size` of them on a node."""
    staged = max(staged_bytes(arch, parallel, world, training, stage) for stage in {0, parallel.pipeline - 1})
    return SaveEstimate(
        rank_bytes=staged,
        node_bytes=staged * min(node_size, world),
        gpu_bytes=0.0,
        blocked_seconds=FIXED_SECONDS + staged / STAGING_RATE,
        writing_seconds=staged / WRITING_RATE,
    )


def staged_bytes(
    arch: Architecture, parallel: ParallelConfig, world: int, training: Training, stage: int
) -> float:
    """Bytes that a rank of pipeline stage `stage` (from 0) and the first tensor-parallel rank stages, on
    average over those that share its optimizer."""
    weights = _written_on(arch, parallel, stage)
    replicas = world // (parallel.tensor * parallel.pipeline)
    expert_replicas = world // (parallel.expert_tensor_size * parallel.expert * parallel.pipeline)
    return (training.element + CHECKPOINT) * (weights.dense / replicas + weights.experts / expert_replicas)


def _written_on(arch: Architecture, parallel: ParallelConfig, stage: int) -> Weights:
    weights = weights_on(arch, parallel, stage)
    if arch.tied and 0 < stage == parallel.pipeline - 1:
        matrix = arch.padded_vocab_size(parallel.tensor) // parallel.tensor * arch.hidden_size
        return Weights(weights.dense - matrix, weights.experts)
    return weights
