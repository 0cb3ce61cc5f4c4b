"""What ends a worker of a shared stage, and what does not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from megatron_lopd.config import EngineConfig
from megatron_lopd.errors import DataError, LopdError, StopRequested
from megatron_lopd.pipeline import workers as sharing
from megatron_lopd.pipeline.workers import Part, Work, make_parts
from megatron_lopd.runtime.claims import claim_path


@pytest.mark.parametrize("error", [DataError("in the way of the others"), StopRequested("enough")])
def test_of_what_ends_the_work_on_a_lost_part_a_stop_alone_ends_the_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: LopdError
) -> None:
    """Asleep for longer than its lease it lost the part, and wakes up to be asked to stop, say."""
    monkeypatch.setattr(sharing, "open_engine", lambda *unused: FakeEngine())
    path = tmp_path / "shard.arrow"

    def write(*unused: Any) -> None:
        claim_path(tmp_path, path.name, 2).touch()  # taken over,
        path.touch()  # and made
        raise error

    work = Work("test", EngineConfig(), tmp_path, [Part(path, 1, write)])
    if isinstance(error, StopRequested):
        with pytest.raises(StopRequested):
            make_parts([work])
    else:
        make_parts([work])


class FakeEngine:
    def close(self) -> None:
        pass
