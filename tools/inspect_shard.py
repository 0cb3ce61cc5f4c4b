"""Show a shard of rollouts or scores: what it is, how long its samples are, and some of them.

    python tools/inspect_shard.py SHARD.arrow [--samples N | --sample ID ...] [--token N] [--tokenizer DIR]

Reads the index, and the samples shown. Exit codes: 0 done; 1 failed; 2 bad usage.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from megatron_lopd.commands.inspection import describe_shard
    from megatron_lopd.errors import LopdError
    from megatron_lopd.runtime.display import say
except ModuleNotFoundError as error:
    print(
        f"inspect_shard: {error}: run it in the environment that megatron-lopd is installed in",
        file=sys.stderr,
    )
    sys.exit(2)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="show a shard of rollouts or scores")
    parser.add_argument("shard", type=Path, help=".arrow shard")
    parser.add_argument("--samples", type=int, default=2, help="the first so many samples (count)")
    parser.add_argument(
        "--sample", action="append", default=[], metavar="ID", help="a sample by id; repeat it"
    )
    parser.add_argument("--token", type=int, default=0, help="response token whose top k is shown, from 0")
    parser.add_argument(
        "--tokenizer", type=Path, help="model directory to decode with (default: the shard's)"
    )
    arguments = parser.parse_args()
    try:
        for line in describe_shard(
            arguments.shard, arguments.samples, arguments.sample, arguments.token, arguments.tokenizer
        ):
            say(line)
    except LopdError as error:
        say(f"inspect_shard: {error}", error=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
