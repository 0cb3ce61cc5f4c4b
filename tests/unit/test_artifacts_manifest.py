"""A manifest in strange hands, and the files that it lists: as they were committed, or one line."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.artifacts import committed
from megatron_lopd.artifacts.manifest import VERSION, committed_files, load_manifest
from megatron_lopd.artifacts.stamps import Stamp
from megatron_lopd.artifacts.unchanged import verify_unchanged
from megatron_lopd.errors import DataError
from megatron_lopd.files.digests import canonical_json, sha256_bytes
from tests.unit.test_artifacts import make_artifact

ENTRY = {"size": 1, "blake3": "0" * 64}
MUTATIONS: dict[str, Any] = {
    "files": [
        *({name: ENTRY} for name in ("../a.bin", "/etc/passwd", "a/../b", "./a", "a//b", "a/", "", ".")),
        *({name: ENTRY} for name in ("a\0b", "a\\b", "a\nb", "x" * 300, "manifest.json")),
        {"/".join(["x" * 100] * 11): ENTRY},
        *({"a.bin": ENTRY | {"size": size}} for size in (-1, 1.0, True, "1", None, 1 << 70, [])),
        *({"a.bin": ENTRY | {"blake3": digest}} for digest in ("", "0" * 63, "G" * 64, 0, None, "0" * 65)),
        *({"a.bin": entry} for entry in ({}, ENTRY | {"more": 1}, [], None, 1)),
        *([], None, "a.bin", 7),
    ],
    "parents": [
        {"sft": {"kind": "artifact", "path": "../../elsewhere", "digests": {"id": "x"}}},
        {"sft": {"kind": "checkpoint", "path": "/etc", "digests": {"id": "x"}}},
        {"sft": {"kind": "artifact", "path": "sft", "digests": {"id": 1}}},
        {"sft": {"kind": "artefact", "path": "sft", "digests": {}}},
        {"sft": {"kind": [], "path": "sft", "digests": {}}},
        {"sft": {"kind": "model", "path": None, "digests": {}}},
        *({"sft": {}}, {"sft": None}, [], None),
    ],
    "counts": [{"samples": -1}, {"samples": 1.5}, {"samples": 1 << 64}, {"samples": "9"}, [], None],
    "versions": [{"torch": 2}, [], None],
    "config": [[], None, "x"],
    "kind": [1, None, [], {}],
    "lineage": ["certain", None, [], {}, 1],
    "version": [VERSION - 1, VERSION + 1, str(VERSION), None, [], 10**30],
    "format": ["other", None, []],
    "more": [1],
}


def sealed(plain: dict[str, Any]) -> str:
    """As somebody would write it who knows how: under its own digest."""
    body = {name: value for name, value in plain.items() if name != "id"}
    known = {name: value for name, value in body.items() if name != "more"}
    return json.dumps(body | {"id": sha256_bytes(canonical_json(known))}, indent=2, sort_keys=True) + "\n"


@pytest.mark.parametrize("part", MUTATIONS)
def test_a_manifest_of_other_types_or_names_is_one_line(tmp_path: Path, part: str) -> None:
    path = make_artifact(tmp_path / "artifact") / "manifest.json"
    whole = json.loads(path.read_text())
    assert sealed(whole) == path.read_text()
    for value in MUTATIONS[part]:
        path.write_text(sealed(whole | {part: value}))
        with pytest.raises(DataError, match=r"manifest\.json: ") as caught:
            load_manifest(path.parent)
        assert "\n" not in str(caught.value), value
        assert len(str(caught.value)) < 500 + len(str(path)), value


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text.replace("  ", " "),
        lambda text: "\ufeff" + text,
        lambda text: text + "\n",
        lambda text: text.replace('"counts"', '"counts": {},\n  "counts"', 1),
        lambda text: text.replace("0.1", "0.10", 1),
        lambda text: text.replace("0.1", "NaN", 1),
        lambda text: text.replace("0.1", "[" * 5000 + "]" * 5000, 1),
        lambda text: text.replace("0.1", "9" * 5000, 1),
        lambda text: text.replace("lr", "\\ud800", 1),
    ],
)
def test_a_manifest_has_one_spelling(tmp_path: Path, spoil: Callable[[str], str]) -> None:
    path = make_artifact(tmp_path / "artifact") / "manifest.json"
    path.write_text(spoil(path.read_text()))
    with pytest.raises(DataError, match=r"manifest\.json: damaged"):
        load_manifest(path.parent)


@pytest.mark.parametrize("odd", ["directory", "fifo", "link", "dangling"])
def test_a_manifest_is_a_file(tmp_path: Path, odd: str) -> None:
    path = make_artifact(tmp_path / "artifact") / "manifest.json"
    path.rename(tmp_path / "moved")
    makers: dict[str, Callable[[], None]] = {
        "directory": path.mkdir,
        "fifo": lambda: os.mkfifo(path),
        "link": lambda: path.symlink_to(tmp_path / "moved"),
        "dangling": lambda: path.symlink_to("nowhere"),
    }
    makers[odd]()
    with pytest.raises(DataError, match=r"manifest\.json: (a|no)"):
        load_manifest(path.parent)


def test_a_write_within_the_clocks_tick_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the same size, with its old time of content put back, on a kernel whose clock moves every 10 ms."""
    directory = make_artifact(tmp_path / "artifact")
    (file, _) = committed_files(directory, load_manifest(directory))
    content, times, tick = file.path.read_bytes(), file.path.stat(), 10_000_000
    exact = committed._stamp_of

    def coarse(stream: Any) -> Stamp:
        *rest, changed = exact(stream)
        return (*rest, changed - changed % tick + 1)

    monkeypatch.setattr(committed, "_stamp_of", coarse)
    for _ in range(10):
        file.path.write_bytes(content)
        os.utime(file.path, ns=(times.st_atime_ns, times.st_mtime_ns))
        file.check()  # hashes it, as it has just been written
        file.path.write_bytes(content[::-1])
        os.utime(file.path, ns=(times.st_atime_ns, times.st_mtime_ns))
        with pytest.raises(DataError, match=r"a\.bin: damaged"):
            file.check()


