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
CLIPPED = [*SAMPLED, "train.importance=clipped"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["train.objective=topk_forward_kl", "score.top_k=0"],
            "train.objective=topk_forward_kl needs the teacher's top k: set score.top_k (to 64, say) and run",
        ),
        ([*CLIPPED, *TOPK], "train.importance=clipped weighs the sampled token's loss"),
        (
            [*CLIPPED, "train.objective=fixed_negative"],
            "set train.importance=none, or train.objective=sampled",
        ),
        ([*CLIPPED, "train.importance_clip=0"], "train.importance_clip=0 must be above 0"),
        (
            [*CLIPPED, "rollout.sampling.temperature=0"],
            "set train.importance=none, or the temperature above 0",
        ),
        ([*TOPK, "train.weights.extrapolation=1.2"], "train.weights.extrapolation=1.2 needs pi_ref's"),
        (
            [*SAMPLED, "train.weights.extrapolation=1.2", "rollout.sampling.temperature=0.7"],
            "set rollout.sampling to temperature=1, top_p=1, top_k=0, or train.weights.extrapolation=1",
        ),
        (
            [*SAMPLED, "train.weights.extrapolation=1.2", "rollout.sampling.top_p=0.9"],
            "set rollout.sampling to temper",
        ),
        (["train.weights.extrapolation=0"], "train.weights.extrapolation=0 must be above 0"),
        ([*SAMPLED, "train.weights.entropy=1"], "leave it empty with train.objective=sampled_reverse_kl"),
        ([*FORWARD, "train.weights.entropy=1"], "or set train.objective=topk_reverse_kl"),
        ([*TOPK, "train.weights.entropy=-1"], "train.weights.entropy=-1.0 must be at least 0 nats"),
        ([*TOPK, "train.weights.entropy=4.2"], "of at most 4.19 nats: lower it, or raise score.top_k"),
        (["train.weights.position=0.5"], "train.weights.position=0.5 must be at least 1"),
        (["train.weights.horizon=0"], "train.weights.horizon=0 must be at least 1"),
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
        [*CLIPPED, "train.importance_clip=3"],
        ["train.weights.position=1.5", "train.weights.horizon=4"],
        [*SAMPLED, "train.weights.extrapolation=1.25"],
        ["train.objective=fixed_negative"],
        [*TOPK, "train.weights.entropy=1"],
        FORWARD,
    ):
        train = deciding(load_recipe(path, overrides).train)
        assert train not in seen
        seen.append(train)
