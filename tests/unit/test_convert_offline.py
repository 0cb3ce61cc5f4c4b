"""Hugging Face -> Megatron -> Hugging Face by the tools, and what they refuse."""

from __future__ import annotations

import json
import os
import pickle
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.convert.offline import hf_to_megatron, megatron_to_hf
from megatron_lopd.errors import ConfigError, DataError
from tests.model_zoo import FAMILIES, contents, make_model_dir

ROOT = Path(__file__).parents[2]
WEIGHTS = "model.safetensors"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trip_is_bit_identical(family: Any, tied: bool, dtype: torch.dtype, tmp_path: Path) -> None:
    source = make_model_dir(tmp_path / "hf", family, tied=tied, dtype=dtype, max_shard_size="60KB")
    hf_to_megatron(source, tmp_path / "megatron")
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", max_shard_bytes=40_000)
    assert contents(tmp_path / "back") == contents(source)
    index = json.loads((tmp_path / "back" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(contents(source)[0])
    assert fingerprint_model(tmp_path / "back") == fingerprint_model(source)


@pytest.mark.slow
def test_the_command_lines_and_their_exit_codes(tmp_path: Path) -> None:
    source = make_model_dir(tmp_path / "hf")
    there = run_tool("hf_to_megatron.py", source, tmp_path / "megatron")
    assert (there.returncode, there.stderr) == (0, "")
    back = run_tool("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back")
    assert (back.returncode, back.stderr) == (0, "")
    assert contents(tmp_path / "back") == contents(source)
    again = run_tool("megatron_to_hf.py", tmp_path / "megatron", tmp_path / "back")
    assert again.returncode == 2
    assert again.stderr == (
        f"megatron_to_hf: {tmp_path / 'back'}: exists and is not empty: remove it or give another directory\n"
    )


def run_tool(name: str, *arguments: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "tools" / name, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )


def rewrite(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def spoil(source: Path) -> None:
        tensors = load_file(source / WEIGHTS)
        change(tensors)
        save_file(tensors, source / WEIGHTS)

    return spoil


def halve_one(tensors: dict[str, torch.Tensor]) -> None:
    name = "model.layers.1.self_attn.k_proj.weight"
    tensors[name] = tensors[name].bfloat16()


def shrink_layer(tensors: dict[str, torch.Tensor]) -> None:
    for part in "qkv":
        name = f"model.layers.2.self_attn.{part}_proj.weight"
        tensors[name] = tensors[name][:32].contiguous()


def truncate(source: Path) -> None:
    data = (source / WEIGHTS).read_bytes()
    (source / WEIGHTS).write_bytes(data[:-100])


def pickle_instead(source: Path) -> None:
    torch.save(load_file(source / WEIGHTS), source / "pytorch_model.bin")
    (source / WEIGHTS).unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (rewrite(lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
        (rewrite(lambda t: t.update(extra=torch.ones(2))), "model.safetensors: tensor extra is not part of"),
        (rewrite(halve_one), "must have one dtype"),
        (rewrite(shrink_layer), "model.layers.2.self_attn.q_proj.weight"),
        (rewrite(lambda t: t.update({"model.norm.weight": torch.ones(32, dtype=torch.int8)})), "is I8"),
        (truncate, "damaged: its tensors end at byte"),
        (pickle_instead, "pickles are never loaded"),
    ],
)
def test_bad_weights_are_named_and_nothing_is_left(
    spoil: Callable[[Path], None], message: str, tmp_path: Path
) -> None:
    source = make_model_dir(tmp_path / "hf")
    spoil(source)
    with pytest.raises(DataError, match=message):
        hf_to_megatron(source, tmp_path / "megatron")
    assert [path.name for path in tmp_path.iterdir()] == ["hf"]


@pytest.mark.parametrize("limit", [20_000, 1_000], ids=["weights", "metadata"])
def test_a_full_disk_leaves_nothing(limit: int, tmp_path: Path) -> None:
    source = make_model_dir(tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "megatron")
    for convert in (
        lambda: hf_to_megatron(source, tmp_path / "out"),
        lambda: megatron_to_hf(tmp_path / "megatron", tmp_path / "out", 10**9),
    ):
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limits[1]))
        try:
            with pytest.raises(DataError, match="cannot be written"):
                convert()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.path}",)


def plant_in_metadata(directory: Path, bomb: Bomb) -> None:
    (directory / ".metadata").write_bytes(pickle.dumps(bomb))


def plant_in_tensor(directory: Path, bomb: Bomb) -> None:
    """Put the bomb where the file's first tensor is: the reader goes there by offset."""
    data = directory / "__0_0.distcp"
    size = data.stat().st_size
    torch.save(bomb, data, _use_new_zipfile_serialization=False)  # one that may have something behind it
    with data.open("ab") as stream:
        stream.truncate(size)


def cut_short(directory: Path, bomb: Bomb) -> None:
    os.truncate(directory / "__0_0.distcp", 40_000)


def lose_metadata(directory: Path, bomb: Bomb) -> None:
    (directory / ".metadata").unlink()


def bomb_common(directory: Path, bomb: Bomb) -> None:
    torch.save(bomb, directory / "common.pt")


@pytest.mark.parametrize("damage", [plant_in_metadata, plant_in_tensor, cut_short, lose_metadata])
def test_a_damaged_or_hostile_checkpoint_is_refused_and_runs_no_code(
    damage: Callable[[Path, Bomb], None], tmp_path: Path
) -> None:
    hf_to_megatron(make_model_dir(tmp_path / "hf"), tmp_path / "megatron")
    damage(tmp_path / "megatron", Bomb(tmp_path / "exploded"))
    with pytest.raises(DataError, match=r"metadata|cannot be read"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", 10**9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf", "megatron"]


def test_common_pt_is_never_opened(tmp_path: Path) -> None:
    source = make_model_dir(tmp_path / "hf")
    hf_to_megatron(source, tmp_path / "megatron")
    bomb_common(tmp_path / "megatron", Bomb(tmp_path / "exploded"))
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", 10**9)
    assert contents(tmp_path / "back") == contents(source)
    assert not (tmp_path / "exploded").exists()


def test_another_models_config_is_refused(tmp_path: Path) -> None:
    hf_to_megatron(make_model_dir(tmp_path / "hf"), tmp_path / "megatron")
    other = make_model_dir(tmp_path / "other", "qwen2", num_hidden_layers=2)
    with pytest.raises(DataError, match="is not that of this checkpoint"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", 10**9, hf_dir=other)
    with pytest.raises(ConfigError, match="--hf-dir"):
        megatron_to_hf(tmp_path / "megatron", tmp_path / "back", 10**9, hf_dir=tmp_path)


def test_the_dtype_key_follows_the_weights(tmp_path: Path) -> None:
    hf_to_megatron(make_model_dir(tmp_path / "fp32"), tmp_path / "megatron")
    other = make_model_dir(tmp_path / "bf16", dtype=torch.bfloat16)
    megatron_to_hf(tmp_path / "megatron", tmp_path / "back", 10**9, hf_dir=other)
    before, after = (json.loads((path / "config.json").read_text()) for path in (other, tmp_path / "back"))
    assert (before.pop("dtype"), after.pop("dtype")) == ("bfloat16", "float32")
    assert before == after
