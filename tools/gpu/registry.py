"""The checks, most valuable first. A new one is a function in tools/gpu/checks and a line here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check: a function that takes a `Part` of the run (context.py), in a process of its own.

    `target` is "module:function". `seconds` is what it takes on an H100: it is begun only where that much of
    the budget is left. At `limit` seconds it is ended. Consecutive checks that share the GPU (`shared`: they
    measure no time) run beside each other.
    """

    name: str
    about: str
    target: str
    seconds: float
    limit: float
    shared: bool = False
    toy_limit: float = 600.0  # a CPU may be slow, and used by others as well


def _check(name: str, about: str, function: str, seconds: float, limit: float, shared: bool = False) -> Check:
    return Check(name, about, f"tools.gpu.checks.{function}", seconds, limit, shared)


CHECKS = (
    _check("machine", "versions; copy bandwidth and bf16 GEMMs", "machine:run", 20, 60),
    _check("log-probs", "the log-prob operation: exact, and timed", "log_probs:run", 40, 120),
    _check("tests", "tests/gpu, several processes at once", "gpu_tests:run", 90, 220, shared=True),
    _check("quickstart", "examples/quickstart, its accuracy", "recipes:quickstart", 150, 260, shared=True),
    # Here for want of time: it is to end well, and how fast such a run is recipe-bf16 says, by itself.
    _check("recipe-fp8", "recipe-bf16, trained in FP8 tensorwise", "recipes:fp8", 150, 260, shared=True),
    _check("steps", "training steps: seconds, MFU, memory", "steps:run", 100, 180),
    _check("profile", "one step by kernel", "profiles:run", 30, 60),
    _check("swiglu", "SwiGLU's kernels, each way", "swiglu:run", 20, 60),
    _check("checkpoint", "save and load: GB/s, memory", "checkpoints:run", 45, 120),
    _check("recipe-bf16", "a 0.6B run from generate to report", "recipes:bf16", 100, 240),
    _check("stage-change", "memory that training leaves behind", "stage_change:run", 45, 120),
    _check("imports", "seconds until train can begin", "imports:run", 30, 150),
)
