"""The several-process helper reports what went wrong, and Megatron-Core's groups can be made again."""

from __future__ import annotations

import multiprocessing as mp
import os
import time

import pytest
import torch
from gloo import RankError, run_ranks

from megatron_lopd.config import ParallelConfig


def fail_on_rank_1() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("rank one is unwell")
    time.sleep(60)


def die() -> None:
    os._exit(3)


def sleep() -> None:
    time.sleep(60)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (fail_on_rank_1, "rank one is unwell"),
        (die, "died without a word"),
        (sleep, r"\[0, 1\] did not finish"),
    ],
)
def test_a_failing_rank_ends_all(function: object, message: str) -> None:
    assert callable(function)
    with pytest.raises(RankError, match=message):
        run_ranks(2, function, timeout=10.0 if function is not sleep else 0.5)
    assert not mp.active_children()


def sums_by_layout() -> list[float]:
    from megatron.core import parallel_state

    from megatron_lopd.mcore.process_groups import model_parallel

    sums = []
    for layout in (ParallelConfig(tensor=2, processes=2), ParallelConfig(pipeline=2, processes=2)):
        with model_parallel(layout, seed=0) as ranks:
            value = torch.tensor([ranks.rank + 1.0])
            torch.distributed.all_reduce(value, group=parallel_state.get_tensor_model_parallel_group())
            sums.append(value.item())
    return sums


def test_the_groups_can_be_made_again_in_another_layout() -> None:
    assert run_ranks(2, sums_by_layout) == [[3.0, 1.0], [3.0, 2.0]]
