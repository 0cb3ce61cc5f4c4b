"""What the documents say is so: commands run, recipes load, the messages that are explained are ours."""

from __future__ import annotations

import ast
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_lopd import cli
from megatron_lopd.config import load_recipe
from tools.docs import recipe_reference

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "SECURITY")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
PAGES += [*sorted((ROOT / "examples").glob("*/README.md")), ROOT / "launcher" / "README.md"]
TUTORIAL = ROOT / "docs" / "tutorial.md"
# Programs in fenced commands that are not here, and what else tries those lines.
ELSEWHERE = {
    "docker": "make lint has hadolint read the Dockerfile",
    "enroot": "nothing: neither Docker nor enroot is here",
    "torchrun": "tests/unit/test_environment.py starts ranks by it",
    "tools/gpu/check.sh": "tests/unit/test_gpu_checks.py",
    "squeue": "tests/slurm asks SLURM itself",
    "tail": "a log of a cluster",
}
# A recipe that a page's fragment is put into, so that it can be loaded.
WHOLE: dict[str, Any] = {
    "run_dir": "runs/x",
    "teacher": {"model": "t"},
    "student": {"model": "s"},
    "sft": {"steps": 1},
    "train": {"steps": 1},
}


def fenced(page: Path, language: str) -> Iterator[str]:
    """The code between fences of `language` ("" for those that name none), without the page's indent."""
    lines = iter(page.read_text(encoding="utf-8").splitlines())
    for line in lines:
        if opened := re.fullmatch(r"( *)```(\w*)", line):
            indent, named = opened.groups()
            block = list(itertools.takewhile(lambda each: each != f"{indent}```", lines))  # noqa: B023
            if named == language:
                yield "".join(f"{each.removeprefix(indent)}\n" for each in block)


def command_lines(page: Path) -> Iterator[str]:
    """The shell's lines of a page, without what a `#` says of them, those that a backslash parts as one."""
    for language in ("bash", ""):
        for block in fenced(page, language):
            for line in block.replace("\\\n", " ").splitlines():
                line = line.partition("  #")[0].strip()
                if re.match(
                    r"(lopd|make|python|tools/|launcher/|docker|enroot|torchrun|squeue|tail) ?\S*", line
                ):
                    yield line


def inline(page: Path) -> Iterator[str]:
    """`lopd ...` in the text, where it has more than the command's name."""
    text = re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    yield from re.findall(r"`(lopd [a-z][^`]*)`", text)


def main(line: str, directory: Path) -> subprocess.CompletedProcess[str]:
    """A command of ours, as a shell in `directory` would run it."""
    words = shlex.split(line)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "megatron_lopd.cli", *words[1:]]
    return subprocess.run(
        command, cwd=directory, env=environment, capture_output=True, text=True, timeout=280
    )


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the pages' paths name, the quickstart at a size that takes seconds."""
    house = tmp_path_factory.mktemp("house")
    shutil.copytree(ROOT / "examples", house / "examples")
    path = house / "examples" / "quickstart" / "recipe.yaml"
    recipe = yaml.safe_load(path.read_text())
    for source in recipe["prompts"].values():
        source["count"] = 48
    for section in ("sft", "train"):
        recipe[section] |= {"steps": 3, "global_batch_size": 16, "checkpoint_every": 2}
    recipe["sft"]["optimizer"]["warmup_steps"] = 1
    recipe["train"]["guard"] = {"min_kept_mass": None}
    path.write_text(yaml.safe_dump(recipe))
    return house


def test_the_tutorial_runs_from_its_first_line_to_its_last(house: Path) -> None:
    """`make quickstart` is the run that the Makefile says; the rest as it stands, Python too."""
    lines = [line for line in command_lines(TUTORIAL) if line.startswith(("lopd", "make"))]
    assert lines[0] == "make quickstart"
    for line in lines:
        ended = main(line.replace("make quickstart", "lopd run examples/quickstart/recipe.yaml"), house)
        refused = "train.steps=50" in line  # which the page says
        assert ended.returncode == (3 if refused else 0), (line, ended.stderr[-2000:])
    (program,) = fenced(TUTORIAL, "python")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", program], cwd=house, env=environment, check=True, timeout=200)
    for line in [
        *command_lines(ROOT / "docs" / "artifacts.md"),
        *command_lines(ROOT / "docs" / "scaling.md"),
    ]:
        if line.startswith("lopd"):
            assert main(line, house).returncode == 0, line


