"""Training steps as training makes them, with its loader, packing, model and optimizer; random documents."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

from megatron_lopd.config import Fp8Config, OptimizerConfig, ParallelConfig, TrainConfig
from megatron_lopd.data.records import Rollout, Sample, Score, TopK
from megatron_lopd.estimate.memory import Training, layer_activations, logit_rows, training_memory
from megatron_lopd.families.architecture import Architecture, Experts, read_architecture
from megatron_lopd.families.flops import step_flops
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import capabilities
from megatron_lopd.mcore.loader import BatchLoader, ListedSamples
from megatron_lopd.mcore.model import build_model
from megatron_lopd.mcore.optimizer import Optimization, build_optimization, guarded_step, zero_gradients
from megatron_lopd.mcore.process_groups import Ranks, model_parallel
from megatron_lopd.objectives import get_objective
from megatron_lopd.ops.kernel_trial import agree
from megatron_lopd.training.step import run_micro_batches
from tools.gpu.context import LeftOut

ROOT = Path(__file__).parents[2]
ALONE = ParallelConfig()
TOP_K = 64
LONGEST = 4096  # tokens of a document

QWEN3_06B = read_architecture(ROOT / "tools" / "bench" / "qwen3_0.6b")
# Eight of its 36 layers, and its output matrix tied to the embedding: 2.2 G parameters.
QWEN3_8B_CUT = replace(
    QWEN3_06B, num_layers=8, hidden_size=4096, ffn_size=12288, num_heads=32, num_kv_heads=8
)
# Qwen3-30B-A3B's layers, twelve of 48, with 32 of its 128 experts.
EXPERTS_CUT = replace(
    QWEN3_06B,
    family="qwen3_moe",
    num_layers=12,
    hidden_size=2048,
    num_heads=32,
    num_kv_heads=4,
    experts=Experts(count=32, top_k=8, ffn_size=768, normalize_top_k=True),
)


@dataclass(frozen=True)
class Job:
    """A kind of training step.

    `engine`: Transformer Engine's layers, else native ones. `fused`: the log-prob operation's own kernels
    where they run, else torch's operations.
    """

    name: str
    arch: Architecture
    micro_batch_tokens: int = 16384
    samples: int = 16
    longest: int = LONGEST
    engine: bool = True
    fused: bool = True
    fp8: Fp8Config | None = None
    objective: str = "sampled_reverse_kl"

    def toy(self) -> Job:
        """The same, small enough for a CPU, in native layers."""
        tiny = replace(
            self.arch,
            num_layers=2,
            hidden_size=128,
            ffn_size=256,
            num_heads=4,
            num_kv_heads=2,
            head_dim=32,
            vocab_size=1003,
            experts=self.arch.experts and Experts(4, 2, 64, normalize_top_k=True),
        )
        return replace(self, arch=tiny, micro_batch_tokens=256, samples=4, longest=120, engine=False)

    @property
    def planned_bytes(self) -> float:
        """What `lopd plan` reckons; native layers keep about twice of what Transformer Engine's do."""
        planned = training_memory(self.arch, ALONE, 1, self._training).total
        if not self.engine:
            layer = layer_activations(self.arch, ALONE, self._training)
            planned += self.micro_batch_tokens * self.arch.num_layers * layer
        return planned

    @property
    def logit_rows(self) -> int | None:
        """As training's loop chooses it."""
        if not torch.cuda.is_available():
            return None
        memory = torch.cuda.get_device_properties(0).total_memory
        return logit_rows(self.arch, ALONE, 1, self._training, memory)

    @property
    def _training(self) -> Training:
        return Training(self.micro_batch_tokens, "bf16", self.fp8 is not None)

    def largest_fitting(self, free: float) -> str:
        """In words, the most layers of this model that would fit, at fewer tokens if need be."""
        for tokens in (self.micro_batch_tokens >> halvings for halvings in range(4)):
            for layers in range(self.arch.num_layers, 0, -1):
                arch = replace(self.arch, num_layers=layers)
                if replace(self, arch=arch, micro_batch_tokens=tokens).planned_bytes <= free:
                    cut = f"{layers} of {self.arch.num_layers} layers, {tokens:,} tokens a micro-batch"
                    return f"the largest cut that fits: {cut}"
        return "no cut of it fits"


