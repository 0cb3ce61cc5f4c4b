"""Manifests: as they were written, or refused; rewritten whole, not what children were made from."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blake3 import blake3
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from tests.attacks.attack import Attack, lopd
from tests.attacks.changes import Json, file_changes, has_text, in_files, json_changes

PARENTS = ("generate", "sft", "rollout", "score", "train")  # something in the run was made from each
LEAVES = ("evaluate", "report")
FILES = [f"run/{stage}/manifest.json" for stage in (*PARENTS, "export", *LEAVES)]


def forge(path: Path, document: Any) -> None:
    """Write a manifest as the program would, with the id that its content has."""
    document = {key: value for key, value in document.items() if key != "id"}
    canonical = json.dumps(document, sort_keys=True, separators=(",", ":")).encode("utf-8", "surrogatepass")
    document["id"] = hashlib.sha256(canonical).hexdigest()
    text = json.dumps(document, indent=2, sort_keys=True) + "\n"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class Forged:
    """A change of a manifest by somebody who writes its id anew."""

    file: str
    change: Json

    def __call__(self, world: Path) -> None:
        path = world / self.file
        document = self.change.changed(json.loads(path.read_text(encoding="utf-8")))
        if isinstance(document, dict) and not has_text(document):
            forge(path, document)
        else:
            self.change(path)


@dataclass(frozen=True)
class Listed:
    """A file more in a manifest, with the size and digest that it has, and the id written anew."""

    file: str
    name: str
    link: bool

    def __call__(self, world: Path) -> None:
        path = world / self.file
        secret = world.parent / "outside" / "secret"
        name = self.name.replace("{outside}", str(secret))
        if self.link:
            (path.parent / name).symlink_to(secret)
        document = json.loads(path.read_text(encoding="utf-8"))
        content = secret.read_bytes()
        document["files"][name] = {"size": len(content), "blake3": blake3(content).hexdigest()}
        forge(path, document)


class Manifests(Attack[Any]):
    """Every value of every manifest, with the id left alone and with it written anew."""

    name = "manifests"
    examples = 3

    def changes(self) -> SearchStrategy[Any]:
        outside = st.one_of(
            st.builds(Listed, st.sampled_from(FILES), st.just("linked"), st.just(True)),
            st.builds(
                Listed,
                st.sampled_from(FILES),
                st.sampled_from(["../../../outside/secret", "{outside}", "../../run/../../outside/secret"]),
                st.just(False),
            ),
        )
        return st.one_of(
            in_files(FILES, json_changes),
            in_files(FILES, file_changes),
            st.builds(Forged, st.sampled_from(FILES), json_changes),
            outside,
        )

    def spoil(self, world: Path, change: Any) -> None:
        change(world)

    def use(self, world: Path, change: Any) -> str:
        """What verify says, and what a run does, which finds all of it done."""
        said = lopd("verify", "run")
        if change is not None:
            lopd("inspect", str(Path(change.file).parent), "--samples", "1")
        return said + lopd("run", "recipe.yaml")

    def allows(self, change: Any, before: str, after: str) -> bool:
        """A whole manifest of what nothing is made from is another artifact, with another id."""
        leaf = isinstance(change, Forged) and change.file.split("/")[1] in (*LEAVES, "export")
        return (
            _without_own(after, change.file) == _without_own(before, change.file) if leaf else before == after
        )

    def named(self, change: Any) -> Sequence[str]:
        return [str(Path(change.file).parent), Path(change.file).parent.name]


def _without_own(said: str, file: str) -> list[str]:
    """All but what is said of the artifact itself, to be compared."""
    own = str(Path(file).parent)
    kept = [
        line for line in said.splitlines() if not line.startswith(f"{own}: ") or " was made from " in line
    ]
    return [re.sub(r"\b[0-9a-f]{12}\b", "ID", line) for line in kept]
