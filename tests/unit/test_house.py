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


# Files that open, link or rename files by themselves, and why `files/` does not do it for them.
OPEN_BY_THEMSELVES = {
    "artifacts/committed.py": "part by part below an artifact's directory",
    "artifacts/digest_cache.py": "/proc",
    "checkpoint/sharded.py": "into a directory of its own that is renamed when it is whole",
    "cli.py": "/dev/null, and a file that the launcher names",
    "convert/hf_checkpoint.py": "safetensors, of files that model_files has looked at",
    "convert/torch_dist_reader.py": "into a directory of its own that is renamed when it is whole",
    "data/arrow_file.py": "maps the file that committed.py or reading.py has opened",
    "evaluation/verdicts.py": "a name that is one claim's alone",
    "runtime/bounded.py": "/proc",
    "runtime/claim_files.py": "claims are made and replaced by the rules of claims",
    "runtime/owner.py": "/proc",
    "training/checkpoints.py": "renames whole directories",
}
_METHODS = {"read_text", "read_bytes", "write_text", "write_bytes", "memory_map", "copyfile", "copytree"}
_FUNCTIONS = {"open", "safe_open", "load_file", "save_file", "os.open", "os.link", "os.rename", "os.replace"}
_FUNCTIONS |= {"shutil.copy", "shutil.move", "mmap.mmap", "json.load", "yaml.load", "np.load"}
_MODES = re.compile("[rwax]b?[+]?")


def _opens_files(call: ast.Call) -> bool:
    name = ast.unparse(call.func)
    if name in _FUNCTIONS:
        return True
    if not isinstance(call.func, ast.Attribute):
        return False
    given = [each.value for each in call.args[:1] if isinstance(each, ast.Constant)]
    is_mode = bool(given) and isinstance(given[0], str) and bool(_MODES.fullmatch(given[0]))
    return call.func.attr in _METHODS or (call.func.attr == "open" and is_mode)


def test_one_module_reads_and_one_writes() -> None:
    """So the rules for what others have made (no FIFO, no link, no bomb) hold wherever a file is opened."""
    found = set()
    for path in FILES:
        calls = (each for each in ast.walk(ast.parse(path.read_text())) if isinstance(each, ast.Call))
        if path.parent.name != "files" and any(map(_opens_files, calls)):
            found.add(str(path.relative_to(PACKAGE)))
    assert found == set(OPEN_BY_THEMSELVES)


def test_nobody_takes_what_cannot_be_seen_for_gone() -> None:
    """`os.path.lexists` does. `reading.is_there` tells a disk that hiccups from a file that is not there."""
    found = {str(path.relative_to(PACKAGE)) for path in FILES if "path.lexists(" in path.read_text()}
    assert found == {"runtime/environment.py", "runtime/claim_files.py"}, "where nothing follows from it"


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
