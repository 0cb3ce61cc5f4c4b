"""tools/gpu's runner outlives whatever a check does, and all that it knows by then is on the disk."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.fake_gpu_checks import CHECKS
from tools.gpu.results import Ending, Results

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CHECK = ROOT / "tools" / "gpu" / "check.sh"


def environment(root: Path) -> dict[str, str]:
    (root / "pids").mkdir()
    fixed = {"PYTHONPATH": str(ROOT), "PYTHON": sys.executable, "LOPD_FAKE_PIDS": str(root / "pids")}
    return {**os.environ, **fixed}


def start(root: Path, *arguments: str) -> subprocess.Popen[str]:
    """The runner over the fakes."""
    command = [sys.executable, "-m", "tests.fake_gpu_checks", "--toy", "--out", str(root / "out"), *arguments]
    streams: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=ROOT, env=environment(root), **streams)


def lines(root: Path) -> list[dict[str, Any]]:
    """results.jsonl; each of its lines must be whole."""
    return [json.loads(line) for line in (root / "out" / "results.jsonl").read_text().splitlines()]


def living(root: Path) -> list[int]:
    """Of the processes that the fakes noted, those that run."""
    pids = [int(path.name) for path in (root / "pids").iterdir() if path.name.isdigit()]
    assert pids
    return [pid for pid in pids if psutil.pid_exists(pid) and runs(psutil.Process(pid))]


def runs(process: psutil.Process) -> bool:
    """A dead one may be left for process 1 to collect, which not every container has."""
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


def wait_for(condition: Callable[[], bool]) -> None:
    """However slow the machine: pytest's own timeout ends it."""
    while not condition():
        time.sleep(0.02)


def test_every_kind_of_end_leaves_the_other_lines(tmp_path: Path) -> None:
    names = [check.name for check in CHECKS if check.name != "waits"]
    runner = start(tmp_path, "--budget", "500", "--only", *names)
    printed, _ = runner.communicate()
    machine, *endings = lines(tmp_path)
    assert machine["machine"]["packages"]
    found = {each["name"]: each for each in endings}

    assert {name: each["status"] for name, each in found.items()} == {
        "crashes": "failed",
        "no-module": "failed",
        "half": "failed",
        "hangs": "timed out",
        "killed": "killed",
        "children": "ok",
        "floods": "killed",
        "garbage": "failed",
        "cannot": "left out",
        "beside-1": "ok",
        "beside-2": "ok",
        "too-long": "left out",
        "good": "ok",
    }
    assert runner.returncode == 1
    assert not living(tmp_path)
    # What was told before the end is there, whatever the end was.
    told = {name: [figure["figure"] for figure in each["figures"]] for name, each in found.items()}
    assert all(told[name] == ["before"] for name in ("crashes", "hangs", "killed"))
    assert told["half"] == ["first", "before", "second", "third"]
    assert found["good"]["figures"] == [{"figure": "answer", "value": 42, "ratio": "nan"}]
    # Why, in one line each.
    assert found["crashes"]["reason"] == "ValueError: it is broken"
    assert found["no-module"]["reason"] == "ModuleNotFoundError: No module named 'tests.no_such_module'"
    assert found["half"]["reason"] == "second: ValueError: it is broken"
    assert found["killed"]["reason"].startswith("by SIGKILL")
    assert "wrote more than" in found["floods"]["reason"]
    assert found["cannot"]["reason"] == "needs 640 GB, this has 24"
    assert found["too-long"]["reason"].startswith("budget: ")
    assert all("\n" not in each["reason"] and len(each["reason"]) < 400 for each in endings)
    # Where it hung is in the log, and a flood is not.
    assert "in hangs" in Path(found["hangs"]["log"]).read_text()
    assert Path(found["floods"]["log"]).stat().st_size < 3 * 2**20
    table = (tmp_path / "out" / "table.txt").read_text()
    assert table in printed
    assert all(f"\n{name} " in table for name in found)
    assert "4 ok, 7 failed, timed out or killed, 2 left out" in table
    assert not (tmp_path / "out" / "scratch").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL], ids=["SIGTERM", "SIGKILL"])
