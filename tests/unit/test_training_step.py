"""topk_reverse_kl and weighted losses through the trainer, against transformers with the whole logits."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import run_ranks

from megatron_lopd.config import OptimizerConfig, ParallelConfig, TrainConfig, WeightsConfig
from megatron_lopd.data.collate import MicroBatch, collate
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Sample, Score, TopK
from megatron_lopd.objectives import SampledReverseKlOptions
from tests.interpreter import run_interpreted
from tests.training_zoo import VOCABULARY, hf_log_probs, make_root

K = 5


def samples(root: Path) -> list[tuple[Sample, torch.Tensor]]:
    """Six samples with a random teacher's scores, and the teacher's log-probs [T, V] of each."""
    data = TrainingData(root / "data", root / "data")
    generator = torch.Generator().manual_seed(0)
    scored = []
    for position in range(6):
        rollout = data.sample(position).rollout
        tokens = torch.from_numpy(rollout.response_tokens.astype(np.int64))[:, None]
        teacher = torch.randn(len(tokens), VOCABULARY, generator=generator).mul(3).log_softmax(-1)
        top = teacher.topk(K)
        tail = teacher.scatter(1, torch.cat([top.indices, tokens], 1), float("-inf")).logsumexp(-1)
        top_k = TopK(top.indices.int().numpy(), top.values.numpy(), tail.numpy())
        score = Score(rollout.sample_id, teacher.gather(1, tokens)[:, 0].numpy(), top_k)
        scored.append((Sample(rollout, score), teacher))
    return scored


def plain_loss(model: Any, sample: Sample, teacher: torch.Tensor) -> torch.Tensor:
    """The mean over the response of the KL with all tokens outside K and a_t taken as one."""
    prompt, response = sample.rollout.prompt_tokens, sample.rollout.response_tokens
    tokens = torch.from_numpy(np.concatenate([prompt, response]).astype(np.int64))
    student = model(tokens[None]).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    columns = torch.cat([teacher.topk(K).indices, tokens[len(prompt) :, None]], 1)
    chosen = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, columns, True)
    kl = (student.exp() * (student - teacher)).masked_fill(~chosen, 0).sum(-1)
    p_tail, q_tail = (x.masked_fill(chosen, float("-inf")).logsumexp(-1) for x in (student, teacher))
    return (kl + p_tail.exp() * (p_tail - q_tail)).mean()


def test_topk_loss_metrics_and_gradient_are_those_of_whole_logits(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    root = make_root(tmp_path)
    scored = samples(root)
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    each = torch.stack([plain_loss(model, *sample) for sample in scored])
    each.mean().backward()
    losses = each.tolist()

    plain = [sample for sample, _ in scored]
    batches = [collate(part, "sequence_mean", Padding(total=8)) for part in (plain[:4], [], plain[4:])]
    config = TrainConfig(steps=1, objective="topk_reverse_kl")
    ((measured, gradient),) = run_ranks(1, one_step, root / "model", batches, config)
    # fp32 in another order.
    assert measured["loss"] == pytest.approx(np.mean(losses), rel=1e-5)
    reference = model.get_input_embeddings().weight.grad
    torch.testing.assert_close(gradient[:VOCABULARY], reference, rtol=1e-4, atol=1e-6)
    lengths = [len(sample.rollout.response_tokens) for sample in plain]
    assert measured["reverse_kl_top_k"] == pytest.approx(np.average(losses, weights=lengths), rel=1e-5)


def test_data_without_top_k_is_refused(tmp_path: Path) -> None:
    root = make_root(tmp_path, samples=6)
    sample, _ = samples(root)[0]
    assert sample.score is not None
    batch = collate([replace(sample, score=replace(sample.score, top_k=None))], "sequence_mean", Padding())
    with pytest.raises(AssertionError, match=r"DataError: the top-k objectives need .* score\.top_k above 0"):
        run_ranks(1, one_step, root / "model", [batch], TrainConfig(steps=1, objective="topk_reverse_kl"))


def test_weights_reach_the_loss_and_the_gradient_and_not_the_metrics(tmp_path: Path) -> None:
    """Drawn at another temperature: only importance is of what was drawn from, all else of pi_ref itself."""
    from transformers import AutoModelForCausalLM

    root = make_root(tmp_path, temperature=0.8)
    plain = [sample for sample, _ in samples(root)]
    config = TrainConfig(
        steps=1,
        objective="sampled_reverse_kl",
        weights=WeightsConfig(position=3.0, horizon=4),
        options=SampledReverseKlOptions("clipped", 0.9, extrapolation=1.5),
    )
    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    each, reverse_kl = [], []
    for sample in plain:
        rollout, score = sample.rollout, sample.score
        current = hf_log_probs(model, rollout.prompt_tokens, rollout.response_tokens)
        assert score is not None
        teacher, behaviour = torch.tensor(score.log_probs), torch.tensor(rollout.untruncated_log_probs)
        distances, student = (teacher - behaviour).abs(), current.detach()
        advantage = 1.5 * (teacher - behaviour) - (student - behaviour)
        weight = 3 - 2 * (distances.cumsum(0) - distances) / distances.sum()
        weight *= (student - torch.tensor(rollout.log_probs)).exp().clamp(max=0.9)
        each.append((-advantage * weight * current)[:4].sum() / len(current))
        reverse_kl.append(student - teacher)
    loss = torch.stack(each).mean()
    loss.backward()

    batches = [collate(part, "sequence_mean", Padding(total=8)) for part in (plain[:4], plain[4:])]
    ((measured, gradient),) = run_ranks(1, one_step, root / "model", batches, config)
    # fp32 in another order.
    assert measured["loss"] == pytest.approx(loss.item(), rel=1e-5)
    reference = model.get_input_embeddings().weight.grad
    error = (gradient[:VOCABULARY] - reference).norm() / reference.norm()
    assert error < 1e-5  # of the whole: entries near 0 are differences of large terms
    assert measured["reverse_kl_sampled"] == pytest.approx(torch.cat(reverse_kl).mean().item(), rel=1e-5)
    assert measured["kept_mass"] == pytest.approx(1, abs=1e-5)


def test_a_forward_pass_alone_leaves_no_gradient(tmp_path: Path) -> None:
    """With gradients enabled, as the preflight's is in which FP8 finds its scales."""
    root = make_root(tmp_path, samples=6)
    batch = collate([sample for sample, _ in samples(root)], "sequence_mean", Padding(total=8))
    ((alone, after),) = run_interpreted(1, forward_then_both, root / "model", [batch])
    assert alone == 0
    assert after > 0


