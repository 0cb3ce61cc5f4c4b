"""On one GPU: step time and MFU of Qwen3-shaped models, and the log-prob operation against the naive one.

    python tools/bench/gpu.py [--quick]

Random weights, random documents of Qwen3-like lengths, packed as training packs them; one optimizer step of
`sampled_reverse_kl` for each kind of layers and each FP8 recipe this machine has. The kinds take turns, twice
round, each built anew; a figure is the median of all its steps. MFU is model FLOPs (mcore/flops.py) over the
time and the bf16 peak, for FP8 too. The last line is one JSON object: seconds, bytes, ratios. Without a
GPU only --quick runs, at sizes that say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from megatron_lopd.config import Fp8Config, OptimizerConfig, ParallelConfig
from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.packing import pack
from megatron_lopd.data.records import Rollout, Sample, Score
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.architecture import Architecture, read_architecture
from megatron_lopd.mcore.capabilities import FP8_RECIPES, capabilities
from megatron_lopd.mcore.flops import peak_flops, step_flops
from megatron_lopd.mcore.log_probs import vocab_parallel_log_probs
from megatron_lopd.mcore.model import build_model
from megatron_lopd.mcore.optimizer import build_optimization, guarded_step, zero_gradients
from megatron_lopd.mcore.parallel import model_parallel
from megatron_lopd.mcore.precision import packed_padding
from megatron_lopd.objectives import get_objective
from megatron_lopd.training.step import run_micro_batches

ALONE = ParallelConfig()
QWEN3_06B = read_architecture(Path(__file__).parent / "qwen3_0.6b")
MODELS = {"qwen3-0.6b": QWEN3_06B, "qwen3-1.7b": replace(QWEN3_06B, hidden_size=2048, ffn_size=6144)}


@dataclass(frozen=True)
class Scale:
    """How large everything is: models, tokens of a micro-batch, samples of a step, repetitions, rows."""

    models: dict[str, Architecture]
    micro_batch_tokens: int
    samples: int
    longest: int
    warmup: int
    steps: int
    rows: int
    hidden_size: int
    vocab_size: int


FULL = Scale(MODELS, 16384, 32, 4096, 3, 8, 4096, 1024, 151936)
TINY = replace(
    QWEN3_06B, num_layers=2, hidden_size=128, ffn_size=256, num_heads=4, num_kv_heads=2, head_dim=32
)
QUICK = Scale({"tiny": replace(TINY, vocab_size=1003)}, 256, 4, 120, 1, 2, 128, 64, 5003)


@dataclass(frozen=True)
class Kind:
    """A way to compute the layers."""

    name: str
    engine: bool
    fp8: Fp8Config | None = None


def main() -> None:
    """Measure, print a line a figure, and the JSON object."""
    parser = argparse.ArgumentParser(description="step time, MFU and log-prob operation on one GPU")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see that it runs")
    arguments = parser.parse_args()
    if not arguments.quick and not torch.cuda.is_available():
        parser.error("torch sees no GPU: --quick shows that the script runs, and measures nothing")
    compat.prepare()
    machine = capabilities()
    scale = QUICK if arguments.quick else FULL
    results: dict[str, Any] = {"machine": machine.gpu or "cpu", "torch": torch.__version__}
    results["transformer_engine"] = machine.transformer_engine
    results["steps"] = {name: measure_steps(name, arch, scale) for name, arch in scale.models.items()}
    results["log_probs"] = measure_log_probs(scale)
    print(json.dumps(results))


def kinds() -> list[Kind]:
    """Those that run here."""
    machine = capabilities()
    found = [Kind("native bf16", engine=False)]
    if machine.transformer_engine is not None:
        found.append(Kind("engine bf16", engine=True))
        found += [
            Kind(f"engine fp8 {recipe}", engine=True, fp8=Fp8Config(recipe))  # type: ignore[arg-type]
            for recipe in FP8_RECIPES
            if not machine.fp8[recipe]
        ]
    return found


def measure_steps(name: str, arch: Architecture, scale: Scale) -> dict[str, dict[str, float | None]]:
    """Each kind's median step, tokens/s, MFU and peak memory."""
    samples = make_samples(scale, arch.vocab_size)
    lengths = [len(s.rollout.prompt_tokens) + len(s.rollout.response_tokens) for s in samples]
    flops = step_flops(arch, lengths, sum(len(s.rollout.response_tokens) for s in samples))
    peak = peak_flops(capabilities().gpu)
    available = kinds()
    seconds: dict[str, list[float]] = {kind.name: [] for kind in available}
    memory: dict[str, int] = {}
    for _ in range(2):
        for kind in available:
            found, memory[kind.name] = time_steps(kind, arch, samples, scale)
            seconds[kind.name] += found
    results = {}
    for kind in available:
        median = statistics.median(seconds[kind.name])
        mfu = None if peak is None else flops / median / peak
        figures = {"seconds": median, "spread": max(seconds[kind.name]) - min(seconds[kind.name])}
        results[kind.name] = {
            **figures,
            "tokens_per_s": sum(lengths) / median,
            "mfu": mfu,
            "peak_bytes": memory[kind.name],
        }
        shown = "" if mfu is None else f", MFU {mfu:.1%}"
        print(f"{name} {kind.name}: {median:.3f} s a step, {sum(lengths) / median:,.0f} tokens/s{shown}")
    return results


