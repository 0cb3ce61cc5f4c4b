"""Seconds until training can begin, and until its first step is done: with a cold page cache, and warm."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from tools.gpu.context import CheckFailed, Part

ROOT = Path(__file__).parents[3]
PACKAGE = ROOT / "megatron_lopd"


def run(part: Part) -> None:
    """One process cold, one warm, two at once. Files that another process has mapped stay in the cache."""
    folders = [PACKAGE] if part.toy else [PACKAGE, *(Path(each) for each in sys.path if each != str(ROOT))]
    part.figure("evicted", gb=sum(map(evict, folders)) / 1e9)
    for name, count in (("cold", 1), ("warm", 1), ("two at once, warm", 2)):
        for number, (imported, stepped) in enumerate(_start(part.toy, count), start=1):
            which = name if count == 1 else f"{name}, {number}"
            part.figure(which, imported_s=imported, stepped_s=stepped)


def _start(toy: bool, count: int) -> Iterator[tuple[float, float]]:
    """(seconds until imported, until stepped) of `count` processes started together."""
    command = [sys.executable, "-P", "-m", "tools.gpu.first_step", *(["--toy"] if toy else [])]
    began = time.monotonic()
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(count)]
    for process in processes:
        out, _ = process.communicate()
        seen = dict(re.findall(r"^(imported|stepped) at ([\d.]+)$", out, re.MULTILINE))
        if process.returncode or len(seen) < 2:
            raise CheckFailed("a process that was to make one step did not: its message is in the log")
        yield float(seen["imported"]) - began, float(seen["stepped"]) - began


def evict(folder: Path) -> int:
    """Have the system forget the contents of the Python files and libraries below it; their bytes."""
    return sum(_forget(path) for path in folder.rglob("*"))


def _forget(path: Path) -> int:
    if path.suffix not in (".py", ".pyc", ".so") or path.is_symlink():
        return 0
    try:
        file = os.open(path, os.O_RDONLY)
    except OSError:
        return 0
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        return os.fstat(file).st_size
    finally:
        os.close(file)
