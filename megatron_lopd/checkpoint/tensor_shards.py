"""Which part of the training state a rank keeps, as boxes of the model's whole tensors.

The distributed optimizer cuts the parameters, one after the other, into equal runs, a run for each
data-parallel rank: of a parameter of several axes a rank then has a run of its elements in C order, which is
no box. It is a few boxes, though (at most two for each axis but the first, and one more), each of them
contiguous in the run. So each rank can write what it has, straight from where it has it, into a file format
of boxes; and since a box says where it is in the whole tensor, a rank of any other layout reads the boxes
that its own overlap.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject, ShardedTensor
from torch import Tensor

from megatron_lopd.errors import CheckpointError
from megatron_lopd.mcore.optimizer import Optimization
from megatron_lopd.mcore.private import (
    ShardedTensorFactory,
    is_main_replica,
    nested_values,
    state_of,
    state_range,
)

# What the optimizer keeps of a parameter, by its name there: Megatron-Core's names in a checkpoint.
STATES = ("param", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Box:
    """A box of the whole tensor `key`, and its elements here: 1-D, in C order, on whatever device.

    `padded`: the whole tensor may have other sizes in a checkpoint of another layout, whose vocabulary is
    padded to another multiple; what is in one of them alone is padding.
    """

    key: str
    size: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    padded: bool
    elements: Tensor


def boxes_of_run(
    shape: tuple[int, ...], start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Elements [start, end) of a tensor in C order, as (offset, shape) of boxes, in that order."""
    if start >= end:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])
    first, last = -(-start // row), end // row  # the whole rows
    if first > last:  # within one row
        yield from _boxes_of_row(shape, last, start - last * row, end - last * row)
        return
    if start < first * row:
        yield from _boxes_of_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0 for _ in shape[1:])), (last - first, *shape[1:])
    if last * row < end:
        yield from _boxes_of_row(shape, last, 0, end - last * row)


def _boxes_of_row(
    shape: tuple[int, ...], row: int, start: int, end: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    for offset, box in boxes_of_run(shape[1:], start, end):
        yield (row, *offset), (1, *box)


class ShardedModel:
    """The chunks of this rank as they are now, with what the optimizer keeps of their parameters."""

    def __init__(self, optimization: Optimization) -> None:
        self._parts = optimization.optimizer.chained_optimizers
        self._chunks: list[dict[str, Any]] = [
            chunk.module.sharded_state_dict() for chunk in optimization.chunks
        ]
        values = [value for chunk in self._chunks for value in nested_values(chunk)]
        self._tensors = [value for value in values if isinstance(value, ShardedTensor | ShardedTensorFactory)]
        self._of = {id(value.data): value for value in self._tensors}

    def own_boxes(self) -> Iterator[Box]:
        """What this rank writes: with the other ranks', every element of weights and state once.

        The weights are shared out as their state is.
        """
        for param, start, end, states in self._runs():
            # Of ranks that have copies of a tensor and its state, as tensor-parallel ranks have of a norm,
            # one data-parallel group's write it. A replica's numbers: pipeline, tensor, data parallel.
            if is_main_replica(self._of[id(param)].replica_id[:2]):
                yield from self._boxes(param, start, end, {"": param.detach().view(-1)[start:end], **states})
        for tensor in self._buffers():
            if is_main_replica(tensor.replica_id):
                yield _whole_box(tensor)

    def wanted_boxes(self) -> Iterator[Box]:
        """What this rank reads: its whole weights, and its share of the state. Elements are the live ones."""
        for each in self._tensors:
            if isinstance(each.data, torch.nn.Parameter):
                yield from self._boxes(each.data, 0, each.data.numel(), {"": each.data.detach().view(-1)})
        for tensor in self._buffers():
            yield _whole_box(tensor)
        for run in self._runs():
            yield from self._boxes(*run)

    def objects(self) -> list[dict[str, ShardedObject]]:
        """What is no tensor, by name, of each chunk: what modules keep beside weights (`_extra_state`)."""
        return [
            {name: value for name, value in chunk.items() if isinstance(value, ShardedObject)}
            for chunk in self._chunks
        ]

    def _buffers(self) -> Iterator[ShardedTensor]:
        return (each for each in self._tensors if not isinstance(each.data, torch.nn.Parameter))

    def _runs(self) -> Iterator[tuple[Tensor, int, int, dict[str, Tensor]]]:
        """Parameters of which this rank has state: (parameter, start, end, state by prefix of its key)."""
        for part in self._parts:
            for param in part.model_param_gbuf_map:
                run = state_range(part, param)
                state = state_of(part, param)
                states = {f"optimizer.state.{name}.": state[name].detach().view(-1) for name in STATES}
                yield param, run.start, run.end, states

    def _boxes(self, param: Tensor, start: int, end: int, runs: dict[str, Tensor]) -> Iterator[Box]:
        """Elements [start, end) of a parameter, of each of `runs`, which have them, by prefix of the key."""
        sharded = self._of[id(param)]
        parts = nested_values(sharded.build()) if isinstance(sharded, ShardedTensorFactory) else [sharded]
        for part in parts:
            tensor = part.data
            if not tensor.is_contiguous():
                raise CheckpointError(f"{part.key}: its parts are not contiguous: it cannot be checkpointed")
            begin = tensor.storage_offset() - param.storage_offset()
            at, stop = max(start, begin), min(end, begin + tensor.numel())
            for offset, shape in boxes_of_run(tuple(tensor.shape), at - begin, stop - begin):
                count = math.prod(shape)
                for prefix, run in runs.items():
                    yield Box(
                        f"{prefix}{part.key}",
                        tuple(part.global_shape),
                        _shifted(part, offset),
                        (1,) * part.prepend_axis_num + shape,
                        part.allow_shape_mismatch,
                        run[at - start : at - start + count],
                    )
                at += count


def _shifted(part: ShardedTensor, offset: tuple[int, ...]) -> tuple[int, ...]:
    before, axes = part.global_offset[: part.prepend_axis_num], part.global_offset[part.prepend_axis_num :]
    return (*before, *(a + b for a, b in zip(axes, offset, strict=True)))


def _whole_box(tensor: ShardedTensor) -> Box:
    return Box(
        tensor.key,
        tuple(tensor.global_shape),
        tuple(tensor.global_offset),
        (1,) * tensor.prepend_axis_num + tuple(tensor.local_shape),
        tensor.allow_shape_mismatch,
        tensor.data.detach().view(-1),
    )
