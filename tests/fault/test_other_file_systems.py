"""File systems of other people's: without hard links, locks or flushed directories, and with lost replies.

The functions below the tests run in a process that bears the faults.
"""

from __future__ import annotations

import errno
import functools
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.manifest import Manifest, write_manifest
from megatron_lopd.artifacts.model_files import model_files
from megatron_lopd.commands.verify import verify_path
from megatron_lopd.data.chat import Chat
from megatron_lopd.errors import DataError, LopdError, Unreadable
from megatron_lopd.families.architecture import read_architecture
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import atomic_write_json, publish
from megatron_lopd.pipeline import execute, workers
from megatron_lopd.runtime import claims
from megatron_lopd.runtime.claim_files import CLAIMS, READINGS, ClaimState, create_claim
from megatron_lopd.runtime.owner import Owner
from megatron_lopd.training.checkpoints import Checkpoints
from megatron_lopd.training.saving import newest_checkpoint
from tests.model_zoo import make_model_dir
from tests.shims.file_faults import (
    Failing,
    Faults,
    bearing,
    build,
    failures,
    module_of,
    preloaded,
    run_bearing,
)

NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV)
NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)
WRITERS = 8


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(tmp_path_factory.mktemp("library"))


def test_without_hard_links_one_of_many_still_gets_a_name(tmp_path: Path, library: Path) -> None:
    run_bearing(library, None, without_links, tmp_path)


def without_links(root: Path) -> None:
    for number in NO_LINKS:
        directory = root / str(number)
        directory.mkdir()
        with bearing(Faults(directory, latency_ms=1, failing=(Failing("link", number),))):
            race(directory)


def race(directory: Path) -> None:
    """Writers publish one shard and claim one part, each its own; again and again."""
    for turn in range(5):
        pids: dict[int, int] = {}
        (directory / CLAIMS).mkdir(exist_ok=True)
        ready, go = os.pipe()  # its end is the start
        for number in range(WRITERS):
            if not (pid := os.fork()):
                os.close(go)
                os.read(ready, 1)
                private = directory / f"private-{number}"
                private.write_text(str(number))
                won = publish(private, directory / f"shard-{turn}")
                owns = create_claim(directory, ClaimState(f"part-{turn}", 1, Owner.here()))
                os._exit(2 * won + owns)
            pids[pid] = number
        os.close(ready)
        os.close(go)
        codes = {number: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid, number in pids.items()}
        winners = [number for number, code in codes.items() if code & 2]
        assert len(winners) == 1, codes
        assert (directory / f"shard-{turn}").read_text() == str(winners[0])
        assert sum(code & 1 for code in codes.values()) == 1, codes
    left = Counter(path.name.partition("-")[0] for path in directory.iterdir())
    assert left == {"shard": 5, CLAIMS: 1}
    assert len(list((directory / CLAIMS).iterdir())) == 5


def test_what_cannot_tell_who_was_first_is_refused_in_a_line(tmp_path: Path, library: Path) -> None:
    failing = (Failing("link", errno.EPERM), Failing("renameat2", errno.EINVAL))
    run_bearing(library, Faults(tmp_path, failing=failing), refused, tmp_path)


def refused(directory: Path) -> None:
    (directory / CLAIMS).mkdir()
    (directory / "private").write_text("x")
    with pytest.raises(DataError, match="neither hard links nor renames that replace nothing"):
        publish(directory / "private", directory / "shard")
    with pytest.raises(DataError, match="choose a run_dir on another file system"):
        claims.Claims(directory).take("part")
    assert [path.name for path in directory.iterdir()] == [CLAIMS]
    assert not any((directory / CLAIMS).iterdir())


def test_a_reply_that_was_lost_does_not_turn_what_is_done_into_a_failure(
    tmp_path: Path, library: Path
) -> None:
    """NFS sends a request again, and finds the name taken, or the source gone: by itself."""
    failing = (
        Failing("link", errno.EEXIST, after=True),
        Failing("rename", errno.ENOENT, pattern="*.json", after=True),
    )
    run_bearing(library, Faults(tmp_path, failing=failing), done_all_the_same, tmp_path)


