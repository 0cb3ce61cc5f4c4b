"""What ranks must decide alike: work done once for all of them, and flags any one of them may raise.

Where rank 0 or each rank may work for long, the others wait on the store, which has no timeout, and in no
collective, which has one.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_lopd.artifacts.committed import known_of, learn, share_of, verify
from megatron_lopd.artifacts.manifest import Manifest, committed_files
from megatron_lopd.engines.ranks import channel
from megatron_lopd.errors import DataError, LopdError

T = TypeVar("T")
CHANNEL = "agreement"


def meet() -> None:
    """Have rank 0 be there for the others before it works for long: they wait longer for that than for it."""
    channel(CHANNEL)


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone. Every rank gets its result, or raises its LopdError.

    An OSError becomes a DataError naming the file: left to itself it would end rank 0 and hang the others.
    No process group is needed. Rank 0 meets the others first: they wait longer for its work than for it.
    """
    messages = channel(CHANNEL)
    outcome: list[Any] = [None, None]
    if _rank_and_size()[0] == 0:
        try:
            outcome[0] = work()
        except LopdError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = DataError(f"{error.filename}: {error.strerror}: check the disk and its permissions")
        messages.send(outcome, last=True)  # each may be the last: an error ends rank 0
    else:
        outcome = messages.receive()
        if outcome[1] is not None:
            outcome[1].said = True  # by rank 0
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def verify_together(artifacts: Mapping[Path, Manifest]) -> None:
    """Hash every file of artifacts, by directory, each rank its share. Every rank calls, with the same.

    After that each rank knows them all, and hashes no file again that it opens as it was.

    Raises the same DataError in every rank when a file is missing or damaged. No process group is needed.
    """
    files = [
        file for directory, manifest in artifacts.items() for file in committed_files(directory, manifest)
    ]
    fault: DataError | None = None
    share = share_of(files, *_rank_and_size())
    try:
        verify(share)
    except DataError as error:
        fault = error
    host = platform.node()
    told = channel(CHANNEL).collect((fault, host, known_of(share)))
    first, of_all = on_rank_zero(lambda: (next((each[0] for each in told if each[0]), None), told))
    if first is not None:
        raise first
    for _, theirs, known in of_all:
        learn(known, elsewhere=theirs != host)


def _rank_and_size() -> tuple[int, int]:
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when `flag` is on at least one."""
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())