def test_a_file_that_is_written_while_it_is_read_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = make_artifact(tmp_path / "artifact")
    (file, _) = committed_files(directory, load_manifest(directory))
    monkeypatch.setattr(committed, "_hashed", {})
    reading = committed.reading

    def meanwhile(path: Path) -> Any:
        if path.name == "a.bin":
            path.write_bytes(path.read_bytes())
        return reading(path)

    monkeypatch.setattr(committed, "reading", meanwhile)
    with pytest.raises(DataError, match=r"a\.bin: it was written to while it was read"):
        file.check()


def test_what_is_unchanged_is_not_read_and_hints_of_others_are_not_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOPD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(committed, "_hashed", {})
    hashed: list[str] = []
    hash_file = committed._hash
    monkeypatch.setattr(
        committed, "_hash", lambda stream, path: hashed.append(path.name) or hash_file(stream, path)
    )
    directory = make_artifact(tmp_path / "artifact")
    manifest = load_manifest(directory)

    def look() -> list[str]:
        hashed.clear()
        committed._hashed.clear()  # as in another process
        verify_unchanged(directory, manifest)
        return sorted(hashed)

    assert look() == ["a.bin", "b.txt"]
    assert look() == []
    times = (directory / "a.bin").stat()
    (directory / "a.bin").write_bytes((directory / "a.bin").read_bytes())
    os.utime(directory / "a.bin", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert look() == ["a.bin"]
    (kept,) = (tmp_path / "cache" / "artifacts").iterdir()
    for path, mode in ((kept, 0o666), (kept.parent, 0o777)):
        before = path.stat().st_mode
        path.chmod(mode)
        assert look() == ["a.bin", "b.txt"], "anybody could have written that"
        path.chmod(before)
    kept.unlink()
    kept.mkdir()
    assert look() == ["a.bin", "b.txt"], "a hint that cannot be kept is not needed"
