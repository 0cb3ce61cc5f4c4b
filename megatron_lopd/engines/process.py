"""An engine in a process of its own: it can die without taking the trainer along.

Started as `python -m megatron_lopd.engines.process`, so that it imports nothing of its parent's and has no
part in its collectives. Requests and results go over a pipe of this project's own making, pickled.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from torch import Tensor

from megatron_lopd.config import EngineConfig, Sampling
from megatron_lopd.data.records import Rollout, Score
from megatron_lopd.engines.kind import kind_of
from megatron_lopd.engines.protocol import Prompted
from megatron_lopd.errors import EngineDied, EngineError
from megatron_lopd.registry import allowing_user_code
from megatron_lopd.runtime import environment
from megatron_lopd.runtime.bounded import bound_waiting
from megatron_lopd.runtime.display import duration
from megatron_lopd.runtime.signals import die_with_parent

# A process whose pipe has closed is as good as gone: how long its exit code may take to appear.
EXIT_SECONDS = 30.0
# How long what a killed process had started, killed with it, may take to give back its GPU.
GROUP_SECONDS = 10.0
POLL_SECONDS = 0.05


class EngineProcess:
    """`open_engine(config, model_dir)` over there. Loading has begun when this returns: see `ready`.

    `name` says in messages whose process it is. A context manager: leaving it ends the process, and what that
    has started; it never outlives this one, whatever ends it.
    """

    def __init__(self, name: str, config: EngineConfig, model_dir: str, threads: int) -> None:
        self._name, self._patience = name, config.patience_seconds
        self._pipe, theirs = Pipe()
        bound_waiting(self._pipe, self._patience)
        with theirs:
            self._process = subprocess.Popen(
                [
                    kind_of(config).python(config),
                    "-m",
                    "megatron_lopd.engines.process",
                    str(theirs.fileno()),
                ],
                pass_fds=[theirs.fileno()],
                env=environment.for_engine(os.environ)
                | {"OMP_NUM_THREADS": str(threads), "PYTHONPATH": _python_path()},
                stdin=subprocess.DEVNULL,
                process_group=0,
            )
        self.pid = self._process.pid
        self._is_killed = False
        self._latest: _Results | None = None
        self._send((config, model_dir))

    def __enter__(self) -> EngineProcess:
        return self

    def __exit__(self, *unused: object) -> None:
        self.close()

    def close(self) -> None:
        """End the process, and wait until it and what it has started have given back their memory."""
        self._kill()
        self._pipe.close()

    def _kill(self) -> None:
        """Once: the whole group, for vLLM's workers hold GPUs of their own."""
        if self._is_killed:
            return
        self._is_killed = True
        deadline = time.monotonic() + GROUP_SECONDS
        with suppress(ProcessLookupError):  # there is nobody left
            os.killpg(self.pid, signal.SIGKILL)
            with suppress(subprocess.TimeoutExpired):  # in a driver's hands, say: it goes when they let go
                self._process.wait(GROUP_SECONDS)
            while time.monotonic() < deadline:  # a zombie that nobody collects would stay for ever
                os.killpg(self.pid, 0)
                time.sleep(POLL_SECONDS)

    def ready(self) -> None:
        """Wait until the model is loaded. Raises EngineError when it does not load, EngineDied as `score`."""
        self._receive()

    def score(self, rollouts: Sequence[Rollout], top_k: int = 0) -> Iterator[Score]:
        """As `Engine.score`. Raises EngineDied too, when a signal killed the process, or no answer came from
        it for engine.patience_minutes."""
        return self._ask("score", list(rollouts), top_k)

    def generate(
        self, requests: Sequence[Prompted], sampling: Sampling, end_tokens: frozenset[int]
    ) -> Iterator[Rollout]:
        """As `Engine.generate`. Raises as `score`."""
        return self._ask("generate", list(requests), sampling, end_tokens)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        """Refused: no weights go over the pipe."""
        raise EngineError(
            f"{self._name} runs in another process and cannot take new weights: set engine.name=transformers"
        )

    def _ask(self, method: str, *arguments: Any) -> Iterator[Any]:
        """What `method` over there yields, one at a time. The first error it has is raised at once."""
        if self._latest is not None:
            self._latest.read_all()  # else its answers would be taken for this request's
        self._send((method, arguments))
        self._receive()
        self._latest = _Results(self._receive)
        return self._latest

    def _send(self, message: Any) -> None:
        self._over_pipe(lambda: self._pipe.send(message))

    def _receive(self) -> Any:
        answer = self._over_pipe(self._pipe.recv)
        if isinstance(answer, EngineError):
            raise answer
        return answer

    def _over_pipe(self, call: Callable[[], Any]) -> Any:
        """What `call` returns: it waits for the other side no longer than its patience."""
        try:
            return call()
        except BlockingIOError:
            self._kill()
            raise EngineDied(
                f"{self._name}'s process (pid {self.pid}) has not answered in "
                f"{duration(self._patience)} (engine.patience_minutes), and was killed"
            ) from None
        except (EOFError, ConnectionError):
            raise self._ended() from None

    def _ended(self) -> EngineError:
        code = None
        with suppress(subprocess.TimeoutExpired):
            code = self._process.wait(EXIT_SECONDS)
        self._kill()  # what it had started, too
        if code is None:
            return EngineDied(f"{self._name}'s process (pid {self.pid}) stopped answering, and was killed")
        if code < 0:
            return EngineDied(
                f"{self._name}'s process (pid {self.pid}) was killed by {signal.Signals(-code).name}"
            )
        return EngineError(
            f"{self._name}'s process (pid {self.pid}) ended with exit code {code}: its own message is above"
        )


class _Results(Iterator[Any]):
    """The answers to one request, up to the None that ends them."""

    def __init__(self, receive: Callable[[], Any]) -> None:
        self._receive = receive
        self._read: deque[Any] = deque()
        self._ended = False

    def __next__(self) -> Any:
        if not self._read and not self._ended:
            self._read_one()
        if not self._read:
            raise StopIteration
        return self._read.popleft()

    def read_all(self) -> None:
        """Keep what is still to come, so that the pipe is free."""
        while not self._ended:
            self._read_one()

    def _read_one(self) -> None:
        self._ended = True  # an error ends them too
        result = self._receive()
        if result is not None:
            self._ended = False
            self._read.append(result)


def _python_path() -> str:
    """This package first, for a Python that it is not installed in."""
    package = str(Path(__file__).parents[2])
    return os.pathsep.join([package, *filter(None, [os.environ.get("PYTHONPATH")])])


def serve(pipe: Connection) -> None:
    """Load the engine that is asked for, then answer what is asked of it until the pipe closes.

    An answer is None once the requests are looked at, the results one by one, and None; or an EngineError.
    """
    from megatron_lopd.engines import load_engine

    try:
        config, model_dir = pipe.recv()
        try:
            with allowing_user_code(True):  # the recipe of whoever asks has allowed what it names
                engine = load_engine(config, model_dir)
            pipe.send(None)
        except EngineError as error:
            pipe.send(error)
            return
        while True:
            method, arguments = pipe.recv()
            try:
                results = getattr(engine, method)(*arguments)
                pipe.send(None)
                for result in results:
                    pipe.send(result)
                pipe.send(None)
            except EngineError as error:
                pipe.send(error)
    except (EOFError, ConnectionError):
        return


def _main() -> None:
    # A stop signal to the whole group of processes is the trainer's to answer: it still needs its scores.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    die_with_parent()
    with Connection(int(sys.argv[1])) as pipe:
        serve(pipe)


if __name__ == "__main__":
    _main()
