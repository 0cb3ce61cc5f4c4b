from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.mcore.log_probs import vocab_parallel_log_probs
from megatron_lopd.objectives import (
    SampledReverseKl,
    Sft,
    TokenLogProbs,
    TopKLogProbs,
    TopKReverseKl,
    _quantiles,
    drift,
    get_objective,
)

# fp64 with a few additions each: 1e-12 leaves three digits above rounding.
FP64 = {"rtol": 1e-12, "atol": 1e-12}


def logits_and_tokens(
    seed: int = 0, rows: int = 7, vocabulary: int = 11
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator, requires_grad=True)
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


def test_sampled_reverse_kl_has_the_closed_form_gradient() -> None:
    """DESIGN section 1: the gradient with respect to the logits is A_t (p_v - 1[v = a_t])."""
    logits, tokens = logits_and_tokens()
    teacher = -torch.rand(7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 5
    log_probs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    loss = SampledReverseKl().token_loss(TokenLogProbs(log_probs, teacher, None))
    loss.sum().backward()

    advantage = teacher - log_probs.detach()
    one_hot = torch.nn.functional.one_hot(tokens, logits.shape[1]).double()
    torch.testing.assert_close(
        logits.grad, advantage[:, None] * (logits.softmax(-1) - one_hot).detach(), **FP64
    )
    torch.testing.assert_close(loss.detach(), -advantage * log_probs.detach(), **FP64)


def test_on_policy_gradient_is_that_of_the_whole_reverse_kl() -> None:
    """E over a ~ pi_theta of the sampled gradient is the gradient of KL(pi_theta || pi_T)."""
    logits, _ = logits_and_tokens(seed=3, rows=1)
    teacher = torch.randn(1, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(4)).log_softmax(
        -1
    )
    log_p = logits.log_softmax(-1)
    (kl_gradient,) = torch.autograd.grad((log_p.exp() * (log_p - teacher)).sum(), logits, retain_graph=True)

    every_token = SampledReverseKl().token_loss(TokenLogProbs(log_p[0], teacher[0], None))
    (sampled,) = torch.autograd.grad((log_p[0].exp().detach() * every_token).sum(), logits)
    torch.testing.assert_close(sampled, kl_gradient, **FP64)


def test_sft_is_cross_entropy() -> None:
    logits, tokens = logits_and_tokens(seed=5)
    log_probs = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    loss = Sft().token_loss(TokenLogProbs(log_probs, None, None))
    torch.testing.assert_close(
        loss, torch.nn.functional.cross_entropy(logits, tokens, reduction="none"), **FP64
    )


def top_k_tokens(logits: torch.Tensor, teacher: torch.Tensor, tokens: torch.Tensor, k: int) -> TokenLogProbs:
    """What the trainer is given: the teacher's exact top k and tail, the student by our operation."""
    top = teacher.topk(k)
    outside = teacher.scatter(1, torch.cat([top.indices, tokens[:, None]], 1), float("-inf"))
    identity = torch.eye(logits.shape[1], dtype=logits.dtype)  # hidden states that are the logits
    student = vocab_parallel_log_probs(logits, identity, tokens, top.indices, vocab_size=logits.shape[1])
    return TokenLogProbs(
        student.log_probs,
        teacher.gather(1, tokens[:, None])[:, 0],
        student.log_probs.detach(),
        TopKLogProbs(
            student.top_k_log_probs,
            student.tail_log_probs,
            top.values,
            outside.logsumexp(-1),
            counted=top.indices != tokens[:, None],
        ),
    )


@given(st.integers(0, 10_000), st.integers(0, 9), st.floats(0.1, 8))
def test_topk_reverse_kl_has_the_closed_form_gradient(seed: int, k: int, sharpness: float) -> None:
    """DESIGN section 1: p_v (c_v - D); and the same by autograd on the whole fp64 logits."""
    logits, tokens = logits_and_tokens(seed)
    generator = torch.Generator().manual_seed(seed + 1)
    teacher = (torch.randn(7, 11, dtype=torch.float64, generator=generator) * sharpness).log_softmax(-1)
    loss = TopKReverseKl().token_loss(top_k_tokens(logits, teacher, tokens, k))
    (gradient,) = torch.autograd.grad(loss.sum(), logits)

    log_p = logits.log_softmax(-1)
    columns = torch.cat([teacher.topk(k).indices, tokens[:, None]], 1)
    chosen = torch.zeros_like(teacher, dtype=torch.bool).scatter(1, columns, True)
    p_tail, q_tail = (
        x.masked_fill(chosen, float("-inf")).logsumexp(-1, keepdim=True) for x in (log_p, teacher)
    )
    c = torch.where(chosen, log_p - teacher, p_tail - q_tail)
    expected = (log_p.exp() * c).sum(-1)  # the tail's tokens share one c, and add up to p_tail c
    (by_autograd,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
    # fp64 with log-probs of up to some 60 nats and 11 terms.
    slack = {"rtol": 1e-10, "atol": 1e-11}
    torch.testing.assert_close(loss, expected, **slack)
    torch.testing.assert_close(gradient, log_p.exp() * (c - expected[:, None]), **slack)
    torch.testing.assert_close(gradient, by_autograd, **slack)
    assert (loss > -1e-12).all()
    whole = (log_p.exp() * (log_p - teacher)).sum(-1)
    assert (loss <= whole + 1e-11).all(), "merging outcomes cannot raise a divergence"


def test_topk_reverse_kl_is_the_whole_divergence_when_the_tail_is_one_token() -> None:
    logits, _ = logits_and_tokens(seed=6)
    teacher = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).log_softmax(
        -1
    )
    log_p = logits.log_softmax(-1)
    likeliest = teacher.argmax(-1)  # one of the top k, and not to be counted twice
    loss = TopKReverseKl().token_loss(top_k_tokens(logits, teacher, likeliest, 10))
    torch.testing.assert_close(loss, (log_p.exp() * (log_p - teacher)).sum(-1), **FP64)


def test_topk_metrics_take_the_kl_from_the_loss_and_the_rest_from_the_token() -> None:
    tokens = TokenLogProbs(torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -2.5]), torch.tensor([-1.0, -2.0]))
    loss = torch.tensor([0.25, 0.5])
    values = TopKReverseKl().metrics(tokens, loss)
    assert set(values) == set(TopKReverseKl.metric_names)
    assert values["reverse_kl"] == 0.375  # exact in binary
    assert values.items() - {("reverse_kl", 0.375)} <= SampledReverseKl().metrics(tokens, loss).items()


