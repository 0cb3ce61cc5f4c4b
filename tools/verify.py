"""Re-hash an artifact, or every artifact of a run, and prove the links between them: `lopd verify`.

    python tools/verify.py PATH

Exit codes: 0 all holds; 1 damaged; 2 bad usage; 3 a link does not hold.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

try:
    from megatron_lopd.commands.verify import verify_path
    from megatron_lopd.errors import LopdError
    from megatron_lopd.runtime.display import say
except ModuleNotFoundError as error:
    print(f"verify: {error}: run it in the environment that megatron-lopd is installed in", file=sys.stderr)
    sys.exit(2)


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description="re-hash an artifact or a run, and prove its lineage")
    parser.add_argument("path", type=Path, help="artifact directory, or run directory")
    arguments = parser.parse_args()
    try:
        for line in verify_path(arguments.path):
            say(line)
    except LopdError as error:
        say(f"verify: {error}", error=True)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
