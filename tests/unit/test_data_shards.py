from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.data import shards
from megatron_lopd.data.columns import COMPAND_LIMIT, TOP_K_IDS, TOP_K_LOG_PROBS
from megatron_lopd.data.records import Rollout, Score, TopK
from megatron_lopd.data.schemas import ROLLOUTS, SCORES, kind_of, scores_kind
from megatron_lopd.data.shard_kind import RECORDS_PER_BATCH
from megatron_lopd.data.shards import ShardReader, write_shard
from megatron_lopd.errors import DataError


def rollout(
    index: int, prompt: int = 3, response: int = 4, sampled: bool = True, truncated: bool = False
) -> Rollout:
    rng = np.random.default_rng(index)
    return Rollout(
        sample_id=f"prompt-é{index}/0",
        prompt_tokens=rng.integers(0, 2**24, prompt, dtype=np.int32),
        response_tokens=rng.integers(0, 200_000, response, dtype=np.int32),
        finish_reason="stop" if index % 2 else "length",
        log_probs=-rng.exponential(size=response).astype(np.float32) if sampled else None,
        untruncated_log_probs=-rng.exponential(size=response).astype(np.float32) if truncated else None,
    )


def score(index: int, response: int, top_k: int, vocabulary: int = 151_936) -> Score:
    rng = np.random.default_rng(index)
    log_probs = -rng.exponential(3, (response, top_k + 2)).astype(np.float32)
    ids = rng.integers(0, vocabulary, (response, top_k), dtype=np.int32)
    likeliest = TopK(ids, log_probs[:, 2:].copy(), log_probs[:, 1].copy()) if top_k else None
    return Score(f"prompt-é{index}/0", log_probs[:, 0].copy(), likeliest)


def assert_same(left: Rollout, right: Rollout) -> None:
    assert (left.sample_id, left.finish_reason) == (right.sample_id, right.finish_reason)
    for name in ("prompt_tokens", "response_tokens", "log_probs", "untruncated_log_probs"):
        one, other = getattr(left, name), getattr(right, name)
        assert (one is None) == (other is None)
        if one is not None:
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.booleans()), min_size=1, max_size=30),
    num_shards=st.integers(1, 3),
)
def test_round_trip(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[int, int, bool]], num_shards: int
) -> None:
    directory = tmp_path_factory.mktemp("shards")
    records = [rollout(index, *shape) for index, shape in enumerate(shapes)]
    parts = [part for part in np.array_split(np.arange(len(records)), num_shards) if len(part)]
    paths = [directory / f"{number}.arrow" for number in range(len(parts))]
    for path, part in zip(paths, parts, strict=True):
        assert write_shard(path, ROLLOUTS, (records[index] for index in part)) == len(part)
    reader = ShardReader(ROLLOUTS, paths)
    assert list(reader.sample_ids) == [record.sample_id for record in records]
    assert reader.lengths("prompt_tokens").tolist() == [len(record.prompt_tokens) for record in records]
    for index in reversed(range(len(records))):
        assert reader.position(records[index].sample_id) == index
        assert_same(reader.record(index), records[index])
    with pytest.raises(IndexError):
        reader.record(len(records))


