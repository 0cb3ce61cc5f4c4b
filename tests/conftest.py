"""For all tests: one thread; hypothesis without a clock; tests/gpu only when named (tools/gpu/check.sh does).

What needs SLURM or vLLM is left out, and named, where they are not installed; an error where LOPD_REQUIRE (a
list with commas) names them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from tests.slurm.cluster import installed as slurm_installed
from tests.vllm_python import VLLM_PYTHON

# Here and in every process started from here, before torch is imported: sums in two threads round
# differently, and many tests hold two processes to the same bits.
os.environ["OMP_NUM_THREADS"] = "1"

if find_spec("hypothesis") is not None:  # tests/gpu need it not, nor a GPU machine's Python have it
    from hypothesis import settings

    # A machine that others use as well may take any time.
    settings.register_profile("unhurried", deadline=None)
    settings.load_profile("unhurried")

TESTS = Path(__file__).parent
# In the order in which they are run.
FOLDERS = (
    "slurm",
    "dist",
    "golden",
    "fault",
    "attacks",
    "engines",
    "doors",
    "docs",
    "study",
    "unit",
    "launcher",
)
GPU_TESTS = TESTS / "gpu"
# What cannot run everywhere: (tests, what they need, its name in LOPD_REQUIRE, whether it is here).
OPTIONAL = (
    (
        TESTS / "slurm",
        "SLURM's slurmctld, slurmd and munged, and root (apt-get install slurm-wlm munge)",
        "slurm",
        slurm_installed,
    ),
    (
        TESTS / "engines" / "test_vllm.py",
        "vLLM's CPU build (make .venv/vllm/.installed)",
        "vllm",
        VLLM_PYTHON.exists,
    ),
)


def pytest_configure() -> None:
    import torch  # not before the number of threads is set

    assert torch.get_num_threads() == 1, "torch was imported before tests/conftest.py could set its threads"
    # A GPU that torch cannot use, as with a torch for CPUs on a machine that has one, is none to the tests.
    if not torch.cuda.is_available():
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`. tests/gpu run where there is no pytest-xdist."""
    from tests.schedule import Schedule

    return Schedule(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_place)


def _place(item: pytest.Item) -> int:
    """The folders with the longest tests first: the workers then come to their end at about the same time."""
    folder = item.path.relative_to(TESTS).parts[0]
    return FOLDERS.index(folder) if folder in FOLDERS else len(FOLDERS)


@pytest.fixture(autouse=True)
def _doors_as_they_were() -> Iterator[None]:
    """What a test has added behind a door is not there for those after it, whatever their order."""
    from megatron_lopd.registry import DOORS, TASKS  # not before OMP_NUM_THREADS is set

    before = {door: (door.things(), dict(door._imported)) for door in (*DOORS, TASKS)}
    yield
    for door, (things, imported) in before.items():
        door._things, door._imported = things, imported


@pytest.fixture(autouse=True)
def _environment_as_it_was() -> Iterator[None]:
    """`main`, called in this process, sets what it would set for a process of its own."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="where tests/gpu runs: cpu runs the part that needs no GPU, at small sizes, to find typos",
    )


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    for path, wanted, name, is_here in OPTIONAL:
        if collection_path == path and not is_here():
            if name in os.environ.get("LOPD_REQUIRE", "").split(","):
                raise pytest.UsageError(
                    f"LOPD_REQUIRE names {name}, and {path.relative_to(TESTS)} needs {wanted}"
                )
            return True
    return True if collection_path == GPU_TESTS and not _named(config) else None


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if not _named(config):
        terminalreporter.write_line("tests/gpu not collected: it needs an NVIDIA GPU (tools/gpu/check.sh)")
    for path, wanted, _, is_here in OPTIONAL:
        if not is_here():
            terminalreporter.write_line(f"tests/{path.relative_to(TESTS)} not collected: it needs {wanted}")


def _named(config: pytest.Config) -> bool:
    paths = (Path(argument.partition("::")[0]).resolve() for argument in config.args)
    return any(path == GPU_TESTS or GPU_TESTS in path.parents for path in paths)
