"""A module's functions in a process of its own, which what a model wrote may hang, crash or fill.

Started as `python -m megatron_lopd.graders.sandbox`. Each call has so much processor time and memory; the
kernel ends what takes more, in the midst of a C function too, and the next call gets a fresh process.
Processor time, not the clock's: how busy the machine is must not decide what is right.

It keeps the run from accidents, not from an attack: the process may read, write and connect as the run may.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from megatron_lopd.errors import EngineError

if TYPE_CHECKING:
    from multiprocessing.connection import Connection

CPU_SECONDS = 5.0  # a comparison of mathematical answers takes a few milliseconds
MEMORY_BYTES = 2 << 30  # of address space; that process itself has 70 MB

# How a call ends the process: its time is up, its stack or its memory is.
_ITS_OWN_FAULT = (signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


class Sandbox:
    """The functions of `module` at a safe distance. The process starts with the first call.

    `module` is importable by a fresh Python: installed, or below a folder of PYTHONPATH.
    """

    def __init__(
        self, module: str, cpu_seconds: float = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._module, self._limits = module, (cpu_seconds, memory_bytes)
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def ask(self, function: str, *arguments: Any) -> Any:
        """What `function` returns; None when it raised, or took more than it may.

        Arguments and result are pickled. Raises EngineError when the process ended for another reason.
        """
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        try:
            self._pipe.send((function, arguments))
            return self._pipe.recv()
        except (EOFError, ConnectionError):
            self._bury()
            return None

    def close(self) -> None:
        """End the process, if there is one."""
        if self._process is not None and self._pipe is not None:
            self._process.kill()
            self._process.wait()
            self._pipe.close()
        self._process = self._pipe = None

    def _start(self) -> None:
        from multiprocessing import Pipe

        self._pipe, theirs = Pipe()
        command = [sys.executable, "-m", "megatron_lopd.graders.sandbox", self._module]
        with theirs:
            self._process = subprocess.Popen(
                [*command, str(theirs.fileno()), *map(str, self._limits)],
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
            how = f"ended with code {code}: what it said is above"
            if code < 0:
                how = f"was killed by {signal.Signals(-code).name}: run the same command again"
            raise EngineError(f"the process of {self._module} {how}")


def _main() -> None:
    """Answer calls, each within its limits, until the pipe closes."""
    import importlib
    from multiprocessing.connection import Connection

    # A stop signal to the whole group of processes is the run's to answer.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    name, descriptor, cpu_seconds, memory_bytes = sys.argv[1:]
    module = importlib.import_module(name)
    resource.setrlimit(resource.RLIMIT_AS, (int(memory_bytes), int(memory_bytes)))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with Connection(int(descriptor)) as pipe:
        while True:
            try:
                function, arguments = pipe.recv()
            except (EOFError, ConnectionError):
                return
            signal.setitimer(signal.ITIMER_PROF, float(cpu_seconds))  # SIGPROF, which Python leaves alone
            try:
                answer = getattr(module, function)(*arguments)
            except Exception:  # noqa: BLE001 - sympy raises what it likes; the caller counts it as ungraded
                answer = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            pipe.send(answer)


if __name__ == "__main__":
    _main()