@given(
    top_k=st.integers(1, 9),
    lengths=st.lists(st.integers(1, 6), min_size=1, max_size=8),
    vocabulary=st.sampled_from([2, 1 << 16, 1 << 18, 1 << 20, 1 << 24]),
)
def test_top_k_round_trip(
    tmp_path_factory: pytest.TempPathFactory, top_k: int, lengths: list[int], vocabulary: int
) -> None:
    path = tmp_path_factory.mktemp("scores") / "s.arrow"
    records = [score(index, length, top_k, vocabulary) for index, length in enumerate(lengths)]
    records[0].top_k.ids[0, 0] = vocabulary - 1
    write_shard(path, scores_kind(top_k), records)
    # Two low bytes and as many bits as the largest id of a sample needs, and a byte to say how many.
    high_bits = {1 << 18: 2, 1 << 20: 4, 1 << 24: 8}.get(vocabulary, 0)
    count = lengths[0] * top_k
    assert len(TOP_K_IDS.encode(records[0].top_k.ids)) == 2 * count + -(-count * high_bits // 8) + 1
    reader = ShardReader(kind_of(path), [path])
    assert reader.lengths("log_probs").tolist() == lengths
    assert reader.max_token == max(int(record.top_k.ids.max()) for record in records)
    for index, expected in enumerate(records):
        read = reader.record(index)
        assert read.sample_id == expected.sample_id
        np.testing.assert_array_equal(read.log_probs, expected.log_probs)
        np.testing.assert_array_equal(read.top_k.tail_log_probs, expected.top_k.tail_log_probs)
        np.testing.assert_array_equal(read.top_k.ids, expected.top_k.ids)
        assert (read.top_k.ids.dtype, read.top_k.log_probs.dtype) == (np.int32, np.float32)
        error = np.abs(read.top_k.log_probs.astype(np.float64) - expected.top_k.log_probs)
        assert (error <= 8.9e-5 * (0.1 - expected.top_k.log_probs)).all()  # what columns.py states


def test_sixteen_bits_of_a_log_prob_are_within_the_stated_bound() -> None:
    # From below the finest step to the limit, with both ends.
    log_probs = -np.concatenate([[0.0], np.geomspace(1e-9, COMPAND_LIMIT, 500_000)]).astype(np.float32)
    encoded = np.frombuffer(TOP_K_LOG_PROBS.encode(log_probs), dtype=np.uint8)
    decoded = TOP_K_LOG_PROBS.decode(encoded)
    assert decoded.max() <= 0
    assert decoded[-1] == -COMPAND_LIMIT
    error = np.abs(decoded.astype(np.float64) - log_probs)
    assert (error <= 8.9e-5 * (0.1 - log_probs.astype(np.float64))).all()
    weighted = error * np.exp(log_probs.astype(np.float64))
    half = np.abs(log_probs.astype(np.float16).astype(np.float64) - log_probs)
    assert weighted.max() <= 3.6e-5 < 1.7e-4 < (half * np.exp(log_probs.astype(np.float64))).max()


def test_several_batches_in_a_shard_and_the_same_bytes_again(tmp_path: Path) -> None:
    records = [rollout(index) for index in range(2 * RECORDS_PER_BATCH + 7)]
    write_shard(tmp_path / "a.arrow", ROLLOUTS, records)
    write_shard(tmp_path / "b.arrow", ROLLOUTS, records)
    assert (tmp_path / "a.arrow").read_bytes() == (tmp_path / "b.arrow").read_bytes()
    for record, expected in zip(ShardReader(ROLLOUTS, [tmp_path / "a.arrow"]), records, strict=True):
        assert_same(record, expected)


def test_bytes_a_response_token(tmp_path: Path) -> None:
    """All that is on disk, at half the length that a reasoning model's answers have."""
    records = [rollout(index, prompt=150, response=800) for index in range(256)]
    scores = [score(index, 800, 64) for index in range(256)]
    write_shard(tmp_path / "r.arrow", ROLLOUTS, records)
    write_shard(tmp_path / "s.arrow", SCORES, (replace(each, top_k=None) for each in scores))
    write_shard(tmp_path / "k.arrow", scores_kind(64), scores[:32])
    size = {name: (tmp_path / f"{name}.arrow").stat().st_size for name in "rsk"}
    assert (size["r"] + size["s"]) / (256 * 800) <= 12
    assert size["r"] / (256 * 800) + size["k"] / (32 * 800) <= 300


def test_large_records_are_cut_into_batches_by_their_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shards, "BYTES_PER_BATCH", 5000)
    records = [rollout(index, response=400) for index in range(7)]  # 2.8 kB each
    write_shard(tmp_path / "r.arrow", ROLLOUTS, records)
    assert pa.ipc.open_file(tmp_path / "r.arrow").num_record_batches == 4
    for record, expected in zip(ShardReader(ROLLOUTS, [tmp_path / "r.arrow"]), records, strict=True):
        assert_same(record, expected)


