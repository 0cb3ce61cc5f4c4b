"""What the documents say is so: commands run, recipes load, messages exist, README stays short."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README_LINES = 150
# What cannot run here, and what else holds it.
ELSEWHERE = {
    "make": "tests are made by make; tests/unit/test_docs_make.py has its targets",
    "docker": "no Docker here; make lint has the Dockerfile read by hadolint",
    "enroot": "no enroot here",
    "torchrun": "tests/unit/test_environment.py runs ranks of torchrun",
    "python launcher/submit.py": "tests/slurm and tests/launcher",
    "tools/gpu/check.sh": "tests/unit/test_gpu_checks.py",
}


def blocks(page: Path, language: str) -> list[str]:
    """The fenced code of a page in one language, each as its text."""
    pattern = rf"^( *)```{language}\n(.*?)^\1```$"
    found = re.findall(pattern, page.read_text(encoding="utf-8"), flags=re.M | re.S)
    return ["\n".join(line.removeprefix(indent) for line in text.splitlines()) for indent, text in found]


def commands() -> Iterator[tuple[Path, str]]:
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                yield page, line.partition("  #")[0].strip()
