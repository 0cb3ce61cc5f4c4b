"""Run a function in several processes joined by gloo, as torchrun would, and collect what they return."""

from __future__ import annotations

import gc
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from torch.distributed import TCPStore

from tests.forks import CONTEXT


class RankError(AssertionError):
    """A rank raised, died or did not finish; the message holds every traceback that was collected."""


def run_ranks(world_size: int, function: Callable[..., Any], *args: Any, timeout: float = 120.0) -> list[Any]:
    """Call `function(*args)` in `world_size` processes with torchrun's environment; results by rank.

    `function` is module-level, and it, `args` and its results can be pickled. `timeout` is in seconds,
    for all of them together. Raises RankError, and leaves no process behind.
    """
    # The store is served from here, as by torchrun's agent, on a port that is taken the moment it is chosen.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    pipes = [CONTEXT.Pipe(duplex=False) for _ in range(world_size)]
    processes = [
        CONTEXT.Process(target=_worker, args=(rank, world_size, store.port, send, function, args), daemon=True)
        for rank, (_, send) in enumerate(pipes)
    ]
    for process in processes:
        process.start()
    for _, send in pipes:
        send.close()  # so that a rank that dies is seen as end of file
    try:
        return _collect([receive for receive, _ in pipes], timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(pipes: list[Connection], timeout: float) -> list[Any]:
    results: dict[int, Any] = {}
    errors: dict[int, str] = {}
    deadline = time.monotonic() + timeout
    pending = dict(zip(pipes, range(len(pipes)), strict=True))
    while pending and not errors:
        ready = wait(list(pending), timeout=max(0.0, deadline - time.monotonic()))
        if not ready:
            raise RankError(f"ranks {sorted(pending.values())} did not finish in {timeout:.0f} s")
        for pipe in ready:
            assert isinstance(pipe, Connection)
            rank = pending.pop(pipe)
            try:
                succeeded, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                succeeded, value = False, "died without a word"
            (results if succeeded else errors)[rank] = value
    if errors:
        raise RankError("\n".join(f"rank {rank}: {error}" for rank, error in sorted(errors.items())))
    return [results[rank] for rank in range(len(pipes))]


def _worker(
    rank: int,
    world_size: int,
    port: int,
    send: Connection,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    import torch

    gc.freeze()  # what the server imported: Megatron-Core collects garbage in every save
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE="True",
        GLOO_SOCKET_IFNAME="lo",
    )
    try:
        answer = pickle.dumps((True, function(*args)))
    except BaseException:  # noqa: BLE001 - every failure belongs in the parent's report
        answer = pickle.dumps((False, traceback.format_exc()))
    # Bytes, since Connection.send would put tensors into memory shared with a process about to end.
    send.send_bytes(answer)