BAD = {
    "nan": ({"log_probs": np.array([-1, np.nan, -1, -1], dtype=np.float32)}, "log-prob 1 of 4 is nan"),
    "inf": ({"log_probs": np.array([-np.inf, -1, -1, -1], dtype=np.float32)}, "log-prob 0 of 4 is -inf"),
    "positive": ({"log_probs": np.array([-1, -1, -1, 1e-7], dtype=np.float32)}, "log-prob 3 of 4"),
    "short": ({"log_probs": np.zeros(3, dtype=np.float32)}, "3 log-probs for 4 response tokens"),
    "float64": ({"log_probs": np.zeros(4)}, "float64, not float32"),
    "empty response": ({"response_tokens": np.empty(0, dtype=np.int32)}, "the response is empty"),
    "empty prompt": ({"prompt_tokens": np.empty(0, dtype=np.int32)}, "the prompt is empty"),
    "beyond 24 bits": ({"response_tokens": np.full(4, 1 << 24, np.int32)}, "response token 0 is 16777216"),
    "negative": (
        {"prompt_tokens": np.array([4, -1], dtype=np.int32)},
        "prompt token 1 is -1: ids must be from 0",
    ),
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


def with_top_k(ids: object = None, log_probs: object = None, tail: object = None) -> Score:
    good = score(1, 4, 3)
    changes = {"ids": ids, "log_probs": log_probs, "tail_log_probs": tail}
    return replace(good, top_k=replace(good.top_k, **{k: v for k, v in changes.items() if v is not None}))


TOP_K = np.full((4, 3), -1, dtype=np.float32)
BAD_SCORES = {
    "no top k": (replace(score(1, 4, 3), top_k=None), "there is no top k, and the shard's is 3"),
    "another k": (score(1, 4, 2), r"ids are \(4, 2\) .* = \(4, 3\)"),
    "lengths": (replace(score(1, 4, 3), log_probs=TOP_K[:2, 0].copy()), r"ids are \(4, 3\) .* = \(2, 3\)"),
    "tail length": (with_top_k(tail=TOP_K[:2, 0].copy()), "2 tail log-probs for 4 log-probs"),
    "tail": (with_top_k(tail=np.float32([-1, -np.inf, -1, -1])), "tail log-prob 1 of 4 is -inf"),
    "nan": (with_top_k(log_probs=TOP_K * np.nan), "top-k log-prob 0 of 12 is nan"),
    "positive": (with_top_k(log_probs=-TOP_K), "top-k log-prob 0 of 12 is 1.0"),
    "too low": (with_top_k(log_probs=TOP_K * 10001), "top-k log-prob 0 of 12 is -10001.0.*not below -10000"),
    "int64": (with_top_k(ids=np.zeros((4, 3), dtype=np.int64)), "top-k ids are int64, not int32"),
    "negative": (with_top_k(ids=np.full((4, 3), -1, dtype=np.int32)), "top-k id 0 is -1"),
}


@pytest.mark.parametrize("name", BAD_SCORES)
def test_a_bad_score_is_refused_on_write(tmp_path: Path, name: str) -> None:
    bad, message = BAD_SCORES[name]
    with pytest.raises(DataError, match=f"s.arrow: sample prompt-é1/0: .*{message}"):
        write_shard(tmp_path / "s.arrow", scores_kind(3), [score(0, 4, 3), bad])
    assert list(tmp_path.iterdir()) == []


def test_a_token_beyond_the_vocabulary_is_found_from_the_index(tmp_path: Path) -> None:
    ids = [[5], [7, 100], [99]]
    records = [
        replace(rollout(i), prompt_tokens=np.int32([1]), response_tokens=np.int32(each), log_probs=None)
        for i, each in enumerate(ids)
    ]
    write_shard(tmp_path / "r.arrow", ROLLOUTS, records)
    reader = ShardReader(ROLLOUTS, [tmp_path / "r.arrow"])
    reader.require_vocabulary(101)
    with pytest.raises(DataError, match=r"r\.arrow: sample prompt-é1/0 has token 100, beyond .* of 100"):
        reader.require_vocabulary(100)
    write_shard(tmp_path / "s.arrow", scores_kind(2), [score(0, 4, 2, 50), score(1, 4, 2, 9)])
    scores = ShardReader(scores_kind(2), [tmp_path / "s.arrow"])
    scores.require_vocabulary(50)
    with pytest.raises(DataError, match=r"s\.arrow: sample prompt-é0/0 has token \d+, beyond .* of 9"):
        scores.require_vocabulary(9)


def test_a_bad_record_that_got_into_a_file_is_refused_on_read(tmp_path: Path) -> None:
    trusting = replace(ROLLOUTS, problem=lambda record: None)
    bad = replace(rollout(1), log_probs=np.array([-1, np.nan, -1, -1], dtype=np.float32))
    write_shard(tmp_path / "r.arrow", trusting, [rollout(0), bad])
    reader = ShardReader(ROLLOUTS, [tmp_path / "r.arrow"])
    assert_same(reader.record(0), rollout(0))
    with pytest.raises(DataError, match=r"r.arrow: sample prompt-é1/0: log-prob 1 of 4 is nan"):
        reader.record(1)


def test_untruncated_log_probs_are_a_column_only_where_they_differ(tmp_path: Path) -> None:
    plain, truncated = rollout(0), rollout(1, truncated=True)
    for name, record in (("plain", plain), ("truncated", truncated)):
        write_shard(tmp_path / name, ROLLOUTS, [record])
    assert pa.ipc.open_file(tmp_path / "plain").schema == ROLLOUTS.schema
    reader = ShardReader(ROLLOUTS, [tmp_path / "plain", tmp_path / "truncated"])
    for record, expected in zip(reader, (plain, truncated), strict=True):
        assert_same(record, expected)
    assert reader.max_token == max(each.prompt_tokens.max() for each in (plain, truncated))
    write_shard(tmp_path / "mixed", ROLLOUTS, [truncated, plain])
    assert_same(ShardReader(ROLLOUTS, [tmp_path / "mixed"]).record(1), plain)
    with pytest.raises(DataError, match="sample prompt-é1/0 has untruncated_log_probs, and the first"):
        write_shard(tmp_path / "lost", ROLLOUTS, [plain, truncated])
    short = replace(truncated, untruncated_log_probs=np.zeros(1, dtype=np.float32))
    with pytest.raises(DataError, match="1 untruncated log-probs for 4 response tokens"):
        write_shard(tmp_path / "short", ROLLOUTS, [short])


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


def test_a_compressed_shard_is_refused_before_it_is_opened_out(tmp_path: Path) -> None:
    """A thousandth of what it would take, of a schema of ours."""
    kind, rows = ROLLOUTS, 2
    columns = {name: pa.array([0] * rows, kind.schema.field(name).type) for name in kind.columns}
    columns |= {name: pa.array(["a", "b"], pa.large_string()) for name in kind.text}
    columns |= {"xxh3_64": pa.array([0] * rows, pa.uint64())}
    columns |= {"values": pa.array([bytes(4 << 20)] * rows, pa.large_binary())}
    batch = pa.RecordBatch.from_arrays(
        [columns[name] for name in kind.schema.names], schema=kind.schema_of("")
    )
    path = tmp_path / "r.arrow"
    for codec in ("zstd", "lz4"):
        options = pa.ipc.IpcWriteOptions(compression=codec)
        with pa.ipc.new_file(path, batch.schema, options=options) as file:
            file.write_batch(batch)
        before = pa.total_allocated_bytes()
        with pytest.raises(DataError, match=r"r\.arrow: damaged .* compressed, as no shard is"):
            ShardReader(ROLLOUTS, [path])
        assert pa.total_allocated_bytes() == before


def test_shards_carry_the_plan_that_made_them(tmp_path: Path) -> None:
    paths = [tmp_path / "0.arrow", tmp_path / "1.arrow"]
    for number, path in enumerate(paths):
        write_shard(path, ROLLOUTS, [rollout(number)], "a" * 64)
    assert len(ShardReader(ROLLOUTS, paths, plan="a" * 64)) == 2
    write_shard(paths[1], ROLLOUTS, [rollout(1)], "b" * 64)
    with pytest.raises(DataError, match=r"1\.arrow: another plan made it \(b{12}; this stage's is a{12}\)"):
        ShardReader(ROLLOUTS, paths, plan="a" * 64)
    paths[1].write_bytes(paths[1].read_bytes().replace(b"b" * 64, b"a" * 64))
    with pytest.raises(DataError, match=r"1\.arrow: damaged: the index checksum"):
        ShardReader(ROLLOUTS, paths, plan="a" * 64)


def test_another_kind_or_version_is_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.arrow", SCORES, [Score("a", np.zeros(1, dtype=np.float32))])
    with pytest.raises(DataError, match=r"s\.arrow: not a rollouts shard of version 3"):
        ShardReader(ROLLOUTS, [tmp_path / "s.arrow"])
    with pytest.raises(DataError, match=r"s\.arrow: not a scores shard of version 4 with top_k 0"):
        ShardReader(replace(SCORES, version=4), [tmp_path / "s.arrow"])
    write_shard(tmp_path / "k.arrow", scores_kind(4), [score(0, 3, 4)])
    with pytest.raises(DataError, match=r"k\.arrow: not a scores shard of version 3 with top_k 0"):
        ShardReader(SCORES, [tmp_path / "s.arrow", tmp_path / "k.arrow"])
    (tmp_path / "other.arrow").write_bytes(b"text")
    with pytest.raises(DataError, match=r"other\.arrow: not a shard"):
        kind_of(tmp_path / "other.arrow")
