"""A run in miniature beside copies of the worked examples, importable as a user's own modules are."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megatron_lopd.cli import main
from megatron_lopd.registry import DOORS

EXAMPLES = Path(__file__).parent


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory to work in; its code/ is on the path, of child processes too."""
    (tmp_path / "code").mkdir()
    for example in EXAMPLES.glob("my_*.py"):
        shutil.copy(example, tmp_path / "code")
    monkeypatch.syspath_prepend(tmp_path / "code")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must end with `code`: the one line that it says on standard error."""

    def run(code: int, *arguments: str) -> str:
        capsys.readouterr()
        assert main(list(arguments)) == code
        (line,) = [
            line for line in capsys.readouterr().err.splitlines() if line.startswith(f"lopd {arguments[0]}: ")
        ]
        return line

    return run


@pytest.fixture
def told(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Run a command that must go through: what it says on standard output."""

    def run(*arguments: str) -> str:
        capsys.readouterr()
        if "--help" in arguments:
            with pytest.raises(SystemExit):
                main(list(arguments))
        else:
            assert main(list(arguments)) == 0
        return capsys.readouterr().out

    return run


@pytest.fixture
def edited() -> Callable[[Path], None]:
    """Change a module's file, and forget what was imported of it, as a new process has."""

    def edit(source: Path) -> None:
        source.write_text(source.read_text() + "\n# edited\n")
        sys.modules.pop(source.stem)
        for door in DOORS:
            for path in [path for path in door._imported if path.startswith(f"{source.stem}:")]:
                del door._things[door._imported.pop(path).name]

    return edit