def test_a_runner_that_is_ended_leaves_whole_lines_and_no_check(
    tmp_path: Path, number: signal.Signals
) -> None:
    runner = start(tmp_path, "--only", "crashes", "waits", "good")
    told = tmp_path / "out" / "figures" / "waits.jsonl"
    wait_for(lambda: told.exists() and told.read_text().endswith("\n"))
    runner.send_signal(number)
    runner.communicate()
    wait_for(lambda: not living(tmp_path))
    statuses = {each["name"]: each["status"] for each in lines(tmp_path)[1:]}
    assert json.loads(told.read_text())["value"] == 4
    if number == signal.SIGTERM:
        assert runner.returncode == 1
        assert statuses == {"crashes": "failed", "waits": "killed", "good": "left out"}
        assert "stopped by SIGTERM" in (tmp_path / "out" / "table.txt").read_text()
    else:
        assert statuses == {"crashes": "failed"}


def test_a_check_that_the_budget_ends_has_not_failed(tmp_path: Path) -> None:
    """Its own limit is longer: it is no fault of the machine's."""
    runner = start(tmp_path, "--only", "children", "waits", "--budget", "8")
    runner.communicate()
    _, ended, waits = sorted(lines(tmp_path), key=lambda line: line.get("name", ""))
    assert (ended["status"], waits["status"], runner.returncode) == ("ok", "left out", 0)
    assert re.match(r"budget: ended after \d+ s; where it stood", waits["reason"])


def refuse(*arguments: str, **changes: str) -> str:
    """What check.sh says, in one line, when it exits with 2."""
    environment = {**os.environ, "PYTHON": sys.executable, **changes}
    done = subprocess.run([CHECK, *arguments], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    return done.stderr


def test_bad_usage_is_one_line(tmp_path: Path) -> None:
    out = ("--out", str(tmp_path / "out"))
    assert "--only speed: there are machine, log-probs, " in refuse("--toy", "--only", "speed", *out)
    assert "--toy runs the same checks" in refuse(*out, CUDA_VISIBLE_DEVICES="")
    assert "--budget" in refuse("--toy", "--budget", "soon", *out)
    assert "there is no no-such-python here" in refuse("--toy", *out, PYTHON="no-such-python")
    bare = tmp_path / "bare"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')  # with nothing that was installed
    bare.chmod(0o755)
    said = refuse("--toy", *out, PYTHON=str(bare))
    assert said.endswith(" has no torch, no triton, no pytest: `make .venv/.dev` makes one that has\n")
    assert not (tmp_path / "out").exists()
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "results.jsonl").touch()
    assert "the results of another run" in refuse("--toy", *out)
    assert "cannot be written" in refuse("--toy", "--out", str(tmp_path / "out" / "results.jsonl"))


def test_a_run_in_which_nothing_ran_has_not_gone_well(tmp_path: Path) -> None:
    runner = start(tmp_path, "--budget", "0.001")
    said, _ = runner.communicate()
    assert runner.returncode == 1
    assert {line["status"] for line in lines(tmp_path)[1:]} == {"left out"}
    assert said.endswith(f"results, logs and this table: {tmp_path / 'out'}\n")


def test_a_line_is_on_the_disk_before_the_next_check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each write is followed by a flush; a full disk costs lines, not the run."""
    calls: list[str] = []
    write, fsync = os.write, os.fsync
    monkeypatch.setattr(os, "write", lambda *args: calls.append("write") or write(*args))
    monkeypatch.setattr(os, "fsync", lambda *args: calls.append("fsync") or fsync(*args))
    results = Results(tmp_path / "results.jsonl")
    results.add_ending(Ending("one", "ok", 1.0, ""))
    results.add_ending(Ending("two", "ok", 1.0, ""))
    assert calls == ["write", "fsync"] * 2

    def full(*arguments: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    results.add_ending(Ending("three", "ok", 1.0, ""))
