from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megatron_lopd.config import Sampling, TrainConfig, WeightsConfig
from megatron_lopd.engines.draw import truncated_log_probs
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.objectives import (
    FixedNegative,
    Objective,
    SampledReverseKl,
    Sft,
    TokenLogProbs,
    TokenPlaces,
    TopKForwardKl,
    TopKLogProbs,
    TopKReverseKl,
    drift,
    get_objective,
)
from megatron_lopd.objectives.advantages import quantiles
from megatron_lopd.objectives.sampled_reverse_kl import SampledReverseKlOptions
from megatron_lopd.objectives.topk_reverse_kl import TopKReverseKlOptions
from megatron_lopd.ops.log_probs import vocab_parallel_log_probs

# fp64 with a few additions each: 1e-12 leaves three digits above rounding.
FP64 = {"rtol": 1e-12, "atol": 1e-12}


def logits_and_tokens(
    seed: int = 0, rows: int = 7, vocabulary: int = 11
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator, requires_grad=True)
    return logits, torch.randint(vocabulary, (rows,), generator=generator)


def test_sampled_reverse_kl_has_the_closed_form_gradient() -> None:
    """With respect to the logits: A_t (p_v - 1[v = a_t])."""
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
    """p_v (c_v - D); and the same by autograd on the whole fp64 logits."""
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