def forward_then_both(model_dir: Path, batches: list[MicroBatch]) -> list[float]:
    """In a rank: the norm of the embedding's gradient after a forward pass alone, and after a step."""
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore import compat
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.optimizer import build_optimization
    from megatron_lopd.mcore.process_groups import model_parallel
    from megatron_lopd.objectives import get_objective
    from megatron_lopd.training.step import run_micro_batches

    objective, norms = get_objective("sft"), []
    with model_parallel(ParallelConfig(), seed=0):
        (model,) = build_model(read_architecture(model_dir), ParallelConfig(), "fp32")
        chunks = build_optimization([model], OptimizerConfig(), "fp32", total_steps=1).chunks
        for forward_only in (True, False):
            run_micro_batches(chunks, objective, batches, 64, compat.device(), forward_only=forward_only)
            norms.append(model.embedding.word_embeddings.weight.main_grad.norm().item())
    return norms


def one_step(
    model_dir: Path, batches: list[MicroBatch], config: TrainConfig
) -> tuple[dict[str, float], torch.Tensor]:
    """In a rank: the step's metrics, and the gradient of the (tied) embedding."""
    from megatron_lopd.convert.load_model import load_hf_weights
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.mcore import compat
    from megatron_lopd.mcore.model import build_model
    from megatron_lopd.mcore.optimizer import build_optimization
    from megatron_lopd.mcore.process_groups import model_parallel
    from megatron_lopd.objectives import get_objective
    from megatron_lopd.training.metrics import Counts, summarize
    from megatron_lopd.training.step import run_micro_batches

    parallel, objective = ParallelConfig(), get_objective(config.objective, config)
    with model_parallel(parallel, seed=0) as ranks:
        arch = read_architecture(model_dir)
        (model,) = build_model(arch, parallel, "fp32")
        load_hf_weights(model, arch, model_dir)
        chunks = build_optimization([model], OptimizerConfig(), "fp32", total_steps=1).chunks
        parts = run_micro_batches(chunks, objective, batches, 64, compat.device())
        counts = Counts.of(batches, compat.device())
        measured = summarize(parts, counts, objective, ranks, compat.device())
        return measured, model.embedding.word_embeddings.weight.main_grad.clone()
