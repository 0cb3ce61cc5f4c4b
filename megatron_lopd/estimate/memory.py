"""Bytes on one GPU, by part: in training on Megatron-Core, and in an engine that samples or scores.

Training. With N weights on a rank, of w bytes (bf16 2, fp32 4), and D ranks that share its optimizer (data x
context parallel for dense weights, the expert data parallel ranks for experts'):
    weights     w N            gradients  4 N      (DistributedDataParallel's fp32 main gradients)
    optimizer   12 N / D       (8 N / D where weights are fp32: they are their own master copy; "distributed
                optimizer" in Megatron-Core's documentation: its table of 6 + 12 / d bytes a parameter)
Activations are those that backward needs, of Korthikanti et al. 2022 (arXiv 2205.05198), section 4, counted
anew for what these models are: no dropout, flash attention (no [tokens, tokens] is kept), grouped queries,
SwiGLU, RMSNorm. A layer keeps of each token, in elements, with s = tensor under sequence parallelism and
otherwise 1:
    4 h / s                both norms' inputs and outputs
    3 (q + k) / tensor     q, k, v as projected, q and k as rotated, attention's output (q = heads x head_dim,
                           k = KV heads x head_dim), and 4 bytes a head of log-sum-exp
    3 f / tensor           gate and up, and their product
and of experts top_k tokens of h in and out, and 3 f each. A recomputed part is there for one layer at a time.
Stage 0 of p keeps the layers of p micro-batches at once (1F1B, Narayanan et al. 2021, arXiv 2104.04473), of
p + (p - 1) / v interleaved; the last keeps one.
Log-probs: what ops/token_loss.py holds of a chunk of rows. No [tokens, vocabulary] is ever held.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Literal

from megatron_lopd.config import ParallelConfig
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.family import family_of
from megatron_lopd.families.memory_shapes import Shape
from megatron_lopd.mcore.recompute import recomputed_part

# Bytes of logits that are made at once on a GPU: ops/row_chunks.py's CHUNK_BYTES["cuda"] (a test holds them
# equal), and where there is room up to the second, beyond which chunks gain little.
LOGIT_BYTES, MOST_LOGIT_BYTES = 1.25e9, 2.5e9
# CUDA's context, NCCL's and cuBLAS's buffers, and what the allocator loses between blocks. An assumption.
RESERVED = 5e9
# What of a GPU's memory an engine other than vLLM may use (vLLM's share is engine.memory_fraction). An
# assumption.
ENGINE_SHARE = 0.9
# What twice the GPUs of a replica must save of the bytes read for a token, to be worth the traffic between
# them. An assumption.
WORTH_DOUBLING = 0.25


@dataclass(frozen=True)
class Training:
    """What a micro-batch is, and in what numbers: `tokens` of it, all ranks of a context group together."""

    tokens: int
    precision: Literal["fp32", "bf16"]
    fp8: bool

    @property
    def element(self) -> int:
        """Bytes of a weight or an activation."""
        return 2 if self.precision == "bf16" else 4


@dataclass(frozen=True)
class TrainingMemory:
    """Bytes on the fullest rank of a layout."""

    weights: float
    gradients: float
    optimizer: float
    activations: float
    log_probs: float
    reserved: float

    @property
    def total(self) -> float:
        """All parts."""
        return float(sum(getattr(self, part.name) for part in fields(self)))

    @property
    def largest(self) -> str:
        """The part with the most bytes."""
        return max(fields(self), key=lambda part: getattr(self, part.name)).name.replace("_", "-")


@dataclass(frozen=True)
class Weights:
    """Weights on a rank (count): `experts` are shared out among other ranks than the `dense` ones."""

    dense: int
    experts: int


def weights_on(arch: Architecture, parallel: ParallelConfig, stage: int) -> Weights:
    """The weights of one rank of pipeline stage `stage` (from 0). Exact, padded vocabulary included."""
    layers = arch.num_layers // parallel.pipeline
    layer = family_of(arch).layer_sizes(arch)
    dense = layers * (layer.replicated + (layer.weights - layer.replicated) // parallel.tensor)
    matrix = arch.padded_vocab_size(parallel.tensor) // parallel.tensor * arch.hidden_size
    first, last = stage == 0, stage == parallel.pipeline - 1
    if first:
        dense += matrix
    if last:
        # Tied, the last stage has a copy of the embedding, unless it is the first as well.
        dense += arch.hidden_size + (0 if arch.tied and first else matrix)
    return Weights(dense, layers * layer.expert_weights // (parallel.expert * parallel.expert_tensor_size))


def training_memory(
    arch: Architecture, parallel: ParallelConfig, world: int, training: Training
) -> TrainingMemory:
    """Bytes on the fullest rank, of `world` ranks split as `parallel` says; `check_layout` must hold."""
    stages = {0, parallel.pipeline - 1}  # those between hold less than the first
    return max((_on_stage(arch, parallel, world, training, stage) for stage in stages), key=lambda m: m.total)


def _on_stage(
    arch: Architecture, parallel: ParallelConfig, world: int, training: Training, stage: int
) -> TrainingMemory:
    weights = weights_on(arch, parallel, stage)
    count = weights.dense + weights.experts
    replicas = world // (parallel.tensor * parallel.pipeline)
    expert_replicas = world // (parallel.expert_tensor_size * parallel.expert * parallel.pipeline)
    state = 12 if training.precision == "bf16" else 8
    # Transformer Engine keeps a layer's matrices in FP8 twice, as they stand and transposed, beside bf16.
    vocabulary = arch.padded_vocab_size(parallel.tensor) // parallel.tensor * arch.hidden_size
    ends = (stage == 0) + (stage == parallel.pipeline - 1 and not (arch.tied and stage == 0))
    in_fp8 = count - ends * vocabulary if training.fp8 else 0
    last = stage == parallel.pipeline - 1
    return TrainingMemory(
        weights=float(training.element * count + 2 * in_fp8),
        gradients=4.0 * count,
        optimizer=state * (weights.dense / replicas + weights.experts / expert_replicas),
        activations=_activations(arch, parallel, training, stage),
        log_probs=_log_probs(arch, parallel, training) if last else 0.0,
        reserved=RESERVED,
    )


def layer_activations(arch: Architecture, parallel: ParallelConfig, training: Training) -> float:
    """Bytes a layer makes for one token and its backward pass needs, whether they are kept or made again."""
    tensor = parallel.tensor
    shared = tensor if parallel.sequence else 1
    inner, groups = arch.num_heads * arch.head_dim, arch.num_kv_heads * arch.head_dim
    kept = 4 * arch.hidden_size / shared + 3 * (inner + groups) / tensor
    if arch.experts is None:
        kept += 3 * arch.ffn_size / tensor
    else:
        expert = 2 * arch.hidden_size / shared + 3 * arch.experts.ffn_size / tensor
        kept += arch.experts.top_k * expert + 2 * arch.experts.count / shared
    return kept * training.element + 4 * arch.num_heads / tensor - _spared_by_fp8(arch, parallel, training)


def _spared_by_fp8(arch: Architecture, parallel: ParallelConfig, training: Training) -> float:
    """Bytes of `layer_activations` less: products keep their inputs in FP8, of one byte for two.

    Attention keeps its output in bf16 as well as the projection does in FP8. Nothing is counted off where
    layers are recomputed.
    """
    if not training.fp8 or parallel.recompute != "none":
        return 0.0
    hidden = arch.hidden_size / (parallel.tensor if parallel.sequence else 1)
    spared = hidden - arch.num_heads * arch.head_dim / parallel.tensor
    if arch.experts is None:
        return spared + hidden + arch.ffn_size / parallel.tensor
    return spared + arch.experts.top_k * (hidden + arch.experts.ffn_size / parallel.tensor)


def recomputed_activations(arch: Architecture, parallel: ParallelConfig, training: Training) -> float:
    """Bytes of `layer_activations` that `parallel.recompute` spares, in Transformer Engine's layers."""
    tensor, hidden, experts = parallel.tensor, arch.hidden_size, arch.experts
    shared = tensor if parallel.sequence else 1
    part = recomputed_part(arch, parallel, None, grouped=training.precision == "bf16")
    if part == "full":
        return layer_activations(arch, parallel, training) - hidden * training.element / shared
    left_out = 0.0
    if part == "mlp":  # the norm before it is within its first product
        left_out = hidden / shared + 3 * arch.ffn_size / tensor
    elif experts is not None and part == "moe_act":
        left_out = experts.top_k * experts.ffn_size / tensor
    elif experts is not None and part == "moe":
        left_out = experts.top_k * (2 * hidden / shared + 3 * experts.ffn_size / tensor)
        left_out += 2 * experts.count / shared
    return left_out * training.element  # flash attention, core_attn, keeps q, k, v and its output either way