def done_all_the_same(directory: Path) -> None:
    (directory / "private").write_text("x")
    assert publish(directory / "private", directory / "shard")
    (directory / CLAIMS).mkdir()
    assert claims.Claims(directory).take("part") is not None
    atomic_write_json(directory / "plan.json", {"a": 1})
    assert read_json(directory / "plan.json") == {"a": 1}


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EACCES, errno.EOPNOTSUPP], ids=errno.errorcode.get)
def test_a_directory_that_cannot_be_flushed_by_itself_is_with_all_else(
    tmp_path: Path, library: Path, number: int
) -> None:
    failing = Failing("fsync", number, pattern=str(tmp_path))
    assert run_bearing(library, Faults(tmp_path, failing=(failing,)), written, tmp_path) == "synced\n"


def test_a_directory_that_is_not_flushed_for_a_fault_of_the_disk_is_an_error(
    tmp_path: Path, library: Path
) -> None:
    failing = Failing("fsync", errno.EIO, pattern=str(tmp_path))
    said = run_bearing(library, Faults(tmp_path, failing=(failing,)), written, tmp_path)
    assert said.startswith(f"{tmp_path}/plan.json: cannot be written: Input/output error")


def written(directory: Path) -> None:
    os.sync = lambda: print("synced")
    try:
        atomic_write_json(directory / "plan.json", {"a": 1})
    except DataError as error:
        print(error)


def test_a_file_that_goes_stale_as_it_is_read_is_read_anew(tmp_path: Path, library: Path) -> None:
    failing = (
        Failing("read", errno.ESTALE, pattern="*/some.json", count=1),
        Failing("open", errno.ESTALE, pattern="*/some.json", count=1),
        Failing("read", errno.ESTALE, pattern="*/always.json"),
    )
    run_bearing(library, Faults(tmp_path, failing=failing), stale, tmp_path)


def stale(directory: Path) -> None:
    for name in ("some.json", "always.json"):
        atomic_write_json(directory / name, {"a": 1})
    assert read_json(directory / "some.json") == {"a": 1}
    with pytest.raises(Unreadable, match=r"always\.json: cannot be read: Stale file handle"):
        read_json(directory / "always.json")


def test_what_cannot_be_seen_for_a_moment_ends_no_worker(tmp_path: Path, library: Path) -> None:
    """Be it the claims on a part, the part, or what it is made from."""
    run_bearing(library, None, unseen, tmp_path)


def unseen(root: Path) -> None:
    claims.POLL_SECONDS = 0.01
    workers.Claims = functools.partial(claims.Claims, backoff=0.01)  # type: ignore[misc,assignment]
    for number, (call, name) in enumerate([("read", "part.1"), ("stat", "part"), ("stat", "source")]):
        directory = root / str(number)
        directory.mkdir()
        part = workers.Derived(directory / "part", directory / "source", lambda path, tick: path.touch())
        part.source.touch()
        work = workers.Work("test", None, directory, [part])
        failing = Failing(call, errno.EIO, pattern=f"{directory}/*{name}", count=READINGS)
        before = claims.Claims(directory).take("part")
        assert before is not None
        with before:  # somebody had it, and has given it back
            pass
        with bearing(Faults(root, failing=(replace(failing, count=0),))), pytest.raises(LopdError) as caught:
            workers.make_parts([work])
        assert "Input/output error" in str(caught.value)
        with bearing(Faults(root, failing=(failing,))):
            workers.make_parts([work])
            assert failures() == READINGS
        assert part.path.exists()


def test_what_cannot_be_seen_is_not_taken_for_gone(tmp_path: Path, library: Path) -> None:
    """Else a checkpoint is passed over with its steps, and a model without its template is another."""
    run_bearing(library, None, not_gone, tmp_path)


