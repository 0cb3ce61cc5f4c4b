"""Processes that start in milliseconds: forks of one server, which imports what they need once.

A process that starts anew imports for three to five seconds. What the start itself is about, such as the
environment in which torch is imported, is not to be shown with these.
"""

from __future__ import annotations

import multiprocessing as mp
import os
import resource
import signal
import sys
from collections.abc import Sequence
from importlib.util import find_spec
from multiprocessing.connection import wait
from pathlib import Path

# There is one server a process, whoever asks first, so all that any fork needs is here. It passes over a name
# that it cannot import and says nothing: a module that has moved would only make every test slower.
PRELOADED = [
    "megatron_lopd.commands.run",
    "megatron_lopd.engines.transformers_engine",
    "megatron_lopd.training.loop",
    "matplotlib.figure",
    "transformers.models.qwen3.modeling_qwen3",
]
assert all(map(find_spec, PRELOADED))
CONTEXT = mp.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


class Command:
    """`lopd *arguments` in `directory`, with this process's environment; used as subprocess.Popen is.

    What it says is added to `directory`/log. No file that it writes grows beyond `file_bytes`.
    """

    def __init__(self, directory: Path, arguments: Sequence[str], file_bytes: int | None = None) -> None:
        work = (directory, list(arguments), dict(os.environ), file_bytes)
        self._process = CONTEXT.Process(target=_run, args=work)
        self._process.start()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, seconds: float) -> int:
        """The exit code, or -n for signal n. AssertionError, and it is killed, when it takes longer."""
        if not wait([self._process.sentinel], seconds):
            self.kill()
            raise AssertionError(f"{self._process} did not end in {seconds:.0f} s")
        self._process.join()
        assert self._process.exitcode is not None
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        os.kill(self.pid, number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


def _run(directory: Path, arguments: list[str], environment: dict[str, str], file_bytes: int | None) -> None:
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(environment)
    log = os.open("log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for standard in (1, 2):
        os.dup2(log, standard)
    if file_bytes is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_bytes, file_bytes))
    from megatron_lopd.cli import main

    sys.exit(main(arguments))
