"""The mathematical grader in a process of its own, which a response may hang, crash or fill.

Started as `python -m megatron_lopd.graders.math_process`. Each comparison has so much processor time and
memory; the kernel ends what takes more, in the midst of a C function too, and the next one gets a fresh
process. Processor time, not the clock's: how busy the machine is must not decide what is right.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

from megatron_lopd.errors import EngineError

if TYPE_CHECKING:
    from megatron_lopd.graders.math import MathVerdict

CPU_SECONDS = 5.0  # a comparison takes a few milliseconds
MEMORY_BYTES = 2 << 30  # of address space; the process itself has 70 MB

# How a comparison ends the process: its time is up, its stack or its memory is.
_ITS_OWN_FAULT = (signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


class MathProcess:
    """`graders.math` at a safe distance. The process starts with the first question."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def compare(self, gold: str, response: str) -> MathVerdict | None:
        """As `graders.math.compare`; None when that raised, or took more than it may.

        Raises EngineError when the process ended for another reason.
        """
        found: MathVerdict | None = self._ask("compare", gold, response)
        return found

    def is_readable(self, gold: str) -> bool:
        """As `graders.math.is_readable`; False when that raised, or took more than it may."""
        return self._ask("is_readable", gold) is True

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
        self._process = self._pipe = None

    def _ask(self, *question: str) -> Any:
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send(question)
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._bury()
            return None

    def _start(self) -> None:
        self._pipe, theirs = Pipe()
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "megatron_lopd.graders.math_process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's order of terms depends on it
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )

    def _bury(self) -> None:
        assert self._process is not None
        code = self._process.wait()
        self.close()
        if -code not in _ITS_OWN_FAULT:
            how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with code {code}"
            raise EngineError(f"the math grader's process {how}: run the same command again")


def serve(pipe: Connection) -> None:
    """Answer questions, each within its limits, until the pipe closes."""
    from megatron_lopd.graders import math

    functions: dict[str, Callable[..., Any]] = {"compare": math.compare, "is_readable": math.is_readable}
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            name, *texts = pipe.recv()
        except (EOFError, ConnectionError):
            return
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)  # SIGPROF, which Python leaves to the kernel
        try:
            answer = functions[name](*texts)
        except Exception:  # noqa: BLE001 - sympy raises what it likes; the caller counts it as ungraded
            answer = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(answer)


def _main() -> None:
    # A stop signal to the whole group of processes is the run's to answer.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    with Connection(int(sys.argv[1])) as pipe:
        serve(pipe)


if __name__ == "__main__":
    _main()