def not_gone(root: Path) -> None:
    model, checkpoints = root / "model", root / "run/train/checkpoints"
    make_model_dir(model, tokens=80)
    for step in (1, 2):
        directory = checkpoints / f"step_{step:08d}"
        directory.mkdir(parents=True)
        write_manifest(directory, Manifest("checkpoint", {}, {}, {"step": step}, {}, {}, "proved"))
    own = Checkpoints(checkpoints, "a job", read_architecture(model), "proved", keep=9)
    looks: list[tuple[str, Callable[[], object]]] = [
        (str(checkpoints / "step_00000002/manifest.json"), lambda: newest_checkpoint(own, print)),
        (str(checkpoints / "step_00000001/manifest.json"), lambda: list(verify_path(checkpoints))),
        (str(checkpoints), own.steps),
    ]
    files = [path for path in model_files(model).all if path.suffix != ".safetensors"]
    assert {"chat_template.jinja", "tokenizer.json", "tokenizer_config.json"} <= {path.name for path in files}
    for path in files:
        looks += [(str(path), lambda: fingerprint_model(model)), (str(path), lambda: Chat(str(model)))]
    for call in ("stat", "read"):
        for pattern, look in looks:
            for number in (errno.EIO, errno.ESTALE, errno.EACCES):
                failing = Failing("opendir" if pattern == str(checkpoints) else call, number, pattern)
                with bearing(Faults(root, failing=(failing,))):
                    try:
                        look()
                    except (LopdError, OSError) as error:
                        assert pattern in str(error), (call, pattern, str(error))  # noqa: PT017
                        continue
                    assert not failures(), f"{call} of {pattern} failed with {number}, and nobody said so"


@pytest.mark.parametrize(
    "number", [NO_LOCKS[0], *(pytest.param(each, marks=pytest.mark.nightly) for each in NO_LOCKS[1:])]
)
def test_without_locks_a_stage_is_held_all_the_same(tmp_path: Path, library: Path, number: int) -> None:
    """Against a second run while the first lives, and not once it is dead."""
    faults = Faults(tmp_path, failing=(Failing("flock", number),))
    holder = holding(tmp_path, library, faults)
    try:
        assert run_bearing(library, faults, try_to_hold, tmp_path) == "refused\n"
    finally:
        holder.kill()
        holder.wait()
    assert run_bearing(library, faults, try_to_hold, tmp_path) == "held\n"


def test_a_run_that_was_taken_for_dead_ends_when_it_wakes(tmp_path: Path, library: Path) -> None:
    """Stopped on another machine, for longer than the lease."""
    faults = Faults(tmp_path, failing=(Failing("flock", errno.ENOLCK),))
    holder = holding(tmp_path, library, faults, elsewhere=True)
    try:
        assert run_bearing(library, faults, try_to_hold, tmp_path) == "refused\n", "its heartbeat is heard"
        holder.send_signal(signal.SIGSTOP)
        assert run_bearing(library, faults, try_to_hold, tmp_path) == "held\n"
        holder.send_signal(signal.SIGCONT)
        assert holder.wait(60) == 75
        assert holder.stderr is not None
        assert "another has taken its work over: it ends" in holder.stderr.read()
    finally:
        holder.kill()


def holding(directory: Path, library: Path, faults: Faults, elsewhere: bool = False) -> subprocess.Popen[str]:
    """A process that holds the stage in `directory`."""
    code = f"from pathlib import *; from {module_of(hold_on)} import *; hold_on({directory!r}, {elsewhere})"
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])} | preloaded(library, faults)
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def short_lease(elsewhere: bool) -> None:
    claims.LEASE_SECONDS, claims.POLL_SECONDS = 1.0, 0.02
    kept = claims.Claims
    owner = replace(Owner.here(), host="elsewhere") if elsewhere else Owner.here()
    claims.Claims = functools.partial(kept, lease=1.0, owner=owner)  # type: ignore[misc,assignment]


def hold_on(directory: Path, elsewhere: bool) -> None:
    short_lease(elsewhere)
    with execute._sole_worker(directory):
        print("held", flush=True)
        time.sleep(120)


def try_to_hold(directory: Path) -> None:
    short_lease(elsewhere=False)
    try:
        with execute._sole_worker(directory):
            print("held")
    except LopdError as error:
        print("refused" if "another lopd is at work here" in str(error) else error)
