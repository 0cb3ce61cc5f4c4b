"""Gloo, which carries the collectives where there is no GPU: what has to be different from torch's own."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed import ProcessGroupGloo, Store, distributed_c10d


class GlooOfOneWorker(ProcessGroupGloo):
    """A process group whose collectives run one after another, in the order they were asked for.

    torch gives a group two worker threads. As of 2.13 both write down, with no lock, the name of the
    collective they did last, and two threads that move one string free its memory twice. Megatron-Core has
    several all-gathers of weights under way at once, so now and then a rank dies of it. All ranks ask in the
    same order, as NCCL needs them to, so nothing that a group's one worker waits for is behind it.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        from megatron_lopd.mcore.private import gloo_options  # imports Megatron-Core's checkpoints

        interfaces = [name for name in os.environ.get("GLOO_SOCKET_IFNAME", "").split(",") if name]
        super().__init__(store, rank, size, gloo_options(timeout, interfaces))


def use_one_worker() -> None:
    """Have torch make every gloo group of this process a `GlooOfOneWorker` from here on."""
    distributed_c10d.ProcessGroupGloo = GlooOfOneWorker  # type: ignore[misc]


def all_gather_unequal(
    parts: list[torch.Tensor], own: torch.Tensor, group: Any = None, async_op: bool = False
) -> Any:
    """`torch.distributed.all_gather` of parts that may differ in their first dimension: padded on the way."""
    if len({part.shape for part in parts}) == 1:
        return distributed_c10d.all_gather(parts, own, group=group, async_op=async_op)
    padded = own.new_zeros(max(map(len, parts)), *own.shape[1:])
    padded[: len(own)] = own
    received = [torch.empty_like(padded) for _ in parts]
    distributed_c10d.all_gather(received, padded, group=group)
    for part, whole in zip(parts, received, strict=True):
        part.copy_(whole[: len(part)])
    return None


def reduce_scatter_unequal(output: torch.Tensor, parts: list[torch.Tensor], *, group: Any) -> None:
    """`torch.distributed.reduce_scatter` of parts that may differ in their first dimension."""
    whole = torch.cat(parts)
    distributed_c10d.all_reduce(whole, group=group)
    output.copy_(torch.split(whole, [len(part) for part in parts])[group.rank()])
