"""The process of one check: python -P -m tools.gpu.child MODULE:FUNCTION SCRATCH TOLD [--toy]."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from tools.gpu.context import CheckFailed, LeftOut, Part

LEFT_OUT = 77  # as test harnesses say that a test was skipped


def main() -> int:
    target, scratch, told, *options = sys.argv[1:]
    part = Part("--toy" in options, Path(scratch), Path(told))
    try:
        module, _, function = target.partition(":")
        getattr(importlib.import_module(module), function)(part)
        part.end()
    except LeftOut as reason:
        part.reason(reason)
        return LEFT_OUT
    except CheckFailed as failure:
        part.reason(failure)
        return 1
    except BaseException as error:
        part.reason(error)
        raise
    return 0


if __name__ == "__main__":
    sys.exit(main())
