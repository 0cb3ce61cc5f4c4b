"""Commit, damage, fingerprints and the refusals."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from megatron_lopd.artifacts import digest_cache, fingerprint, stamps, weights_digest
from megatron_lopd.artifacts.committed import FileEntry
from megatron_lopd.artifacts.digest_cache import relying_on_hints
from megatron_lopd.artifacts.fingerprint import fingerprint_model
from megatron_lopd.artifacts.manifest import (
    Manifest,
    Parent,
    commit,
    is_committed,
    load_manifest,
    verify_files,
)
from megatron_lopd.artifacts.voice_digest import tokenizer_digest
from megatron_lopd.errors import DataError
from megatron_lopd.files.reading import read_json
from megatron_lopd.files.writing import atomic_file
from tests.model_zoo import make_tokenizer

TENSORS = {
    "model.embed_tokens.weight": torch.arange(12, dtype=torch.float32).reshape(4, 3),
    "model.norm.weight": torch.ones(3, dtype=torch.bfloat16),
    "model.layers.0.self_attn.q_proj.weight": torch.full((2, 3), 0.5),
}


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"1" * 5000])
def test_a_file_that_is_not_json_is_one_line(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "it.json").write_bytes(content)
    with pytest.raises(DataError, match=r"it\.json: (not UTF-8 text|damaged: (not valid JSON|brackets))"):
        read_json(tmp_path / "it.json")


def make_model(directory: Path, shards: int = 1, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    tensors = TENSORS if tensors is None else tensors
    directory.mkdir()
    names = sorted(tensors)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard}.safetensors" if shards > 1 else "model.safetensors"
        part = {name: tensors[name] for name in names[shard::shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    if shards > 1:
        (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (directory / "config.json").write_text('{"hidden_size": 3, "tie_word_embeddings": true}')
    make_tokenizer().save_pretrained(directory)
    return directory


def make_artifact(directory: Path) -> Path:
    directory.mkdir()
    (directory / "a.bin").write_bytes(bytes(range(200)))
    (directory / "b.txt").write_text("hello")
    commit(
        directory,
        "rollouts",
        files=["a.bin", "b.txt"],
        config={"lr": 0.1},
        counts={"samples": 2},
        versions={},
        parents={"teacher": Parent("model", "t", {"weights": "ab"})},
        lineage="proved",
    )
    return directory


def test_a_manifest_comes_back_and_its_id_stands_for_every_byte(tmp_path: Path) -> None:
    first, second = make_artifact(tmp_path / "one"), make_artifact(tmp_path / "two")
    manifest = load_manifest(first, "rollouts")
    assert manifest.id == load_manifest(second).id
    assert manifest.parents["teacher"].digests == {"weights": "ab"}
    verify_files(first, manifest)
    with pytest.raises(DataError, match="holds rollouts, not scores"):
        load_manifest(first, "scores")


def test_a_file_that_cannot_be_read_is_named() -> None:
    """The error of a failed read, as of a bad disk, has no name in it. This file fails so everywhere."""
    manifest = Manifest("test", {"mem": FileEntry(0, "")}, {}, {}, {}, {}, "proved")
    with pytest.raises(DataError, match=r"^/proc/self/mem: cannot be read: Input/output error"):
        verify_files(Path("/proc/self"), manifest)


@given(st.integers(0, 204), st.integers(1, 255))
@settings(max_examples=40)
def test_any_flipped_byte_is_found_and_its_file_named(position: int, flip: int) -> None:
    import tempfile

    with tempfile.TemporaryDirectory() as parent:
        directory = make_artifact(Path(parent, "artifact"))
        path, offset = (
            (directory / "a.bin", position) if position < 200 else (directory / "b.txt", position - 200)
        )
        data = bytearray(path.read_bytes())
        data[offset] ^= flip
        path.write_bytes(data)
        with pytest.raises(DataError, match=path.name):
            verify_files(directory, load_manifest(directory))


def test_nothing_is_visible_before_the_block_succeeds(tmp_path: Path) -> None:
    def write_half() -> None:
        with atomic_file(tmp_path / "file") as stream:
            stream.write(b"half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        write_half()
    assert list(tmp_path.iterdir()) == []
    assert not is_committed(tmp_path)


def test_fingerprint_survives_resharding_and_redundant_tensors(tmp_path: Path) -> None:
    whole = fingerprint_model(make_model(tmp_path / "whole"))
    assert fingerprint_model(make_model(tmp_path / "sharded", shards=3)) == whole
    extra = TENSORS | {"lm_head.weight": TENSORS["model.embed_tokens.weight"].clone()}
    assert fingerprint_model(make_model(tmp_path / "tied", tensors=extra)) == whole


@pytest.mark.parametrize("change", ["value", "dtype", "shape", "name"])
def test_fingerprint_sees_every_change(tmp_path: Path, change: str) -> None:
    tensors = dict(TENSORS)
    norm = tensors.pop("model.norm.weight")
    changed = {
        "value": {"model.norm.weight": norm * 2},
        "dtype": {"model.norm.weight": norm.view(torch.float16)},  # the same bytes
        "shape": {"model.norm.weight": norm.reshape(1, 3)},
        "name": {"model.norms.weight": norm},
    }[change]
    before = fingerprint_model(make_model(tmp_path / "before")).weights
    assert fingerprint_model(make_model(tmp_path / "after", tensors=tensors | changed)).weights != before


def test_weights_beside_an_index_that_does_not_list_them_are_refused(tmp_path: Path) -> None:
    """transformers would load these, and the index's be fingerprinted."""
    model = make_model(tmp_path / "model", shards=2)
    save_file({name: 2 * tensor for name, tensor in TENSORS.items()}, model / "model.safetensors")
    with pytest.raises(
        DataError, match=r"model\.safetensors: not in model\.safetensors\.index\.json beside it"
    ):
        fingerprint_model(model)


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[int]:
    """How many tensors are hashed, each time weights are."""
    taken: list[int] = []
    digests = weights_digest._digests

    def noted(tensors: Any) -> Any:
        taken.append(len(tensors))
        return digests(tensors)

    monkeypatch.setattr(weights_digest, "_digests", noted)
    monkeypatch.setenv("LOPD_CACHE", str(tmp_path / "cache"))
    return taken


