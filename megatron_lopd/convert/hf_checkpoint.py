"""Hugging Face checkpoint directories: reading slices of tensors, writing shards, carrying files over.

Weights are safetensors only; a pickle is never opened.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from megatron_lopd.artifacts.digest_cache import require_as_hashed, require_unchanged, stamps_of
from megatron_lopd.artifacts.lineage import LINEAGE_FILE
from megatron_lopd.artifacts.model_files import CONFIG, GENERATION, INDEX, model_files, voice_files
from megatron_lopd.artifacts.tensor_files import TensorLocation
from megatron_lopd.artifacts.weights_digest import other_output
from megatron_lopd.data.end_tokens import write_end_tokens
from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.families.architecture import Architecture
from megatron_lopd.families.weight_rules import TensorMap, spare_tensors, tensor_maps
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import (
    TEMPORARY_PREFIX,
    atomic_write_json,
    atomic_write_text,
    copy_file,
    fsync_directory,
    fsync_tree,
    settle_mode,
)

DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
DTYPE_NAMES = {
    torch.float32: "float32",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
    torch.float64: "float64",
}
# What comes along without being the model's.
_NOTICES = ("LICENSE*", "NOTICE*")


class HFWeights:
    """The weights of a checkpoint directory, read tensor by tensor and slice by slice.

    One file is mapped at a time, so the memory in use stays below one shard. A context manager, whose end
    raises DataError where a file changed meanwhile, or is not as it was when this process hashed it.
    Raises DataError when a file is missing or malformed, or holds a dtype that is not a float.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self._locations: dict[str, TensorLocation] = {}
        files = model_files(self.directory)
        self._files = [files.config, *files.of_weights]
        self._stamps = stamps_of(self._files)
        for location in files.tensors():
            self._locations[location.name] = location
        self._open_path: Path | None = None
        self._open_file: Any = None

    def __enter__(self) -> HFWeights:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._open_path = self._open_file = None
        if error is None:
            require_unchanged(self._stamps, "read")
            require_as_hashed(self._files)

    def check(self, maps: Sequence[TensorMap], arch: Architecture) -> None:
        """Raise DataError unless the checkpoint holds every tensor of `maps`, those of `arch`, and no other.

        Rotary frequency buffers, and an output layer equal to the embedding it is tied to, may be there.
        """
        spare = spare_tensors(arch)
        wanted = {part for item in maps for part in item.parts}
        missing = sorted(wanted - self._locations.keys())
        if missing:
            raise DataError(
                f"{self.directory}: tensor {missing[0]} is missing ({len(missing)} in all): "
                "config.json and the weights are not of the same model"
            )
        for name in sorted(self._locations.keys() - wanted):
            if not name.endswith("rotary_emb.inv_freq") and name not in spare:
                raise DataError(
                    f"{self._locations[name].path}: tensor {name} is not part of the model that "
                    "config.json describes"
                )
        if arch.tied:
            self._check_tied()

    def _check_tied(self) -> None:
        if (other := other_output(list(self._locations.values()))) is not None:
            raise DataError(
                f"{other.path}: {other.name} is not the embedding, and config.json ties the two: training "
                "would drop it: set tie_word_embeddings to false, or remove the tensor"
            )

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._locations[name].path

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, from the file's header."""
        return self._locations[name].shape

    def parts(self, item: TensorMap, arch: Architecture) -> list[tuple[str, int, int]]:
        """Where the parts of a Megatron tensor are: (tensor, first row, rows) of each.

        DataError when a fused tensor's rows cannot be shared out among its parts.
        """
        if not item.is_fused:
            return [(name, 0, self.shape(name)[0]) for name in item.parts]
        name, shares = item.parts[0], item.split.shares(arch)
        rows = self.shape(name)[0]
        if rows % sum(shares):
            raise DataError(
                f"{self.file(name)}: the {rows} rows of {name} are not a multiple of {sum(shares)}, as "
                "config.json asks: it is of another model"
            )
        unit = rows // sum(shares)
        return [(name, unit * sum(shares[:number]), unit * share) for number, share in enumerate(shares)]

    def dtype(self, name: str) -> torch.dtype:
        """A tensor's dtype. DataError when it is not a floating-point one."""
        location = self._locations[name]
        if location.dtype not in DTYPES:
            raise DataError(
                f"{location.path}: tensor {name} is {location.dtype}: give a checkpoint that is not "
                f"quantized ({', '.join(DTYPES)})"
            )
        return DTYPES[location.dtype]

    def read(self, name: str, axis: int = 0, start: int = 0, stop: int | None = None) -> Tensor:
        """Rows (axis 0) or columns (axis 1) [start, stop) of a tensor, on the CPU; by default all."""
        path = self.file(name)
        self.dtype(name)
        try:
            if path != self._open_path:
                self._open_file = safe_open(path, framework="pt")
                self._open_path = path
            view = self._open_file.get_slice(name)
            tensor: Tensor = view[start:stop] if axis == 0 else view[:, start:stop]
        except SafetensorError as error:
            raise DataError(f"{path}: damaged: {error}") from None
        return tensor


