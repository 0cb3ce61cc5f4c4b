"""A pytest plugin that tells each test's verdict as a figure, into the file LOPD_GPU_TOLD."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import pytest

from tools.gpu.context import Part


def _part() -> Part:
    return Part(toy=False, scratch=Path(), told=Path(os.environ["LOPD_GPU_TOLD"]))


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Its call, and whatever else did not pass."""
    if report.when != "call" and report.passed:
        return
    lines = str(report.longrepr).splitlines() if report.failed else []
    why = {"why": next((line for line in lines if line.startswith("E ")), lines[-1])} if lines else {}
    name = report.nodeid.removeprefix("tests/gpu/")
    part = _part()
    part.figure(name, verdict=report.outcome, seconds=round(report.duration, 2), **why)


def pytest_deselected(items: Sequence[pytest.Item]) -> None:
    """What this machine has not the parts for, by the names of NEEDED in tests/gpu/conftest.py."""
    wanted = {name for item in items for mark in item.iter_markers("needs") for name in mark.args}
    if items:
        _part().figure(f"{items[0].path.name}: left out", tests=len(items), needing=" ".join(sorted(wanted)))
