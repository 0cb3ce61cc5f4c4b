"""Says at the end what the golden record was held to: every byte, or on an unknown processor the losses."""

from __future__ import annotations

import pytest


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for each in terminalreporter.stats.values() for report in each]
    noted = {each for report in reports for each in getattr(report, "user_properties", ())}
    for text in sorted(text for name, text in noted if name == "golden"):
        terminalreporter.write_line(f"tests/golden: {text}")