@dataclass(frozen=True)
class Case:
    """Student and teacher over a whole small vocabulary, fp64; the events are K, a_t, and all else as one."""

    logits: torch.Tensor
    teacher: torch.Tensor  # log-probs [R, V]
    tokens: torch.Tensor
    k: int

    def given(self) -> TokenLogProbs:
        return top_k_tokens(self.logits, self.teacher, self.tokens, self.k)

    def events(self) -> list[list[list[int]]]:
        """Of each row, the tokens of each event; found without the code under test."""
        vocabulary, rows = self.logits.shape[1], []
        for log_probs, token in zip(self.teacher.tolist(), self.tokens.tolist(), strict=True):
            likeliest = sorted(range(vocabulary), key=lambda v: -log_probs[v])[: self.k]
            alone = sorted({*likeliest, token})
            rows.append([[v] for v in alone] + [[v for v in range(vocabulary) if v not in alone]])
        return rows

    def merged(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Of each row, the events' log-probs: (student's, differentiable; teacher's)."""
        student, pairs = self.logits.log_softmax(-1), []
        for row, events in enumerate(self.events()):
            p, q = (
                torch.stack([x[row, event].logsumexp(0) for event in events]) for x in (student, self.teacher)
            )
            pairs.append((p, q))
        return pairs


def kl(log_p: torch.Tensor, log_q: torch.Tensor) -> torch.Tensor:
    return (log_p.exp() * (log_p - log_q)).sum(-1)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Flat to peaked (log-probs down to some -150 nats), every k that leaves a tail."""
    rows, vocabulary = draw(st.integers(1, 6)), draw(st.integers(3, 13))
    logits, tokens = logits_and_tokens(draw(st.integers(0, 10_000)), rows, vocabulary)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    teacher = torch.randn(rows, vocabulary, dtype=torch.float64, generator=generator)
    logits = (logits.detach() * draw(st.floats(0.01, 25))).requires_grad_()
    teacher = (teacher * draw(st.floats(0.01, 25))).log_softmax(-1)
    return Case(logits, teacher, tokens, draw(st.integers(0, vocabulary - 2)))


def check(objective: Objective, case: Case, expected: torch.Tensor) -> torch.Tensor:
    """Loss and the gradient of the logits are `expected`'s by autograd; the gradient is returned."""
    loss = objective.token_loss(case.given())
    (gradient,) = torch.autograd.grad(loss.sum(), case.logits)
    (by_autograd,) = torch.autograd.grad(expected.sum(), case.logits, retain_graph=True)
    # fp64 with log-probs of up to some 150 nats and 13 terms.
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(gradient, by_autograd, rtol=1e-10, atol=1e-10)
    return gradient


@given(cases())
def test_topk_divergences_are_those_of_the_merged_distributions(case: Case) -> None:
    pairs = case.merged()
    reverse, forward = (torch.stack([kl(*pair[::step]) for pair in pairs]) for step in (1, -1))
    check(TopKReverseKl(), case, reverse)
    gradient = check(TopKForwardKl(), case, forward)

    p, q = case.logits.softmax(-1).detach(), case.teacher.exp()
    closed = p - q
    for row, events in enumerate(case.events()):
        tail = events[-1]
        closed[row, tail] = p[row, tail] * (1 - q[row, tail].sum() / p[row, tail].sum())
    # The tail's two sums cancel where the student's tail is tiny: relative to 1, as all terms are at most 1.
    torch.testing.assert_close(gradient, closed, rtol=1e-9, atol=1e-9)
    log_p = case.logits.log_softmax(-1)
    for loss, whole in ((reverse, kl(log_p, case.teacher)), (forward, kl(case.teacher, log_p))):
        assert (loss > -1e-12).all()
        assert (loss <= whole + 1e-10).all(), "merging outcomes cannot raise a divergence"


@given(cases(), st.floats(0, 2.5))
def test_forward_kl_is_added_where_the_teachers_entropy_is_high(case: Case, threshold: float) -> None:
    pairs = case.merged()
    entropies = [-(q.exp() * q).sum().item() for _, q in pairs]
    assume(all(abs(entropy - threshold) > 1e-9 for entropy in entropies))
    expected = [
        kl(p, q) + (kl(q, p) if entropy > threshold else 0)
        for (p, q), entropy in zip(pairs, entropies, strict=True)
    ]
    check(TopKReverseKl(TopKReverseKlOptions(entropy=threshold)), case, torch.stack(expected))
    whole = -(case.teacher.exp() * case.teacher).sum(-1)
    assert (torch.tensor(entropies, dtype=torch.float64) <= whole + 1e-10).all(), "a lower bound"


@given(cases(), st.floats(0.05, 20), st.floats(0.1, 3))
def test_sampled_loss_with_importance_and_extrapolation(case: Case, clip: float, factor: float) -> None:
    """w A (p_v - 1[v = a_t]) with both of the student's factors held constant."""
    generator = torch.Generator().manual_seed(len(case.tokens))
    behaviour = -torch.rand(len(case.tokens), dtype=torch.float64, generator=generator) * 6
    current = case.logits.log_softmax(-1).gather(1, case.tokens[:, None])[:, 0]
    teacher = case.teacher.gather(1, case.tokens[:, None])[:, 0]
    options = SampledReverseKlOptions("clipped", importance_clip=clip, extrapolation=factor)
    loss = SampledReverseKl(options).token_loss(TokenLogProbs(current, teacher, behaviour))
    (gradient,) = torch.autograd.grad(loss.sum(), case.logits, retain_graph=True)

    student = current.detach()
    advantage = factor * (teacher - behaviour) - (student - behaviour)
    advantage = advantage * (student - behaviour).exp().clamp(max=clip)
    one_hot = torch.nn.functional.one_hot(case.tokens, case.logits.shape[1]).double()
    # fp64, with weights up to 20 and advantages up to some 500 nats.
    slack = {"rtol": 1e-10, "atol": 1e-9}
    torch.testing.assert_close(loss.detach(), -advantage * student, **slack)
    closed = advantage[:, None] * (case.logits.softmax(-1).detach() - one_hot)
    torch.testing.assert_close(gradient, closed, **slack)


def test_options_left_alone_are_the_plain_objective_to_the_bit() -> None:
    logits, tokens = logits_and_tokens(seed=8)
    current = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0].float()
    given_tokens = TokenLogProbs(current, current.detach() * 0.7, current.detach() * 1.3)
    config = TrainConfig(steps=1, objective="sampled_reverse_kl")
    plain = -(given_tokens.teacher - current.detach()) * current
    loss = get_objective(config.objective, config).token_loss(given_tokens)
    assert torch.equal(loss, plain)


@given(cases())
def test_fixed_negative_knows_nothing_of_the_teacher(case: Case) -> None:
    current = case.logits.log_softmax(-1).gather(1, case.tokens[:, None])[:, 0]
    loss = FixedNegative().token_loss(TokenLogProbs(current, case.teacher[:, 0], current.detach()))
    (gradient,) = torch.autograd.grad(loss.sum(), case.logits, retain_graph=True)
    one_hot = torch.nn.functional.one_hot(case.tokens, case.logits.shape[1]).double()
    torch.testing.assert_close(gradient, one_hot - case.logits.softmax(-1).detach(), **FP64)


def test_topk_forward_kl_is_the_whole_divergence_when_the_tail_is_one_token() -> None:
    logits, _ = logits_and_tokens(seed=6)
    teacher = torch.randn(7, 11, dtype=torch.float64, generator=torch.Generator().manual_seed(7)).log_softmax(
        -1
    )
    loss = TopKForwardKl().token_loss(top_k_tokens(logits, teacher, teacher.argmax(-1), 10))
    torch.testing.assert_close(loss, kl(teacher, logits.log_softmax(-1)), **FP64)


