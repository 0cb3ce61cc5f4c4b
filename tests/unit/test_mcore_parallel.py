"""What the process groups are asked for."""

from __future__ import annotations

import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state

from megatron_lopd.config import ParallelConfig
from megatron_lopd.errors import ConfigError
from megatron_lopd.mcore import compat
from megatron_lopd.mcore import process_groups as parallel
from megatron_lopd.mcore.process_groups import model_parallel

pytestmark = pytest.mark.release


class _AskedError(Exception):
    pass


def test_no_other_machine_reaches_the_store_of_this_ones_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """What ranks send each other over it is unpickled."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    for name, value in (("RANK", "0"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", str(port))):
        monkeypatch.setenv(name, value)
    store = parallel._store.__wrapped__(0, 1)
    store.set("key", "value")
    assert store.get("key") == b"value"
    tables = (Path("/proc/net", name).read_text() for name in ("tcp", "tcp6"))
    lines = [line.split() for table in tables for line in table.splitlines()]
    listening = [fields[1] for fields in lines if fields[1].endswith(f":{port:04X}") and fields[3] == "0A"]
    assert listening == [f"0100007F:{port:04X}"]
    with pytest.raises(ConfigError, match=rf"MASTER_PORT={port}: .* choose another"):
        parallel._store.__wrapped__(0, 1)


def test_every_group_waits_for_hours(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: dict[str, Any] = {}
    initialize, new_groups = torch.distributed.init_process_group, parallel_state.initialize_model_parallel

    def record(function: Any) -> Any:
        def recorded(*arguments: Any, **options: Any) -> Any:
            asked.update(options)
            return function(*arguments, **options)

        return recorded

    monkeypatch.setattr(torch.distributed, "init_process_group", record(initialize))
    monkeypatch.setattr(parallel_state, "initialize_model_parallel", record(new_groups))
    with model_parallel(ParallelConfig(), seed=0):
        pass
    assert asked["timeout"] >= timedelta(hours=1)
    assert asked["distributed_timeout_minutes"] == asked["timeout"] / timedelta(minutes=1)
    assert asked["create_gloo_process_groups"] is False, "each is a split of NCCL's for the ranks outside it"
    with model_parallel(ParallelConfig(), seed=0, timeout=timedelta(seconds=90)):
        pass
    assert asked["timeout"] == timedelta(seconds=90)
    assert asked["distributed_timeout_minutes"] == 2


def test_a_lone_process_tells_its_errors_as_before() -> None:
    """After n trainings from Python each line of a traceback began with n times `[rank0]: `."""
    hook = sys.excepthook
    with model_parallel(ParallelConfig(), seed=0):
        assert sys.excepthook is hook
    assert sys.excepthook is hook


def test_nccl_is_told_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake GPU: nothing but what is asked of torch.distributed."""
    compat.prepare()
    asked: dict[str, Any] = {}

    def stop(*arguments: Any, **options: Any) -> None:
        asked.update(options)
        raise _AskedError

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", stop)
    monkeypatch.setattr(parallel, "world_store", torch.distributed.HashStore)
    for name, value in (("LOCAL_RANK", "3"), ("RANK", "3"), ("WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    with pytest.raises(_AskedError), model_parallel(ParallelConfig(), seed=0):
        pass
    assert asked["device_id"] == torch.device("cuda", 3)