def make_samples(scale: Scale, vocab_size: int) -> list[Sample]:
    """Prompts of some 150 tokens and log-normal answers, cut at the horizon as rollouts are."""
    rng = np.random.default_rng(0)
    samples = []
    for number in range(scale.samples):
        prompt = int(np.clip(rng.lognormal(5.0, 0.5), 8, scale.longest // 4))
        response = int(np.clip(rng.lognormal(7.3, 0.8), 16, scale.longest - prompt))
        tokens = rng.integers(1, vocab_size, prompt + response, dtype=np.int32)
        kept = -rng.exponential(0.5, response).astype(np.float32)
        rollout = Rollout(f"sample-{number}", tokens[:prompt], tokens[prompt:], "stop", kept)
        samples.append(Sample(rollout, Score(f"sample-{number}", kept * 0.9)))
    return samples


def time_steps(
    kind: Kind, arch: Architecture, samples: Sequence[Sample], scale: Scale
) -> tuple[list[float], int]:
    """(seconds of each step after the warm-up, peak bytes on the GPU)."""
    with layers_of(kind), model_parallel(ALONE, seed=0):
        model = build_model(arch, ALONE, "bf16", fp8=kind.fp8)
        total = scale.warmup + scale.steps
        optimization = build_optimization(model, OptimizerConfig(lr=1e-6), "bf16", total)
        micro_batches = pack_samples(samples, scale, kind.fp8)
        objective, device = get_objective("sampled_reverse_kl"), compat.device()
        reset_peak()
        seconds = []
        for _ in range(total):
            synchronize()
            began = time.perf_counter()
            zero_gradients(optimization)
            run_micro_batches(optimization.chunks, objective, micro_batches, scale.micro_batch_tokens, device)
            guarded_step(optimization)
            synchronize()
            seconds.append(time.perf_counter() - began)
        peak = peak_bytes()
    del model, optimization
    release()
    return seconds[scale.warmup :], peak


def pack_samples(samples: Sequence[Sample], scale: Scale, fp8: Fp8Config | None) -> list[MicroBatch]:
    """The step's micro-batches on the one rank."""
    padding = packed_padding(ALONE, fp8)
    lengths = np.array([len(s.rollout.prompt_tokens) + len(s.rollout.response_tokens) for s in samples])
    (bins,) = pack(padding.documents(lengths), padding.budget(scale.micro_batch_tokens), 1)
    return [collate([samples[index] for index in each], "sequence_mean", padding) for each in bins]


@contextmanager
def layers_of(kind: Kind) -> Iterator[None]:
    """Native layers also where Transformer Engine's would be chosen."""
    chosen = compat.has_transformer_engine
    if not kind.engine:
        compat.has_transformer_engine = lambda: False
    capabilities.cache_clear()
    try:
        yield
    finally:
        compat.has_transformer_engine = chosen
        capabilities.cache_clear()


def measure_log_probs(scale: Scale) -> dict[str, float | None]:
    """Forward and backward of ours and of the naive one, in turns; peak above inputs and gradients."""
    device = compat.device()
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(scale.rows, scale.hidden_size, device=device, generator=generator)
    weight = torch.randn(scale.vocab_size, scale.hidden_size, device=device, generator=generator)
    inputs = tuple(x.mul(scale.hidden_size**-0.25).bfloat16().requires_grad_() for x in (hidden, weight))
    tokens = torch.randint(scale.vocab_size, (scale.rows,), device=device, generator=generator)
    del hidden, weight
    seconds: dict[str, list[float]] = {"ours": [], "naive": []}
    peaks: dict[str, int] = {}
    for turn in range(scale.warmup + scale.steps):
        for name, compute in (("ours", lean), ("naive", naive)):
            elapsed, peaks[name] = time_log_probs(compute, inputs, tokens)
            if turn >= scale.warmup:
                seconds[name].append(elapsed)
    ours, theirs = (statistics.median(seconds[name]) for name in ("ours", "naive"))
    peak_ratio = peaks["ours"] / peaks["naive"] if peaks["naive"] else None
    print(f"log-probs: {ours:.4f} s, naive {theirs:.4f} s; peak bytes {peaks['ours']:,}, {peaks['naive']:,}")
    return {
        "seconds": ours,
        "naive_seconds": theirs,
        "time_ratio": ours / theirs,
        "peak_bytes": peaks["ours"],
        "naive_peak_bytes": peaks["naive"],
        "peak_ratio": peak_ratio,
    }


def time_log_probs(compute: Any, inputs: tuple[torch.Tensor, ...], tokens: torch.Tensor) -> tuple[float, int]:
    """(seconds, bytes at the peak above inputs and their gradients)."""
    for x in inputs:
        x.grad = None
    release()
    synchronize()
    reset_peak()
    held = peak_bytes() + sum(x.nbytes for x in inputs)
    began = time.perf_counter()
    compute(*inputs, tokens).mean().backward()
    synchronize()
    return time.perf_counter() - began, max(0, peak_bytes() - held)


def lean(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """This project's operation."""
    return vocab_parallel_log_probs(hidden, weight, tokens, vocab_size=len(weight)).log_probs


def naive(hidden: torch.Tensor, weight: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """All logits, in fp32, and their softmax."""
    return (hidden @ weight.t()).float().log_softmax(-1).gather(1, tokens[:, None])[:, 0]


def synchronize() -> None:
    """Wait for the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def reset_peak() -> None:
    """Start measuring the peak from what is held now."""
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()


def peak_bytes() -> int:
    """The peak since; 0 without a GPU."""
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0


def release() -> None:
    """Give memory back before the next measurement."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
