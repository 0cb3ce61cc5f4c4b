"""The file format of checkpoints: boxes of named tensors and pickled objects, in files of any number.

It is torch.distributed.checkpoint's ("torch_dist"): each box and each object is a `torch.save` of its own at
some offset of some `*.distcp` file, and `.metadata` says where. Nothing in it tells of a layout, and
`megatron.core.dist_checkpointing.load` reads it at any. Here one process writes or reads without the others.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import pickle
import zipfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum
from pathlib import Path, PurePath
from typing import IO, Any, BinaryIO, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.checkpoint import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    TensorStorageMetadata,
)

from megatron_lopd.artifacts.manifest import (
    committed_file,
    is_committed,
    is_plain_path,
    load_manifest,
    shown,
    verify_files,
)
from megatron_lopd.errors import CheckpointError, DataError
from megatron_lopd.files.digests import HashedFile
from megatron_lopd.files.reading import is_there, open_file, reading
from megatron_lopd.mcore.private import (
    INDEX_MODULES,
    MetadataIndex,
    StorageInfo,
    TensorProperties,
    get_layout,
)

INDEX = ".metadata"


@dataclass(frozen=True)
class Entry:
    """A box of the tensor `key`, or an object (`dtype` None), and the bytes of `file` that hold it."""

    key: str
    dtype: torch.dtype | None
    size: tuple[int, ...]  # of the whole tensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    file: str
    start: int
    length: int


def write_value(stream: IO[bytes] | HashedFile, value: Tensor | bytes) -> None:
    """Append a tensor, contiguous and in host memory, or an object pickled by `pickled`.

    A tensor is written from where it is: `torch.save` writes the whole storage that a tensor is a view of,
    and so it is given a storage that begins and ends with it.
    """
    if isinstance(value, bytes):
        stream.write(value)
    elif value.numel():
        raw = value.detach().view(-1).view(torch.uint8).numpy()
        alone = torch.frombuffer(raw, dtype=value.dtype).view(value.shape)
        torch.save(alone, cast(IO[bytes], stream))
    else:
        torch.save(value.detach().clone(), cast(IO[bytes], stream))


def pickled(value: Any) -> bytes:
    """An object as the format holds it."""
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def index_of(entries: Iterable[Entry]) -> bytes:
    """`.metadata`: the same bytes for the same entries in the same order.

    Raises CheckpointError when they leave out an element of a tensor, or hold one twice.
    """
    # A pickle tells of equal values whether they are one object: every string is one, and no tuple is.
    names: dict[str, str] = {}
    stored: dict[str, TensorStorageMetadata | BytesStorageMetadata] = {}
    places: dict[MetadataIndex, StorageInfo] = {}
    for entry in entries:
        key, file = (names.setdefault(name, name) for name in (entry.key, entry.file))
        if entry.dtype is None:
            stored[key] = BytesStorageMetadata()
            place = MetadataIndex(key)
        else:
            tensor = stored.get(key)
            if tensor is None:
                properties = TensorProperties(dtype=entry.dtype)
                tensor = stored[key] = TensorStorageMetadata(properties, torch.Size(entry.size), [])
            assert isinstance(tensor, TensorStorageMetadata)
            tensor.chunks.append(ChunkStorageMetadata(torch.Size(entry.offset), torch.Size(entry.shape)))
            place = MetadataIndex(key, torch.Size(entry.offset))
        if place in places:
            raise CheckpointError(f"{key}{list(entry.offset)} was written twice: report this as a defect")
        places[place] = StorageInfo(file, entry.start, entry.length)
    for key, each in stored.items():
        if isinstance(each, TensorStorageMetadata):
            written, whole = sum(math.prod(box.sizes) for box in each.chunks), math.prod(each.size)
            if written != whole:
                raise CheckpointError(
                    f"{key}: {written} of {whole} elements were written: report this as a defect"
                )
    return pickle.dumps(Metadata(stored, storage_data=places))


class TorchDistReader:
    """Reads boxes of tensors from a distributed checkpoint. Raises DataError when it is malformed.

    Nothing in it can run code: `.metadata` is unpickled by a reader that knows only the format's own
    records, all else by torch's `weights_only` reader. Nothing outside its directory is opened, and of one
    that this project committed only what its manifest lists, as it was committed. No tensor is larger than
    the file that holds it.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._boxes: dict[str, tuple[NDArray[np.int64], NDArray[np.int64]]] = {}
        self._manifest = load_manifest(self.directory) if is_committed(self.directory) else None
        if self._manifest is not None:
            verify_files(self.directory, self._manifest)
        path = self.directory / INDEX
        if not is_there(path):
            raise DataError(f"{self.directory}: not a torch_dist checkpoint (no {INDEX}): give its directory")
        with self._open(INDEX) as stream:
            try:
                self._metadata: Metadata = _RecordUnpickler(io.BytesIO(stream.read())).load()
                sizes = _require_sound(self._metadata)
            except Exception as error:  # noqa: BLE001 - in a damaged one a record may be built of anything
                raise DataError(f"{path}: damaged, or not a checkpoint's metadata: {_words(error)}") from None
        for name, size in sizes.items():
            with self._open(name) as stream:
                held = os.fstat(stream.fileno()).st_size
            if held < size:
                raise DataError(f"{self.directory / name}: damaged: {held} bytes, {INDEX} speaks of {size}")
        self.tensors: dict[str, TensorStorageMetadata] = {}
        """Whole size, dtype and chunks by key."""
        self.objects: set[str] = set()
        for key, item in self._metadata.state_dict_metadata.items():
            if isinstance(item, TensorStorageMetadata):
                self.tensors[key] = item
            else:
                self.objects.add(key)

    def read(self, key: str, index: tuple[int, ...]) -> Tensor:
        """`tensor[index]` for the leading `index`."""
        stored = self.tensors[key]
        shape = stored.size[len(index) :]
        result = torch.empty(shape, dtype=stored.properties.dtype)
        self.read_box(key, (*index, *(0 for _ in shape)), result.view((1,) * len(index) + tuple(shape)))
        return result

    def read_box(self, key: str, offset: tuple[int, ...], target: Tensor) -> None:
        """Fill `target` with the box of the tensor `key` that begins at `offset`, from the chunks under it.

        What of the box is beyond the tensor's end is left as it is.
        """
        stored = self.tensors[key]
        low = np.array(offset, dtype=np.int64)
        high = np.minimum(low + np.array(target.shape, dtype=np.int64), np.array(stored.size, dtype=np.int64))
        starts, ends = self._chunks(key)
        overlap = (np.maximum(starts, low) < np.minimum(ends, high)).all(axis=1)
        filled = 0
        for number in np.flatnonzero(overlap):
            chunk = stored.chunks[number]
            from_, to = np.maximum(starts[number], low), np.minimum(ends[number], high)
            source = self._load(MetadataIndex(key, chunk.offsets), chunk.sizes)
            part = source[_slices(from_ - starts[number], to - starts[number])]
            target[_slices(from_ - low, to - low)] = part
            filled += part.numel()
        wanted = int(np.prod(np.maximum(high - low, 0)))
        if filled != wanted:
            raise DataError(
                f"{self.directory}: {key}{list(offset)}: chunks hold {filled} of {wanted} elements: "
                "the checkpoint is damaged"
            )

    def read_object(self, key: str) -> Any:
        """The object `key`, one of `objects`."""
        return self._read(MetadataIndex(key))

    def read_file(self, name: str) -> Any:
        """What a file by itself holds, such as `common.pt`."""
        with self._open(name) as stream:
            return self._loaded(self.directory / name, name, stream.read())

    def _chunks(self, key: str) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where the tensor's chunks begin and end: [chunks, axes] each."""
        if key not in self._boxes:
            stored = self.tensors[key]
            shape = (len(stored.chunks), len(stored.size))
            starts = np.array([chunk.offsets for chunk in stored.chunks], dtype=np.int64).reshape(shape)
            sizes = np.array([chunk.sizes for chunk in stored.chunks], dtype=np.int64).reshape(shape)
            self._boxes[key] = starts, starts + sizes
        return self._boxes[key]

    def _load(self, index: MetadataIndex, shape: torch.Size) -> Tensor:
        tensor = self._read(index)
        if not isinstance(tensor, Tensor) or tensor.shape != shape:
            raise DataError(
                f"{self.directory}: {index.fqn}: not the tensor it says: the checkpoint is damaged"
            )
        return tensor

    def _read(self, index: MetadataIndex) -> Any:
        info = self._metadata.storage_data[index]
        path = self.directory / info.relative_path
        with self._open(str(info.relative_path)) as stream, reading(path):
            stream.seek(info.offset)
            data = stream.read(info.length)
        return self._loaded(path, index.fqn, data)

    def _loaded(self, path: Path, what: str, data: bytes) -> Any:
        try:
            _require_stored(data)
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except pickle.UnpicklingError:  # torch's words advise to run it
            raise DataError(
                f"{path}: {what} cannot be read: it is damaged, or names code, which is not run"
            ) from None
        except Exception as error:  # noqa: BLE001 - as above
            raise DataError(f"{path}: {what} cannot be read: {_words(error)}") from None

    def _open(self, name: str) -> BinaryIO:
        if self._manifest is not None:
            return committed_file(self.directory, self._manifest, name).open()
        if not is_plain_path(name):
            raise DataError(f"{self.directory / INDEX}: damaged: {shown(name)} is no file of a checkpoint")
        return open_file(self.directory / name, follow_links=False)


