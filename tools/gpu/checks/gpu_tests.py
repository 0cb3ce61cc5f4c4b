"""tests/gpu by pytest, a process a file at once: what is right does not need the GPU to itself."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

from tools.gpu.context import CheckFailed, LeftOut, Part

ROOT = Path(__file__).parents[3]
NO_TESTS = 5  # pytest's exit code where all of a file's tests need what is not here


def run(part: Part) -> None:
    """Each test's verdict is a figure, told as it ends (tools/gpu/verdicts.py)."""
    if importlib.util.find_spec("pytest") is None:
        raise LeftOut("pytest is not installed")
    files = sorted((ROOT / "tests" / "gpu").glob("test_*.py"))
    if not files:
        raise LeftOut("tests/gpu is not here: run the script in a checkout")
    options = ["-p", "tools.gpu.verdicts", "-p", "no:cacheprovider"]
    if part.toy:
        options += ["--device", "cpu"]
    if importlib.util.find_spec("pytest_timeout") is not None:
        options += ["--timeout", "90"]
    processes = {}
    for path in files:
        command = [sys.executable, "-m", "pytest", str(path), *options]
        command += ["--basetemp", str(part.scratch / path.stem)]
        # One thread, as tests/conftest.py wants it, even where a plugin imports torch before that can say so.
        environment = {**os.environ, "LOPD_GPU_TOLD": str(part.told), "OMP_NUM_THREADS": "1"}
        processes[path.name] = subprocess.Popen(command, cwd=ROOT, env=environment)
    codes = {name: process.wait() for name, process in processes.items()}
    bad = {name: code for name, code in codes.items() if code not in (0, NO_TESTS)}
    if bad:
        raise CheckFailed("; ".join(f"{name}: pytest ended with {code}" for name, code in bad.items()))
