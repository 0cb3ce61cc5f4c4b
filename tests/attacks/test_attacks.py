"""A few attempts of every kind, the same each time; `make attack` makes as many as the time allows."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.attack import kinds
from tests.attacks.workers import campaigns

SEED = 1


def test_every_attack_is_refused_or_changes_nothing(tmp_path: Path) -> None:
    """Of all kinds at once: they share the finished run that their worlds are copies of."""
    rounds = ((kind, SEED) for kind in kinds())
    tallies = dict(campaigns(tmp_path, rounds, examples=0, processes=2, minutes=None))
    assert tallies.keys() == kinds().keys()
    assert all(tally.tried.total() for tally in tallies.values())
    findings = [str(finding) for tally in tallies.values() for finding in tally.findings]
    assert not findings, "\n".join(findings)
