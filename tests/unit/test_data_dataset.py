from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from megatron_lopd.data.dataset import TrainingData, shard_name
from megatron_lopd.data.packing import Padding
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS, SCORES
from megatron_lopd.data.shards import write_shard
from megatron_lopd.errors import DataError
from tests.shard_zoo import PLAN, commit_shards

LENGTHS = {"a": 3, "b": 1, "c": 2, "d": 5}


def write_rollouts(directory: Path, shards: Sequence[str]) -> None:
    for number, ids in enumerate(shards):
        records = [
            Rollout(
                sample_id=sample_id,
                prompt_tokens=np.arange(1, 3, dtype=np.int32),
                response_tokens=np.full(LENGTHS[sample_id], ord(sample_id), dtype=np.int32),
                finish_reason="stop",
                log_probs=None,
            )
            for sample_id in ids
        ]
        write_shard(directory / shard_name(ROLLOUTS, number), ROLLOUTS, records, PLAN)
    commit_shards(directory)


def write_scores(directory: Path, ids: str, longer_by: int = 0) -> None:
    records = [
        Score(sample_id, np.full(LENGTHS[sample_id] + longer_by, -ord(sample_id), dtype=np.float32))
        for sample_id in ids
    ]
    write_shard(directory / shard_name(SCORES, 0), SCORES, records, PLAN)
    commit_shards(directory)


def test_scores_are_joined_by_id_and_not_by_position(tmp_path: Path) -> None:
    write_rollouts(tmp_path, ["ab", "cd"])
    write_scores(tmp_path, "dbca")
    data = TrainingData(tmp_path, tmp_path)
    assert len(data) == 4
    assert list(data.sample_ids) == list("abcd")
    assert data.lengths.tolist() == [5, 3, 4, 7]
    for index, sample_id in enumerate("abcd"):
        sample = data.sample(index)
        assert sample.rollout.sample_id == sample_id
        assert sample.score is not None
        assert sample.score.log_probs.tolist() == [-ord(sample_id)] * LENGTHS[sample_id]
    data.require_within(7, Padding())
    with pytest.raises(DataError, match=r"rollouts-00001\.arrow: sample d has 7 tokens.*at least 7"):
        data.require_within(6, Padding())
    data.require_within(12, Padding(4, 12))
    with pytest.raises(DataError, match=r"sample d has 7 tokens, .* pads to 12, above .*=11: .* at least 12"):
        data.require_within(11, Padding(4, 12))
    data.require_positions(7)
    with pytest.raises(DataError, match=r"rollouts-00001\.arrow: sample d has 7 tokens, .* 6 positions"):
        data.require_positions(6)


def test_without_scores(tmp_path: Path) -> None:
    write_rollouts(tmp_path, ["a"])
    assert TrainingData(tmp_path).sample(0).score is None


@pytest.mark.parametrize(
    ("scored", "longer_by", "message"),
    [
        ("ab", 0, "sample c of the rollouts has no score"),
        ("abcd", 0, r"scores-00000\.arrow: sample d is scored but not in the rollouts"),
        ("abc", 1, r"scores-00000\.arrow: sample a has 4 scores for 3 response tokens"),
    ],
)
def test_scores_of_other_rollouts_are_refused(
    tmp_path: Path, scored: str, longer_by: int, message: str
) -> None:
    write_rollouts(tmp_path, ["ab", "c"])
    write_scores(tmp_path, scored, longer_by)
    with pytest.raises(DataError, match=message):
        TrainingData(tmp_path, tmp_path)


def test_rollouts_under_the_name_of_scores_are_refused(tmp_path: Path) -> None:
    write_rollouts(tmp_path, ["ab"])
    (tmp_path / shard_name(ROLLOUTS, 0)).rename(tmp_path / shard_name(SCORES, 0))
    write_rollouts(tmp_path, ["ab"])
    with pytest.raises(DataError, match=r"scores-00000\.arrow: not a scores shard"):
        TrainingData(tmp_path, tmp_path)


def test_missing_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a committed artifact"):
        TrainingData(tmp_path)
    commit_shards(tmp_path)
    with pytest.raises(DataError, match="no rollouts shards"):
        TrainingData(tmp_path)
    write_rollouts(tmp_path, ["a", "b", "c"])
    (tmp_path / shard_name(ROLLOUTS, 1)).unlink()
    with pytest.raises(DataError, match=r"rollouts-00001\.arrow: missing: the manifest lists it"):
        TrainingData(tmp_path)
    commit_shards(tmp_path)
    with pytest.raises(DataError, match=r"rollouts-00001\.arrow is missing"):
        TrainingData(tmp_path)