@pytest.mark.parametrize("tail", [-80.0, -200.0, -1e30])
def test_a_teacher_tail_too_small_for_fp32_adds_nothing(tail: float) -> None:
    """exp(-200) is 0 in fp32: its term is 0, not NaN, and so is what it sends back."""
    student = torch.tensor([[1.0, 0.5, -1.0]]).log_softmax(-1).requires_grad_()
    teacher = torch.tensor([[0.25, 0.75]]).log()
    tokens = TokenLogProbs(
        student[:, 0],
        teacher[:, 0],
        student[:, 0].detach(),
        TopKLogProbs(
            student[:, 1:2],
            student[:, 2],
            teacher[:, 1:],
            torch.tensor([tail]),
            counted=torch.tensor([[True]]),
        ),
    )
    loss = TopKForwardKl().token_loss(tokens)
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    expected = kl(teacher, student[:, :2].detach())
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-6, atol=0)
    torch.testing.assert_close(gradient, torch.tensor([[-0.25, -0.75, 0.0]]), rtol=1e-6, atol=1e-30)
    undecided = TopKReverseKl(TopKReverseKlOptions(entropy=0.0)).token_loss(tokens)
    assert undecided.isfinite().all() or tail == -1e30  # where the reverse KL is 1e30 by itself


def test_topk_metrics_take_the_kl_from_the_loss_and_the_rest_from_the_token() -> None:
    tokens = TokenLogProbs(torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -2.5]), torch.tensor([-1.0, -2.0]))
    loss = torch.tensor([0.25, 0.5])
    values = TopKReverseKl().metrics(tokens, loss)
    assert set(values) == set(TopKReverseKl.metric_names)
    assert values["reverse_kl_top_k"] == 0.375  # exact in binary
    assert values.items() - {("reverse_kl_top_k", 0.375)} == SampledReverseKl().metrics(tokens, loss).items()


def test_metrics_of_known_numbers() -> None:
    current = torch.tensor([-1.0, -2.0, -3.0, -0.5])
    teacher = torch.tensor([-0.5, -2.5, -1.0, -0.5])
    tokens = TokenLogProbs(current, teacher, current.clone())
    values = SampledReverseKl().metrics(tokens, SampledReverseKl().token_loss(tokens))
    assert set(values) == set(SampledReverseKl.metric_names)
    assert values["reverse_kl_sampled"] == pytest.approx(-0.5)  # exact in binary: halves only
    assert values["advantage_mean"] == pytest.approx(0.5)
    assert values["advantage_p50"] == pytest.approx(0.25)
    assert values["drift_kl"] == 0.0
    assert values["effective_sample_size"] == pytest.approx(1.0, abs=1e-12)  # one exp of a log sum
    assert values["kept_mass"] == pytest.approx(1.0, abs=1e-12)


def test_every_distillation_objective_has_the_same_metrics() -> None:
    tokens = TokenLogProbs(torch.tensor([-1.0, -2.0]), torch.tensor([-0.5, -2.5]), torch.tensor([-1.5, -2.0]))
    loss = torch.tensor([0.25, 0.5])
    sampled = SampledReverseKl().metrics(tokens, loss)
    assert sampled["kept_mass"] == pytest.approx((math.exp(0.5) + 1) / 2)
    others = {
        FixedNegative(): {},
        TopKForwardKl(): {"forward_kl_top_k": 0.375},
        TopKReverseKl(TopKReverseKlOptions(entropy=1.0)): {},
    }
    for objective, own in others.items():
        assert objective.metrics(tokens, loss) == sampled | own
        assert set(objective.metric_names) == set(sampled | own)


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
    assert values["kept_mass"] == pytest.approx(1, abs=0.01)  # moved is nowhere that reference is not


def test_kept_mass_is_the_mass_left_on_what_was_sampled() -> None:
    """A quarter of the student's mass is on a token that pi_ref never draws; 0.005 is 5 standard errors."""
    reference = torch.tensor([0.6, 0.4, 0.0])
    moved = torch.tensor([0.4, 0.35, 0.25])
    drawn = torch.multinomial(
        reference, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
    )
    values = drift(TokenLogProbs(moved.log()[drawn], None, reference.log()[drawn]))
    assert values["kept_mass"] == pytest.approx(0.75, abs=0.005)


