"""An engine added in one file outside the package (my_engine.py), through the commands."""

from __future__ import annotations

import hashlib
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from megatron_lopd import registry
from megatron_lopd.cli import main
from megatron_lopd.commands import run
from megatron_lopd.data.dataset import open_shards
from megatron_lopd.data.schemas import ROLLOUTS
from megatron_lopd.runtime.launch import in_own_process
from tests.pipeline import write_recipe

SOURCE = Path(__file__).with_name("my_engine.py")
ENGINE = {
    "name": "my_engine:KIND",
    "batch_size": 16,
    "shard_samples": 16,
    "warming": {"least": 0.8, "most": 1.2},
}


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file where a user has it, and a recipe that names it; forgotten afterwards."""
    shutil.copy(SOURCE, tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    registry.ENGINES.things()
    for memory in ("_things", "_imported"):
        monkeypatch.setattr(registry.ENGINES, memory, dict(getattr(registry.ENGINES, memory)))
    monkeypatch.delitem(sys.modules, "my_engine", raising=False)
    rollout = {"sampling": {"max_new_tokens": 12}, "engine": ENGINE}
    prompts = {"sft": {"task": "arithmetic", "count": 20}, "opd": {"task": "arithmetic", "count": 20}}
    write_recipe(tmp_path, rollout=rollout, prompts=prompts)
    return tmp_path


def test_it_samples_what_is_trained_on_and_its_source_is_in_the_lineage(
    root: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["run", "recipe.yaml", "allow_user_code=true"]) == 0, capfd.readouterr().err
    # Its temperatures are far from 1, and the trainer agrees all the same: both log-probs are kept.
    assert "rollouts agree with the trainer within" in capfd.readouterr().err
    rollouts = list(open_shards(ROLLOUTS, root / "run/rollout"))
    differ = [np.abs(each.log_probs - each.untruncated_log_probs).max() for each in rollouts]
    assert np.mean(differ) > 0.01
    engine = json.loads((root / "run/rollout/manifest.json").read_text())["config"]["engine"]
    digest = hashlib.sha256(SOURCE.read_bytes()).hexdigest()
    assert engine["name"] == f"my_engine:KIND sha256:{digest}"
    assert engine["warming"] == {"least": 0.8, "most": 1.2}

    capfd.readouterr()
    assert main(["rollout", "recipe.yaml", "allow_user_code=true", "rollout.engine.warming.most=2"]) == 3
    assert "engine.warming.most" in capfd.readouterr().err


def test_without_leave_it_is_refused(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rollout", "recipe.yaml"]) == 2
    assert "my_engine:KIND" in (line := capsys.readouterr().err)
    assert "allow_user_code=true" in line
    assert "warming" not in registry.ENGINES.things()


def test_doctor_plan_and_help_know_it(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "recipe.yaml", "allow_user_code=true"]) == 0
    shown = capsys.readouterr().out
    assert "transformers, each sample at a temperature of its own" in shown
    with pytest.raises(SystemExit):
        main(["rollout", "--help"])
    assert "rollout.engine.vllm:" in capsys.readouterr().out


def test_a_check_in_a_process_of_its_own_knows_it(root: Path) -> None:
    """As `lopd run` has recipes checked that ask something of a GPU."""
    planned = in_own_process(run._check_anew, "recipe.yaml", ["allow_user_code=true"], ["rollout"])
    assert "the student after SFT answers" in planned["rollout"][0]
