"""Fakes, named so: checks that end in every way a check can, for the runner of tools/gpu to outlive.

    python -m tests.fake_gpu_checks [as check.sh]

Each writes its process id, and those of what it starts, into the folder LOPD_FAKE_PIDS.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tools.gpu.context import LeftOut, Part
from tools.gpu.registry import Check
from tools.gpu.run import main

SLEEPS = "import sys, time; print(flush=True); time.sleep(600)"


def _note(pid: int) -> None:
    (Path(os.environ["LOPD_FAKE_PIDS"]) / str(pid)).touch()


def _start_sleeper(**options: bool) -> None:
    """A process that outlives its check unless it is killed."""
    sleeper = subprocess.Popen([sys.executable, "-c", SLEEPS], stdout=subprocess.PIPE, **options)
    assert sleeper.stdout is not None
    sleeper.stdout.readline()
    _note(sleeper.pid)


def good(part: Part) -> None:
    part.figure("answer", value=42, ratio=float("nan"))


def crashes(part: Part) -> None:
    part.figure("before", value=1)
    raise ValueError("it is\nbroken")


def half(part: Part) -> None:
    part.attempt("first", lambda: part.figure("first", value=1))
    part.attempt("second", lambda: crashes(part))
    part.attempt("third", lambda: part.figure("third", value=3))


def hangs(part: Part) -> None:
    _note(os.getpid())
    part.figure("before", value=2)
    _start_sleeper()
    time.sleep(600)


def waits(part: Part) -> None:
    _note(os.getpid())
    part.figure("before", value=4)
    time.sleep(600)


def killed(part: Part) -> None:
    part.figure("before", value=3)
    os.kill(os.getpid(), signal.SIGKILL)


def leaves_children(part: Part) -> None:
    _start_sleeper()
    _start_sleeper(start_new_session=True)  # no kill of a process group finds this one


def floods(part: Part) -> None:
    _note(os.getpid())
    while True:
        sys.stdout.buffer.write(b"\xff\x00garbage" * 2**20)


def tells_garbage(part: Part) -> None:
    with part.told.open("ab") as file:
        file.write(b'\xff\xfe{"figure":\n[1]\n' + json.dumps({"figure": "torn"}).encode()[:-3])
    print("\0\x1b[31m" + "x" * 5000)
    sys.stdout.flush()
    os._exit(3)


def cannot_run(part: Part) -> None:
    raise LeftOut("needs 640 GB, this has 24")


def beside(part: Part) -> None:
    """Ends only once its twin runs as well."""
    pids = Path(os.environ["LOPD_FAKE_PIDS"])
    (pids / f"beside-{os.getpid()}").touch()
    while len(list(pids.glob("beside-*"))) < 2:
        time.sleep(0.02)


def _fake(name: str, function: str, limit: float = 60, seconds: float = 0, shared: bool = False) -> Check:
    return Check(name, name, f"tests.fake_gpu_checks:{function}", seconds, limit, shared, toy_limit=limit)


CHECKS = (
    _fake("crashes", "crashes"),
    Check("no-module", "no-module", "tests.no_such_module:run", 0, 60),
    _fake("half", "half"),
    _fake("hangs", "hangs", limit=8),
    _fake("killed", "killed"),
    _fake("children", "leaves_children"),
    _fake("waits", "waits"),
    _fake("floods", "floods"),
    _fake("garbage", "tells_garbage"),
    _fake("cannot", "cannot_run"),
    _fake("beside-1", "beside", shared=True),
    _fake("beside-2", "beside", shared=True),
    _fake("too-long", "good", seconds=10_000),
    _fake("good", "good"),
)

if __name__ == "__main__":
    sys.exit(main(checks=CHECKS))
