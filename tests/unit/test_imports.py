"""What a command imports, since each process of a job waits for it: looked up in a process of its own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.training_zoo import make_root

pytestmark = pytest.mark.slow

# By what each is for: none of it trains.
NOT_FOR_TRAINING = {
    "transformers": "reads thousands of files as it is imported",
    "huggingface_hub": "transformers'",
    "tokenizers": "Chat's",
    "vllm": "an engine",
    "modelopt": "export in FP8",
    "math_verify": "grading",
    "matplotlib": "the report",
    "pandas": "no part of the package",
    "megatron_lopd.report.page": "another stage's",
    "megatron_lopd.evaluation.grading": "another stage's",
    "megatron_lopd.engines.transformers_engine": "another stage",
    "megatron_lopd.engines.vllm_engine": "another stage",
    "torch._inductor.codegen": "torch's compiler: its optimizers import only the front",
}
NOT_FOR_ASKING = {*NOT_FOR_TRAINING, "torch", "megatron.core", "numpy", "pyarrow", "tensorboard"}

RANK = """
import sys
from pathlib import Path

import megatron_lopd.cli
from megatron_lopd.stages import train
from megatron_lopd.commands import run
from megatron_lopd.config import ParallelConfig, TrainConfig
from megatron_lopd.training.data_sources import CachedData
from megatron_lopd.training.job import ModelSetup, Segment, TrainingJob
from megatron_lopd.training.loop import run_training

root = Path(sys.argv[1])
run_training(
    TrainingJob(
        name="train",
        identity="a job",
        work_dir=root / "run",
        model=ModelSetup(root / "model", ParallelConfig(), "fp32", seed=0),
        config=TrainConfig(
            steps=1, objective="sampled_reverse_kl", global_batch_size=4, micro_batch_tokens=64),
        objective="sampled_reverse_kl",
        segment=Segment(CachedData(root / "data", root / "data"), "proved"),
    )
)
"""
COMMAND = """
import sys

from megatron_lopd.cli import main

try:
    code = main(sys.argv[1:])
except SystemExit as ended:  # --help
    code = ended.code
assert code == {code}, code
"""


def modules_after(program: str, *arguments: str | Path, cwd: Path | None = None) -> set[str]:
    """The names in sys.modules once `program` has run in `cwd`; what it printed is left out."""
    report = f"{program}\nimport json, sys\nprint()\nprint(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-W", "ignore", "-c", report, *map(str, arguments)]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=200, check=True, cwd=cwd)
    return set(json.loads(ended.stdout.splitlines()[-1]))


def test_a_trainer_rank_imports_what_it_trains_with_and_nothing_more(tmp_path: Path) -> None:
    imported = modules_after(RANK, make_root(tmp_path, samples=8))
    assert {"megatron.core", "torch", "megatron_lopd.mcore.model"} <= imported
    assert not sorted(imported & NOT_FOR_TRAINING.keys())


def test_the_package_imports_no_more_than_its_hooks() -> None:
    imported = modules_after("import megatron_lopd as lopd; lopd.Run, lopd.read_rollouts")
    assert "megatron_lopd.api" in imported
    assert not sorted(imported & NOT_FOR_ASKING)


@pytest.mark.parametrize("command", ["--help", "train", "status", "plan", "a misspelt key"])
def test_a_command_that_only_asks_imports_no_torch(tmp_path: Path, command: str) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"run_dir: {tmp_path}/run\n"
        "teacher: {model: elsewhere/Qwen3-8B}\n"
        "student: {model: elsewhere/Qwen3-4B}\n"
        "sft: {steps: 2}\n"
        "train: {steps: 2}\n"
    )
    arguments = {
        "train": ["train", "--help"],
        "status": ["status", recipe],
        "plan": ["plan", recipe, "--gpus", "h100:8", "parallel.recompute=selective"],
        "a misspelt key": ["run", recipe, "train.stepz=3"],
    }.get(command, [command])
    imported = modules_after(COMMAND.format(code=2 if command == "a misspelt key" else 0), *arguments)
    assert "megatron_lopd.cli" in imported
    assert ("megatron_lopd.estimate.run_plan" in imported) == (command == "plan")
    assert ("megatron_lopd.commands.status" in imported) == (command == "status")
    assert not sorted(imported & NOT_FOR_ASKING)
