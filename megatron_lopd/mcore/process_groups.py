"""The process group and Megatron-Core's parallel state, entered and left as one context."""

from __future__ import annotations

import functools
import gc
import math
import os
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import HashStore, PrefixStore, Store, TCPStore
from torch.distributed.rendezvous import rendezvous

from megatron_lopd.config import ParallelConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import compat, transformer_engine
from megatron_lopd.runtime import heartbeats
from megatron_lopd.runtime.environment import LOOPBACK

# How long a collective, or the ranks' first meeting, waits for the last rank. What may take long on one rank
# is waited for outside of collectives, and ranks that stop are missed sooner (runtime/heartbeats.py); this is
# for what nobody thought of, and above what an engine is waited for.
TIMEOUT = timedelta(hours=3)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands: sizes, and 0-based ranks, of the world and of each parallel axis."""

    world_size: int
    rank: int
    tp_size: int
    tp_rank: int
    pp_size: int
    pp_rank: int
    cp_size: int
    cp_rank: int
    dp_size: int
    dp_rank: int

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds the output layer."""
        return self.pp_rank == self.pp_size - 1


@contextmanager
def model_parallel(parallel: ParallelConfig, seed: int, timeout: timedelta = TIMEOUT) -> Iterator[Ranks]:
    """Set up every process group Megatron-Core needs, and take them down on the way out.

    Under torchrun (RANK and WORLD_SIZE set) the world is its processes; otherwise it is this process
    alone. `seed` seeds Megatron-Core's named random states. `timeout` is every group's. May be entered again
    in one process.
    Raises ConfigError when the processes do not divide into the groups of `parallel`.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    _check_world(parallel, world_size)
    compat.prepare()
    device = None  # of the groups: the one that NCCL is to use, where it would otherwise have to guess
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    # A prefix of its own each time: a store outlives its groups, and would hand out their old addresses. The
    # store counts, by rank, and the ranks enter alike.
    world = world_store()
    entered = world.add(f"entered by {rank}", 1)
    if entered > 1:
        # The groups of before are garbage in cycles with what was trained; each has descriptors and threads.
        gc.collect()
    store = PrefixStore(f"lopd{entered}", world)
    hook = sys.excepthook
    torch.distributed.init_process_group(
        compat.backend(),
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timeout,
        device_id=device if world_size > 1 else None,  # it connects every group at once, for one rank in vain
    )
    if world_size == 1:
        # torch's names the rank in each line of a traceback, once more each time, and for good.
        sys.excepthook = hook
    chunks = parallel.virtual_pipeline
    try:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=chunks if chunks > 1 else None,
            context_parallel_size=parallel.context,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor_size,
            distributed_timeout_minutes=math.ceil(timeout / timedelta(minutes=1)),
            # Nothing uses them; and where a device is bound to the default group, the ranks outside of a new
            # group split NCCL's communicator whatever its backend, which those inside do not.
            create_gloo_process_groups=False,
        )
        model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
        yield _ranks()
    finally:
        transformer_engine.forget_fp8_state()
        # Of all models' tables: it would keep the embeddings of those that are gone, and of each a group.
        RotaryEmbedding.forward.cache_clear()
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


def _check_world(parallel: ParallelConfig, world_size: int) -> None:
    needed = parallel.ranks_multiple
    if world_size % needed:
        raise ConfigError(
            f"parallel: {parallel.product} needs a multiple of {needed} processes, not {world_size}: start "
            f"{needed} (torchrun --nproc-per-node {needed}, or parallel.processes={needed}) or lower a size"
        )


def world_store() -> Store:
    """The store over which the ranks found each other; it outlives every `model_parallel`."""
    return _store(int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)))


@functools.cache
def _store(rank: int, world_size: int) -> Store:
    """torchrun's rendezvous store, kept for the life of the process, or one in memory."""
    if "RANK" not in os.environ:
        return HashStore()
    has_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # torchrun's, which has the store
    store: Store
    if rank == 0 and os.environ.get("MASTER_ADDR") == LOOPBACK and not has_agent:
        store = _store_of_this_machine(world_size)
    else:
        store, _, _ = next(rendezvous("env://", rank, world_size, timeout=TIMEOUT))
    if world_size > 1:
        heartbeats.join(rank, store, os.environ["MASTER_ADDR"])
    return store


def _store_of_this_machine(world_size: int) -> Store:
    """Rank 0's store where all ranks are here, out of other machines' reach: torch's is on every address.

    What ranks send each other over it are pickles, and whoever can write to it could send them one.
    """
    port = int(os.environ["MASTER_PORT"])
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise ConfigError(f"MASTER_PORT={port}: {error.strerror}: choose another") from None
    descriptor = listener.detach()  # the store's from now on
    return TCPStore(
        LOOPBACK,
        port,
        world_size,
        is_master=True,
        timeout=TIMEOUT,
        multi_tenant=True,
        master_listen_fd=descriptor,
    )


def _ranks() -> Ranks:
    return Ranks(
        world_size=torch.distributed.get_world_size(),
        rank=torch.distributed.get_rank(),
        tp_size=parallel_state.get_tensor_model_parallel_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp_size=parallel_state.get_pipeline_model_parallel_world_size(),
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        cp_size=parallel_state.get_context_parallel_world_size(),
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp_size=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
    )
