"""Claims: one owner at a time, taken from the dead and never from the living, whatever the clocks say."""

from __future__ import annotations

import ctypes
import multiprocessing as mp
import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.artifacts.digest_cache import SESSION_VARIABLE, session
from megatron_lopd.errors import DataError
from megatron_lopd.runtime import claim_files
from megatron_lopd.runtime import claims as claims_module
from megatron_lopd.runtime.claim_files import (
    CLAIMS,
    PARTS,
    ClaimState,
    announce,
    announced,
    claim_path,
    read_claims,
    remove_claims,
)
from megatron_lopd.runtime.claims import ATTEMPTS, BEATS_A_LEASE, LEASE_SECONDS, ClaimLost, Claims, PartFailed
from megatron_lopd.runtime.owner import Owner

CONTEXT = mp.get_context("fork")
LEASE = 0.6
ELSEWHERE = replace(Owner.here(), host="another-node")


@pytest.fixture
def renamed() -> Iterator[None]:
    """This process has a name that is no UTF-8, as a script's is that Linux cuts within a letter."""
    prctl, set_name, before = ctypes.CDLL(None).prctl, 15, Path("/proc/self/comm").read_bytes().strip()
    prctl(set_name, b"entra\xc3\xaenement-\xc3")
    yield
    prctl(set_name, before)


def test_a_process_may_have_any_name(renamed: None, monkeypatch: pytest.MonkeyPatch) -> None:
    assert Owner.here().is_here(Owner.here())
    monkeypatch.setenv(SESSION_VARIABLE, "")
    assert session().startswith(f"{os.getpid()}.")


def test_of_many_that_try_at_once_one_gets_each_part(tmp_path: Path) -> None:
    workers, parts = 8, 40
    barrier, results = CONTEXT.Barrier(workers), CONTEXT.Queue()

    class Simultaneous(Claims):
        """Makes its claim when all have found the part free."""

        def _create(self, state: ClaimState) -> bool:
            barrier.wait()
            return super()._create(state)

    def work() -> None:
        mine, kept = Simultaneous(tmp_path), []
        for part in range(parts):
            barrier.wait()
            claim = mine.take(f"p-{part}.x")
            if claim is not None:
                kept.append((part, claim))
        results.put([part for part, _ in kept])
        barrier.wait()

    processes = [CONTEXT.Process(target=work) for _ in range(workers)]
    for process in processes:
        process.start()
    taken = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join()
    assert sorted(part for each in taken for part in each) == list(range(parts))


def test_a_dead_process_loses_its_part_at_once_and_a_live_one_does_not(tmp_path: Path) -> None:
    pid = _elsewhere(tmp_path, lambda claim: time.sleep(60))
    assert Claims(tmp_path).take("a.x") is None
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    claim = Claims(tmp_path).take("a.x")
    assert claim is not None
    assert [state.owner.pid for state in read_claims(tmp_path)["a.x"]] == [pid, os.getpid()]


def test_a_process_that_got_the_pid_of_a_dead_one_is_not_it(tmp_path: Path) -> None:
    owner = replace(Owner.here(), started=1)
    _write(tmp_path, ClaimState("a.x", 1, owner))
    assert Claims(tmp_path).take("a.x") is not None


@pytest.mark.parametrize("skew", [-1e6, 1e6])
def test_a_worker_of_another_machine_is_judged_by_its_heartbeat_not_by_its_clock(
    tmp_path: Path, skew: float
) -> None:
    """Its files carry times from a clock that is days off, either way."""
    watcher = Claims(tmp_path, lease=LEASE)
    began = time.monotonic()
    beat = 0
    while time.monotonic() - began < 3 * LEASE:
        beat += 1
        _write(tmp_path, ClaimState("a.x", 1, ELSEWHERE, beat=beat))
        os.utime(claim_path(tmp_path, "a.x", 1), (time.time() + skew, time.time() + skew))
        assert watcher.take("a.x") is None, "a live one never"
        time.sleep(LEASE / 6)
    silent = time.monotonic()
    while (claim := watcher.take("a.x")) is None:
        time.sleep(0.02)
    assert claim is not None
    assert time.monotonic() - silent > LEASE / 2, "not before it was silent for long"
    assert Claims(tmp_path, lease=LEASE).take("a.x") is None, "of two that watched, one"


