from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gloo import RankError, run_ranks

from megatron_lopd.config import OptimizerConfig, Sampling
from megatron_lopd.data.batch_plan import BatchPlan
from megatron_lopd.data.dataset import TrainingData
from megatron_lopd.data.records import Rollout, Score, TopK
from megatron_lopd.data.schemas import ROLLOUTS, scores_kind
from megatron_lopd.objectives import TokenLogProbs
from megatron_lopd.training.preflight import Agreement, Preflight
from tests.shard_zoo import write_committed
from tests.training_zoo import VOCABULARY, hf_log_probs, make_root, train

pytestmark = pytest.mark.release

STEPS = 5
OPTIMIZER = OptimizerConfig(lr=3e-3, schedule="linear", warmup_steps=2, weight_decay=0.3, clip_grad=0.7)


def plain_loop(root: Path, normalization: str) -> tuple[list[float], list[float]]:
    """The same five SFT steps in transformers and torch alone: (losses, gradient norms)."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(root / "model", dtype=torch.float32)
    decayed = [p for p in model.parameters() if p.dim() > 1]
    spared = [p for p in model.parameters() if p.dim() == 1]
    adam = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": OPTIMIZER.weight_decay},
            {"params": spared, "weight_decay": 0.0},
        ],
        betas=(OPTIMIZER.beta1, OPTIMIZER.beta2),
        eps=OPTIMIZER.eps,
    )
    data = TrainingData(root / "data")
    plan = BatchPlan(len(data), 16, seed=0)
    losses, norms = [], []
    for step in range(STEPS):
        decay = 1 - (step - 2) / (STEPS - 2)
        rate = OPTIMIZER.lr * (step / 2 if step <= 2 else decay)
        adam.param_groups[0]["lr"] = adam.param_groups[1]["lr"] = rate
        rollouts = [data.sample(int(position)).rollout for position in plan.samples(step)]
        nlls = [-hf_log_probs(model, rollout.prompt_tokens, rollout.response_tokens) for rollout in rollouts]
        if normalization == "sequence_mean":
            loss = torch.stack([nll.mean() for nll in nlls]).mean()
        else:
            loss = torch.cat(nlls).mean()
        adam.zero_grad()
        loss.backward()
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), OPTIMIZER.clip_grad)))
        adam.step()
        losses.append(loss.item())
    return losses, norms


@pytest.mark.parametrize("normalization", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("tied", [True, False])
def test_five_sft_steps_are_those_of_a_plain_loop(tmp_path: Path, normalization: str, tied: bool) -> None:
    root = make_root(tmp_path, tied=tied)
    losses, norms = plain_loop(root, normalization)
    options = {"objective": "sft", "steps": STEPS, "loss_normalization": normalization}
    ((_, steps, _),) = run_ranks(1, _train, root, {"optimizer": OPTIMIZER, **options})
    assert norms[0] > OPTIMIZER.clip_grad, "the test must clip"
    # fp32 sums in another order (packed against one by one): 1e-6 seen; the project's bound is 1e-4.
    assert [step["loss"] for step in steps] == pytest.approx(losses, rel=1e-5)
    assert [step["grad_norm"] for step in steps] == pytest.approx(norms, rel=1e-5)


def test_metrics_of_a_first_step_on_rollouts_of_the_model_itself(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    ((progress, steps, _),) = run_ranks(1, _train, root, {"epochs": 1.0, "steps": None})
    assert progress.step == len(steps) == 3  # 40 samples in batches of 16, the last one filled up
    assert progress.samples == 48
    assert progress.tokens == sum(step["tokens"] for step in steps)
    first, data = steps[0], TrainingData(root / "data", root / "data")
    samples = [data.sample(int(position)) for position in BatchPlan(40, 16, 0).samples(0)]
    behaviour = np.concatenate([sample.rollout.log_probs for sample in samples])
    teacher = np.concatenate([sample.score.log_probs for sample in samples])
    # The kept log-probs are the starting model's, to fp32 rounding (1e-6 seen) of values up to about 10.
    assert first["advantage_mean"] == pytest.approx(float((teacher - behaviour).mean()), abs=1e-5)
    assert first["advantage_p95"] == pytest.approx(float(np.quantile(teacher - behaviour, 0.95)), abs=1e-5)
    assert first["drift_kl"] == pytest.approx(0, abs=1e-9)
    assert first["effective_sample_size"] == pytest.approx(1, abs=1e-9)
    assert first["response_tokens"] == len(behaviour)
    assert steps[-1]["drift_kl"] > 1e-6


@pytest.mark.slow
def test_preflight_passes_its_own_rollouts_and_refuses_shifted_ones(tmp_path: Path) -> None:
    root = make_root(tmp_path, temperature=0.7)
    # fp32 against fp32: anything above rounding is a mistake.
    options: dict[str, Any] = {"steps": 1, "preflight": Preflight(16, 1e-4, Sampling(temperature=0.7))}

    def rewrite(change: Callable[[Rollout], Rollout]) -> None:
        data = TrainingData(root / "data")
        changed = [change(data.sample(number).rollout) for number in range(len(data))]
        write_committed(root / "data", "rollouts-00000.arrow", ROLLOUTS, changed)

    run_ranks(1, _train, root, options)
    rewrite(lambda each: replace(each, untruncated_log_probs=np.roll(each.untruncated_log_probs, 1)))
    with pytest.raises(
        RankError, match=r"NumericsError: preflight: over 16 rollouts .* shifted by one token"
    ):
        run_ranks(1, _train, root, {"work": "shifted", **options})
    # An earlier release kept the log-probs of temperature 0.7 alone.
    rewrite(lambda each: replace(each, untruncated_log_probs=None))
    run_ranks(1, _train, root, {"work": "early", **options})
    with pytest.raises(RankError, match="preflight: over 16 rollouts"):
        run_ranks(1, _train, root, {"work": "wrong", **options, "preflight": Preflight(16, 1e-4, Sampling())})


def test_preflight_reports_percentiles_and_leaves_no_trace(tmp_path: Path) -> None:
    """Forward alone, without gradients."""
    root = make_root(tmp_path)
    ((_, plain),) = run_ranks(1, _watch_preflight, root, {"work": "none", "steps": 2})
    options = {"work": "checked", "steps": 2, "preflight": Preflight(16, 1e-4, Sampling())}
    ((calls, weights),) = run_ranks(1, _watch_preflight, root, options)
    assert calls == [(False, False)], "(gradients, training mode)"
    assert weights == plain

    difference = torch.cat([torch.zeros(990), torch.full((9,), 0.5), torch.tensor([2.0])])
    for drop, expected in ((0, 0.0), (1, 0.5)):
        tokens = TokenLogProbs(-difference[drop:], None, torch.zeros(1000 - drop))
        agreement = Agreement()
        assert agreement.metrics(tokens, agreement.token_loss(tokens)) == {"p99": expected, "max": 2.0}


def test_bad_jobs_are_refused_before_a_step(tmp_path: Path) -> None:
    root = make_root(tmp_path, samples=4)
    with pytest.raises(RankError, match="micro_batch_tokens=8: raise it to at least"):
        run_ranks(1, _train, root, {"micro_batch_tokens": 8})
    late = {"steps": None, "epochs": 0.1, "optimizer": OptimizerConfig(warmup_steps=6)}
    with pytest.raises(RankError, match=r"warmup_steps=6 is not below the run's"):
        run_ranks(1, _train, root, late)
    scores = [sample.score for sample in map(TrainingData(root / "data", root / "data").sample, range(4))]
    beyond = []
    for score in scores:
        likeliest = np.full((len(score.log_probs), 1), VOCABULARY, dtype=np.int32)
        top_k = TopK(likeliest, score.log_probs[:, None], score.log_probs)
        beyond.append(Score(score.sample_id, score.log_probs, top_k))
    write_committed(root / "data", "scores-00000.arrow", scores_kind(1), beyond)
    with pytest.raises(RankError, match=r"scores-00000\.arrow: sample sample-0 has token 67, .* of 67"):
        run_ranks(1, _train, root, {})


def test_utilisation_is_logged_where_the_peak_is_known(tmp_path: Path) -> None:
    (found,) = run_ranks(1, _on_a_known_gpu, make_root(tmp_path))
    assert len(found) == 2
    for mfu, expected in found:
        assert mfu == pytest.approx(expected, rel=1e-12)  # the same numbers, in fp64


def _on_a_known_gpu(root: Path) -> list[tuple[float, float]]:
    """(mfu of a step, and what it should be) as if this CPU had a peak of 1 GFLOP/s."""
    from megatron_lopd.families.architecture import read_architecture
    from megatron_lopd.families.flops import step_flops
    from megatron_lopd.training import loop

    loop.peak_flops = lambda gpu: 1e9
    train(root, "known", steps=2)
    arch, data = read_architecture(root / "model"), TrainingData(root / "data", root / "data")
    metrics, times = ((root / "known" / name).read_text() for name in ("metrics.jsonl", "times.jsonl"))
    found = []
    for number, lines in enumerate(zip(metrics.splitlines(), times.splitlines(), strict=True)):
        step = json.loads(lines[0]) | json.loads(lines[1])
        lengths = data.lengths[BatchPlan(40, 16, 0).samples(number)].tolist()
        flops = step_flops(arch, lengths, step["response_tokens"])
        found.append((step["mfu"], flops / step["seconds"] / 1e9))
    return found


def _watch_preflight(root: Path, options: dict[str, Any]) -> Any:
    """(whether gradients were on, whether the model was in training mode) of each pass, and the weights."""
    from megatron_lopd.training import preflight

    calls: list[tuple[bool, bool]] = []
    forward = preflight.run_micro_batches

    def watched(chunks: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append((torch.is_grad_enabled(), chunks[0].training))
        return forward(chunks, *args, **kwargs)

    preflight.run_micro_batches = watched
    return calls, train(root, **options)[2]


def _train(root: Path, options: dict[str, Any]) -> Any:
    result = train(root, **options)
    assert all(math.isfinite(step["loss"]) for step in result[1])
    return result
