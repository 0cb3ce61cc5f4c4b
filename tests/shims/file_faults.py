"""File systems of other people's: calls on files below one directory that are late, or fail.

file_faults.c, preloaded into a process, does it. One that is started anew is told by its environment:

    library = build(tmp_path)
    subprocess.run([...], env=os.environ | preloaded(library, Faults(run_dir, latency_ms=3)))

One that runs preloaded already, and its forks, may be told something else at any time, by `tell`.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

SOURCE = Path(__file__).with_name("file_faults.c")
ROOT = Path(__file__).parents[2]
# A call's name stands for its whole family: "stat" for lstat, statx and access too, "open" for openat.
# "renameat2" is a rename with flags, which some file systems do not know.
CALLS = frozenset(
    "open stat rename renameat2 link unlink mkdir rmdir opendir fsync flock read write".split()  # noqa: SIM905
)


@dataclass(frozen=True)
class Failing:
    """Calls named `call` on paths that match `pattern` fail with `errno`.

    `pattern` is fnmatch's, and its * matches a / too; of a rename or link either path may match. The
    `first`-th call (1 is the first) and those after it fail, `count` in all; 0: every one. `after`: the call
    is made all the same, and only its answer is an error, as when a reply was lost. An `after` does nothing
    to opendir.
    """

    call: str
    errno: int
    pattern: str = "*"
    first: int = 1
    count: int = 0
    after: bool = False

    def __post_init__(self) -> None:
        if self.call not in CALLS:
            raise ValueError(f"no call {self.call!r}: one of {sorted(CALLS)}")

    def line(self) -> str:
        when = "after" if self.after else "before"
        return f"fail {self.call} {self.errno} {self.first} {self.count} {when} {self.pattern}"


@dataclass(frozen=True)
class Faults:
    """What a process has to bear below the directory `below`, a path with no links in it.

    0 to `latency_ms` before each call, drawn from `seed`; and calls that are `failing`, 32 kinds at most.
    """

    below: Path
    latency_ms: float = 0.0
    seed: int = 0
    failing: tuple[Failing, ...] = ()

    def text(self) -> str:
        latency = f"latency {round(1000 * self.latency_ms)} {self.seed}"
        return "\n".join([f"below {self.below}", latency, *(each.line() for each in self.failing)])


def build(directory: Path) -> Path:
    """The library, compiled into `directory`."""
    library = directory / "file_faults.so"
    if not library.exists():
        subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", library, SOURCE, "-ldl"], check=True)
    return library


def preloaded(library: Path, faults: Faults | None = None) -> dict[str, str]:
    """What to add to the environment of a process that is to run with the library, and bear `faults`."""
    before = os.environ.get("LD_PRELOAD", "").split()
    environment = {"LD_PRELOAD": " ".join([*before, str(library)] if str(library) not in before else before)}
    return environment if faults is None else environment | {"FILE_FAULTS": faults.text()}


def tell(faults: Faults | None) -> None:
    """Have this process, which runs preloaded, bear `faults` from now on; None: none."""
    text = "" if faults is None else faults.text()
    understood = ctypes.CDLL(None).file_faults_set(text.encode())
    assert understood == len(text.splitlines()), f"not all of it was understood:\n{text}"


def failures() -> int:
    """How many calls a rule has made fail, in this process, since it was told."""
    return int(ctypes.CDLL(None).file_faults_failures())


@contextmanager
def bearing(faults: Faults) -> Iterator[None]:
    """`tell(faults)`, undone at the end."""
    tell(faults)
    try:
        yield
    finally:
        tell(None)


def run_bearing(
    library: Path, faults: Faults | None, function: Callable[..., None], *arguments: object
) -> str:
    """What `function(*arguments)` of a test's module prints in a process that bears `faults`.

    It is found by its name; arguments are told by their `repr`. AssertionError where the process fails.
    """
    code = (
        f"from pathlib import PosixPath\nfrom {module_of(function)} import {function.__name__}\n"
        f"{function.__name__}(*{arguments!r})"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": _python_path()} | preloaded(library, faults),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout


def module_of(function: Callable[..., object]) -> str:
    """Where to import it from, in the root of the repository; pytest has a shorter name for a test's."""
    return ".".join(Path(function.__code__.co_filename).relative_to(ROOT).with_suffix("").parts)


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