def _words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _require_stored(data: bytes) -> None:
    """Raise unless it is a zip file whose parts are as large in memory as there, as of `torch.save`."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        if any(part.compress_type != zipfile.ZIP_STORED for part in archive.infolist()):
            raise ValueError("it is compressed, as no checkpoint is")


def _require_sound(metadata: Metadata) -> dict[str, int]:
    """The bytes that each file must have, all places in it being apart.

    Raises where a tensor or object lacks a part of its record, or its place in a file, or has less room there
    than its elements take.
    """
    ends: dict[str, int] = {}
    sums: Counter[str] = Counter()
    for key, item in metadata.state_dict_metadata.items():
        indices, needed = [MetadataIndex(key)], [0]
        if isinstance(item, TensorStorageMetadata):
            element = torch.empty(0, dtype=item.properties.dtype).element_size()
            for each in (item.size, *(size for box in item.chunks for size in (box.offsets, box.sizes))):
                if not isinstance(each, torch.Size) or len(each) != len(item.size):
                    raise ValueError(f"{key}: {each} is no place in a tensor of size {item.size}")
            if math.prod(item.size) != sum(math.prod(box.sizes) for box in item.chunks):
                raise ValueError(f"{key}: its chunks do not make up its size {item.size}")
            indices = [MetadataIndex(key, box.offsets) for box in item.chunks]
            needed = [element * math.prod(box.sizes) for box in item.chunks]
        for index, least in zip(indices, needed, strict=True):
            place = metadata.storage_data[index]
            if place.offset < 0 or place.length < least:
                raise ValueError(f"{key}: {place.length} bytes at {place.offset}")
            name = str(place.relative_path)
            ends[name] = max(ends.get(name, 0), place.offset + place.length)
            sums[name] += place.length
    return {name: max(end, sums[name]) for name, end in ends.items()}


def _slices(low: NDArray[np.int64], high: NDArray[np.int64]) -> tuple[slice, ...]:
    return tuple(slice(int(a), int(b)) for a, b in zip(low, high, strict=True))


class _RecordUnpickler(pickle.Unpickler):
    """Resolves torch.distributed.checkpoint's dataclasses and enums, sizes, dtypes; nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        for known in INDEX_MODULES:
            found = getattr(known, name, None) if module == known.__name__ else None
            if isinstance(found, type) and (dataclasses.is_dataclass(found) or issubclass(found, Enum)):
                return found
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype | torch.layout):
            return value
        if (module, name) == ("torch.serialization", "_get_layout"):
            return get_layout
        if module.split(".")[0] == "pathlib" and name.endswith("Path"):
            return PurePath  # where the checkpoint was written: not a path to open
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint needs")
