"""GPU time of a stage, by a roofline: a share of peak FLOP/s, or, in decoding, of memory bandwidth.

Training and scoring take FLOPs / (peak x UTILIZATION), with the FLOPs of families/flops.py. Decoding reads,
for each token of a running batch, all weights once and each sequence's keys and values so far (Pope et al.
2022, arXiv 2211.05102, section 3): (weights + running x context x KV bytes of a token) / (bandwidth x
DECODING). Of a mixture of experts a batch of b tokens reads the share 1 - (1 - top_k / count)^b of the
experts, as if the router chose evenly. What is not here: loading and starting, evaluation between steps,
waiting on disk, and the traffic between ranks but for what UTILIZATION holds of it.
"""

from __future__ import annotations

from dataclasses import dataclass

from megatron_lopd.config import ParallelConfig
from megatron_lopd.estimate.gpu_kinds import GPUS, Gpu
from megatron_lopd.estimate.memory import EngineMemory, engine_memory, kv_bytes
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.family import family_of
from megatron_lopd.families.flops import step_flops
from megatron_lopd.families.memory_shapes import Shape, published
from megatron_lopd.mcore.recompute import recomputed_part

# Share of HBM bandwidth that decoding reaches. An assumption, fitted to nothing.
DECODING = 0.6
# Share of peak bf16 FLOP/s in training and scoring. Fitted, one for both, to the two PUBLISHED_HOURS of
# Lightning OPD below: in sample, there is nothing else to check it with. tools/bench/plan.py prints what it
# leaves.
UTILIZATION = 0.33

SECONDS_AN_HOUR = 3600.0


@dataclass(frozen=True)
class TokenWork:
    """`samples` sequences of `prompt` and `response` tokens each, on average."""

    samples: float
    prompt: int
    response: int

    @property
    def length(self) -> int:
        """Tokens of a sequence."""
        return self.prompt + self.response


def forward_flops(arch: Architecture, work: TokenWork) -> float:
    """FLOPs of one forward over every sequence: a third of a training step's (2 of 6 a weight and token)."""
    return work.samples * step_flops(arch, [work.length], work.response) / 3


def training_flops(arch: Architecture, work: TokenWork, parallel: ParallelConfig) -> float:
    """FLOPs spent on forward and backward, and on the forward of what is recomputed."""
    forward = forward_flops(arch, work)
    part = recomputed_part(arch, parallel, None, grouped=True)
    again = 0.0
    if part == "full":
        again = forward
    elif part in ("mlp", "moe"):
        experts = arch.experts
        width = arch.ffn_size if experts is None else experts.top_k * experts.ffn_size
        again = 6.0 * arch.num_layers * arch.hidden_size * width * work.samples * work.length
    elif part == "core_attn":
        inner = arch.num_heads * arch.head_dim
        again = 2.0 * arch.num_layers * inner * work.samples * work.length**2
    return 3 * forward + again


def bubble(parallel: ParallelConfig, micro_batches: float) -> float:
    """Time a pipeline's ranks wait, as a share of that in which they work: (p - 1) / (v m).

    m = `micro_batches` of a step on a rank, v its model chunks (Narayanan et al. 2021, arXiv 2104.04473,
    section 2.2).
    """
    return (parallel.pipeline - 1) / (parallel.virtual_pipeline * max(1.0, micro_batches))


def compute_hours(flops: float, gpu: Gpu) -> float:
    """GPU-hours of compute-bound work."""
    return flops / (gpu.flops * UTILIZATION) / SECONDS_AN_HOUR


def decoding_hours(shape: Shape, work: TokenWork, engine: EngineMemory, element: int, gpu: Gpu) -> float:
    """GPU-hours of sampling: a prompt is read at once, its answer by tokens. `element`: bytes of a weight."""
    arch = shape.arch
    experts = arch.num_layers * family_of(arch).layer_sizes(arch).expert_weights
    unread = (1 - arch.experts.top_k / arch.experts.count) ** engine.running if arch.experts else 0.0
    weights = (shape.parameters - experts * unread) * element
    context = work.prompt + work.response / 2
    bytes_a_step = weights + engine.running * context * kv_bytes(arch, element)
    reading = bytes_a_step / (gpu.bandwidth * DECODING)
    flops = forward_flops(arch, TokenWork(engine.running, work.prompt, work.response)) / work.response
    computing = flops / (gpu.flops * UTILIZATION)
    steps = work.samples / engine.running * work.response
    prefill = compute_hours(forward_flops(arch, TokenWork(work.samples, work.prompt, 0)), gpu)
    return steps * max(reading, computing) / SECONDS_AN_HOUR + prefill


@dataclass(frozen=True)
class Published:
    """Hours printed in arXiv 2604.13010: `hours` GPU-hours of Lightning OPD, `online` of standard OPD."""

    student: str
    teacher: str
    hours: float
    online: float


PUBLISHED_HOURS = (Published("Qwen3-4B", "Qwen3-8B", 20, 72), Published("Qwen3-8B", "Qwen3-32B", 30, 120))
# Their settings: about 150 steps of 256 samples, responses of 4,096 tokens.
PUBLISHED_STEPS, PUBLISHED_BATCH = 150, 256
PUBLISHED_WORK = TokenWork(PUBLISHED_STEPS * PUBLISHED_BATCH, prompt=150, response=4096)
# The published code makes a reference forward and an old-log-prob forward before each step's own three
# thirds.
PUBLISHED_FORWARDS = 5


def published_hours(case: Published) -> dict[str, float]:
    """GPU-hours by stage that this page gives for a published run, on H100s.

    Taken for granted, since the paper's abstract starts from an SFT checkpoint: the hours hold rollout, score
    and train, and neither generate nor sft; every response reaches 4,096 tokens; bf16; engines as
    `engine_memory` lays them out, up to 256 sequences at once.
    """
    known = published()
    student, teacher = Shape(known[case.student]), Shape(known[case.teacher])
    gpu, work = GPUS["h100"], PUBLISHED_WORK
    engine = engine_memory(student, 2, PUBLISHED_BATCH, work.length, gpu.memory_bytes, (1, 2, 4, 8))
    assert engine is not None  # an 8B model fits an H100
    return {
        "rollout": decoding_hours(student, work, engine, 2, gpu),
        "score": compute_hours(forward_flops(teacher.arch, work), gpu),
        "train": compute_hours(PUBLISHED_FORWARDS * forward_flops(student.arch, work), gpu),
    }