def check_weights(directory: Path, arch: Architecture) -> None:
    """Raise DataError, as `HFWeights` and its `check`, unless training could read a checkpoint's weights."""
    with HFWeights(directory) as weights:
        weights.check(tensor_maps(arch), arch)


class HFWriter:
    """Writes a checkpoint's weights as they come: at most one shard is held in memory.

    A model that fits in one shard is `model.safetensors`; a larger one gets numbered shards and an
    index, as transformers writes them. `max_shard_bytes` is exceeded only by a single larger tensor.
    """

    def __init__(self, directory: Path, max_shard_bytes: int) -> None:
        if max_shard_bytes < 1:
            raise ConfigError(f"max_shard_bytes must be at least 1, not {max_shard_bytes}")
        self._directory = directory
        self._limit = max_shard_bytes
        self._shard: dict[str, Tensor] = {}
        self._shard_bytes = 0
        self._total_bytes = 0
        self._written: list[list[str]] = []  # tensor names by shard

    def add(self, name: str, tensor: Tensor) -> None:
        """Take a contiguous CPU tensor; writes the shard before it when that is full."""
        if self._shard and self._shard_bytes + tensor.nbytes > self._limit:
            self._flush()
        self._shard[name] = tensor
        self._shard_bytes += tensor.nbytes

    def close(self) -> None:
        """Write the last shard, name the shards, and write the index if there are several."""
        self._flush()
        count = len(self._written)
        weight_map = {}
        for number, names in enumerate(self._written, start=1):
            name = f"model-{number:05d}-of-{count:05d}.safetensors" if count > 1 else "model.safetensors"
            self._path(number).rename(self._directory / name)
            weight_map.update(dict.fromkeys(names, name))
        if count > 1:
            index = {"metadata": {"total_size": self._total_bytes}, "weight_map": weight_map}
            atomic_write_json(self._directory / INDEX, index)

    def _path(self, number: int) -> Path:
        return self._directory / f"model-{number:05d}.partial"

    def _flush(self) -> None:
        self._written.append(list(self._shard))
        path = self._path(len(self._written))
        save_file(self._shard, path, metadata={"format": "pt"})
        settle_mode(path)
        self._total_bytes += self._shard_bytes
        self._shard = {}
        self._shard_bytes = 0


@contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes `path`, flushed to disk, only when the block succeeds.

    Raises ConfigError when `path` exists and is not an empty directory, DataError when the disk
    is full; nothing is left behind in either case.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(f"{path}: exists and is not empty: remove it or give another directory")
    temporary = path.with_name(TEMPORARY_PREFIX + path.name)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        yield temporary
        fsync_tree(temporary)
        os.replace(temporary, path)
        fsync_directory(path.parent)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{path}: cannot be written: {error}: free some space or choose another") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def copy_voice(source: Path, target: Path, ids: Collection[int]) -> list[str]:
    """Copy tokenizer and chat templates, and name all end tokens, `ids`, beside them; returns the names."""
    names = _copy(source, target, voice_files(source))
    write_end_tokens(target, ids)
    return sorted({*names, GENERATION})


def copy_companions(source: Path, target: Path) -> list[str]:
    """Copy what makes a directory of weights and a config whole: what speaks, and licences; returns names."""
    notices = [path for pattern in _NOTICES for path in sorted(source.glob(pattern)) if path.is_file()]
    return _copy(source, target, [*voice_files(source), *notices])


def copy_config(source: Path, target: Path) -> list[str]:
    """Copy config.json and the code that it names, byte for byte; returns the names."""
    files = model_files(source, weights=False)
    return _copy(source, target, [files.config, *files.code])


def _copy(source: Path, target: Path, files: Sequence[Path]) -> list[str]:
    names = [str(path.relative_to(source)) for path in files]
    for name in names:
        copy_file(source / name, target / name)
    return names


def carry_over(source: Path, target: Path, dtype: torch.dtype | None) -> None:
    """Copy config, tokenizer, generation config, chat templates and licences, byte for byte.

    dtype None says that the weights are `source`'s own, unchanged: their lineage then goes along.
    Otherwise, where config.json declares another dtype, that key alone is rewritten.
    """
    copy_config(source, target)
    copy_companions(source, target)
    if dtype is None:
        _copy(source, target, [path for path in (source / LINEAGE_FILE,) if path.exists()])
        return
    config = read_json(target / CONFIG)
    keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
    if any(config.get(key) != DTYPE_NAMES[dtype] for key in keys):
        config.update(dict.fromkeys(keys, DTYPE_NAMES[dtype]))
        atomic_write_text(target / CONFIG, json.dumps(config, indent=2) + "\n")