def _activations(arch: Architecture, parallel: ParallelConfig, training: Training, stage: int) -> float:
    tokens = training.tokens / parallel.context
    layers = arch.num_layers // parallel.pipeline
    waiting = float(parallel.pipeline - stage)
    if parallel.virtual_pipeline > 1:
        waiting += (parallel.pipeline - 1) / parallel.virtual_pipeline
    whole = layer_activations(arch, parallel, training)
    made_again = recomputed_activations(arch, parallel, training)
    return tokens * (layers * (whole - made_again) * waiting + made_again)


def _log_probs(arch: Architecture, parallel: ParallelConfig, training: Training) -> float:
    """The peak with every token a response: the chosen hidden states and their gradient; and of a chunk of
    rows the logits, in whose memory their gradient is made, and the fp32 product with it. The output matrix's
    gradient is added where all gradients are."""
    rows = -(-training.tokens // parallel.context)
    chunk = min(rows, _rows_in(LOGIT_BYTES, arch, parallel))
    hidden = arch.hidden_size * (rows * 2 * training.element + chunk * 4)
    return float(hidden + chunk * _logit_row_bytes(arch, parallel))


def logit_rows(
    arch: Architecture, parallel: ParallelConfig, world: int, training: Training, memory_bytes: float
) -> int:
    """Rows whose logits to make at once on GPUs of `memory_bytes`: LOGIT_BYTES, and more, up to
    MOST_LOGIT_BYTES, where `training_memory` leaves it free."""
    free = memory_bytes - _on_stage(arch, parallel, world, training, parallel.pipeline - 1).total
    return _rows_in(LOGIT_BYTES + min(max(free, 0.0), MOST_LOGIT_BYTES - LOGIT_BYTES), arch, parallel)


def _rows_in(logit_bytes: float, arch: Architecture, parallel: ParallelConfig) -> int:
    """In multiples of 256, and at least that: whole tiles of a matrix product."""
    return max(1, int(logit_bytes // _logit_row_bytes(arch, parallel)) // 256) * 256


def _logit_row_bytes(arch: Architecture, parallel: ParallelConfig) -> int:
    """fp32; where ranks share a vocabulary, one chunk's logits are made while another's are being used."""
    columns = arch.padded_vocab_size(parallel.tensor) // parallel.tensor
    return 4 * columns * (2 if parallel.tensor > 1 else 1)


@dataclass(frozen=True)
class EngineMemory:
    """One replica of an engine: `tensor` GPUs, and bytes on each.

    `kv_cache` is that of the `running` sequences, which fit at their full length, of the `asked` ones.
    """

    tensor: int
    weights: float
    kv_cache: float
    running: int
    asked: int


def kv_bytes(arch: Architecture, element: int) -> int:
    """Bytes of keys and values of one token, all layers."""
    return 2 * arch.num_layers * arch.num_kv_heads * arch.head_dim * element


def engine_memory(
    shape: Shape,
    element: int,
    batch: int,
    length: int,
    memory_bytes: float,
    sizes: Sequence[int],
    share: float = ENGINE_SHARE,
) -> EngineMemory | None:
    """The fewest GPUs, of the `sizes`, of which twice as many would not save WORTH_DOUBLING of what is read.

    Decoding reads all weights for each token of a batch, which more room for the KV cache spreads over more
    sequences. `element`: bytes of a weight and of a KV entry; `length`: tokens of a whole sequence. A size
    must divide the heads; `share` is of the memory. None where not even one sequence fits.
    """
    arch = shape.arch
    cached, weights = length * kv_bytes(arch, element), shape.parameters * element
    found, cost = None, math.inf
    for size in (size for size in sizes if arch.num_heads % size == 0):
        sequence = cached / min(size, arch.num_kv_heads)  # on more ranks than KV heads, they are copied
        room = memory_bytes * share - weights / size
        running = min(batch, int(room // sequence))
        if running < 1:
            continue
        read = weights / running + cached / 2  # bytes a token, half way through its sequence
        if read > (1 - WORTH_DOUBLING) * cost:
            break
        found, cost = EngineMemory(size, weights / size, running * sequence, running, batch), read
    return found
