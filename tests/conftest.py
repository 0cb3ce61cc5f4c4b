"""For all tests: one thread; hypothesis without a clock; tests/gpu only when named (`make test-gpu`).

tests/slurm only where a SLURM can be started; where LOPD_REQUIRE names slurm, whether it can or not.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from tests.slurm.cluster import installed

# Here and in every process started from here, before torch is imported: sums in two threads round
# differently, and many tests hold two processes to the same bits.
os.environ["OMP_NUM_THREADS"] = "1"

# A machine that others use as well may take any time.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

GPU_TESTS = Path(__file__).parent / "gpu"
SLURM_TESTS = Path(__file__).parent / "slurm"
SLURM_WANTED = "SLURM's slurmctld, slurmd and munged, and root (apt-get install slurm-wlm munge)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where tests/gpu runs: cpu runs the part that needs no GPU, at small sizes, to find typos",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    if collection_path == SLURM_TESTS and not installed():
        if "slurm" in os.environ.get("LOPD_REQUIRE", "").split(","):
            raise pytest.UsageError(f"LOPD_REQUIRE names slurm, and tests/slurm needs {SLURM_WANTED}")
        return True
    return True if collection_path == GPU_TESTS and not _named(config) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _named(config):
        terminalreporter.write_line("tests/gpu not collected: it needs an NVIDIA GPU (make test-gpu)")
    if not installed():
        terminalreporter.write_line(f"tests/slurm not collected: it needs {SLURM_WANTED}")


def _named(config: pytest.Config) -> bool:
    paths = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return any(path == GPU_TESTS or GPU_TESTS in path.parents for path in paths)
