"""A run that changes Megatron-Core halfway, both ways.

`make test-newest` alone names this file, and pytest does not collect it by itself, since it takes two
releases: the newest first on PYTHONPATH, and the oldest in the environment.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
from gloo import run_ranks

from megatron_lopd.config import ParallelConfig
from megatron_lopd.mcore import reliance
from tests.training_zoo import make_root, train

pytestmark = pytest.mark.release

# The releases came out bit for bit alike; one may sum in another order.
ROUNDED = 1e-5
REPOSITORY = Path(__file__).resolve().parent.parent
OWN_PATHS = [str(REPOSITORY), str(REPOSITORY / "tests" / "dist")]


def test_a_run_goes_on_under_the_other_release(tmp_path: Path) -> None:
    root = make_root(tmp_path)
    oldest, newest = train_under_both(root, "oldest", "newest")
    assert (oldest["version"], newest["version"]) == (reliance.OLDEST, reliance.NEWEST)
    assert_agree(newest["steps"], oldest["steps"])

    for work, turned in (("oldest", "oldest-then-newest"), ("newest", "newest-then-oldest")):
        shutil.copytree(root / work, root / turned)
        shutil.rmtree(root / turned / "checkpoints" / "step_00000006")
    for resumed in train_under_both(root, "newest-then-oldest", "oldest-then-newest"):
        assert_agree(resumed["steps"], oldest["steps"])


def assert_agree(steps: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    assert [step["step"] for step in steps] == [step["step"] for step in expected]
    for step, reference in zip(steps, expected, strict=True):
        for name in ("loss", "grad_norm"):
            assert step[name] == pytest.approx(reference[name], rel=ROUNDED), (name, step["step"])


def train_under_both(root: Path, work_of_oldest: str, work_of_newest: str) -> list[dict[str, Any]]:
    """The job in `root`, at the same time under the environment's release and under PYTHONPATH's."""
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", "from tests.two_releases import main; main()", str(root), work],
            env=os.environ | {"PYTHONPATH": os.pathsep.join([*paths, *OWN_PATHS])},
            stdout=subprocess.PIPE,
            text=True,
        )
        for work, paths in ((work_of_oldest, []), (work_of_newest, [os.environ["PYTHONPATH"]]))
    ]
    said = [run.communicate(timeout=120)[0] for run in runs]
    assert [run.returncode for run in runs] == [0, 0]
    return [json.loads(text.splitlines()[-1]) for text in said]


def main() -> None:
    """Train in the root and work directory on the command line, and print what became of it as JSON."""
    root, work = sys.argv[1:]
    steps = run_ranks(2, _train, Path(root), work)[0]
    print(json.dumps({"version": version("megatron-core"), "steps": steps}))


def _train(root: Path, work: str) -> list[dict[str, Any]]:
    """Two pipeline stages and tied embeddings: gradients and optimizer state in several buckets."""
    return train(root, work, parallel=ParallelConfig(pipeline=2, processes=2))[1]
