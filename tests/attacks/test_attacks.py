"""A few attempts of every kind, the same each time; `make attack` makes as many as the time allows."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.attacks.attack import kinds
from tests.attacks.campaign import Tally
from tests.attacks.workers import campaigns

SEED = 1


@pytest.fixture(scope="module")
def tallies(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Tally]]:
    """What came of each kind."""
    place: Path = tmp_path_factory.mktemp("attacks")
    rounds = ((kind, SEED) for kind in kinds())
    return dict(campaigns(place, rounds, examples=0, processes=1, minutes=None))


@pytest.mark.parametrize("kind", kinds())
def test_every_attack_is_refused_or_changes_nothing(tallies: dict[str, Tally], kind: str) -> None:
    assert tallies[kind].tried.total() > 0
    assert not tallies[kind].findings, "\n".join(map(str, tallies[kind].findings))
