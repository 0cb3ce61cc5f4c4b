"""What a command need not do, it does not: import, encode and hash, of a run that is finished."""

from __future__ import annotations

import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.artifacts import committed
from megatron_lopd.artifacts.manifest import load_manifest
from megatron_lopd.cli import main
from megatron_lopd.data.chat import Chat
from megatron_lopd.errors import DataError
from megatron_lopd.pipeline.verified import verified_for_workers, verify_unless_told
from tests.unit.test_imports import COMMAND, NOT_FOR_ASKING, modules_after


@pytest.mark.parametrize(
    "command",
    ["status recipe.yaml", "inspect run/export", "run recipe.yaml", "train recipe.yaml"],
)
def test_of_a_finished_run_nothing_heavy_is_imported(finished: Path, command: str) -> None:
    imported = modules_after(COMMAND.format(code=0), *command.split(), cwd=finished)
    assert "megatron_lopd.artifacts.manifest" in imported, "it did something"
    assert not sorted(imported & NOT_FOR_ASKING)


@pytest.mark.parametrize("command", ["inspect run/rollout", "verify run"])
def test_shards_are_looked_at_without_what_models_need(finished: Path, command: str) -> None:
    imported = modules_after(COMMAND.format(code=0), *command.split(), cwd=finished)
    assert not sorted(imported & (NOT_FOR_ASKING - {"numpy", "pyarrow", "tokenizers"}))


def test_a_process_encodes_each_prompt_once_for_each_model(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded: Counter[str] = Counter()
    prompts = Chat.prompts

    def counting(self: Chat, asked: Any, max_tokens: int) -> Any:
        encoded.update(name for name, _ in asked)
        return prompts(self, asked, max_tokens)

    monkeypatch.setattr(Chat, "prompts", counting)
    for stage, times in (("rollout", 1), ("evaluate", 2)):  # two models are evaluated
        shutil.rmtree(root / "run" / stage)
        encoded.clear()
        assert main([stage, "recipe.yaml"]) == 0
        assert set(encoded.values()) == {times}, stage


def test_what_workers_read_is_hashed_once_on_their_machine(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rollout, hashed = root / "run/rollout", []

    def counting(stream: Any, path: Path) -> str:
        hashed.append(path.name)
        return hash_file(stream, path)

    hash_file = committed._hash
    monkeypatch.setattr(committed, "_hash", counting)
    monkeypatch.setattr(committed, "_hashed", {})
    artifacts = {rollout: load_manifest(rollout)}
    names = sorted(artifacts[rollout].files)
    with verified_for_workers(artifacts, root / "run/score"):
        assert sorted(hashed) == names
        hashed.clear()
        committed._hashed.clear()  # as in a worker
        verify_unless_told(artifacts)
        assert hashed == [], "the process that started it has"
        content = bytearray((rollout / names[1]).read_bytes())
        content[-30] ^= 1
        (rollout / names[1]).write_bytes(content)
        with pytest.raises(DataError, match=names[1]):
            verify_unless_told(artifacts)
        assert hashed == [names[1]], "that file is another now"
    hashed.clear()
    committed._hashed.clear()
    content[-30] ^= 1
    (rollout / names[1]).write_bytes(content)
    verify_unless_told(artifacts)
    assert sorted(hashed) == names, "one that was started elsewhere hashes all"


def test_what_another_recipe_made_is_not_called_this_ones(
    finished: Path, root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["run", "recipe.yaml", "--dry-run"]
    assert main(asked) == 0
    assert "by another recipe" not in capsys.readouterr().out
    shutil.copytree(root / "student", root / "other")
    for override in ("seed=9", "teacher.model=other"):
        assert main([*asked, override]) == 3
        assert "generate  [committed, by another recipe: refused: " in capsys.readouterr().out
    assert main(["doctor", "recipe.yaml", "seed=9"]) == 3
    assert "by another recipe" in capsys.readouterr().out
    monkeypatch.chdir(finished)  # where its models are known: status hashes none
    assert main(["status", "recipe.yaml"]) == 0
    assert "by another recipe" not in capsys.readouterr().out
    assert main(["status", "recipe.yaml", "seed=9"]) == 0
    assert "committed: cut at horizon" in (out := capsys.readouterr().out)
    assert "by another recipe" in out