def settle() -> None:
    """Wait until what was written has been as it is for as long as hints need."""
    time.sleep(2 * stamps.TICK / 1e9)


def another_command(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a process that another command starts: it knows what is in files, and has its own start."""
    start = digest_cache._start_of
    monkeypatch.setattr(digest_cache, "_start_of", lambda pid: start(pid) + " again")
    digest_cache._kept_here.clear()


def test_hints_spare_hashing_where_nothing_is_begun(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    model = make_model(tmp_path / "model")
    with monkeypatch.context() as coarse:
        coarse.setattr(stamps, "TICK", 3600 * 10**9)
        fingerprint_model(model)
        fingerprint_model(model)
    assert len(hashed) == 2, "what was written just now could be written again, and look the same"
    settle()
    before = fingerprint_model(model)
    assert fingerprint_model(model) == before
    assert len(hashed) == 3, "it was hashed in this session"
    another_command(monkeypatch)
    with relying_on_hints():
        assert fingerprint_model(model) == before
    assert len(hashed) == 3
    assert fingerprint_model(model) == before
    assert len(hashed) == 4, "what a proof rests on was not read"
    assert not [path for path in model.iterdir() if path.name.startswith(".")]


def test_no_stamp_of_before_covers_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    model = make_model(tmp_path / "model")
    weights = model / "model.safetensors"
    settle()
    before, times = fingerprint_model(model), weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    os.utime(weights, ns=(times.st_atime_ns, times.st_mtime_ns))  # as `cp -p` leaves it
    another_command(monkeypatch)
    with relying_on_hints():
        assert fingerprint_model(model).weights != before.weights


def test_an_index_that_changes_alone_is_looked_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    model = make_model(tmp_path / "model", shards=2)
    settle()
    fingerprint_model(model)
    index = model / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    first, second = sorted(set(places.values()))
    swapped = {name: second if place == first else first for name, place in places.items()}
    index.write_text(json.dumps({"weight_map": swapped}))
    another_command(monkeypatch)
    with relying_on_hints(), pytest.raises(DataError, match=r"index\.json: tensor"):
        fingerprint_model(model)


def test_bits_that_rot_under_an_old_stamp_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int]
) -> None:
    """A disk gives other bytes, and nothing that a file system says of them has changed."""
    model = make_model(tmp_path / "model")
    settle()
    before = fingerprint_model(model)
    weights = model / "model.safetensors"
    stamped = digest_cache.stamp(weights)
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    stamp = digest_cache.stamp
    monkeypatch.setattr(digest_cache, "stamp", lambda path: stamped if path == weights else stamp(path))
    another_command(monkeypatch)
    assert fingerprint_model(model).weights != before.weights


@pytest.mark.parametrize("spoilt", ["writable", "linked", "foreign text", "unwritable"])
def test_hints_are_the_users_own_and_never_needed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hashed: list[int], spoilt: str
) -> None:
    model, cache = make_model(tmp_path / "model"), tmp_path / "cache"
    settle()
    if spoilt == "unwritable":
        cache.write_text("a file, as no modes keep root from writing into a folder")
    before = fingerprint_model(model)
    for hint in cache.rglob("*.json"):
        assert hint.stat().st_mode & 0o777 == 0o600
        assert hint.parent.stat().st_mode & 0o777 == 0o700
        forged = json.loads(hint.read_text())
        forged["weights"]["digest"] = "0" * 64
        hint.write_text("[" if spoilt == "foreign text" else json.dumps(forged))
        if spoilt == "writable":
            hint.chmod(0o666)
        if spoilt == "linked":
            hint.rename(tmp_path / "forged")
            hint.symlink_to(tmp_path / "forged")
    another_command(monkeypatch)
    with relying_on_hints():
        assert fingerprint_model(model) == before


def test_a_folder_may_have_any_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = make_model(tmp_path / "model")
    latin = tmp_path / os.fsdecode(b"caf\xe9")
    shutil.copytree(plain, latin / "model")
    settle()
    monkeypatch.chdir(latin)  # tokenizers itself takes no such name
    assert fingerprint_model("model") == fingerprint_model(plain)


def test_a_file_that_changes_while_it_is_hashed_or_after_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    weights = model / "model.safetensors"
    fingerprint_model(model)
    digest_cache.require_as_hashed([weights])
    changed = TENSORS | {"model.norm.weight": torch.zeros(3, dtype=torch.bfloat16)}
    save_file(changed, weights)
    with pytest.raises(DataError, match=r"model\.safetensors: changed since it was hashed"):
        digest_cache.require_as_hashed([weights])
    digests = weights_digest._digests

    def meanwhile(*given: Any) -> Any:
        save_file(TENSORS, weights)
        return digests(*given)

    monkeypatch.setattr(weights_digest, "_digests", meanwhile)
    with pytest.raises(DataError, match=r"model\.safetensors: changed while it was hashed"):
        fingerprint_model(model)


def test_a_link_to_a_file_changes_nothing_and_another_content_under_old_times_does(tmp_path: Path) -> None:
    """As a backup of hard links makes one; and as whoever sets a file's time back leaves it."""
    model = make_model(tmp_path / "model", shards=2)
    first = model / "model-0.safetensors"
    fingerprint_model(model)
    files = sorted(model.glob("*.safetensors"))
    before = digest_cache.stamps_of(files)
    os.link(first, tmp_path / "backup")
    assert digest_cache.stamps_of(files) != before
    digest_cache.require_unchanged(before, "read")
    digest_cache.require_as_hashed(files)
    found, content = first.stat(), bytearray(first.read_bytes())
    content[-1] ^= 1
    first.write_bytes(content)
    os.utime(first, ns=(found.st_atime_ns, found.st_mtime_ns))
    with pytest.raises(DataError, match=r"model-0\.safetensors: changed while it was read"):
        digest_cache.require_unchanged(before, "read")
    with pytest.raises(DataError, match=r"model-0\.safetensors: changed since it was hashed"):
        digest_cache.require_as_hashed(files)


def test_a_model_that_changes_between_its_parts_has_no_fingerprint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model(tmp_path / "model")
    config = model / "config.json"

    def meanwhile(files: Any) -> str:
        found = tokenizer_digest(files)
        config.write_text('{"hidden_size": 3, "tie_word_embeddings": false}')
        return found

    monkeypatch.setattr(fingerprint, "tokenizer_digest", meanwhile)
    with pytest.raises(DataError, match=r"config\.json: changed while it was hashed"):
        fingerprint_model(model)


def test_fingerprint_parts_move_one_by_one(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    before = fingerprint_model(model).parts()
    (model / "chat_template.jinja").write_text("{{ other }}")
    tokenizer = json.loads((model / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"]["another"] = len(tokenizer["model"]["vocab"])
    (model / "tokenizer.json").write_text(json.dumps(tokenizer))
    after = fingerprint_model(model).parts()
    assert {part for part in before if before[part] != after[part]} == {"chat_template", "tokenizer"}


def test_damaged_and_foreign_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such model directory"):
        fingerprint_model(tmp_path / "none")
    model = make_model(tmp_path / "model")
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-4])
    with pytest.raises(DataError, match=r"model\.safetensors: damaged"):
        fingerprint_model(model)
    weights.unlink()
    (model / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(DataError, match="pickles are never loaded"):
        fingerprint_model(model)


def test_safetensors_headers_that_lie_never_crash(tmp_path: Path) -> None:
    model = make_model(tmp_path / "model")
    weights = model / "model.safetensors"
    whole = weights.read_bytes()
    generator = random.Random(0)
    for _ in range(200):
        data = bytearray(whole)
        data[generator.randrange(8)] ^= 1 << generator.randrange(8)
        weights.write_bytes(data)
        with pytest.raises(DataError, match=r"model\.safetensors: damaged"):
            fingerprint_model(model)
