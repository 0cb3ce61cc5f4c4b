"""tools/gpu/check.sh at toy sizes: each check's steps run without a GPU, lest they rot until there is one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tools.gpu.registry import CHECKS

ROOT = Path(__file__).parents[2]
# What a CPU cannot do even at toy sizes, and why.
LEFT_OUT = {"recipe-fp8": "needs FP8 tensorwise"}
# Of each check what cannot be missing: it is told at its end.
LAST = {
    "machine": "gemm 256^3 bf16",
    "log-probs": "timed, R 20, h 16, V 1,003, k 64, torch",
    "tests": "test_layers.py::test_bf16_is_near_the_oracle[native]",
    "quickstart": "accuracy",
    "steps": "MoE of 32 experts, bf16",
    "profile": "GEMM",
    "checkpoint": "this machine at best",
    "recipe-bf16": "whole run",
    "stage-change": "export",
    "imports": "two at once, warm, 2",
}


# Two minutes by itself; on a machine whose cores others use as well, many times that.
@pytest.mark.timeout(1800)
def test_every_check_runs_at_toy_sizes(tmp_path: Path) -> None:
    command = [ROOT / "tools" / "gpu" / "check.sh", "--toy", "--out", tmp_path / "out", "--budget", "1700"]
    environment = {**os.environ, "PYTHON": sys.executable}
    # From a folder that has a package of the same name, which must not be taken for ours.
    (tmp_path / "tools").mkdir()
    (tmp_path / "tools" / "__init__.py").write_text("raise ImportError('not ours')")
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    _, *endings = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    found = {each["name"]: each for each in endings}
    assert found.keys() == {check.name for check in CHECKS}
    for name, each in found.items():
        if name in LEFT_OUT:
            assert each["status"] == "left out"
            assert each["reason"].startswith(LEFT_OUT[name])
            continue
        assert each["status"] == "ok"
        assert LAST[name] in [figure["figure"] for figure in each["figures"]]
    for reason in ("an NVIDIA GPU", "Transformer Engine"):
        assert f"left out for want of {reason}" in Path(found["tests"]["log"]).read_text()
