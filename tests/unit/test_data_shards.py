from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.data.schemas import ROLLOUTS, SCORES
from megatron_lopd.data.shards import RECORDS_PER_BATCH, ShardReader, write_shard
from megatron_lopd.errors import DataError


def rollout(index: int, prompt: int = 3, response: int = 4, sampled: bool = True) -> Rollout:
    rng = np.random.default_rng(index)
    return Rollout(
        sample_id=f"prompt-é{index}/0",
        prompt_tokens=rng.integers(0, 2**31 - 1, prompt, dtype=np.int32),
        response_tokens=rng.integers(0, 200_000, response, dtype=np.int32),
        finish_reason="stop" if index % 2 else "length",
        log_probs=-rng.exponential(size=response).astype(np.float32) if sampled else None,
    )


def assert_same(left: Rollout, right: Rollout) -> None:
    assert (left.sample_id, left.finish_reason) == (right.sample_id, right.finish_reason)
    for name in ("prompt_tokens", "response_tokens", "log_probs"):
        one, other = getattr(left, name), getattr(right, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.booleans()), min_size=1, max_size=30),
    shards=st.integers(1, 3),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, bool]], shards: int
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    records = [rollout(index, *shape) for index, shape in enumerate(shapes)]
    parts = [part for part in np.array_split(np.arange(len(records)), shards) if len(part)]
    paths = [directory / f"{number}.arrow" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        assert write_shard(path, ROLLOUTS, (records[index] for index in part)) == len(part)
    reader = ShardReader(ROLLOUTS, paths)
    assert reader.sample_ids == [record.sample_id for record in records]
    assert reader.lengths("prompt_tokens").tolist() == [len(record.prompt_tokens) for record in records]
    for index in reversed(range(len(records))):
        assert reader.position(records[index].sample_id) == index
        assert_same(reader.record(index), records[index])
    with pytest.raises(IndexError):
        reader.record(len(records))


def test_several_batches_in_a_shard_and_the_same_bytes_again(tmp_path: Path) -> None:
    records = [rollout(index) for index in range(2 * RECORDS_PER_BATCH + 7)]
    write_shard(tmp_path / "a.arrow", ROLLOUTS, records)
    write_shard(tmp_path / "b.arrow", ROLLOUTS, records)
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()
    for record, expected in zip(ShardReader(ROLLOUTS, [tmp_path / "a.arrow"]), records, strict=True):
        assert_same(record, expected)


def test_bytes_a_response_token(tmp_path: Path) -> None:
    records = [rollout(index, prompt=50, response=400) for index in range(RECORDS_PER_BATCH)]
    write_shard(tmp_path / "r.arrow", ROLLOUTS, records)
    write_shard(tmp_path / "s.arrow", SCORES, (Score(r.sample_id, r.log_probs) for r in records))
    total = sum((tmp_path / name).stat().st_size for name in ("r.arrow", "s.arrow"))
    # 12 bytes for each response token and 4 for each prompt token; what a record costs beside them
    # (ids, offsets, finish reason, twice) is bounded apart, for it does not grow with the response.
    assert total - len(records) * (400 * 12 + 50 * 4) <= 128 * len(records)


BAD = {
    "nan": ({"log_probs": np.array([-1, np.nan, -1, -1], dtype=np.float32)}, "log-prob 1 of 4 is nan"),
    "inf": ({"log_probs": np.array([-np.inf, -1, -1, -1], dtype=np.float32)}, "log-prob 0 of 4 is -inf"),
    "positive": ({"log_probs": np.array([-1, -1, -1, 1e-7], dtype=np.float32)}, "log-prob 3 of 4"),
    "short": ({"log_probs": np.zeros(3, dtype=np.float32)}, "3 log-probs for 4 response tokens"),
    "float64": ({"log_probs": np.zeros(4)}, "float64, not float32"),
    "empty response": ({"response_tokens": np.empty(0, dtype=np.int32)}, "the response is empty"),
    "empty prompt": ({"prompt_tokens": np.empty(0, dtype=np.int32)}, "the prompt is empty"),
    "negative": ({"prompt_tokens": np.array([4, -1], dtype=np.int32)}, "prompt token 1 is -1"),
    "int64": ({"response_tokens": np.arange(4)}, "int64, not int32"),
    "finish reason": ({"finish_reason": "eos"}, "finish_reason is 'eos'"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_refused_on_write_and_leaves_no_file(tmp_path: Path, name: str) -> None:
    changes, message = BAD[name]
    records = [rollout(0), replace(rollout(1), **changes)]
    with pytest.raises(DataError, match=f"r.arrow: sample prompt-é1/0: .*{message}"):
        write_shard(tmp_path / "r.arrow", ROLLOUTS, records)
    assert list(tmp_path.iterdir()) == []


def test_a_bad_record_that_got_into_a_file_is_refused_on_read(tmp_path: Path) -> None:
    trusting = replace(ROLLOUTS, problem=lambda record: None)
    bad = replace(rollout(1), log_probs=np.array([-1, np.nan, -1, -1], dtype=np.float32))
    write_shard(tmp_path / "r.arrow", trusting, [rollout(0), bad])
    reader = ShardReader(ROLLOUTS, [tmp_path / "r.arrow"])
    assert_same(reader.record(0), rollout(0))
    with pytest.raises(DataError, match=r"r.arrow: sample prompt-é1/0: log-prob 1 of 4 is nan"):
        reader.record(1)


def test_repeated_and_absent_samples(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"r\.arrow: sample prompt-é1/0 is given twice"):
        write_shard(tmp_path / "r.arrow", ROLLOUTS, [rollout(1), rollout(1)])
    with pytest.raises(DataError, match="no rollouts to write"):
        write_shard(tmp_path / "r.arrow", ROLLOUTS, [])
    paths = [tmp_path / "0.arrow", tmp_path / "1.arrow"]
    for path in paths:
        write_shard(path, ROLLOUTS, [rollout(1)])
    with pytest.raises(DataError, match=r"1\.arrow: sample prompt-é1/0 is there twice"):
        ShardReader(ROLLOUTS, paths)
    with pytest.raises(DataError, match="sample prompt-7/0 is not among"):
        ShardReader(ROLLOUTS, paths[:1]).position("prompt-7/0")


def test_another_kind_or_version_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.arrow", SCORES, [Score("a", np.zeros(1, dtype=np.float32))])
    with pytest.raises(DataError, match=r"s\.arrow: not a rollouts shard of version 1"):
        ShardReader(ROLLOUTS, [tmp_path / "s.arrow"])
    with pytest.raises(DataError, match=r"s\.arrow: not a scores shard of version 2"):
        ShardReader(replace(SCORES, version=2), [tmp_path / "s.arrow"])
