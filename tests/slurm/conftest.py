from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.slurm.cluster import Slurm


@pytest.fixture(scope="session")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    """A SLURM of its own. What the test's process starts talks to it."""
    each = Slurm(tmp_path_factory.mktemp("slurm"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SLURM_CONF", str(each.root / "slurm.conf"))
        try:
            each.start()
            yield each
        finally:
            each.stop()
