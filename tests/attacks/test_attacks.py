"""A few attempts of every kind, the same each time; `make attack` makes as many as the time allows."""

from __future__ import annotations

from pathlib import Path

from tests.attacks.attack import kinds
from tests.attacks.campaign import Tally, table
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


def test_kinds_that_were_not_tried_are_named_and_have_no_counts() -> None:
    some = Tally()
    some.tried["refused"] = 3
    head, prompts, missed, together = table({"prompts": some, "models": Tally(), "begun": Tally()})
    assert head.split()[:2] == ["kind", "tried"]
    assert prompts.split()[:3] == ["prompts", "3", "3"]
    assert missed == "not tried at all, for want of time: begun, models"
    assert together.split()[:2] == ["all", "3"]
    assert len(table({"prompts": some})) == 3
