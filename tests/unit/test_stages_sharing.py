"""What ends a worker of a shared stage, and what does not."""

from __future__ import annotations

import functools
import multiprocessing as mp
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lopd.config import EngineConfig
from megatron_lopd.data.records import Score
from megatron_lopd.data.schemas import SCORES
from megatron_lopd.data.shards import write_shard
from megatron_lopd.errors import DataError, LopdError, StopRequested
from megatron_lopd.pipeline import workers as sharing
from megatron_lopd.pipeline.workers import Derived, Part, Work, make_parts
from megatron_lopd.runtime import claim_files
from megatron_lopd.runtime import claims as claims_module
from megatron_lopd.runtime.claim_files import CLAIMS, claim_path, remove_claims
from megatron_lopd.runtime.claims import Claims, commit_once, make_once

CONTEXT = mp.get_context("fork")


@pytest.mark.parametrize("error", [DataError("in the way of the others"), StopRequested("enough")])
def test_of_what_ends_the_work_on_a_lost_part_a_stop_alone_ends_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: LopdError
) -> None:
    """Asleep for longer than its lease it lost the part, and wakes up to be asked to stop, say."""
    monkeypatch.setattr(sharing, "open_engine", lambda *unused: FakeEngine())
    path = tmp_path / "shard.arrow"

    def write(*unused: Any) -> None:
        claim_path(tmp_path, path.name, 2).touch()  # taken over,
        path.touch()  # and made
        raise error

    work = Work("test", EngineConfig(), tmp_path, [Part(path, 1, write)])
    if isinstance(error, StopRequested):
        with pytest.raises(StopRequested):
            make_parts([work])
    else:
        make_parts([work])


@pytest.mark.parametrize("error", [TimeoutError("timed out"), OSError("stale handle")])
def test_what_an_engine_raises_within_a_shard_is_its_own_and_is_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: OSError
) -> None:
    monkeypatch.setattr(sharing, "open_engine", lambda *unused: FakeEngine())
    monkeypatch.setattr(sharing, "Claims", functools.partial(Claims, backoff=0.01))
    monkeypatch.setattr(claims_module, "POLL_SECONDS", 0.01)
    errors = [error]

    def scores() -> Iterator[Score]:
        yield Score("a", np.zeros(1, np.float32))
        if errors:
            raise errors.pop()

    def write(engine: Any, path: Path, count: Any) -> None:
        write_shard(path, SCORES, count(scores()))

    make_parts([Work("test", EngineConfig(), tmp_path, [Part(tmp_path / "shard.arrow", 1, write)])])
    assert f"shard.arrow: {error}: to be tried again" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir() if path.name != CLAIMS] == ["shard.arrow"]


def test_a_commit_ends_a_worker_that_waits_for_what_only_the_commit_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another has it at work, then has committed, and taken the claims away with all that is among them."""
    part = Derived(tmp_path / CLAIMS / "verdicts-0", tmp_path / "shard.arrow", lambda *unused: None)
    part.source.touch()
    other = Claims(tmp_path).take("verdicts-0")
    monkeypatch.setattr(sharing, "pause", lambda: remove_claims(tmp_path))
    make_parts([Work("test", None, tmp_path, [part])])
    assert other is not None
    assert other.is_lost()
    assert not (tmp_path / CLAIMS).exists()


def test_a_worker_looks_at_each_part_a_few_times_however_many_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharing, "open_engine", lambda *unused: FakeEngine())
    looks: list[Path] = []
    is_file = Path.is_file
    monkeypatch.setattr(Path, "is_file", lambda path: looks.append(path) or is_file(path))
    paths = [tmp_path / f"{number}.x" for number in range(200)]
    parts = [Part(path, 1, lambda engine, private, count: private.touch()) for path in paths]
    make_parts([Work("test", EngineConfig(), tmp_path, parts)])
    assert len(looks) <= 5 * len(parts)
    assert all(path.exists() for path in paths)


def test_whoever_comes_to_a_committed_artifact_makes_no_claims(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").touch()
    make_once(tmp_path / "manifest.json", lambda: pytest.fail("made again"))
    assert not (tmp_path / CLAIMS).exists()


def test_what_is_no_file_where_one_is_to_be_made_ends_in_a_line(tmp_path: Path) -> None:
    (tmp_path / "agreement.json").mkdir()
    with pytest.raises(DataError, match=r"agreement\.json: a directory, not a file"):
        make_once(tmp_path / "agreement.json", lambda: pytest.fail("made"))


def test_claims_that_go_while_they_are_made_are_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As pathlib says it: the directory was there, and then it is not."""

    def there_and_gone(path: Path, *unused: Any, **options: Any) -> None:
        raise FileExistsError(path)

    monkeypatch.setattr(Path, "mkdir", there_and_gone)
    claim_files.announce(tmp_path, {"a.x": 1})
    claims = Claims(tmp_path)
    assert claims.take("a.x") is None
    assert claims.is_over()


def test_workers_that_come_as_others_commit_end_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight at a time, again and again: claims are made, and go, at any two moments."""
    monkeypatch.setattr(claims_module, "POLL_SECONDS", 0.001)
    workers, rounds = 8, 40
    barrier = CONTEXT.Barrier(workers)

    def make(path: Path, *unused: Any) -> None:
        path.touch()

    def work() -> None:
        for number in range(rounds):
            directory = tmp_path / str(number)
            directory.mkdir(exist_ok=True)
            verdict = Derived(directory / CLAIMS / "verdicts-0", directory / "shard.arrow", make)
            (directory / "shard.arrow").touch()
            barrier.wait(timeout=60)
            make_parts([Work("test", None, tmp_path, [verdict])])
            manifest = directory / "manifest.json"
            commit_once(manifest, manifest.touch, functools.partial(remove_claims, directory))
        os._exit(0)

    processes = [CONTEXT.Process(target=work) for _ in range(workers)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * workers
    for number in range(rounds):
        left = sorted(path.name for path in (tmp_path / str(number)).iterdir())
        assert left == ["manifest.json", "shard.arrow"]


def test_what_a_killed_worker_left_beside_a_committed_artifact_is_cleared_by_the_next(tmp_path: Path) -> None:
    """Below it, beside nothing else: it was killed while it cleared, or came late and claimed anew."""
    (tmp_path / "manifest.json").touch()
    (tmp_path / "sft" / CLAIMS).mkdir(parents=True)
    (tmp_path / "sft" / CLAIMS / "verdicts-0").touch()
    commit_once(tmp_path / "manifest.json", lambda: pytest.fail("again"), lambda: remove_claims(tmp_path))
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["manifest.json", "sft"]


class FakeEngine:
    def close(self) -> None:
        pass
