"""What of tests/gpu and tools/bench/gpu.py runs without a GPU, lest they rot until there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def run(*arguments: str) -> str:
    # On one thread (conftest.py). With two, one run in some twenty had a gradient off by 1.1e-4 (else 1.7e-6,
    # always the same); why is not known, and it did not come again.
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_cpu_part_of_the_gpu_checks_passes() -> None:
    out = run("-m", "pytest", "tests/gpu", "--device", "cpu", "-p", "no:cacheprovider")
    assert "left out for want of an NVIDIA GPU" in out


def test_the_gpu_bench_runs_at_quick_sizes() -> None:
    result = json.loads(run("tools/bench/gpu.py", "--quick").splitlines()[-1])
    assert result["steps"]["tiny"]["native bf16"]["seconds"] > 0
    assert result["log_probs"]["time_ratio"] > 0
