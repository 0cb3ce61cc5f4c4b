"""Checkpoints that a training job finds in its directory: nothing in them is run as code."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.attacks.attack import Attack, lopd
from tests.attacks.changes import byte_changes, json_changes, special_changes
from tests.attacks.kinds.manifests import forge

NEWEST = "run/train/checkpoints/step_00000005"
FILES = (
    ".metadata",
    "common.pt",
    "__0_0.distcp",
    "__0_1.distcp",
    "__0_3.distcp",
    "metadata.json",
    "manifest.json",
)
CODE = (
    "os.system",
    "builtins.eval",
    "builtins.exec",
    "subprocess.call",
    "torch.load",
    "runpy.run_path",
    "pathlib.Path.touch",
)


class Pickled:
    """What runs `function` on reading."""

    def __init__(self, function: str) -> None:
        self.function = function

    def __reduce__(self) -> tuple[Any, ...]:
        import runpy
        import subprocess

        import torch

        touch = "touch ../outside/pwned"
        python = "__import__('os').system('touch ../outside/pwned')"
        chosen: dict[str, tuple[Any, ...]] = {
            "os.system": (os.system, (touch,)),
            "builtins.eval": (eval, (python,)),
            "builtins.exec": (exec, (python,)),
            "subprocess.call": (subprocess.call, (["touch", "../outside/pwned"],)),
            "torch.load": (torch.load, ("evil.pt", None, None, False)),
            "runpy.run_path": (runpy.run_path, ("evil.py",)),
            "pathlib.Path.touch": (Path.touch, (Path("../outside/pwned"),)),
        }
        return chosen[self.function]


@dataclass(frozen=True)
class Poisoned:
    """A file of the newest checkpoint holds a pickle that runs code: alone, at an end, in torch's archive."""

    file: str
    code: str
    how: str
    forged: bool

    def __call__(self, world: Path) -> None:
        path = world / NEWEST / self.file
        (world / "evil.py").write_text("import os; os.system('touch ../outside/pwned')")
        (world / "evil.pt").write_bytes(pickle.dumps(Pickled("os.system")))
        poison = pickle.dumps(Pickled(self.code), protocol=2)
        if self.how == "alone":
            path.write_bytes(poison)
        elif self.how == "after":
            path.write_bytes(path.read_bytes() + poison)
        elif self.how == "before":
            path.write_bytes(poison + path.read_bytes())
        else:
            path.write_bytes(_archive(poison))
        if self.forged and self.file != "manifest.json":
            forge_checkpoint(path.parent)


@dataclass(frozen=True)
class Changed:
    """A file of the newest checkpoint changed; `forged`: its manifest lists it as it is now."""

    file: str
    change: Any
    forged: bool

    def __call__(self, world: Path) -> None:
        path = world / NEWEST / self.file
        self.change(path)
        if self.forged and self.file != "manifest.json":
            forge_checkpoint(path.parent)


@dataclass(frozen=True)
class Renamed:
    """A whole checkpoint under another name: a later step, or one that is none."""

    name: str
    of: str

    def __call__(self, world: Path) -> None:
        source = world / NEWEST.replace("00000005", self.of)
        shutil.copytree(source, source.with_name(self.name), dirs_exist_ok=True)


def forge_checkpoint(directory: Path) -> None:
    """Give a checkpoint's manifest the sizes and digests that its files have."""
    manifest = directory / "manifest.json"
    document = json.loads(manifest.read_text())
    for name, entry in document["files"].items():
        path = directory / name
        if path.is_file() and path.stat().st_size < 1 << 28:
            content = path.read_bytes()
            entry |= {"size": len(content), "blake3": blake3(content).hexdigest()}
    forge(manifest, document)


def _archive(content: bytes) -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/version", "3\n")
        archive.writestr("archive/byteorder", "little")
    return made.getvalue()


class CheckpointFiles(Attack[Any]):
    """Pickles that run code, bits, and names that are none, in the checkpoint that training goes on from."""

    name = "checkpoints"
    copies = (
        "recipe.yaml",
        "student",
        "teacher",
        "run/generate",
        "run/sft",
        "run/rollout",
        "run/score",
        "run/train",
    )
    examples = 2

    def build(self, world: Path) -> None:
        (world / "run/train/manifest.json").unlink()

    def changes(self) -> SearchStrategy[Any]:
        file = st.sampled_from(FILES)
        hows = st.sampled_from(["alone", "after", "before", "archive"])
        return st.one_of(
            st.builds(Poisoned, file, st.sampled_from(CODE), hows, st.just(True)),
            st.builds(Changed, file, byte_changes, st.booleans()),
            st.builds(Changed, file, special_changes, st.just(False)),
            st.builds(
                Changed, st.sampled_from(["metadata.json", "manifest.json"]), json_changes, st.booleans()
            ),
            st.builds(
                Renamed,
                st.sampled_from(
                    ["step_00000009", "step_00000005.bak", "step_9", "step_000000005", "step_-0000001"]
                ),
                st.sampled_from(["00000002", "00000004", "00000005"]),
            ),
        )

    def spoil(self, world: Path, change: Any) -> None:
        change(world)

    def use(self, world: Path, change: Any) -> str:
        """The weights that training ends with."""
        lopd("train", "recipe.yaml")
        files = json.loads((world / "run/train/manifest.json").read_text())["files"]
        return json.dumps({name: entry["blake3"] for name, entry in files.items() if "distcp" in name})

    def allows(self, change: Any, before: str, after: str) -> bool:
        """Who may write a whole checkpoint, digests and all, may choose its weights: but run nothing."""
        forged = isinstance(change, Poisoned | Changed) and change.forged
        return forged or before == after