def require_kind(job: Job) -> None:
    """Raise LeftOut where this machine has not the layers or the numbers that `job` is made of."""
    machine = capabilities()
    if job.engine and machine.transformer_engine is None:
        raise LeftOut("needs Transformer Engine, which cannot be loaded here")
    if job.fp8 is not None and machine.fp8[job.fp8.recipe]:
        raise LeftOut(f"needs FP8 {job.fp8.recipe}: {machine.fp8[job.fp8.recipe]}")


def make_samples(job: Job) -> list[Sample]:
    """Prompts of some 150 tokens and log-normal answers, cut at the horizon as rollouts are."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(job.samples):
        prompt = int(np.clip(rng.lognormal(5.0, 0.5), 8, job.longest // 4))
        response = int(np.clip(rng.lognormal(7.3, 0.8), 16, job.longest - prompt))
        tokens = rng.integers(1, job.arch.vocab_size, prompt + response, dtype=np.int32)
        kept = -rng.exponential(0.5, response).astype(np.float32)
        rollout = Rollout(f"sample-{number}", tokens[:prompt], tokens[prompt:], "stop", kept)
        top_k = (
            _top_k(rng, response, job.arch.vocab_size)
            if "top_k" in get_objective(job.objective).needs
            else None
        )
        samples.append(Sample(rollout, Score(f"sample-{number}", kept * np.float32(0.9), top_k)))
    return samples


def _top_k(rng: np.random.Generator, tokens: int, vocab_size: int) -> TopK:
    """Distinct ids, and a distribution over them and the rest."""
    first = rng.integers(1, vocab_size - TOP_K, (tokens, 1))
    ids = (first + np.arange(TOP_K)).astype(np.int32)
    logits = np.sort(rng.standard_normal((tokens, TOP_K + 1)).astype(np.float32), axis=1)[:, ::-1]
    log_probs = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    return TopK(ids, log_probs[:, :-1], log_probs[:, -1])


@dataclass(frozen=True)
class Steps:
    """A model ready to be trained: `step` makes one optimizer step of all samples."""

    optimization: Optimization
    ranks: Ranks
    step: Callable[[], None]
    tokens: int
    flops: float


@contextmanager
def training(job: Job) -> Iterator[Steps]:
    """Build it; everything is gone when the block ends, if the caller keeps nothing."""
    samples = make_samples(job)
    lengths = [len(each.rollout.prompt_tokens) + len(each.rollout.response_tokens) for each in samples]
    responses = sum(len(each.rollout.response_tokens) for each in samples)
    config = TrainConfig(steps=1, micro_batch_tokens=job.micro_batch_tokens)
    with layers_of(job.engine), log_probs_of(job.fused), model_parallel(ALONE, seed=0) as ranks:
        agree(compat.device())
        model = build_model(job.arch, ALONE, "bf16", fp8=job.fp8)
        optimization = build_optimization(model, OptimizerConfig(lr=1e-6), "bf16", total_steps=100)
        loader = BatchLoader.of(ListedSamples(samples), config, ALONE, ranks, job.fp8)
        micro_batches = loader.micro_batches(range(len(samples)))
        objective, here = get_objective(job.objective), compat.device()

        def step() -> None:
            zero_gradients(optimization)
            run_micro_batches(
                optimization.chunks,
                objective,
                micro_batches,
                job.micro_batch_tokens,
                here,
                rows=job.logit_rows,
            )
            guarded_step(optimization)

        yield Steps(optimization, ranks, step, sum(lengths), step_flops(job.arch, lengths, responses))


@contextmanager
def layers_of(engine: bool) -> Iterator[None]:
    """Native layers also where Transformer Engine's would be chosen."""
    chosen = compat.has_transformer_engine
    if not engine:
        compat.has_transformer_engine = lambda: False
    capabilities.cache_clear()
    try:
        yield
    finally:
        compat.has_transformer_engine = chosen
        capabilities.cache_clear()


@contextmanager
def log_probs_of(fused: bool) -> Iterator[None]:
    """torch's operations also where the kernels would be chosen."""
    if fused:
        yield
        return
    with patch("megatron_lopd.ops.token_loss.usable", lambda device: False):
        yield


def first_step(toy: bool) -> None:
    """One step of a one-layer model of a real vocabulary."""
    compat.prepare()
    engine = capabilities().transformer_engine is not None
    arch = replace(QWEN3_06B, num_layers=1)
    job = Job("one step", arch, micro_batch_tokens=2048, samples=2, longest=512, engine=engine)
    with training(job.toy() if toy else job) as steps:
        steps.step()
