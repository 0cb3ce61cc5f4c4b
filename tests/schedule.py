"""How pytest-xdist divides the tests between its workers (`make test` has two)."""

from __future__ import annotations

from pathlib import PurePath
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

# What one worker runs one after another is a file, whose tests share what they made, or one of these: what uses the
# only SLURM, and what uses SmolLM2, which takes long to make.
TOGETHER = {
    "tests/slurm": "slurm",
    "tests/engines/test_smollm2.py": "smollm2",
    "tests/engines/test_vllm.py": "smollm2",
}


class Schedule(LoadScopeScheduling):
    """A worker that has run all it was given is given the next file, in the order of collection."""

    def __init__(self, config: pytest.Config, log: Any) -> None:
        super().__init__(config, log)
        config.option.loadscopereorder = False  # not by the number of tests, which says little

    def _split_scope(self, nodeid: str) -> str:
        path = nodeid.partition("::")[0]
        return TOGETHER.get(path) or TOGETHER.get(str(PurePath(path).parent)) or path
