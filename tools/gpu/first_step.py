"""What `imports` starts: a process that says when it has what training needs, and when a step is done."""

from __future__ import annotations

import importlib
import sys


def main() -> None:
    """Print "imported", then "stepped"; --toy: on a CPU."""
    importlib.import_module("megatron_lopd.training.loop")  # what a rank of `lopd train` has at its start
    print("imported", flush=True)
    from tools.gpu.training import first_step

    first_step(toy="--toy" in sys.argv)
    print("stepped", flush=True)


if __name__ == "__main__":
    main()