def test_every_program_that_a_page_calls_is_here_or_accounted_for() -> None:
    targets = set(re.findall(r"^([\w.$()/-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    targets |= {".venv/.dev"}
    for page in PAGES:
        for line in command_lines(page):
            words = shlex.split(line)
            if words[0] == "make":
                assert {word for word in words[1:] if "=" not in word} <= targets, (page, line)
            elif words[0] == "lopd":
                cli.parse(words[1:])
            elif words[0] == "python":
                assert (ROOT / words[1]).is_file(), (page, line)
            else:
                assert words[0] in ELSEWHERE, (page, line)


def test_commands_in_the_text_are_commands() -> None:
    stand_ins = {"RECIPE": "recipe.yaml", "PATH": "runs/x", "[RECIPE]": "recipe.yaml"}
    for page in PAGES:
        for text in inline(page):
            words = [stand_ins.get(word, word) for word in shlex.split(text)[1:] if word != "--help"]
            if len(words) > 1:
                cli.parse(words)
                continue
            with pytest.raises(SystemExit) as ended:  # the command alone, without what it is given
                cli.parse([*words, "--help"])
            assert ended.value.code in (None, 0), (page, text)


def test_recipes_and_their_fragments_load(tmp_path: Path) -> None:
    seen = 0
    for page in PAGES:
        for block in fenced(page, "yaml"):
            part = yaml.safe_load(block)
            if "stages" in part:  # a cluster file
                continue
            whole = WHOLE | part
            for name in WHOLE.keys() & part.keys():
                if isinstance(WHOLE[name], dict):
                    whole[name] = WHOLE[name] | part[name]
            path = tmp_path / "recipe.yaml"
            path.write_text(yaml.safe_dump(whole))
            load_recipe(path)
            seen += 1
    assert seen >= 5


def test_messages_that_are_explained_are_ours() -> None:
    """By the words of the source, its pieces of text put together as Python does."""
    texts = [node for path in (ROOT / "megatron_lopd").rglob("*.py") for node in _texts(path)]
    page = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    explained = re.findall(r"^- `(.*?)`:", page, flags=re.M)
    assert len(explained) >= 15
    for message in explained:
        assert any(message in text for text in texts), message


def _texts(path: Path) -> Iterator[str]:
    source = path.read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield "".join(map(_piece, node.values))


def _piece(part: ast.expr) -> str:
    """Of an f-string, as it is written."""
    if isinstance(part, ast.FormattedValue):
        return f"{{{ast.unparse(part.value)}{'!r' if part.conversion == ord('r') else ''}}}"
    assert isinstance(part, ast.Constant)
    return str(part.value)


def test_readme_is_a_page_and_the_pages_are_all_there() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
    listed = set(re.findall(r"(\w+\.md)", (ROOT / "mkdocs.yml").read_text()))
    assert listed == {path.name for path in (ROOT / "docs").glob("*.md")}


def test_links_lead_somewhere() -> None:
    """Those that mkdocs does not see: of pages outside docs/, and into the repository."""
    for page in PAGES:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), (page, target)


def test_the_tree_of_the_package_is_the_one_described() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    described = set(re.findall(r"^  (\w+/|\w+\.py) +\S", page, flags=re.M))
    package = ROOT / "megatron_lopd"
    folders = {f"{path.parent.name}/" for path in package.glob("*/__init__.py")}
    files = {path.name for path in package.glob("*.py") if path.name != "__init__.py"}
    assert described == folders | files


def test_the_worked_examples_are_the_tested_files_and_short() -> None:
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    shown = re.findall(r"<!-- (tests/doors/my_\w+\.py) -->\n```python\n(.*?)```\n", page, flags=re.S)
    assert {path for path, _ in shown} == {
        f"tests/doors/{each.name}" for each in (ROOT / "tests/doors").glob("my_*.py")
    }
    for path, code in shown:
        text = (ROOT / path).read_text(encoding="utf-8")
        assert code == text, f"{path} has changed: put it into docs/extending.md"
        assert len(text.splitlines()) < 60


def test_the_recipe_reference_is_of_todays_keys() -> None:
    page = (ROOT / "docs" / "recipe.md").read_text(encoding="utf-8")
    assert page == recipe_reference.page(), "python -m tools.docs.recipe_reference > docs/recipe.md"
