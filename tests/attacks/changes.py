"""Ways of spoiling a file, whatever it holds: its bytes, its JSON, what stands under its name."""

from __future__ import annotations

import json
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hypothesis import strategies as st

Special = Literal[
    "missing",
    "empty",
    "directory",
    "fifo",
    "socket",
    "link to /dev/zero",
    "link to itself",
    "dangling link",
    "link outside",
    "link to the same outside",
    "hard link outside",
    "8 GB of zeros",
]
SPECIALS: tuple[Special, ...] = Special.__args__  # type: ignore[attr-defined]
# Those that leave the same bytes to be read: what does not forbid links may go on.
SAME_BYTES = ("link to the same outside",)


@dataclass(frozen=True)
class Flip:
    """Bits of a byte turned over; `position` modulo the file's size."""

    position: int
    mask: int

    def __call__(self, path: Path) -> None:
        content = bytearray(path.read_bytes())
        if content:
            content[self.position % len(content)] ^= self.mask
        path.write_bytes(content)


@dataclass(frozen=True)
class Splice:
    """`removed` bytes from `position` on give way to `put`."""

    position: int
    removed: int
    put: bytes

    def __call__(self, path: Path) -> None:
        content = path.read_bytes()
        at = self.position % (len(content) + 1)
        path.write_bytes(content[:at] + self.put + content[at + self.removed :])


@dataclass(frozen=True)
class Whole:
    """Other content."""

    content: bytes

    def __call__(self, path: Path) -> None:
        path.write_bytes(self.content)


@dataclass(frozen=True)
class Stand:
    """Something else under the file's name."""

    what: Special

    def __call__(self, path: Path) -> None:
        content = path.read_bytes() if path.is_file() else b""
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        path.parent.mkdir(parents=True, exist_ok=True)
        outside = _outside(path)
        if self.what == "empty":
            path.touch()
        elif self.what == "directory":
            path.mkdir()
        elif self.what == "fifo":
            os.mkfifo(path)
        elif self.what == "socket":
            _bind(path)
        elif self.what == "link to /dev/zero":
            path.symlink_to("/dev/zero")
        elif self.what == "link to itself":
            path.symlink_to(path.name)
        elif self.what == "dangling link":
            path.symlink_to(outside / "absent")
        elif self.what == "link outside":
            path.symlink_to(outside / "secret")
        elif self.what == "link to the same outside":
            (outside / "same").write_bytes(content)
            path.symlink_to(outside / "same")
        elif self.what == "hard link outside":
            os.link(outside / "secret", path)
        elif self.what == "8 GB of zeros":
            with path.open("wb") as stream:
                stream.truncate(8 << 30)


def _outside(path: Path) -> Path:
    """The files beside the world that nothing may touch."""
    return next(each / "outside" for each in path.parents if (each / "outside").is_dir())


def _bind(path: Path) -> None:
    # Its name may have 107 bytes only.
    here = os.open(path.parent, os.O_RDONLY)
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(f"/proc/self/fd/{here}/{path.name[:60]}")
        if path.name[:60] != path.name:
            os.rename(path.with_name(path.name[:60]), path)
    finally:
        os.close(here)


@dataclass(frozen=True)
class CopyOf:
    """Another file of the world, of this name, in its place."""

    name: str

    def __call__(self, path: Path) -> None:
        content = (_outside(path).parent / "world" / self.name).read_bytes()
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


# ---- JSON


@dataclass(frozen=True)
class Text:
    """JSON's own text where a value stands, such as json.dumps does not write.

    `piece` and then `after`, each `times` times, between two of `around`.
    """

    piece: str
    times: int = 1
    after: str = ""
    around: str = ""

    def __str__(self) -> str:
        return self.around + self.piece * self.times + self.after * self.times + self.around


class Long(str):
    """A text that a finding shows the beginning of."""

    def __repr__(self) -> str:
        return f"{self[:60]!s:.60}... ({len(self):,})" if len(self) > 200 else super().__repr__()


