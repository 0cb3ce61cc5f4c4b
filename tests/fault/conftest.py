from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from megatron_lopd.cli import main
from tests.pipeline import write_recipe


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run, to be copied and never changed: its recipe's paths are relative to it."""
    root = tmp_path_factory.mktemp("finished")
    recipe = write_recipe(root)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main(["run", recipe.name]) == 0
        assert main(["run", recipe.name, "--dry-run"]) == 0  # its models are hashed as they now stay
    return root


@pytest.fixture
def root(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which is the working directory."""
    copy = tmp_path / "copy"
    shutil.copytree(finished, copy)
    monkeypatch.chdir(copy)
    return copy
