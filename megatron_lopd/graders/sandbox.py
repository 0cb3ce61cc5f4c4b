"""A module's functions in a process of its own, which what a model wrote may hang, crash or fill.

Started as `python -c`, that process imports the module, calls its `prepare` where it has one, and nothing
more: it forks one that answers calls, and another, within milliseconds, for one that has died. Each call has
so much processor time and memory; the kernel ends what takes more, in the midst of a C function too.
Processor time, not the clock's: how busy the machine is must not decide what is right. By the clock, only a
process that is stopped, or as good as dead, is given up, which is no verdict.

It keeps the run from accidents, not from an attack: the process may read, write and connect as the run may.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from megatron_lopd.errors import EngineDied, EngineError
from megatron_lopd.runtime.bounded import bound_waiting
from megatron_lopd.runtime.signals import die_with_parent

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from types import ModuleType

CPU_SECONDS = 5.0  # a comparison of mathematical answers takes a few milliseconds
MEMORY_BYTES = 2 << 30  # of address space; that process itself has 70 MB
# Seconds of the clock without an answer, beside so many times the processor time of the call: a machine may
# have many times more to do than it has cores.
PATIENCE_SECONDS, PATIENCE_TIMES = 300.0, 20

# How a call ends the process: its time is up, its stack or its memory is.
_ITS_OWN_FAULT = (signal.SIGPROF, signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)


@dataclass(frozen=True)
class Outcome:
    """What came of a call: `value`, None where it failed; whether its time was up; `seconds` of processor."""

    value: Any
    late: bool
    seconds: float


class Ration:
    """Processor time for a number of calls together, in seconds, whichever threads make them.

    Half of it is kept for all, in equal parts; the other half is had by the first that need more, up to
    `most` each. So a few slow calls take what they need, and many leave the others their part.
    """

    def __init__(self, seconds: float, calls: int, most: float = CPU_SECONDS) -> None:
        self._left, self._calls, self._most = seconds, calls, most
        self._kept = seconds / (2 * max(calls, 1))
        self._lock = threading.Lock()

    def spend(self, call: Callable[[float], Outcome]) -> Outcome:
        """Make one of the calls, telling it how long it may take."""
        with self._lock:
            self._calls -= 1
            allowed = min(self._most, self._left - self._kept * self._calls)
            self._left -= allowed
        outcome = call(allowed)
        with self._lock:
            self._left += max(allowed - outcome.seconds, 0.0)
        return outcome


class Sandbox:
    """The functions of `module` at a safe distance. The process starts with the first call.

    `module` is importable by a fresh Python: installed, or below a folder of PYTHONPATH.
    """

    def __init__(
        self, module: str, cpu_seconds: float = CPU_SECONDS, memory_bytes: int = MEMORY_BYTES
    ) -> None:
        self._module, self._cpu_seconds, self._memory_bytes = module, cpu_seconds, memory_bytes
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None

    def ask(self, function: str, *arguments: Any) -> Any:
        """What `function` returns; None when it raised, or took more than it may. Raises as `call`."""
        return self.call(self._cpu_seconds, function, *arguments).value

    def call(self, cpu_seconds: float, function: str, *arguments: Any) -> Outcome:
        """What came of the function. Arguments and result are pickled.

        Raises EngineError when the process ended for a reason that is not the call's own; EngineDied when a
        signal from outside ended it, or stopped it: another try may well go through.
        """
        if self._pipe is None:
            self._start()
        assert self._pipe is not None
        assert self._process is not None
        patience = PATIENCE_SECONDS + PATIENCE_TIMES * cpu_seconds
        bound_waiting(self._pipe, patience)
        try:
            self._pipe.send((cpu_seconds, function, arguments))
            reply = self._pipe.recv()
        except BlockingIOError:
            self.close()
            raise EngineDied(
                f"the process of {self._module} gave no answer in {patience:.0f} s, and was killed: run "
                "the same command again"
            ) from None
        except (EOFError, ConnectionError):
            reply = self._process.wait()
            self.close()
        if isinstance(reply, Outcome):
            return reply
        if -reply in _ITS_OWN_FAULT:
            return Outcome(None, reply == -signal.SIGPROF, cpu_seconds)
        if reply < 0:
            how = f"was killed by {signal.Signals(-reply).name}: run the same command again"
            raise EngineDied(f"the process of {self._module} {how}")
        raise EngineError(f"the process of {self._module} ended with code {reply}: what it said is above")

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
        code = f"from {__name__} import _main; _main()"
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, self._module, str(theirs.fileno()), str(self._memory_bytes)],
                pass_fds=[theirs.fileno()],
                env=os.environ | {"PYTHONHASHSEED": "0"},  # sympy's order of terms depends on it
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
            )


def _main() -> None:
    """Pass calls on to a fork of this process, and back what comes of them, until the pipe closes.

    What comes is an Outcome, or the code that the fork ended with.
    """
    import importlib
    from multiprocessing.connection import Connection

    # A stop signal to the whole group of processes is the run's to answer.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    name, descriptor, memory_bytes = sys.argv[1:]
    module = importlib.import_module(name)
    getattr(module, "prepare", lambda: None)()
    fork: tuple[int, Connection] | None = None
    with Connection(int(descriptor)) as pipe:
        while True:
            try:
                request = pipe.recv_bytes()
            except (EOFError, ConnectionError):
                return  # a fork that is still at work ends with its call, at the latest
            process, to_fork = fork = fork or _fork(module, int(memory_bytes), pipe)
            try:
                to_fork.send_bytes(request)
                pipe.send_bytes(to_fork.recv_bytes())
            except (EOFError, ConnectionError):
                to_fork.close()
                fork = None
                pipe.send(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]))


def _fork(module: ModuleType, memory_bytes: int, pipe: Connection) -> tuple[int, Connection]:
    """A process that answers calls: its id, and the pipe to it. `pipe` is not for it."""
    from multiprocessing import Pipe

    ours, theirs = Pipe()
    if number := os.fork():
        theirs.close()
        return number, ours
    try:
        pipe.close()
        ours.close()
        die_with_parent()  # what is stopped cannot end by itself
        resource.setrlimit(resource.RLIMIT_AS, (memory_bytes, memory_bytes))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        _answer(module, theirs)
        os._exit(0)
    finally:
        sys.excepthook(*sys.exc_info())
        os._exit(1)


def _answer(module: ModuleType, pipe: Connection) -> None:
    """Answer calls, each within its time, until the pipe closes."""
    while True:
        try:
            seconds, function, arguments = pipe.recv()
        except (EOFError, ConnectionError):
            return
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, max(seconds, 1e-3))  # SIGPROF, which Python leaves alone
        try:
            value = getattr(module, function)(*arguments)
        except Exception:  # noqa: BLE001 - sympy raises what it likes; the caller counts it as ungraded
            value = None
        signal.setitimer(signal.ITIMER_PROF, 0)
        pipe.send(Outcome(value, False, time.process_time() - began))
