"""What others wrote (names, keys, templates, texts) reaches a terminal or a log as text, in one line."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_lopd.cli import main
from megatron_lopd.runtime.display import ProgressDisplay, printable
from tests.model_zoo import make_model_dir
from tests.pipeline import SMALL, write_recipe

# Clears the screen, writes another title, turns the direction of writing, ends the line, rings; C1; no width.
HOSTILE = "a\x1b[2J\x1b]0;t\x07\u202eb\nc\rd\x9b31m\u2028e\u200bf\x7f"
REPOSITORY = Path(__file__).parents[2]


def harmless(text: str) -> bool:
    return all(unicodedata.category(each) not in ("Cc", "Cf", "Zl", "Zp") for each in text.replace("\n", ""))


@given(st.text())
def test_any_text_is_one_line_of_text_and_plain_text_is_itself(text: str) -> None:
    shown = printable(text)
    assert harmless(shown)
    assert "\n" not in shown
    shown.encode()
    plain = "".join(each for each in text if each.isprintable())
    assert printable(plain) == plain
    assert printable("π ‖ é 漢字 😀") == "π ‖ é 漢字 😀"


def test_progress_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    display = ProgressDisplay(HOSTILE, "sample")
    display.begin(0, 1)
    display.update(1, HOSTILE)
    display.note(HOSTILE)
    err = capsys.readouterr().err
    assert harmless(err)
    assert len(err.splitlines()) == 2


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hostile")
    write_recipe(root)
    hostile = root / HOSTILE
    hostile.mkdir()
    make_model_dir(hostile / "model", seed=1, **SMALL)
    (hostile / "model/chat_template.jinja").write_text("{{ raise_exception(" + json.dumps(HOSTILE) + ") }}")
    (hostile / "p.jsonl").write_text(json.dumps({"id": HOSTILE, "prompt": "1" * 99}) + "\n")
    (hostile / "bad.yaml").write_text(json.dumps({"run_dir": "x", HOSTILE: 1}), encoding="utf-8")
    (hostile / "value.yaml").write_text(json.dumps({"run_dir": "x", "precision": HOSTILE}), encoding="utf-8")
    (hostile / "model/config.json").write_text(
        json.dumps({"model_type": HOSTILE, "architectures": [HOSTILE]})
    )
    return root


Words = Callable[[str], list[str]]
COMMANDS: dict[str, Words] = {
    "a model's path and type": lambda path: [
        "run",
        "recipe.yaml",
        f"teacher.model={json.dumps(path + '/model')}",
    ],
    "a path that is not there": lambda path: [
        "run",
        "recipe.yaml",
        f"teacher.model={json.dumps(path + '/no')}",
    ],
    "a prompt's id": lambda path: [
        "run",
        "recipe.yaml",
        "--dry-run",
        "prompts.opd=" + json.dumps({"path": f"{path}/p.jsonl"}),
    ],
    "a key": lambda path: ["run", f"{path}/bad.yaml"],
    "a key, by help": lambda path: ["run", f"{path}/bad.yaml", "--help"],
    "a value": lambda path: ["status", f"{path}/value.yaml"],
    "no such recipe": lambda path: ["doctor", f"{path}/none.yaml"],
    "an override": lambda path: ["run", "recipe.yaml", f"{path}=1"],
    "an argument": lambda path: ["run", "recipe.yaml", f"--{path}"],
    "nothing there": lambda path: ["inspect", path],
    "nothing to verify": lambda path: ["verify", path],
    "a run_dir": lambda path: ["run", "recipe.yaml", f"run_dir={json.dumps(path)}"],
    "the recipe written out": lambda path: [
        *("run", "recipe.yaml", "--dry-run"),
        f"sft.teacher={json.dumps(path)}",
        "sft.data=nowhere.jsonl",
    ],
}


@pytest.mark.parametrize("case", COMMANDS)
def test_commands(
    root: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.chdir(root)
    with contextlib.suppress(SystemExit):  # of a usage error
        assert main(COMMANDS[case](HOSTILE)) in (0, 1, 2, 3)
    captured = capsys.readouterr()
    assert harmless(captured.out + captured.err)
    assert len(captured.err.splitlines()) <= 3  # of a usage, two lines


@pytest.mark.parametrize("path", ["launcher/submit.py", "tools/verify.py", "tools/inspect_shard.py"])
def test_tools(root: Path, path: str) -> None:
    done = subprocess.run(
        [sys.executable, REPOSITORY / path, HOSTILE, *([HOSTILE] if "submit" in path else [])],
        cwd=root,
        capture_output=True,
        env={"PYTHONPATH": str(REPOSITORY), "PATH": "/usr/bin:/bin"},
        check=False,
    )
    assert done.returncode in (1, 2)
    assert harmless(done.stderr.decode())
    assert len(done.stderr.splitlines()) == 1


def test_a_terminal_that_knows_no_such_letter_is_told_all_the_same(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "megatron_lopd.cli", "status", "\u03c0\u20ac.yaml"],
        cwd=root,
        capture_output=True,
        env={"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "ascii:strict"},
        check=False,
    )
    assert (done.returncode, b"Traceback" in done.stderr) == (2, False)
    assert b"\\u03c0\\u20ac.yaml: no such recipe" in done.stderr
