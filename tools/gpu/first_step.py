"""What `imports` starts: a process that says when it has what training needs, and when a step is done."""

from __future__ import annotations

import importlib
import sys
import time


def main() -> None:
    """Print when, by the clock that all processes share; --toy: on a CPU."""
    importlib.import_module("megatron_lopd.training.loop")  # what a rank of `lopd train` has at its start
    print(f"imported at {time.monotonic()}", flush=True)
    from tools.gpu.training import first_step

    first_step(toy="--toy" in sys.argv)
    print(f"stepped at {time.monotonic()}", flush=True)


if __name__ == "__main__":
    main()
