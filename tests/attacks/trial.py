"""One attempt: a world is copied, spoilt and used by a forked child, and what came of it is judged."""

from __future__ import annotations

import ctypes
import json
import os
import re
import resource
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, Literal

import hypothesis

from megatron_lopd.errors import LopdError
from tests.attacks.attack import Attack

Verdict = Literal["refused", "accepted", "undetected", "uncaught", "hang", "outside", "memory"]
WRONG: tuple[Verdict, ...] = ("undetected", "uncaught", "hang", "outside", "memory")
PEAK_LIMIT = 2_000_000_000  # bytes that an attempt's process may ever hold
FILE_LIMIT = 1 << 28  # bytes of a file that it writes
PR_SET_PDEATHSIG = 1  # of prctl(2)
LOOK_EVERY = 0.25  # seconds
LONGEST_MESSAGE = 2000  # characters of a refusal
SENTINELS = {"secret": "not yours\n", "folder/deep": "nor this\n", "empty": ""}
# What a terminal would obey: C0 without tab, line feed and carriage return; DEL; C1; what turns text around.
CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]")


@dataclass(frozen=True)
class Outcome:
    """What an attempt came to. `evidence`: what `use` returned; `peak`: bytes its process held at most."""

    verdict: Verdict
    detail: str
    peak: int
    evidence: str = ""


def attempt(attack: Attack[Any], valid: Path, change: Any, before: str | None) -> Outcome:
    """Copy the world `valid`, change it and use it; `before` is what the valid one gives.

    With None for both `change` and `before`, the valid world itself is tried.
    """
    with tempfile.TemporaryDirectory(prefix="attack-") as name:
        scratch = Path(name)
        world = scratch / "world"
        shutil.copytree(valid, world, symlinks=True)
        for sentinel, text in SENTINELS.items():
            path = scratch / "outside" / sentinel
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        for place in ("home", "cache", "tmp"):
            (scratch / place).mkdir()
        if before is not None:
            try:
                attack.spoil(world, change)
            except (OSError, ValueError):  # a name that no file can have, a document that is none any more
                hypothesis.reject()
        untouched = dict(_outside(scratch))
        outcome = _judged(attack, change, before, *_run(attack, scratch, change))
        touched = sorted(_differ(untouched, dict(_outside(scratch))))
        if touched and outcome.verdict not in ("hang", "memory", "uncaught"):
            return Outcome(
                "outside", f"changed outside the run directory: {', '.join(touched)}", outcome.peak
            )
        return outcome


def _judged(
    attack: Attack[Any], change: Any, before: str | None, ended: Verdict, text: str, said: str, peak: int
) -> Outcome:
    verdict, detail = ended, text
    if peak > PEAK_LIMIT:
        verdict, detail = "memory", f"{peak / 1e6:,.0f} MB"
    elif ended in ("refused", "accepted") and "Traceback (most recent call last)" in said:
        verdict, detail = "uncaught", said[said.index("Traceback (most recent") :][-1500:]
    elif ended in ("refused", "accepted") and (found := CONTROL.search(said)):
        around = said[max(0, found.start() - 60) : found.end() + 20]
        verdict, detail = "uncaught", f"a control character is printed as it is: {around!a}"
    elif ended == "refused" and before is not None and (problem := _problem(text, attack.named(change))):
        verdict, detail = "uncaught", f"{problem}: {text[:600]!a}"
    elif ended == "accepted" and before is not None and not attack.allows(change, before, text):
        verdict, detail = "undetected", _difference(before, text)
    return Outcome(verdict, detail, peak, text if verdict == "accepted" else "")


def _problem(message: str, named: Any) -> str | None:
    """What is wrong with a refusal, as a line for people."""
    if not message.strip():
        return "a refusal without a word"
    if len(message) > LONGEST_MESSAGE:
        return f"a refusal of {len(message):,} characters"
    if named and not any(text in message for text in named):
        return f"a refusal that names none of {', '.join(named)}"
    return None


def _difference(before: str, after: str) -> str:
    for old, new in zip(before.splitlines(), after.splitlines(), strict=False):
        if old != new:
            return f"used, as {new[:300]!a}, where the valid world gives {old[:300]!a}"
    return f"used: {len(after):,} characters, where the valid world gives {len(before):,}: {after[-300:]!a}"


