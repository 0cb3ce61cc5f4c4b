"""Gloo: collectives that are under way at once, and what groups leave open."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from gloo import run_ranks

from tests.training_zoo import make_root, train

pytestmark = pytest.mark.slow

# What Megatron-Core does with the weights, by one rank: no network, so that the workers do little else than
# end collectives. Two workers a group were dead after some thousands, within a second.
GATHERS = """
import torch
from megatron.core import parallel_state
from torch.distributed import _coalescing_manager, all_gather_into_tensor

from megatron_lopd.config import ParallelConfig
from megatron_lopd.mcore.process_groups import model_parallel

with model_parallel(ParallelConfig(), seed=0):
    group = parallel_state.get_data_parallel_group()
    shard, weights = torch.ones(2), [torch.zeros(2) for _ in range(64)]
    for _ in range(1000):
        under_way = []
        for weight in weights:
            with _coalescing_manager(group, async_ops=True) as gather:
                all_gather_into_tensor(weight, shard, group=group)
            under_way.append(gather)
        for gather in under_way:
            gather.wait()
    assert all((weight == 1).all() for weight in weights)
"""


def test_many_all_gathers_at_once_do_not_end_the_process() -> None:
    """In a process of its own, since the outcome without the mend is an abort in malloc."""
    ran = subprocess.run(
        [sys.executable, "-c", GATHERS], capture_output=True, text=True, timeout=120, check=False
    )
    assert ran.returncode == 0, ran.stderr[-2000:]


def test_who_trains_again_and_again_in_one_process_has_no_more_files_open(tmp_path: Path) -> None:
    """Groups are in cycles with what was trained, and in caches. Each stage took 64 of 1,024 files."""
    (opened,) = run_ranks(1, _open_after_each, make_root(tmp_path), ["first", "second", "third"])
    assert len(set(opened)) == 1, opened


def _open_after_each(root: Path, works: list[str]) -> list[int]:
    opened = []
    for work in works:
        train(root, work, steps=2)
        opened.append(len(os.listdir("/proc/self/fd")))
    return opened
