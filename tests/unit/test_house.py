"""The order of the package, as docs/architecture.md promises it: what an import rule cannot say."""

from __future__ import annotations

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megatron_lopd"
FILES = sorted(PACKAGE.rglob("*.py"))
LONGEST_FILE = 400  # lines
LARGEST_FOLDER = 0.2  # of the package's lines


def lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


def test_a_name_stands_once() -> None:
    """A reader who meets a file's or a class's name knows which it is."""
    of_files, of_classes = defaultdict(list), defaultdict(list)
    for path in FILES:
        if path.name != "__init__.py":
            of_files[path.stem].append(path)
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                of_classes[node.name].append(path)
    assert {name: paths for name, paths in of_files.items() if len(paths) > 1} == {}
    assert {name: paths for name, paths in of_classes.items() if len(paths) > 1} == {}


def test_files_are_short_and_folders_balanced() -> None:
    assert [path for path in FILES if lines(path) > LONGEST_FILE] == []
    of_folders: Counter[str] = Counter()
    for path in FILES:
        of_folders[path.relative_to(PACKAGE).parts[0]] += lines(path)
    most, size = of_folders.most_common(1)[0]
    assert size <= LARGEST_FOLDER * of_folders.total(), most


def test_no_document_is_named_that_is_not_here() -> None:
    """A page that a text names by file is in the repository; so is whatever it takes a section of."""
    folders = [ROOT / name for name in ("docs", "examples", "launcher", "megatron_lopd", "tests", "tools")]
    files = [*ROOT.iterdir(), *(path for folder in folders for path in folder.rglob("*"))]
    present = {path.name for path in files if path.suffix == ".md"}
    texts = [path for path in files if path.suffix in {".py", ".md", ".toml", ".yaml", ".sh"}]
    absent = defaultdict(set)
    for path in texts:
        if path == Path(__file__).resolve():
            continue
        text = path.read_text(encoding="utf-8")
        if re.search(r"\bDESIGN\b|\b[Tt]he issue (asks|says)\b", text):
            absent[str(path)].add("DESIGN")
        absent[str(path)] |= {name for name in re.findall(r"\b[\w-]+\.md\b", text) if name not in present}
    assert {path: names for path, names in absent.items() if names} == {}
