"""A file's stamp: what tells, unread, that nobody has written to it since it was last looked at."""

from __future__ import annotations

import os

# Device, inode, bytes, time of its content and time of change (nanoseconds): any write, and any copy, changes
# one of them, and nobody can set the last one.
Stamp = tuple[int, int, int, int, int]

# Nanoseconds for which a file that is written again may keep its time: two ticks of a kernel's clock; where a
# file system keeps no parts of a second, two seconds.
TICK, COARSE_TICK = 20_000_000, 2_000_000_000
_SECOND = 1_000_000_000


def stamp_of(found: os.stat_result) -> Stamp:
    """Of what the operating system says of a file."""
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def settled_at(changed: int) -> int:
    """From when on a write gives a file another time of change than this. Both in nanoseconds, epoch time."""
    return changed + (TICK if changed % _SECOND else COARSE_TICK)