ODD_TEXT = (
    "",
    "..",
    "../../outside/secret",
    "/etc/passwd",
    "a/../../b",
    "./x",
    "x" * 300,
    "a\x00b",
    "\x1b[31mred\x1b]0;title\x07",
    "\r\nlopd: all is proved",
    "\u202eproved",
    "\ud800",
    "é\u0301",
    "__class__",
    "\\\\host\\share",
    "%s%n{0}{x}",
    "-rf",
)
ODD_JSON = (
    Text("NaN"),
    Text("-Infinity"),
    Text("1e999"),
    Text("9", 5000),
    Text("[", 100_000, "]"),
    Text('{"a":', 50_000),
    Text('"x\x01y"'),
    Text("long", 500_000, around='"'),
    Text("{,}"),
    Text('"\\ud800"'),
)
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.sampled_from([0, 1, -1, 2**31, 2**63, 2**64, 10**30]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(ODD_TEXT),
    st.text(max_size=8),
)
json_values = st.one_of(
    scalars,
    st.sampled_from(ODD_JSON),
    st.lists(scalars, max_size=3),
    st.dictionaries(st.one_of(st.sampled_from(ODD_TEXT), st.text(max_size=5)), scalars, max_size=3),
)


@dataclass(frozen=True)
class Json:
    """A place of a JSON document, found by indices modulo what is there, changed.

    `set` and `delete` change the value there, `rename` and `add` a key of the mapping that holds it, `twice`
    gives that key a second time.
    """

    place: tuple[int, ...]
    how: Literal["set", "delete", "rename", "add", "twice"]
    key: str
    value: Any

    def __call__(self, path: Path) -> None:
        path.write_bytes(dump(self.changed(json.loads(path.read_text(encoding="utf-8")))))

    def changed(self, document: Any) -> Any:
        """The document with the change; as `dump` takes it."""
        holder, key = {"": document}, ""
        at: Any = holder
        for step in self.place:
            inner = at[key]
            if not isinstance(inner, dict | list) or not inner:
                break
            at, key = (
                inner,
                (list(inner)[step % len(inner)] if isinstance(inner, dict) else step % len(inner)),
            )
        if self.how == "set" or at is holder:
            at[key] = self.value
        elif self.how == "delete":
            del at[key]
        elif isinstance(at, list):
            at.insert(key, self.value)
        elif self.how == "rename":
            at[self.key] = at.pop(key)
        elif self.how == "add":
            at[self.key] = self.value
        else:
            at[Twice(key)] = self.value
        return holder[""]


def has_text(value: Any) -> bool:
    """Whether something in it is written as JSON does not write it."""
    if isinstance(value, dict):
        return any(isinstance(key, Twice) or has_text(each) for key, each in value.items())
    return isinstance(value, Text) or (isinstance(value, list) and any(map(has_text, value)))


class Twice(str):
    """A key that is another than its equal: a mapping may have both."""

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other


def dump(value: Any) -> bytes:
    """JSON of what `Json.changed` gives."""
    texts: list[str] = []

    def plain(each: Any) -> Any:
        if isinstance(each, Text):
            texts.append(str(each))
            return f"@@text {len(texts) - 1}@@"
        if isinstance(each, dict):
            return {key: plain(inner) for key, inner in each.items()}
        return [plain(inner) for inner in each] if isinstance(each, list | tuple) else each

    written = json.dumps(plain(value), indent=2)
    for number, text in enumerate(texts):
        written = written.replace(f'"@@text {number}@@"', text)
    return written.encode("utf-8", "surrogatepass")


# ---- strategies


def mostly(likely: st.SearchStrategy[Any], odd: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Five draws of six of the one: what is wrong in one place only tells more than what is all wrong."""
    return st.integers(0, 5).flatmap(lambda drawn: odd if drawn == 5 else likely)


any_bytes = st.binary(max_size=64)
byte_changes = st.one_of(
    st.builds(Flip, st.integers(0, 1 << 20), st.integers(1, 255)),
    st.builds(Splice, st.integers(0, 1 << 20), st.integers(0, 200), any_bytes),
    st.builds(Splice, st.integers(0, 1 << 20), st.just(1 << 30), st.just(b"")),
    st.builds(Whole, any_bytes),
)
special_changes = st.builds(Stand, st.sampled_from(SPECIALS))
json_changes = st.builds(
    Json,
    st.lists(st.integers(0, 30), max_size=5).map(tuple),
    st.sampled_from(["set", "delete", "rename", "add", "twice"]),
    st.one_of(st.sampled_from(ODD_TEXT), st.text(max_size=5)),
    json_values,
)
file_changes = st.one_of(byte_changes, special_changes)


@dataclass(frozen=True)
class In:
    """A change of one file of the world."""

    file: str
    change: Any

    def __call__(self, world: Path) -> None:
        path = world / self.file
        if isinstance(self.change, Stand | Whole) or path.is_file():
            path.parent.mkdir(parents=True, exist_ok=True)
            self.change(path)


def in_files(files: Sequence[str], change: st.SearchStrategy[Any]) -> st.SearchStrategy[In]:
    """One of `files`, changed so."""
    return st.builds(In, st.sampled_from(list(files)), change)
