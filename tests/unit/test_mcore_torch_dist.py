"""A file format that is read from strangers, who give no digests: what is damaged is said to be."""

from __future__ import annotations

import random
import resource
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from megatron_lopd.checkpoint.sharded import StagedFile, StagedState
from megatron_lopd.checkpoint.tensor_shards import Box
from megatron_lopd.checkpoint.torch_dist import INDEX, Entry, TorchDistReader, index_of, pickled, write_value
from megatron_lopd.errors import CheckpointError, DataError

FILE = "__0_0.distcp"


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    """A tensor in two boxes, and an object."""
    entries = []
    with (tmp_path / FILE).open("wb") as stream:
        for row in range(2):
            start = stream.tell()
            write_value(stream, torch.arange(3.0).view(1, 3) + row)
            place = FILE, start, stream.tell() - start
            entries.append(Entry("weight", torch.float32, (2, 3), (row, 0), (1, 3), *place))
        start, content = stream.tell(), pickled([{"state": torch.arange(4), "of": "a module"}])
        write_value(stream, content)
        entries.append(Entry("object", None, (), (), (), FILE, start, len(content)))
    (tmp_path / INDEX).write_bytes(index_of(entries))
    return tmp_path


def _read_all(directory: Path) -> None:
    reader = TorchDistReader(directory)
    for key in reader.tensors:
        reader.read(key, ())
    for key in reader.objects:
        reader.read_object(key)


def _flipped(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= rng.randrange(1, 256)
    return bytes(changed)


def _cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.randrange(len(content))]


@pytest.mark.filterwarnings("ignore")  # torch warns of what it has not seen before
@pytest.mark.parametrize("name", [INDEX, FILE])
@pytest.mark.parametrize("damage", [_flipped, _cut])
def test_damage_anywhere_raises_nothing_but_data_errors(
    checkpoint: Path, name: str, damage: Callable[[bytes, random.Random], bytes]
) -> None:
    """Not all of it can be seen: the format has no digests of its own."""
    whole, rng = (checkpoint / name).read_bytes(), random.Random(0)
    lines: list[str] = []
    for _ in range(800):
        (checkpoint / name).write_bytes(damage(whole, rng))
        try:
            _read_all(checkpoint)
        except DataError as error:
            lines.append(str(error))
    assert len(lines) > 50
    assert not any("\n" in line for line in lines)


def test_what_is_not_damaged_is_read(checkpoint: Path) -> None:
    reader = TorchDistReader(checkpoint)
    assert torch.equal(reader.read("weight", ()), torch.tensor([[0.0, 1, 2], [1, 2, 3]]))
    assert reader.read_object("object")[0]["of"] == "a module"


def test_a_full_disk_is_told_in_the_systems_words(tmp_path: Path) -> None:
    """torch's writer ends a file it could not write with an error of its own, which says nothing."""
    box = Box("weight", (200_000,), (0,), (200_000,), False, torch.zeros(200_000))
    staged = StagedState(tmp_path, [StagedFile(FILE, [], [box])], {})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written \(\[Errno 27\] File too large\)"):
            staged.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
