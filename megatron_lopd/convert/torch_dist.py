"""Megatron's distributed checkpoint format, written and read tensor by tensor in one process.

The format is torch.distributed.checkpoint's ("torch_dist": `.metadata` and `*.distcp`) with
Megatron's `metadata.json` and `common.pt` beside it. A checkpoint holds whole tensors in named
chunks, and no trace of a layout: `megatron.core.dist_checkpointing.load` reads it at any TP and PP.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import Any

import torch
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from torch import Tensor
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as dcp_metadata
from torch.distributed.checkpoint import planner as dcp_planner
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import create_default_global_save_plan
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    SavePlanner,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save

from megatron_lopd.errors import DataError, LopdError


@dataclass(frozen=True)
class Chunk:
    """A box of a checkpoint's tensor, and how to make it when its turn to be written comes."""

    key: str
    dtype: torch.dtype
    size: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    make: Callable[[], Tensor]  # -> [*shape], contiguous, on the CPU

    def write_item(self) -> WriteItem:
        """What torch.distributed.checkpoint plans with."""
        box = ChunkStorageMetadata(torch.Size(self.offset), torch.Size(self.shape))
        data = TensorWriteData(box, TensorProperties(dtype=self.dtype), torch.Size(self.size))
        return WriteItem(MetadataIndex(self.key, self.offset), WriteItemType.SHARD, tensor_data=data)


def save_chunks(chunks: Sequence[Chunk], empty_objects: Sequence[str], directory: Path) -> None:
    """Write a distributed checkpoint from chunks, making one at a time, in their order.

    `empty_objects` are keys of Megatron's sharded objects that are there and hold None.
    """
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")
            save({}, storage_writer=_Writer(directory), planner=_Planner(chunks, empty_objects), no_dist=True)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]  # of the one process
        if isinstance(reason, LopdError):
            raise reason from error
        # A full disk is an OSError from the file, or a RuntimeError from torch's zip writer.
        raise DataError(
            f"{directory}: cannot be written: {reason}: free some space or choose another place"
        ) from error
    # Megatron-LM reorders the QKV of a checkpoint whose version is missing or below 2.
    torch.save({"checkpoint_version": 3.0}, directory / "common.pt")
    save_config(CheckpointingConfig("torch_dist"), str(directory))


class _Writer(filesystem.FileSystemWriter):
    """Without the writer's path and a random id in `.metadata`: same tensors, same bytes."""

    def storage_meta(self) -> StorageMeta | None:
        return None


class _Planner(SavePlanner):
    """Plans the given chunks, and makes each only when the writer asks for it."""

    def __init__(self, chunks: Sequence[Chunk], empty_objects: Sequence[str]) -> None:
        self._empty_objects = empty_objects
        self._chunks = {MetadataIndex(chunk.key, chunk.offset): chunk for chunk in chunks}

    def set_up_planner(
        self,
        state_dict: dict[str, Any],
        storage_meta: StorageMeta | None = None,
        is_coordinator: bool = False,
    ) -> None:
        pass  # the chunks are the state

    def create_local_plan(self) -> SavePlan:
        objects = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self._empty_objects]
        return SavePlan([*objects, *(chunk.write_item() for chunk in self._chunks.values())])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return create_default_global_save_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        if write_item.type is WriteItemType.BYTE_IO:
            data = io.BytesIO()
            torch.save([None], data)  # a list, as Megatron keeps every shard that a rank has of an object
            return data
        chunk = self._chunks[write_item.index]
        tensor = chunk.make()
        if tensor.shape != chunk.shape or tensor.dtype != chunk.dtype:
            raise DataError(
                f"{chunk.key}: made of {tuple(tensor.shape)} {tensor.dtype}, "
                f"planned {chunk.shape} {chunk.dtype}"
            )
        return tensor


class TorchDistReader:
    """Reads boxes of tensors from a distributed checkpoint. Raises DataError when it is malformed.

    Nothing in it can run code: `.metadata` is unpickled by a reader that knows only the format's own
    records, tensors by torch's `weights_only` reader, and `common.pt` is not opened.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        path = self.directory / ".metadata"
        if not path.is_file():
            raise DataError(
                f"{self.directory}: not a torch_dist checkpoint (no .metadata): give its directory"
            )
        try:
            with path.open("rb") as stream:
                self._metadata: Metadata = _RecordUnpickler(stream).load()
        except (pickle.UnpicklingError, EOFError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: damaged, or not a checkpoint's metadata: {error}") from None

    @property
    def tensors(self) -> dict[str, TensorStorageMetadata]:
        """The checkpoint's tensors: whole size, dtype and chunks by key."""
        stored = self._metadata.state_dict_metadata
        return {key: item for key, item in stored.items() if isinstance(item, TensorStorageMetadata)}

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        """`tensor[index]` for the leading `index`, put together from the chunks that overlap it."""
        stored = self.tensors[key]
        shape = stored.size[len(index) :]
        result = torch.empty(shape, dtype=stored.properties.dtype)
        filled = 0
        for chunk in stored.chunks:
            lead = list(zip(index, chunk.offsets, chunk.sizes, strict=False))
            if all(start <= wanted < start + size for wanted, start, size in lead):
                tensor = self._load(MetadataIndex(key, chunk.offsets))
                tensor = tensor[tuple(wanted - start for wanted, start, _ in lead)]
                starts = chunk.offsets[len(index) :]
                box = tuple(slice(a, a + n) for a, n in zip(starts, tensor.shape, strict=True))
                result[box] = tensor
                filled += tensor.numel()
        if filled != result.numel():
            raise DataError(
                f"{self.directory}: {key}{list(index)}: chunks hold {filled} of {result.numel()} elements: "
                "the checkpoint is damaged"
            )
        return result

    def _load(self, index: MetadataIndex) -> Tensor:
        info = self._metadata.storage_data[index]
        path = self.directory / info.relative_path
        try:
            with path.open("rb") as stream:
                stream.seek(info.offset)
                data = io.BytesIO(stream.read(info.length))
            tensor = torch.load(data, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise DataError(f"{path}: {index.fqn} cannot be read: {error}") from None
        if not isinstance(tensor, Tensor):
            raise DataError(f"{path}: {index.fqn} is not a tensor: the checkpoint is damaged")
        return tensor


class _RecordUnpickler(pickle.Unpickler):
    """Resolves torch.distributed.checkpoint's dataclasses and enums, sizes, dtypes; nothing else."""

    _MODULES = (dcp_metadata, dcp_planner, filesystem)

    def find_class(self, module: str, name: str) -> Any:
        for known in self._MODULES:
            found = getattr(known, name, None) if module == known.__name__ else None
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum)):
                return found
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype | torch.layout):
            return value
        if (module, name) == ("torch.serialization", "_get_layout"):
            return torch.serialization._get_layout
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePath  # where the checkpoint was written: not a path to open
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
