"""Ranks in which the Triton kernels run in Triton's interpreter, on a CPU."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Any

from gloo import run_ranks


def run_interpreted(
    world_size: int, function: Callable[..., Any], *arguments: Any, timeout: float = 120.0
) -> list[Any]:
    """As run_ranks."""
    return run_ranks(world_size, _interpreted, function, *arguments, timeout=timeout)


def _interpreted(function: Callable[..., Any], *arguments: Any) -> Any:
    interpret()
    return function(*arguments)


def interpret() -> None:
    """From now on, in this process. Triton chooses as it is imported, which the ranks' server has done: it is
    imported again, but for its compiled part, of which a process can have but one."""
    from megatron_lopd.ops.kernel_trial import trial

    os.environ["TRITON_INTERPRET"] = "1"
    for name in [name for name in sys.modules if name.partition(".")[0] == "triton"]:
        if not name.startswith("triton._C"):
            del sys.modules[name]
    trial.cache_clear()
    assert trial("cpu") == ""
