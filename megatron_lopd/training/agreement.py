"""What ranks must decide alike: work done once for all of them, and flags any one of them may raise."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_lopd.errors import DataError, LopdError

T = TypeVar("T")


def on_rank_zero(work: Callable[[], T]) -> T:
    """Run `work` on rank 0 alone. Every rank gets its result, or raises its LopdError.

    An OSError becomes a DataError naming the file: left to itself it would end rank 0 and hang the others.
    """
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = work()
        except LopdError as error:
            outcome[1] = error
        except OSError as error:
            outcome[1] = DataError(f"{error.filename}: {error.strerror}: check the disk and its permissions")
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    result: T = outcome[0]
    return result


def any_rank(flag: bool, device: torch.device) -> bool:
    """True on every rank when `flag` is on at least one."""
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised.item())
