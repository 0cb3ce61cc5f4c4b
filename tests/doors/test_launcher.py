"""A launcher in one file outside the package: named by a cluster file, it runs a recipe's stages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from megatron_lopd.config import load_cluster
from megatron_lopd.errors import ConfigError
from tests.pipeline import write_recipe

DOORS = Path(__file__).parent
SUBMIT = DOORS.parents[1] / "launcher/submit.py"
CLUSTER = {"launcher": "my_launcher:OneScript", "allow_user_code": True, "gpus_per_node": 0}


def submit(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(DOORS), str(DOORS.parents[1]), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, str(SUBMIT), "recipe.yaml", "cluster.yaml", *options]
    environment = os.environ | {"PYTHONPATH": paths}
    return subprocess.run(
        command, cwd=root, env=environment, capture_output=True, text=True, check=False, timeout=280
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_recipe(tmp_path)
    recipe = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    for section in ("train", "rollout", "score", "evaluate"):  # the shortest run there is
        del recipe[section]
    del recipe["prompts"]["opd"], recipe["prompts"]["eval"]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    (tmp_path / "cluster.yaml").write_text(yaml.safe_dump(CLUSTER))
    return tmp_path


def test_a_launcher_of_ones_own_runs_the_stages(root: Path) -> None:
    shown = submit(root, "--dry-run")
    assert shown.stdout.startswith("# run.sh\n#!/usr/bin/env bash"), shown.stderr
    done = submit(root)
    assert done.returncode == 0, done.stderr
    (script,) = re.findall(r"^start it: bash (.*)$", done.stdout, re.MULTILINE)
    assert Path(script) == root / "run/one_script/run.sh"
    assert Path(script).read_text() in shown.stdout
    started = subprocess.run(["bash", script], capture_output=True, text=True, check=False, timeout=280)
    assert started.returncode == 0, started.stderr
    assert "nothing to do" in submit(root).stdout


def test_what_it_refuses_is_a_line(root: Path) -> None:
    several = CLUSTER | {"stages": {"generate": {"nodes": 2}}}
    (root / "cluster.yaml").write_text(yaml.safe_dump(several))
    done = submit(root)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "submit: one_script has one node, and generate asks for more: set its nodes to 1\n"


def test_it_is_imported_only_where_the_cluster_file_allows_it(root: Path) -> None:
    path = root / "cluster.yaml"
    path.write_text(yaml.safe_dump(CLUSTER | {"allow_user_code": False}))
    with pytest.raises(ConfigError, match=r"my_launcher:OneScript .*set allow_user_code=true"):
        load_cluster(path)
    path.write_text("launcher: slrum\n")
    with pytest.raises(ConfigError, match=r"unknown launcher 'slrum' \(did you mean slurm\?\)"):
        load_cluster(path)


def test_outside_the_environment_it_says_so_in_a_line() -> None:
    """-S and -I: a Python without any installed package stands for the wrong one."""
    tools = [SUBMIT, *sorted((DOORS.parents[1] / "tools").glob("[a-z]*.py"))]
    assert len(tools) >= 5
    for tool in tools:
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(tool)], capture_output=True, text=True, check=False
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert line.startswith(f"{tool.stem}: No module named 'megatron_lopd'")
        assert "run it in the environment" in line
