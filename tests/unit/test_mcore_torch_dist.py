"""A file format that is read from strangers, who give no digests: what is damaged is said to be."""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import random
import resource
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_lopd.artifacts.manifest import commit
from megatron_lopd.checkpoint.layer_states import require_plain
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


class Bomb:
    """Runs a command where it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def _saved(value: Any) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def test_nothing_in_a_checkpoint_runs_code(checkpoint: Path, tmp_path: Path) -> None:
    """A bomb in each place where torch or Megatron-Core would unpickle one on loading."""
    bomb = Bomb(tmp_path / "exploded")
    whole = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    reader = TorchDistReader(checkpoint)
    places = reader._metadata.storage_data
    for index, place in places.items():
        content = bytearray(whole[FILE])
        planted = _saved([bomb])
        content[place.offset :] = planted
        (checkpoint / FILE).write_bytes(content.ljust(len(whole[FILE]) + len(planted), b"\0"))
        grown = TorchDistReader(checkpoint)
        grown._metadata.storage_data[index].length = len(planted)
        with pytest.raises(DataError, match="cannot be read"):
            grown._read(index)
    (checkpoint / FILE).write_bytes(whole[FILE])
    (checkpoint / "common.pt").write_bytes(_saved({"optimizer": bomb}))
    with pytest.raises(DataError, match=r"common\.pt: common\.pt cannot be read"):
        TorchDistReader(checkpoint).read_file("common.pt")
    for index_bytes in (pickle.dumps(bomb), pickle.dumps([bomb] * 3), pickle.dumps({"a": bomb}, protocol=0)):
        (checkpoint / INDEX).write_bytes(index_bytes)
        with pytest.raises(DataError, match=r"\.metadata: damaged"):
            TorchDistReader(checkpoint)
    assert not (tmp_path / "exploded").exists()


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


def test_what_a_layer_keeps_runs_no_code(tmp_path: Path) -> None:
    """Transformer Engine unpickles its state by itself, whatever reader the checkpoint was read by."""
    path = tmp_path / "exploded"
    state = {"scale": torch.ones(3), "half": torch.ones(2, dtype=torch.float16), "names": ("a", None, 1.5)}
    nothing = torch.empty(0, dtype=torch.uint8)
    require_plain(tmp_path, {"fc1._extra_state": _bytes(pickle.dumps(state)), "fc2._extra_state": nothing})
    require_plain(tmp_path, {"fc1.weight": torch.ones(3)})
    hidden = io.BytesIO()
    torch.save(Bomb(path), hidden)

    class Storage:
        def __reduce__(self) -> Any:
            return torch.storage._load_from_bytes, (hidden.getvalue(),)

    for bad in (
        pickle.dumps(Bomb(path)),
        pickle.dumps({"scale": Bomb(path)}),
        pickle.dumps(Storage()),
        b"cposix\nsystem\n(S'touch " + str(path).encode() + b"'\ntR.",
        pickle.dumps(state)[:-3],
        b"\x80",
    ):
        with pytest.raises(DataError, match=r"fc1\._extra_state is damaged, or names code"):
            require_plain(tmp_path, {"fc1._extra_state": _bytes(bad)})
    for odd in (io.BytesIO(pickle.dumps(Bomb(path))), torch.ones(3), Bomb(path)):
        with pytest.raises(DataError, match="not a tensor of bytes"):
            require_plain(tmp_path, {"fc1._extra_state": odd})
    assert not path.exists()


def test_a_tiny_file_takes_no_memory(checkpoint: Path) -> None:
    """A tensor whose chunks all lie in one place, one beyond its file, and a compressed one."""
    whole = (checkpoint / INDEX).read_bytes()
    place = next(iter(TorchDistReader(checkpoint)._metadata.storage_data.values()))
    rows = 10_000
    entries = [
        Entry("weight", torch.float32, (rows, 3), (row, 0), (1, 3), FILE, place.offset, place.length)
        for row in range(rows)
    ]
    huge = Entry("weight", torch.float32, (1 << 40,), (0,), (1 << 40,), FILE, place.offset, place.length)
    for bad in (entries, [huge], [dataclasses.replace(huge, length=1 << 43)]):
        (checkpoint / INDEX).write_bytes(index_of(bad))
        with pytest.raises(DataError, match="damaged"):
            TorchDistReader(checkpoint)
    (checkpoint / INDEX).write_bytes(whole)
    stream = io.BytesIO()
    plain = zipfile.ZipFile(io.BytesIO(_saved(torch.zeros(1 << 20))))
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as packed:
        for part in plain.infolist():
            packed.writestr(part.filename, plain.read(part))
    (checkpoint / "common.pt").write_bytes(stream.getvalue())
    with pytest.raises(DataError, match="it is compressed, as no checkpoint is"):
        TorchDistReader(checkpoint).read_file("common.pt")


@pytest.mark.parametrize("name", ["../outside", "/etc/hostname", "a/../../outside", "link"])
def test_nothing_outside_its_directory_is_opened(checkpoint: Path, name: str) -> None:
    inside = checkpoint / "inside"
    inside.mkdir()
    for each in (FILE, INDEX):
        (checkpoint / each).rename(inside / each)
    shutil.copy(inside / FILE, checkpoint / "outside")
    (inside / "link").symlink_to(checkpoint / "outside")
    content = (inside / INDEX).read_bytes()
    moved = [
        Entry("weight", torch.float32, (2, 3), (row, 0), (1, 3), name, info.offset, info.length)
        for row, info in enumerate(list(TorchDistReader(inside)._metadata.storage_data.values())[:2])
    ]
    (inside / INDEX).write_bytes(index_of(moved))
    with pytest.raises(DataError, match=r"no file of a checkpoint|a link"):
        TorchDistReader(inside)
    (inside / INDEX).write_bytes(content)


def test_of_a_committed_one_what_its_manifest_lists_is_read(checkpoint: Path) -> None:
    nothing: dict[str, Any] = {"config": {}, "counts": {}, "versions": {}, "parents": {}}
    commit(checkpoint, "checkpoint", files=[FILE, INDEX], lineage="proved", **nothing)
    _read_all(checkpoint)
    (checkpoint / "common.pt").write_bytes(_saved({}))
    with pytest.raises(DataError, match=r"common\.pt: not part of"):
        TorchDistReader(checkpoint).read_file("common.pt")
    content = bytearray((checkpoint / FILE).read_bytes())
    content[0] ^= 1
    (checkpoint / FILE).write_bytes(content)
    with pytest.raises(DataError, match=rf"{FILE}: damaged: BLAKE3"):
        TorchDistReader(checkpoint)
