"""What a damaged disk, a full one and a kill do to a shard."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lopd.data import shards
from megatron_lopd.data.records import Rollout, Score, TopK
from megatron_lopd.data.schemas import ROLLOUTS, SCORES, kind_of, scores_kind
from megatron_lopd.data.shard_kind import ShardKind
from megatron_lopd.data.shards import ShardReader, write_shard
from megatron_lopd.errors import DataError

RECORDS = [
    Rollout(
        sample_id=f"sample-{index}",
        prompt_tokens=np.arange(index + 1, dtype=np.int32),
        response_tokens=np.arange(index + 2, dtype=np.int32),
        finish_reason="stop",
        log_probs=-np.arange(index + 2, dtype=np.float32),
    )
    for index in range(5)
]


TOP_K = [
    Score(
        f"sample-{index}",
        -np.arange(index + 2, dtype=np.float32),
        TopK(
            np.arange(3 * (index + 2), dtype=np.int32).reshape(-1, 3) << 13,
            -np.arange(3 * (index + 2), dtype=np.float32).reshape(-1, 3) / 7,
            -np.arange(index + 2, dtype=np.float32) / 3,
        ),
    )
    for index in range(3)
]


def contents(path: Path) -> list[str]:
    """The records in full, as text."""
    with np.printoptions(threshold=sys.maxsize, floatmode="unique"):
        return [repr(record) for record in ShardReader(kind_of(path), [path])]


@pytest.mark.parametrize(
    ("kind", "records", "mask"),
    [
        (ROLLOUTS, RECORDS, 0xFF),
        *(pytest.param(ROLLOUTS, RECORDS, mask, marks=pytest.mark.nightly) for mask in (0x01, 0x02, 0x10)),
        (scores_kind(3), TOP_K, 0x01),
    ],
)
def test_no_flipped_byte_changes_what_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: ShardKind[Any], records: list[Any], mask: int
) -> None:
    """Every byte of a shard, one at a time: either the record comes back as it was, or an error does."""
    good, bad = tmp_path / "good.arrow", tmp_path / "bad.arrow"
    monkeypatch.setattr(shards, "RECORDS_PER_BATCH", 2)  # several batches: one can go missing
    write_shard(good, kind, records)
    expected, original = contents(good), good.read_bytes()
    refused = 0
    for position in range(len(original)):
        damaged = bytearray(original)
        damaged[position] ^= mask
        # A new file each time: overwriting one that is still mapped would change it under the reader.
        bad.unlink(missing_ok=True)
        bad.write_bytes(damaged)
        try:
            assert contents(bad) == expected, f"byte {position} was flipped unnoticed"
        except DataError as error:
            assert str(bad) in str(error)  # noqa: PT017 (most flips raise, those in padding do not)
            refused += 1
    # Padding, alignment and Arrow's own redundant metadata are all that may change unnoticed.
    assert refused > len(original) / 2


def test_a_flipped_log_prob_names_the_file_and_the_samples(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    marker = np.float32(-0.12345)
    write_shard(path, SCORES, [Score(name, np.array([marker], dtype=np.float32)) for name in ("a", "b")])
    damaged = bytearray(path.read_bytes())
    damaged[damaged.index(marker.tobytes())] ^= 1
    path.write_bytes(damaged)
    reader = ShardReader(SCORES, [path])
    with pytest.raises(DataError, match=r"s\.arrow: damaged: the checksum of sample a does"):
        reader.record(0)


@pytest.mark.parametrize("keep", [0.0, 0.3, 0.6, 0.9, 0.999])
def test_a_truncated_file_is_refused(tmp_path: Path, keep: float) -> None:
    path = tmp_path / "r.arrow"
    write_shard(path, ROLLOUTS, RECORDS)
    data = path.read_bytes()
    path.write_bytes(data[: int(keep * len(data))])
    with pytest.raises(DataError, match=r"r\.arrow: damaged or truncated"):
        ShardReader(ROLLOUTS, [path])


def test_a_full_disk_is_one_clear_line_and_leaves_nothing(tmp_path: Path) -> None:
    """A limit on the size of a file fails a write half-way, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1500, before[1]))
        with pytest.raises(DataError, match=r"r\.arrow: cannot be written: File too large") as caught:
            write_shard(tmp_path / "r.arrow", ROLLOUTS, RECORDS)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


WRITER = """
import sys, time
from pathlib import Path
import numpy as np
from megatron_lopd.data import shards
from megatron_lopd.data.records import Score
from megatron_lopd.data.schemas import SCORES
from megatron_lopd.data.shards import write_shard
def records():
    for index in range(5000):
        yield Score(str(index), np.zeros(3, dtype=np.float32))
    print("half", flush=True)
    time.sleep(60)
write_shard(Path(sys.argv[1]), SCORES, records())
"""


def test_a_kill_in_the_middle_leaves_no_shard(tmp_path: Path) -> None:
    path = tmp_path / "s.arrow"
    command = [sys.executable, "-c", WRITER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "half\n"
        os.kill(process.pid, signal.SIGKILL)
    assert not path.exists()
    records = [Score(str(index), np.zeros(3, dtype=np.float32)) for index in range(10)]
    write_shard(path, SCORES, records)
    assert len(ShardReader(SCORES, [path])) == 10
