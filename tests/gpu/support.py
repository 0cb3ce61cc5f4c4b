"""One micro-batch through a tiny model: by transformers in fp64, and by us with either layer spec."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from megatron_lopd.config import Fp8Config, OptimizerConfig, ParallelConfig, Recompute
from megatron_lopd.convert.load_model import load_hf_weights
from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.records import Rollout, Sample, Score, TopK
from megatron_lopd.families.architecture import Architecture, read_architecture
from megatron_lopd.families.weight_rules import merge_parts, tensor_maps
from megatron_lopd.mcore import compat
from megatron_lopd.mcore.capabilities import capabilities
from megatron_lopd.mcore.model import build_model
from megatron_lopd.mcore.names import parameters_by_name
from megatron_lopd.mcore.optimizer import Optimization, build_optimization, zero_gradients
from megatron_lopd.mcore.precision import packed_padding
from megatron_lopd.mcore.process_groups import Ranks, model_parallel
from megatron_lopd.objectives import TokenLogProbs, TopKLogProbs, get_objective
from megatron_lopd.training.fp8_scales import find_scales
from megatron_lopd.training.step import run_micro_batches
from tests.model_zoo import make_model_dir

Layers = Literal["native", "engine"]
Gradient = dict[str, torch.Tensor]
ALONE = ParallelConfig()
STEPS = 10
# Multiples of 128, which every FP8 recipe takes; heads of 64, which every flash attention takes.
SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 1003,  # odd, as real ones may be
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 256}
# Together 513: odd without FP8, and padded to 528 with it, 16 more than a multiple of the blocks of 128.
LENGTHS = (300, 17, 2, 130, 64)
K = 8


def make_checkpoint(root: Path, family: Any) -> Path:
    """bf16 weights, so that bf16, FP8 and the oracle start from the same numbers; logits of about a unit."""
    sizes = SIZES | (EXPERTS if family == "qwen3_moe" else {})
    return make_model_dir(root / family, family, tied=True, dtype=torch.bfloat16, std=0.05, **sizes)


def samples() -> list[Sample]:
    """Random documents, scored by random distributions; the first token of each is its prompt."""
    rng = np.random.default_rng(3)
    found = []
    for number, length in enumerate(LENGTHS):
        tokens = rng.integers(1, SIZES["vocab_size"], length, dtype=np.int32)
        kept = np.zeros(length - 1, dtype=np.float32)
        teacher = torch.from_numpy(rng.normal(size=(length - 1, SIZES["vocab_size"]))).log_softmax(-1)
        own = torch.from_numpy(tokens[1:].astype(np.int64))[:, None]
        likeliest = teacher.topk(K)
        others = teacher.scatter(1, likeliest.indices, -torch.inf).scatter(1, own, -torch.inf)
        top_k = TopK(
            likeliest.indices.numpy().astype(np.int32),
            likeliest.values.float().numpy(),
            others.logsumexp(-1).float().numpy(),
        )
        score = Score(f"sample-{number}", teacher.gather(1, own)[:, 0].float().numpy(), top_k)
        found.append(Sample(Rollout(f"sample-{number}", tokens[:1], tokens[1:], "stop", kept), score))
    return found


@dataclass(frozen=True)
class Outcome:
    """log-probs [R] in fp64, and the gradient of the objective's mean by Megatron's names, on the CPU."""

    log_probs: torch.Tensor
    gradient: Gradient

    def nats_from(self, other: Outcome) -> float:
        """Mean |difference| of the log-probs."""
        return float((self.log_probs - other.log_probs).abs().mean())

    def gradient_error(self, other: Outcome) -> float:
        """|g - g'| / |g'| over all parameters together. NaN where a gradient is not finite."""
        assert self.gradient.keys() == other.gradient.keys()
        ours, theirs = (
            torch.cat([each.gradient[name].double().flatten() for name in sorted(self.gradient)])
            for each in (self, other)
        )
        return float((ours - theirs).norm() / theirs.norm())


class Bench:
    """The checkpoints, and what each way of computing gives for them (each computed once)."""

    def __init__(self, checkpoints: dict[str, Path], quick: bool) -> None:
        self.checkpoints, self.quick = checkpoints, quick
        self._known: dict[Any, Outcome] = {}

    def oracle(self, family: str = "qwen3", objective: str = "sft") -> Outcome:
        """transformers on the CPU in fp64, one document at a time."""
        key = (family, objective)
        if key not in self._known:
            self._known[key] = _oracle(self.checkpoints[family], objective)
        return self._known[key]

    def outcome(
        self,
        layers: Layers,
        precision: Any,
        fp8: Fp8Config | None = None,
        family: str = "qwen3",
        objective: str = "sft",
        recompute: Recompute = "none",
    ) -> Outcome:
        """Ours, of the first pass; under delayed scaling, when there are scales."""
        key = (layers, precision, fp8, family, objective, recompute)
        if key not in self._known:
            with training(self.checkpoints[family], layers, precision, fp8, recompute) as work:
                if fp8 is not None and fp8.recipe == "delayed":
                    work.find_scales()
                self._known[key] = work.one_pass(objective)
        return self._known[key]


@dataclass(frozen=True)
class Work:
    """A model ready to be trained, in this process alone."""

    arch: Architecture
    ranks: Ranks
    optimization: Optimization
    batch: MicroBatch

    def one_pass(self, objective: str = "sft") -> Outcome:
        """Forward and backward; the gradients stay in the buffers for a step."""
        zero_gradients(self.optimization)
        chunks = self.optimization.chunks
        device, loss = compat.device(), get_objective(objective)
        (values,) = run_micro_batches(chunks, loss, [self.batch], len(self.batch.tokens), device)
        parameters = parameters_by_name(chunks[0].module, self.arch)
        gradient = {name: value.main_grad.float().cpu() for name, value in parameters.items()}  # type: ignore[attr-defined]
        return Outcome(values.log_probs.current.double().cpu(), gradient)

    def find_scales(self) -> None:
        """As training does before its first step."""
        tokens = len(self.batch.tokens)
        find_scales(self.optimization, get_objective("sft"), [self.batch], tokens, compat.device())


@contextmanager
def training(
    model_dir: Path,
    layers: Layers,
    precision: Any,
    fp8: Fp8Config | None = None,
    recompute: Recompute = "none",
) -> Iterator[Work]:
    """The checkpoint with `layers`, its optimizer and one micro-batch of `samples()`."""
    with layers_of(layers), model_parallel(ALONE, seed=0) as ranks:
        arch = read_architecture(model_dir)
        model = build_model(arch, replace(ALONE, recompute=recompute), precision, fp8=fp8)
        load_hf_weights(model[0], arch, model_dir)
        optimization = build_optimization(model, OptimizerConfig(lr=1e-3), precision, STEPS)
        yield Work(arch, ranks, optimization, collate(samples(), "token_mean", packed_padding(ALONE, fp8)))


@contextmanager
def layers_of(layers: Layers) -> Iterator[None]:
    """Choose the layer spec, where the machine would allow Transformer Engine's."""
    compat.prepare()
    chosen = compat.has_transformer_engine
    if layers == "native":
        compat.has_transformer_engine = lambda: False
    capabilities.cache_clear()
    try:
        yield
    finally:
        compat.has_transformer_engine = chosen
        capabilities.cache_clear()


