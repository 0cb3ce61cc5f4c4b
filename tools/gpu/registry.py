"""The checks, most valuable first. A new one is a function in tools/gpu/checks and a line here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Check:
    """One check: a function that takes a `Part` of the run (context.py), in a process of its own.

    `target` is "module:function". `seconds` is what it took on an H200 with 16 cores, or what those that have
    not ended on a GPU may take: it is begun only where that much of the budget is left. At `limit` seconds it
    is ended. Consecutive checks that share the GPU (`shared`: they measure no time) run beside each other.
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
    _check("machine", "versions; copy bandwidth and bf16 GEMMs", "machine:run", 17, 60),
    _check("log-probs", "the log-prob operation: exact, and timed", "log_probs:run", 51, 120),
    _check("tests", "tests/gpu, several processes at once", "gpu_tests:run", 91, 220, shared=True),
    _check("quickstart", "examples/quickstart, its accuracy", "recipes:quickstart", 158, 280, shared=True),
    _check("steps", "training steps: seconds, MFU, memory", "steps:run", 86, 180),
    # These two have not run on a GPU: before what has. Their seconds are a guess, from 12 to 17 for each
    # process that begins to train or to answer.
    _check("stage-change", "memory that training leaves behind", "stage_change:run", 105, 220),
    _check("imports", "seconds until train can begin", "imports:run", 65, 180),
    _check("checkpoint", "save and load: GB/s, memory", "checkpoints:run", 37, 120),
    _check("profile", "one step by kernel", "profiles:run", 18, 60),
    _check("swiglu", "SwiGLU's kernels, each way", "swiglu:run", 25, 60),
    # Last, for they alone would take half of the budget each: a process for each stage, 140 s within them.
    # recipe-fp8 has ended in 257 s beside others; recipe-bf16, by itself, was in evaluate after 239.
    _check("recipe-bf16", "a 0.6B run from generate to report", "recipes:bf16", 270, 400),
    _check("recipe-fp8", "recipe-bf16, trained in FP8 tensorwise", "recipes:fp8", 260, 400),
)
