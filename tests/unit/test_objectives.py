from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.objectives import SampledReverseKl, Sft, TokenLogProbs, _quantiles, drift, get_objective

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


def test_metrics_of_known_numbers() -> None:
    current = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    teacher = torch.tensor([-0.5, -2.5, -1.0, -0.5])
    values = SampledReverseKl().metrics(TokenLogProbs(current, teacher, current.clone()))
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
        SampledReverseKl().metrics(TokenLogProbs(current, current, None))
    with pytest.raises(ConfigError, match="sampled_reverse_kl, sft"):
        get_objective("reverse_kl")