def test_one_that_was_only_asleep_learns_that_it_lost(tmp_path: Path) -> None:
    answers = CONTEXT.Queue()

    def work(claim: Any) -> None:
        while not claim.is_lost():
            time.sleep(0.02)
        with claim:
            answers.put("lost")
        time.sleep(60)

    pid = _elsewhere(tmp_path, work)
    os.kill(pid, signal.SIGSTOP)
    try:
        watcher = Claims(tmp_path, lease=LEASE)
        while (claim := watcher.take("a.x")) is None:
            time.sleep(0.02)
        assert not claim.is_lost()
    finally:
        os.kill(pid, signal.SIGCONT)
    assert answers.get(timeout=10) == "lost"
    assert not claim.is_lost(), "what it said on waking up was of its own claim"
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_part_that_fails_waits_longer_each_time_and_then_fails_for_good(tmp_path: Path) -> None:
    claims = Claims(tmp_path, backoff=0.2)
    waits = []
    for number in range(ATTEMPTS):
        began = time.monotonic()
        while (claim := claims.take("a.x")) is None:
            time.sleep(0.01)
        waits.append(time.monotonic() - began)
        with claim:
            claim.fail(f"no luck {number}")
    # From below alone: a busy machine makes any wait longer.
    assert waits[1] >= 0.2
    assert waits[2] >= 0.4
    with pytest.raises(PartFailed, match=r"a\.x: failed 3 times, the last on .* \(pid \d+\): no luck 2"):
        claims.take("a.x")
    assert Claims(tmp_path).take("a.x") is not None, "started again, it begins anew"


def test_what_is_given_back_is_free_and_deaths_are_no_failures(tmp_path: Path) -> None:
    for _ in range(ATTEMPTS + 2):
        _write(
            tmp_path,
            ClaimState(
                "a.x", len(read_claims(tmp_path).get("a.x", [])) + 1, replace(Owner.here(), started=1)
            ),
        )
    for _ in range(2):
        claim = Claims(tmp_path).take("a.x")
        assert claim is not None
        with claim:
            assert Claims(tmp_path).take("a.x") is None
    remove_claims(tmp_path)
    assert claim.is_lost(), "the artifact is committed: nothing more to publish"
    assert Claims(tmp_path).take("a.x") is not None


def test_what_makes_no_progress_is_given_up_and_what_does_is_not(tmp_path: Path) -> None:
    """Its heartbeat goes on: the process is there."""
    said: list[str] = []
    claims = Claims(tmp_path, lease=LEASE, backoff=0, patience=LEASE, hung=said.append)
    moving, stuck = claims.take("moves.x"), claims.take("stuck.x")
    assert moving is not None
    assert stuck is not None
    with moving, stuck:
        while not said:
            moving.progress(1, 2, 0.0, 0.0)
            time.sleep(0.01)
        assert read_claims(tmp_path)["stuck.x"][-1].status == "failed"
        assert read_claims(tmp_path)["moves.x"][-1].status == "working"
        with pytest.raises(ClaimLost):
            stuck.progress(1, 2, 0.0, 0.0)
        taken = Claims(tmp_path, backoff=0).take("stuck.x")
        assert taken is not None
    assert f"{tmp_path}/stuck.x: no progress in 1s: its engine hangs" in said[0]
    assert [state.status for state in read_claims(tmp_path)["stuck.x"]] == ["failed", "working"]


def test_a_part_made_at_the_first_try_leaves_nothing_and_what_failed_before_stays_known(
    tmp_path: Path,
) -> None:
    claims = Claims(tmp_path, backoff=0)
    first, second = claims.take("a.x"), claims.take("b.x")
    assert first is not None
    assert second is not None
    with first, second:
        first.made()
        second.fail("no luck")
    again = claims.take("b.x")
    assert again is not None
    with again:
        again.made()
    assert {part: len(states) for part, states in read_claims(tmp_path).items()} == {"b.x": 2}


def test_a_full_disk_hides_no_error_of_the_work_and_ends_no_heartbeat(tmp_path: Path) -> None:
    claim = Claims(tmp_path, lease=LEASE).take("a.x")
    assert claim is not None
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))  # bytes a file may have: less than a claim
    try:
        time.sleep(LEASE / 2)  # some heartbeats
        assert read_claims(tmp_path)["a.x"][0].beat == 0
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        deadline = time.monotonic() + 10
        while read_claims(tmp_path)["a.x"][0].beat == 0:
            assert time.monotonic() < deadline, "the heartbeat has ended"
            time.sleep(0.01)
        resource.setrlimit(resource.RLIMIT_FSIZE, (8, limits[1]))
        with pytest.raises(DataError, match="the disk is full"), claim:
            raise DataError("the disk is full")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in (tmp_path / CLAIMS).iterdir()] == ["a.x.1"]