def _run(attack: Attack[Any], scratch: Path, change: Any) -> tuple[Verdict, str, str, int]:
    """(how `use` ended in a child, its text or what went wrong, all that was printed, bytes at the peak)."""
    answer, said = scratch / "tmp" / "answer", scratch / "tmp" / "said"
    child = os.fork()
    if not child:
        try:
            _in_child(attack, scratch, change, answer, said)
        finally:
            traceback.print_exc()
            os._exit(77)
    ended = _has_ended(child, attack.seconds)
    if not ended:
        os.killpg(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    peak = usage.ru_maxrss * 1024
    printed = said.read_text(errors="backslashreplace") if said.exists() else ""
    if not ended:
        return (
            "hang",
            f"no end in {attack.seconds:.0f} s of computing or waiting; it said: {printed[-200:]!a}",
            printed,
            peak,
        )
    if status or not answer.exists():
        how = f"signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else f"code {os.WEXITSTATUS(status)}"
        return "uncaught", f"its process ended with {how}; it said: {printed[-600:]!a}", printed, peak
    verdict, text = json.loads(answer.read_text(encoding="utf-8"))
    return verdict, text, printed, peak


def _has_ended(child: int, seconds: float) -> bool:
    """Whether a process ends before it has computed for so long, or waited for so long on end.

    Not before so much time has passed: a machine that others use may let it neither compute nor wait.
    """
    descriptor = os.pidfd_open(child)
    try:
        waiting_since = time.monotonic()
        while not wait([descriptor], LOOK_EVERY):
            state, *fields = Path(f"/proc/{child}/stat").read_text().rpartition(")")[2].split()
            used = (int(fields[10]) + int(fields[11])) / os.sysconf("SC_CLK_TCK")
            if state != "S":  # what asks again every second is asleep when it is looked at
                waiting_since = time.monotonic()
            if used > seconds or time.monotonic() - waiting_since > seconds:
                return False
        return True
    finally:
        os.close(descriptor)


def _in_child(attack: Attack[Any], scratch: Path, change: Any, answer: Path, said: Path) -> None:
    os.setsid()
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # an attempt ends with its worker
    world = scratch / "world"
    os.chdir(world)
    output = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for standard in (1, 2):
        os.dup2(output, standard)
    for variable, place in (("HOME", "home"), ("LOPD_CACHE", "cache"), ("TMPDIR", "tmp")):
        os.environ[variable] = str(scratch / place)
    tempfile.tempdir = None
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (FILE_LIMIT, FILE_LIMIT))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    held = int(re.search(r"VmData:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024
    most = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (held + PEAK_LIMIT, most))
    found: tuple[Verdict, str]
    try:
        found = "accepted", attack.use(world, change)
    except LopdError as error:
        found = "refused", str(error)
    except MemoryError as error:
        found = "memory", f"MemoryError: {error}: {_where(error)}"
    except BaseException as error:  # noqa: BLE001 - which one it is, is what is asked
        found = "uncaught", f"{type(error).__name__}: {str(error)[:300]}: {_where(error)}"
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    answer.write_text(json.dumps(found), encoding="utf-8")
    os._exit(0)


def _where(error: BaseException) -> str:
    """The last lines of this project that an error came through."""
    frames = [each for each in traceback.extract_tb(error.__traceback__) if "megatron_lopd" in each.filename]
    return " < ".join(
        f"{Path(each.filename).name}:{each.lineno} {each.name}" for each in reversed(frames[-4:])
    )


def _outside(scratch: Path) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(what may not change, what changes with it), of all but the run, the cache and the temporary files."""
    free = {scratch / "world" / "run", scratch / "cache", scratch / "tmp"}
    waiting = [scratch]
    while waiting:
        for entry in os.scandir(waiting.pop()):
            path = Path(entry.path)
            found = entry.stat(follow_symlinks=False)
            is_free = path in free
            stamp = (found.st_ino, found.st_mode, 0 if is_free else found.st_size, found.st_uid)
            if entry.is_dir(follow_symlinks=False):
                yield str(path.relative_to(scratch)), stamp[:2]
                if not is_free:
                    waiting.append(path)
            else:
                yield str(path.relative_to(scratch)), (*stamp, found.st_mtime_ns)


def _differ(before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    return {name for name in before.keys() | after.keys() if before.get(name) != after.get(name)}
