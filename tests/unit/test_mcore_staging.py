"""Runs of elements as boxes, and boxes in segments of host memory."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from megatron_lopd.checkpoint import staging
from megatron_lopd.checkpoint.staging import HostBuffer
from megatron_lopd.checkpoint.tensor_shards import Box, boxes_of_run
from megatron_lopd.errors import CheckpointError


def test_any_run_of_elements_is_a_few_boxes_in_order() -> None:
    rng = random.Random(0)
    for _ in range(2000):
        shape = tuple(rng.randint(1, 5) for _ in range(rng.randint(0, 4)))
        count = math.prod(shape)
        start = rng.randint(0, count)
        end = rng.randint(start, count)
        whole = torch.arange(count).view(shape)
        boxes = list(boxes_of_run(shape, start, end))
        found = [
            whole[tuple(slice(at, at + size) for at, size in zip(offset, box, strict=True))].reshape(-1)
            for offset, box in boxes
        ]
        assert torch.cat([torch.empty(0, dtype=torch.int64), *found]).tolist() == list(range(start, end))
        assert len(boxes) <= max(1, 2 * len(shape) - 1)


def test_boxes_are_cut_at_the_ends_of_segments_and_copied_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(staging, "SEGMENT_BYTES", 2048)
    whole = {
        "a": torch.randn(2, 100, 7),
        "b": torch.randn(5).bfloat16(),
        "c": torch.randn(1000),
        "d": torch.randn(3, 3, 3, 11).bfloat16(),
    }
    boxes = [
        Box(key, tuple(each.shape), (0,) * each.ndim, tuple(each.shape), False, each.view(-1))
        for key, each in whole.items()
    ]
    host = HostBuffer(boxes)
    assert all(segment.nbytes <= 2048 for segment in host._segments)
    for _ in range(2):  # the memory is kept
        for tensor in whole.values():
            tensor.normal_()
        copies = host.copied(boxes)
        begin = {segment.data_ptr() for segment in host._segments}
        assert {copy.elements.untyped_storage().data_ptr() for copy in copies} == begin
        assert len(copies) > len(boxes)
        found = {key: torch.full_like(each, float("nan")) for key, each in whole.items()}
        for copy in copies:
            place = tuple(slice(at, at + size) for at, size in zip(copy.offset, copy.shape, strict=True))
            assert found[copy.key][place].isnan().all(), "no element twice"
            found[copy.key][place] = copy.elements.view(copy.shape)
        assert all(torch.equal(found[key], each) for key, each in whole.items())


def box(elements: int) -> Box:
    return Box("a", (elements,), (0,), (elements,), False, torch.arange(elements))


def test_on_a_gpu_the_memory_is_pinned_and_the_copies_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake GPU: what is asked of torch, which here copies at once."""
    asked: list[bool] = []
    done: list[str] = []
    empty = torch.empty

    def recorded(*arguments: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append(pin_memory)
        return empty(*arguments, **options)

    def copied(target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        done.append("begun" if non_blocking else "copied")
        target.numpy()[:] = source.numpy()
        return target

    monkeypatch.setattr(torch, "empty", recorded)
    monkeypatch.setattr(torch.Tensor, "copy_", copied)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    stream = SimpleNamespace(synchronize=lambda: done.append("waited"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    boxes = [box(4), box(4)]
    HostBuffer(boxes).copied(boxes)
    assert asked == [True]
    assert done == ["begun", "begun", "waited"]


def test_too_little_host_memory_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any, **options: Any) -> torch.Tensor:
        raise RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported later")

    monkeypatch.setattr(torch, "empty", full)
    with pytest.raises(CheckpointError, match=r"0\.0 GB of host memory.* \(CUDA error: out") as caught:
        HostBuffer([box(4)])
    assert "\n" not in str(caught.value)
