"""GPUs that torch cannot use, or that one job cannot share: said before anything is allocated."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import torch

from megatron_lopd.errors import ConfigError

DEVICES = Path("/dev")  # where the driver puts nvidia0, nvidia1, ...


def why_unusable() -> str:
    """Why torch cannot use this machine's NVIDIA GPU, in torch's own words.

    Empty where it can, where there is none, and where CUDA_VISIBLE_DEVICES hides it on purpose (it is empty
    or -1).
    """
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") in ("", "-1"):
        return ""
    if not any(DEVICES.glob("nvidia[0-9]*")):
        return ""
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:  # the latter: a torch without CUDA
        return " ".join(str(error).split())
    return "torch.cuda.is_available() is False"


def require_usable() -> None:
    """Raise ConfigError where there is a GPU and the CPU would do its work in silence."""
    if reason := why_unusable():
        raise ConfigError(
            f"this machine has an NVIDIA GPU and torch cannot use it: {reason}: install a driver and a torch "
            "that fit each other, or set CUDA_VISIBLE_DEVICES= (empty) to run on the CPU"
        )


def kinds() -> dict[str, list[int]]:
    """{name of a GPU: numbers of the visible ones that have it}, in the order of their numbers."""
    found: dict[str, list[int]] = {}
    for number in range(torch.cuda.device_count()):
        found.setdefault(torch.cuda.get_device_name(number), []).append(number)
    return found


def require_one_kind(processes: int) -> None:
    """Raise ConfigError when the first `processes` visible GPUs, one a rank, are not all alike.

    Ranks choose layers and FP8 by their own GPU, and would wait for each other in different collectives.
    """
    used = Counter(
        name for name, numbers in kinds().items() for number in numbers if number < max(1, processes)
    )
    if len(used) > 1:
        listed = ", ".join(f"{count} x {name}" for name, count in used.items())
        each = "; ".join(f"{','.join(map(str, numbers))} for {name}" for name, numbers in kinds().items())
        raise ConfigError(
            f"the {processes} ranks would run on GPUs of different kinds ({listed}): set "
            f"CUDA_VISIBLE_DEVICES to those of one kind ({each}), and parallel.processes to at most as many"
        )