WHOLE = claim_files.text_of(ClaimState("a.x", 1, Owner.here()))
DAMAGED: dict[str, Callable[[Path], object]] = {
    "torn": lambda path: path.write_text(WHOLE[:20]),
    "empty": lambda path: path.touch(),
    "no object": lambda path: path.write_text("[1]"),
    "a key too many": lambda path: path.write_text(WHOLE.replace("{", '{"x": 1, ', 1)),
    "of another type": lambda path: path.write_text(WHOLE.replace('"beat": 0', '"beat": "0"')),
    "an owner of no kind": lambda path: path.write_text(re.sub(r'"owner": {.*?}', '"owner": 7', WHOLE)),
    "no status": lambda path: path.write_text(WHOLE.replace("working", "sleeping")),
    "another claim": lambda path: path.write_text(WHOLE.replace("a.x", "b.x")),
    "not a number": lambda path: path.write_text(WHOLE.replace('"rate": 0.0', '"rate": NaN')),
    "not UTF-8": lambda path: path.write_bytes(b"\xff\xfe"),
    "brackets": lambda path: path.write_text("[" * 50_000),
    "huge": lambda path: path.write_text(WHOLE + " " * 10_000_000),
    "a link": lambda path: path.symlink_to("/dev/zero"),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a FIFO": os.mkfifo,
    "a directory": lambda path: path.mkdir(),
}


@pytest.mark.parametrize("damage", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_claim_is_an_error_that_names_it(tmp_path: Path, damage: Callable[[Path], object]) -> None:
    path = claim_path(tmp_path, "a.x", 1)
    path.parent.mkdir()
    damage(path)
    for look in (lambda: Claims(tmp_path).take("a.x"), lambda: read_claims(tmp_path)):
        with pytest.raises(DataError, match=r"\.claims/a\.x\.1: damaged: end all workers"):
            look()
    assert Claims(tmp_path).take("b.x") is not None


def test_what_is_told_of_the_parts_is_read_as_strictly(tmp_path: Path) -> None:
    path = tmp_path / CLAIMS / PARTS
    path.parent.mkdir()
    for text in ("[1]", '{"a": "b"}', "7", '{"a": 1', ""):
        path.write_text(text)
        with pytest.raises(DataError, match=r"\.claims/parts: "):
            announced(tmp_path)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(DataError, match="a FIFO"):
        announced(tmp_path)
    announce(tmp_path, {"a.x": 3})
    assert announced(tmp_path) == {"a.x": 3}, "a worker that starts mends it"


@pytest.mark.parametrize("make", [lambda path: path.touch(), lambda path: path.symlink_to("/tmp"), os.mkfifo])
def test_claims_are_made_in_a_directory_of_ours_alone(tmp_path: Path, make: Callable[[Path], None]) -> None:
    make(tmp_path / CLAIMS)
    for begin in (Claims, lambda directory: announce(directory, {})):
        with pytest.raises(DataError, match=r"\.claims: not a directory of this program's: remove it"):
            begin(tmp_path)


def test_a_heartbeat_that_is_seen_a_minute_late_and_then_at_once_is_heard_within_the_lease(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Over NFS, at its worst: a client looks once in its acdirmax, and what it is told may be as old."""
    cached, beat = 60, LEASE_SECONDS / BEATS_A_LEASE
    now = 0.0
    monkeypatch.setattr(claims_module.time, "monotonic", lambda: now)
    watcher = Claims(tmp_path)
    quiet = []
    for second in range(0, 3600):
        now, looked = float(second), second // cached
        seen = looked * cached - cached * (looked % 2)
        state = ClaimState("a.x", 1, ELSEWHERE, beat=int(seen / beat))
        quiet.append(watcher._quiet_seconds(state))
    assert 2 * cached - beat <= max(quiet) <= LEASE_SECONDS - cached, "with a look to spare"


def _elsewhere(directory: Path, work: Callable[[Any], None]) -> int:
    """Claim a.x in a process of its own, and do `work(claim)` there; its pid, once it has the claim."""
    pid = os.fork()
    if not pid:
        claim = Claims(directory, lease=LEASE).take("a.x")
        assert claim is not None
        work(claim)
        os._exit(0)
    while not claim_path(directory, "a.x", 1).exists():
        time.sleep(0.01)
    return pid


def _write(directory: Path, state: ClaimState) -> None:
    path = claim_path(directory, state.part, state.generation)
    path.parent.mkdir(exist_ok=True)
    claim_files.rewrite(directory, path, claim_files.text_of(state))
