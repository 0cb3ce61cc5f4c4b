"""A process, told apart from every other one on any machine, and whether it has ended."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Owner:
    """Who works: a process of a boot of a host."""

    host: str
    boot: str
    pid_namespace: int
    pid: int
    started: int  # clock ticks after boot

    @staticmethod
    def here() -> Owner:
        """This process."""
        return Owner(
            host=socket.gethostname(),
            boot=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
            pid_namespace=os.stat("/proc/self/ns/pid").st_ino,
            pid=os.getpid(),
            started=_start_of(os.getpid()) or 0,
        )

    def is_gone(self, watcher: Owner) -> bool:
        """Whether the process has ended for certain, which only one that can see it may say."""
        return self._is_seen_by(watcher) and _start_of(self.pid) != self.started

    def is_here(self, watcher: Owner) -> bool:
        """Whether the process is there for certain, as `watcher` can see."""
        return self._is_seen_by(watcher) and _start_of(self.pid) == self.started

    def _is_seen_by(self, watcher: Owner) -> bool:
        return (self.host, self.boot, self.pid_namespace) == (
            watcher.host,
            watcher.boot,
            watcher.pid_namespace,
        )


def is_suspended(pid: int) -> bool:
    """Whether a process of this machine has been stopped by a signal, and not by a debugger."""
    return _state_of(pid)[:1] == ["T"]


def _start_of(pid: int) -> int | None:
    """When a process began, in clock ticks after boot; None when it has ended."""
    fields = _state_of(pid)
    return int(fields[19]) if fields and fields[0] not in "ZX" else None


def _state_of(pid: int) -> list[str]:
    """The fields of Linux's proc(5) from the process's state on; none when it is gone."""
    try:
        # A process's name, cut after 15 bytes, is in no encoding.
        return Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return []
