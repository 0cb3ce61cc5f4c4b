"""Giving a whole file a name that nobody has given yet: of many that try at once, on any machines, one does.

A hard link does it, which fails where the name is taken. Where a file system has none (FAT, SMB, some of
FUSE), a rename that replaces nothing does, where it has that. What has neither cannot tell who was first.
"""

from __future__ import annotations

import ctypes
import errno
import os
from pathlib import Path

from megatron_lopd.errors import DataError

# How file systems say that they have no hard links; EXDEV: between two quotas, or layers of a container.
_NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EXDEV, errno.EMLINK}
_NO_SUCH_RENAME = {errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS}
_AT_FDCWD, _RENAME_NOREPLACE = -100, 1  # Linux's renameat2(2)


def take_name(private: Path, path: Path) -> bool:
    """Name the file `private` `path` too, or instead, unless that is taken. Whether it got the name.

    Raises FileNotFoundError where `private` or its directory is gone, DataError where the file system has no
    way to do it, and OSError.
    """
    try:
        os.link(private, path)
    except OSError as error:
        if _is_one_file(private, path):  # of a request that was sent twice the second answer came: NFS
            return True
        if error.errno == errno.EEXIST:
            return False
        if error.errno not in _NO_LINKS:
            raise
        return _rename(private, path)
    return True


def _is_one_file(private: Path, path: Path) -> bool:
    try:
        return os.path.samestat(os.lstat(private), os.lstat(path))
    except OSError:
        return False


def _rename(private: Path, path: Path) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    source, target = os.fsencode(private), os.fsencode(path)
    if libc.renameat2(_AT_FDCWD, source, _AT_FDCWD, target, _RENAME_NOREPLACE) == 0:
        return True
    number = ctypes.get_errno()
    if number == errno.EEXIST:
        return False
    if number in _NO_SUCH_RENAME:
        raise DataError(
            f"{path.parent}: its file system has neither hard links nor renames that replace nothing, by one "
            "of which it is known who was first: choose a run_dir on another file system"
        )
    raise OSError(number, os.strerror(number), str(path))