@pytest.mark.parametrize(
    ("temperature", "top_p", "top_k"),
    [(1, 0.9, 0), (1, 1, 20), (0.6, 0.95, 20), (0.6, 1, 0), (1.5, 1, 0), (1, 1, 0)],
)
def test_drift_is_from_the_model_that_sampled_and_not_from_its_sampler(
    temperature: float, top_p: float, top_k: int
) -> None:
    """150,000 tokens by Zipf's law: unmoved is unmoved, and lost mass is seen as such."""
    rank = torch.arange(1, 150_001, dtype=torch.float64)
    reference = (-rank.log()).log_softmax(0)
    sampler = truncated_log_probs(
        reference[None], Sampling(temperature=temperature, top_p=top_p, top_k=top_k)
    )[0]
    generator = torch.Generator().manual_seed(0)
    drawn = torch.multinomial(sampler.exp(), 200_000, replacement=True, generator=generator)

    def measured(student: torch.Tensor) -> dict[str, float]:
        return drift(TokenLogProbs(student[drawn], None, reference[drawn], sampled=sampler[drawn]))

    unmoved = {"drift_kl": 0, "effective_sample_size": 1, "kept_mass": 1}
    assert measured(reference) == pytest.approx(unmoved, abs=1e-12)  # sums of 200,000 in fp64

    # Every other token gives up four fifths of its probability, to tokens that pi_ref has not.
    moved = reference + math.log(0.2) * (rank % 2 == 0)
    found = measured(moved)
    covered = [torch.minimum(pi.exp(), 10 * sampler.exp()).sum() for pi in (moved, reference)]
    expected = (covered[0] / covered[1]).item()
    assert expected < 0.93, "the guard's default would stop this one"
    # A mean of 200,000 of at most 10, beside one that moves with it: the standard error is below 0.003.
    assert found["kept_mass"] == pytest.approx(expected, abs=0.012)
    assert found["drift_kl"] > 0.1
    assert found["effective_sample_size"] < 0.95


def test_importance_is_by_the_distribution_that_was_drawn_from() -> None:
    current, reference, drawn = (torch.tensor([value]).log() for value in (0.3, 0.2, 0.25))
    tokens = TokenLogProbs(current, torch.zeros(1), reference, sampled=drawn)
    clipped = SampledReverseKl(SampledReverseKlOptions("clipped"))
    plain = SampledReverseKl().token_loss(tokens)
    torch.testing.assert_close(clipped.token_loss(tokens), plain * 0.3 / 0.25)  # not by 0.3 / 0.2


def test_drift_survives_ratios_that_overflow() -> None:
    values = drift(TokenLogProbs(torch.zeros(4), None, torch.full((4,), -500.0)))
    assert values["effective_sample_size"] == pytest.approx(1.0, abs=1e-9)
    assert math.isfinite(values["drift_kl"])
    assert values["kept_mass"] == 10.0  # one such token in a thousand must not stand for the others


@given(st.lists(st.floats(-50, 50), min_size=1, max_size=40), st.floats(0, 1))
def test_quantiles_are_those_of_torch(values: list[float], probability: float) -> None:
    tensor = torch.tensor(values, dtype=torch.float64)
    expected = torch.quantile(tensor, torch.tensor(probability, dtype=torch.float64)).item()
    # Interpolating between values up to 50 in fp64 costs a few units of 1e-14.
    assert quantiles(tensor, (probability,)) == [pytest.approx(expected, abs=1e-12)]


def test_missing_log_probs_and_unknown_names_are_refused() -> None:
    current = torch.zeros(2)
    with pytest.raises(DataError, match="run the score stage"):
        SampledReverseKl().token_loss(TokenLogProbs(current, None, current))
    with pytest.raises(DataError, match="no behaviour log-probs"):
        SampledReverseKl().metrics(TokenLogProbs(current, current, None), current)
    for objective in (TopKReverseKl(), TopKForwardKl(), TopKReverseKl(TopKReverseKlOptions(entropy=1.0))):
        with pytest.raises(DataError, match=r"score\.top_k above 0"):
            objective.token_loss(TokenLogProbs(current, current, current))
    with pytest.raises(DataError, match="no behaviour log-probs"):
        SampledReverseKl(SampledReverseKlOptions("clipped")).token_loss(TokenLogProbs(current, current, None))
    with pytest.raises(DataError, match=r"train\.weights\.position needs"):
        SampledReverseKl(weights=WeightsConfig(position=2.0)).token_weights(
            TokenPlaces(torch.arange(2), None)
        )
    with pytest.raises(
        ConfigError, match=r"unknown objective 'reverse_kl' .*: use one of sampled_reverse_kl, topk"
    ):
        get_objective("reverse_kl")
