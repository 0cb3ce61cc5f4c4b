"""Position and horizon weights, from samples to token weights; and the options that a recipe cannot have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.config import WeightsConfig, deciding, load_recipe
from megatron_lopd.data.collate import collate
from megatron_lopd.data.context_parallel import slice_micro_batch
from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Rollout, Sample, Score
from megatron_lopd.errors import ConfigError
from megatron_lopd.objectives import SampledReverseKl, TokenPlaces
from tests.unit.test_config_load import GOOD, write


def make_sample(number: int, response: int) -> Sample:
    rng = np.random.default_rng([number, response])
    tokens = np.arange(response, dtype=np.int32)
    behaviour, teacher = (-rng.exponential(2, response).astype(np.float32) for _ in range(2))
    rollout = Rollout(str(number), np.ones(3, dtype=np.int32), tokens, "stop", behaviour)
    return Sample(rollout, Score(str(number), teacher))


def expected_weights(sample: Sample, position: float, horizon: int | None) -> list[float]:
    """Token by token, as the docstring of Distillation has it."""
    assert sample.score is not None
    assert sample.rollout.log_probs is not None
    distances = [
        abs(float(a) - float(b))
        for a, b in zip(sample.score.log_probs, sample.rollout.log_probs, strict=True)
    ]
    weights = []
    for t in range(len(distances)):
        share = sum(distances[:t]) / sum(distances)
        counts = horizon is None or t < horizon
        weights.append((position - (position - 1) * share) * counts)
    return weights


@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=5),
    position=st.floats(1, 5),
    horizon=st.none() | st.integers(1, 25),
    size=st.sampled_from([1, 2, 4]),
)
def test_weights_are_of_the_whole_response_on_every_rank(
    lengths: list[int], position: float, horizon: int | None, size: int
) -> None:
    samples = [make_sample(number, length) for number, length in enumerate(lengths)]
    objective = SampledReverseKl(weights=WeightsConfig(position=position, horizon=horizon))
    whole = collate(samples, "sequence_mean", Padding(2 * size, 2 * size))
    parts = [slice_micro_batch(whole, size, rank) for rank in range(size)] if size > 1 else [whole]
    found: dict[tuple[int, int], float] = {}
    for part in parts:
        weights = objective.token_weights(TokenPlaces(part.response_position, part.prefix_discrepancy))
        keys = zip(part.sequence_index.tolist(), part.response_position.tolist(), strict=True)
        found |= dict(zip(keys, weights.tolist(), strict=True))
    for number, sample in enumerate(samples):
        expected = expected_weights(sample, position, horizon)
        # float32 weights up to 5.
        assert [found.pop((number, t)) for t in range(len(expected))] == pytest.approx(expected, abs=2e-6)
    assert not found


def test_a_teacher_that_agrees_throughout_leaves_every_prefix_as_good_as_the_first() -> None:
    sample = make_sample(0, 4)
    assert sample.rollout.log_probs is not None
    same = Sample(sample.rollout, Score("0", sample.rollout.log_probs))
    batch = collate([same], "sequence_mean", Padding())
    weights = SampledReverseKl(weights=WeightsConfig(position=1.5)).token_weights(
        TokenPlaces(batch.response_position, batch.prefix_discrepancy)
    )
    assert weights.tolist() == [1.5] * 4


def test_without_weights_nothing_is_multiplied_and_nothing_is_needed() -> None:
    weights = SampledReverseKl().token_weights(TokenPlaces(torch.arange(3), None))
    assert weights.tolist() == [1.0, 1.0, 1.0]


TOPK = ["score.top_k=64", "train.objective=topk_reverse_kl"]
FORWARD = ["score.top_k=64", "train.objective=topk_forward_kl"]
SAMPLED = ["train.objective=sampled_reverse_kl"]
EXTRAPOLATION = "train.sampled_reverse_kl.extrapolation"
CLIPPED = [*SAMPLED, "train.sampled_reverse_kl.importance=clipped"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.objective=topk_forward_kl", "score.top_k=0"],
            "train.objective=topk_forward_kl needs the teacher's top k: set score.top_k (to 64, say, or to 8",
        ),
        (
            [*CLIPPED, *TOPK],
            "train.sampled_reverse_kl has options of another objective than train.objective=topk_reverse_kl: "
            "drop it, or set train.objective=sampled_reverse_kl",
        ),
        ([*CLIPPED, "train.objective=fixed_negative"], "than train.objective=fixed_negative: drop it"),
        (
            [*CLIPPED, "train.sampled_reverse_kl.importance_clip=0"],
            "train.sampled_reverse_kl.importance_clip must be above 0, not 0",
        ),
        ([*CLIPPED, "rollout.sampling.temperature=0"], "set it to none, or the temperature above 0"),
        # Where keys of former versions are now.
        ([*SAMPLED, "train.importance=none"], "did you mean train.sampled_reverse_kl.importance?"),
        (["train.weights.extrapolation=1"], "did you mean train.sampled_reverse_kl.extrapolation?"),
        (["train.weights.entropy=1"], "did you mean train.topk_reverse_kl.entropy?"),
        (["score.engine.python=/x"], "did you mean score.engine.vllm.python?"),
        (["score.agreement.engine.tensor=2"], "did you mean score.agreement.engine.vllm.tensor?"),
        (["score.engine.parallel={tensor: 2}"], "did you mean score.engine.megatron.parallel?"),
        (["rollout.engine.micro_batch_tokens=9"], "did you mean rollout.engine.megatron.micro_batch_tokens?"),
        (
            [*SAMPLED, f"{EXTRAPOLATION}=1.2", "rollout.sampling.temperature=0.7"],
            "set rollout.sampling to temperature=1, top_p=1, top_k=0, or the extrapolation to 1",
        ),
        (
            [*SAMPLED, f"{EXTRAPOLATION}=1.2", "rollout.sampling.top_p=0.9"],
            "set rollout.sampling to temper",
        ),
        ([*SAMPLED, f"{EXTRAPOLATION}=0"], f"{EXTRAPOLATION} must be above 0, not 0"),
        ([*FORWARD, "train.topk_reverse_kl.entropy=1"], "or set train.objective=topk_reverse_kl"),
        (
            [*TOPK, "train.topk_reverse_kl.entropy=-1"],
            "train.topk_reverse_kl.entropy must be at least 0, not",
        ),
        (
            [*TOPK, "train.topk_reverse_kl.entropy=4.2"],
            "of at most 4.19 nats: lower it, or raise score.top_k",
        ),
        (["train.weights.position=0.5"], "train.weights.position must be at least 1, not 0.5"),
        (["train.weights.horizon=0"], "train.weights.horizon must be at least 1, not 0"),
        (["train.weights.postion=2"], "did you mean train.weights.position?"),
    ],
)
def test_options_that_cannot_be_say_what_to_set(tmp_path: Path, overrides: list[str], expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_recipe(write(tmp_path, GOOD), overrides)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_option_decides_a_run(tmp_path: Path) -> None:
    """And so is part of its identity: no checkpoint of another objective is gone on from."""
    path, seen = write(tmp_path, GOOD), []
    for overrides in (
        [],
        CLIPPED,
        [*CLIPPED, "train.sampled_reverse_kl.importance_clip=3"],
        ["train.weights.position=1.5", "train.weights.horizon=4"],
        [*SAMPLED, f"{EXTRAPOLATION}=1.25"],
        ["train.objective=fixed_negative"],
        [*TOPK, "train.topk_reverse_kl.entropy=1"],
        FORWARD,
    ):
        train = deciding(load_recipe(path, overrides).train)
        assert train not in seen
        seen.append(train)