def _oracle(model_dir: Path, objective: str) -> Outcome:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        model_dir, dtype=torch.float64, experts_implementation="eager"
    )
    log_probs, losses = [], []
    for sample in samples():
        rollout, score = sample.rollout, sample.score
        tokens = torch.from_numpy(np.concatenate([rollout.prompt_tokens, rollout.response_tokens])).long()
        all_log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        own = tokens[1:, None]
        log_probs.append(all_log_probs.gather(1, own)[:, 0])
        assert score is not None
        assert score.top_k is not None
        ids = torch.from_numpy(score.top_k.ids).long()
        others = all_log_probs.scatter(1, ids, -torch.inf).scatter(1, own, -torch.inf)
        top_k = TopKLogProbs(
            all_log_probs.gather(1, ids),
            others.logsumexp(-1),
            *(torch.from_numpy(x).double() for x in (score.top_k.log_probs, score.top_k.tail_log_probs)),
            counted=ids != own,
        )
        teacher = torch.from_numpy(score.log_probs).double()
        tokens_of = TokenLogProbs(log_probs[-1], teacher, None, top_k)
        losses.append(get_objective(objective).token_loss(tokens_of))
    joined = torch.cat(log_probs)
    torch.cat(losses).mean().backward()
    arch = read_architecture(model_dir)
    hf = {name: value.grad for name, value in model.named_parameters()}
    gradient = {
        item.megatron: merge_parts(item.split, [hf[name] for name in item.parts], arch.num_kv_heads).float()
        for item in tensor_maps(arch)
        if all(name in hf and hf[name] is not None for name in item.parts)
    }
    return Outcome(joined.detach(), gradient)
