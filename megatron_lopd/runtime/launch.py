"""Several processes of one command on this machine: ranks, as torchrun would start them, or workers.

torchrun turns every failure into exit code 1 and gives a stopping worker half a minute before it
kills it; here a rank's exit code is the command's, and a stop signal waits for the checkpoint.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from types import FrameType
from typing import Any, TypeVar

from megatron_lopd.errors import ConfigError
from megatron_lopd.runtime import environment, heartbeats
from megatron_lopd.runtime.display import duration
from megatron_lopd.runtime.owner import is_suspended
from megatron_lopd.runtime.signals import STOP_SIGNALS, die_with_parent

T = TypeVar("T")
# Once one rank has failed the others wait for it in a collective: how long they get to notice.
GRACE_SECONDS = 10.0
POLL_SECONDS = 0.05
WORKER = "LOPD_WORKER"  # in the environment of a worker: its number on this machine


def launch(arguments: Sequence[str], processes: int) -> tuple[int, bool]:
    """Run `python -m megatron_lopd.cli *arguments` in `processes` ranks.

    Returns the first exit code that is not 0, and whether a stop signal came.

    Stop signals are passed on to every rank, and wake one that is suspended. When a rank fails, the others
    are ended; so is one that stays suspended, which of several ranks the others notice sooner, once they have
    met. 128 + n stands for a rank that signal n killed.
    """
    port = _free_port()
    environments = [environment.for_rank(rank, processes, port, os.environ) for rank in range(processes)]
    return _run(arguments, environments, all_or_none=True)


def launch_workers(arguments: Sequence[str], workers: int) -> int:
    """Run `python -m megatron_lopd.cli *arguments` in `workers` processes, each with its share of the GPUs.

    They know of each other by the stage's directory alone: when one ends the others go on. One that stays
    suspended is ended. Returns 0 when one of them ended so, else the first exit code. Raises ConfigError when
    the GPUs do not divide.
    """
    gpus = environment.visible_gpus()
    if gpus and len(gpus) % workers:
        raise ConfigError(
            f"engine.workers={workers} does not divide this machine's {len(gpus)} GPUs: set it to a number "
            "that does, or CUDA_VISIBLE_DEVICES to the GPUs to use"
        )
    share = len(gpus) // workers
    environments = []
    for number in range(workers):
        mine = {"CUDA_VISIBLE_DEVICES": ",".join(gpus[number * share : (number + 1) * share])} if gpus else {}
        environments.append(
            environment.threads(workers) | environment.showing_gpus(os.environ) | mine | {WORKER: str(number)}
        )
    return _run(arguments, environments, all_or_none=False)[0]


def is_worker() -> bool:
    """Whether this process is one that `launch_workers` started."""
    return WORKER in os.environ


def in_own_process(work: Callable[..., T], *arguments: Any) -> T:
    """What `work(*arguments)` returns or raises in a new process, which sees the GPUs that this one hides."""
    with ProcessPoolExecutor(1, get_context("spawn"), initializer=environment.show_gpus) as pool:
        return pool.submit(work, *arguments).result()


def _run(
    arguments: Sequence[str], environments: Sequence[Mapping[str, str]], *, all_or_none: bool
) -> tuple[int, bool]:
    command = [sys.executable, "-m", "megatron_lopd.cli", *arguments]
    ranks = [subprocess.Popen(command, env=dict(each), preexec_fn=die_with_parent) for each in environments]

    asked: list[int] = []

    def pass_on(number: int, frame: FrameType | None) -> None:
        asked.append(number)
        for rank in ranks:
            rank.send_signal(number)
            rank.send_signal(signal.SIGCONT)  # one that is suspended could do nothing about it

    before = {number: signal.signal(number, pass_on) for number in STOP_SIGNALS}
    try:
        silence = heartbeats.silence_seconds()
        if all_or_none:
            # Several watch each other once they have met, and can say more: theirs is the first word.
            limit = silence if len(ranks) == 1 else 2 * silence
            code = _wait(ranks, _Suspensions(ranks, "rank", limit))
        else:
            code = _wait_for_one(ranks, _Suspensions(ranks, "worker", silence))
        return code, bool(asked)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for rank in ranks:
            rank.kill()
            rank.wait()


class _Suspensions:
    """Ends the processes that have been suspended for `limit` seconds: they hold what others wait for."""

    def __init__(self, processes: Sequence[subprocess.Popen[bytes]], kind: str, limit: float) -> None:
        self._processes, self._kind, self._limit = processes, kind, limit
        self._seconds = dict.fromkeys(range(len(processes)), 0.0)
        self._looked = time.monotonic()

    def look(self) -> None:
        now = time.monotonic()
        if now - self._looked < self._limit / heartbeats.BEATS_A_SILENCE:
            return
        # This process may have been suspended too, by a scheduler, say.
        passed = min(now - self._looked, 2 * self._limit / heartbeats.BEATS_A_SILENCE)
        self._looked = now
        for number, process in enumerate(self._processes):
            if process.poll() is not None or not is_suspended(process.pid):
                self._seconds[number] = 0.0
                continue
            self._seconds[number] += passed
            if self._seconds[number] >= self._limit:
                print(
                    f"lopd: {self._kind} {number} (pid {process.pid} on {socket.gethostname()}) has been "
                    f"suspended for {duration(self._limit)}, and is ended: run the same command again",
                    file=sys.stderr,
                    flush=True,
                )
                process.kill()


def _wait(ranks: Sequence[subprocess.Popen[bytes]], watch: _Suspensions) -> int:
    deadline = float("inf")
    while True:
        watch.look()
        codes = [rank.poll() for rank in ranks]
        failed = next((code for code in codes if code), 0)
        if None not in codes or time.monotonic() > deadline:
            return failed if failed >= 0 else 128 - failed
        if failed and deadline == float("inf"):
            deadline = time.monotonic() + GRACE_SECONDS
        time.sleep(POLL_SECONDS)


def _wait_for_one(workers: Sequence[subprocess.Popen[bytes]], watch: _Suspensions) -> int:
    while any(worker.poll() is None for worker in workers):
        watch.look()
        time.sleep(POLL_SECONDS)
    codes = [worker.wait() for worker in workers]
    failed = 0 if 0 in codes else codes[0]
    return failed if failed >= 0 else 128 - failed


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((environment.LOOPBACK, 0))
        port: int = probe.getsockname()[1]
        return port