def test_metrics_of_known_numbers() -> None:
    current = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    teacher = torch.tensor([-0.5, -2.5, -1.0, -0.5])
    tokens = TokenLogProbs(current, teacher, current.clone())
    values = SampledReverseKl().metrics(tokens, SampledReverseKl().token_loss(tokens))
    assert set(values) == set(SampledReverseKl.metric_names)
    assert values["reverse_kl"] == pytest.approx(-0.5)  # exact in binary: halves only
    assert values["advantage_mean"] == pytest.approx(0.5)
    assert values["advantage_p50"] == pytest.approx(0.25)
    assert values["drift_kl"] == 0.0
    assert values["effective_sample_size"] == pytest.approx(1.0, abs=1e-12)  # one exp of a log sum


def test_drift_kl_estimates_the_true_divergence() -> None:
    """200,000 draws of pi_ref: k3's standard error here is below 0.002, so 0.01 is five of them."""
    reference = torch.tensor([0.5, 0.3, 0.2])
    moved = torch.tensor([0.3, 0.3, 0.4])
    drawn = torch.multinomial(
        reference, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    values = drift(TokenLogProbs(moved.log()[drawn], None, reference.log()[drawn]))
    true_kl = (reference * (reference / moved).log()).sum().item()
    assert values["drift_kl"] == pytest.approx(true_kl, abs=0.01)
    true_fraction = 1 / (moved**2 / reference).sum().item()
    assert values["effective_sample_size"] == pytest.approx(true_fraction, abs=0.01)


def test_drift_survives_ratios_that_overflow() -> None:
    values = drift(TokenLogProbs(torch.zeros(4), None, torch.full((4,), -500.0)))
    assert values["effective_sample_size"] == pytest.approx(1.0, abs=1e-9)
    assert math.isfinite(values["drift_kl"])


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_those_of_torch(values: list[float], probability: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    expected = torch.quantile(tensor, torch.tensor(probability, dtype=torch.float64)).item()
    # Interpolating between values up to 50 in fp64 costs a few units of 1e-14.
    assert _quantiles(tensor, (probability,)) == [pytest.approx(expected, abs=1e-12)]


def test_missing_log_probs_and_unknown_names_are_refused() -> None:
    current = torch.zeros(2)
    with pytest.raises(DataError, match="run the score stage"):
        SampledReverseKl().token_loss(TokenLogProbs(current, None, current))
    with pytest.raises(DataError, match="no behaviour log-probs"):
        SampledReverseKl().metrics(TokenLogProbs(current, current, None), current)
    with pytest.raises(DataError, match=r"score\.top_k above 0"):
        TopKReverseKl().token_loss(TokenLogProbs(current, current, current))
    with pytest.raises(ConfigError, match="sampled_reverse_kl, sft, topk_reverse_kl"):
        get_objective("reverse_kl")
