"""How pytest-xdist divides the tests between its workers (`make test` has two)."""

from __future__ import annotations

from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

ONE_SLURM = "tests/slurm/"  # for all tests of the folder


class Schedule(LoadScopeScheduling):
    """A worker that has run what it was given is given the next file, in the order of collection.

    So a file's tests share what they have made.
    """

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # not by the number of tests, which says little

    def _split_scope(self, nodeid: str) -> str:
        return ONE_SLURM if nodeid.startswith(ONE_SLURM) else nodeid.partition("::")[0]
