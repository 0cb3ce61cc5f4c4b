"""Megatron's distributed checkpoint, written tensor by tensor in one process.

The format is checkpoint/torch_dist.py's, with Megatron's `metadata.json` and `common.pt` beside it. A
checkpoint holds whole tensors in named chunks, and no trace of a layout:
`megatron.core.dist_checkpointing.load` reads it at any TP and PP.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_lopd.checkpoint.torch_dist import INDEX, Entry, index_of, pickled, write_value
from megatron_lopd.errors import DataError
from megatron_lopd.mcore.private import CheckpointingConfig, save_config

FILE = "__0_0.distcp"


@dataclass(frozen=True)
class TensorChunk:
    """A box of a checkpoint's tensor, and how to make it when its turn to be written comes."""

    key: str
    dtype: torch.dtype
    size: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    make: Callable[[], Tensor]  # -> [*shape], contiguous, on the CPU


def save_chunks(chunks: Sequence[TensorChunk], empty_objects: Sequence[str], directory: Path) -> None:
    """Write a distributed checkpoint from chunks, making one at a time, in their order.

    `empty_objects` are keys of Megatron's sharded objects that are there and hold None.
    """
    directory.mkdir(parents=True, exist_ok=True)
    try:
        index = index_of(_written(chunks, empty_objects, directory / FILE))
        (directory / INDEX).write_bytes(index)
        # Megatron-LM reorders the QKV of a checkpoint whose version is missing or below 2.
        torch.save({"checkpoint_version": 3.0}, directory / "common.pt")
        save_config(CheckpointingConfig("torch_dist"), str(directory))
    except (OSError, RuntimeError) as error:  # the latter from torch's zip writer
        raise DataError(
            f"{directory}: cannot be written: {error}: free some space or choose another place"
        ) from error


def _written(chunks: Sequence[TensorChunk], empty_objects: Sequence[str], path: Path) -> Iterator[Entry]:
    with path.open("wb") as stream:
        for chunk in chunks:
            tensor = chunk.make()
            if tensor.shape != chunk.shape or tensor.dtype != chunk.dtype:
                raise DataError(
                    f"{chunk.key}: made of {tuple(tensor.shape)} {tensor.dtype}, "
                    f"planned {chunk.shape} {chunk.dtype}"
                )
            start = stream.tell()
            write_value(stream, tensor)
            length = stream.tell() - start
            yield Entry(
                chunk.key, chunk.dtype, chunk.size, chunk.offset, chunk.shape, path.name, start, length
            )
        nothing = pickled([None])  # a list, as Megatron keeps every shard that a rank has of an object
        for key in empty_objects:
            start = stream.tell()
            write_value(stream, nothing)
            yield Entry(key, None, (), (), (), path.name, start, len(nothing))
