"""Several processes of one command on this machine, as torchrun would start them.

torchrun turns every failure into exit code 1 and gives a stopping worker half a minute before it
kills it; here a rank's exit code is the command's, and a stop signal waits for the checkpoint.
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from types import FrameType

from megatron_lopd.training.preemption import STOP_SIGNALS

# Once one rank has failed the others wait for it in a collective: how long they get to notice.
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.05


def launch(arguments: Sequence[str], processes: int) -> tuple[int, bool]:
    """Run `python -m megatron_lopd.cli *arguments` in `processes` ranks.

    Returns the first exit code that is not 0, and whether a stop signal came.

    Stop signals are passed on to every rank. When a rank fails, the others are ended. 128 + n stands for a
    rank that signal n killed.
    """
    port = _free_port()
    command = [sys.executable, "-m", "megatron_lopd.cli", *arguments]
    environments = [_environment(rank, processes, port) for rank in range(processes)]
    ranks = [subprocess.Popen(command, env=each, preexec_fn=_die_with_parent) for each in environments]

    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            rank.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        code = _wait(ranks)
        return code, bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank in ranks:
            rank.kill()
            rank.wait()


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    deadline = float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        failed = next((code for code in codes if code), 0)
        if None not in codes or time.monotonic() > deadline:
            return failed if failed >= 0 else 128 - failed
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(POLL_SECONDS)


def _die_with_parent() -> None:
    """A kill -9 of the launcher must not leave ranks behind that go on writing. Linux's prctl(2)."""
    pr_set_pdeathsig = 1
    ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


def _environment(rank: int, processes: int, port: int) -> dict[str, str]:
    cores = max(1, (os.cpu_count() or 1) // processes)
    return (
        {"OMP_NUM_THREADS": str(cores)}
        | os.environ
        | {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    )


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
