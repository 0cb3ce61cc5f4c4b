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
        if (self.host, self.boot, self.pid_namespace) != (watcher.host, watcher.boot, watcher.pid_namespace):
            return False
        return _start_of(self.pid) != self.started


def _start_of(pid: int) -> int | None:
    """When a process began, in clock ticks after boot (Linux's proc(5)); None when it has ended."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state in "ZX" else int(fields[18])
