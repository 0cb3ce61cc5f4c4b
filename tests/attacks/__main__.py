"""`python -m tests.attacks --minutes 30`: every kind in rotation, with fresh seeds, over all cores.

It tells each finding as it comes, and at its end the counts by kind. Exit code 1 where there was one.
"""

from __future__ import annotations

import os

# Before torch is imported, here and in every process.
os.environ |= {"OMP_NUM_THREADS": "1"}

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tests.attacks.attack import kinds
from tests.attacks.campaign import Tally, table
from tests.attacks.trial import WRONG
from tests.attacks.workers import campaigns


def main() -> int:
    """Exit code."""
    known = list(kinds())
    parser = argparse.ArgumentParser(prog="python -m tests.attacks", description=__doc__)
    parser.add_argument(
        "--minutes", type=float, default=30.0, help="how long, beside what making the worlds takes"
    )
    parser.add_argument("--kind", choices=known, action="append", help="this kind alone; may be given again")
    parser.add_argument("--seed", type=int, help="one round of this seed, in place of --minutes")
    parser.add_argument("--examples", type=int, default=60, help="attempts of a round")
    parser.add_argument(
        "--processes", type=int, default=len(os.sched_getaffinity(0)), help="attempts at a time"
    )
    options = parser.parse_args()
    chosen = options.kind or known
    tallies = {name: Tally() for name in chosen}
    with tempfile.TemporaryDirectory(prefix="attacks-") as place:
        started = time.monotonic()
        once = options.seed is not None
        seeds = [options.seed] if once else iter(lambda: random.SystemRandom().randrange(1 << 32), None)
        rounds = campaigns(
            Path(place),
            ((kind, seed) for seed in seeds for kind in chosen),
            examples=options.examples,
            processes=1 if once else options.processes,
            minutes=None if once else options.minutes,
        )
        try:
            for name, tally in rounds:
                for finding in tally.findings:
                    print(finding, flush=True)
                tallies[name].add(tally)
        finally:
            print(f"{(time.monotonic() - started) / 60:.1f} minutes")
            print("\n".join(table(tallies)))
    return 1 if any(tally.tried[each] for tally in tallies.values() for each in WRONG) else 0


if __name__ == "__main__":
    sys.exit(main())
