"""What says whether a response is right."""

from __future__ import annotations

from megatron_lopd.graders.arithmetic_grader import ArithmeticGrader, DialectsGrader
from megatron_lopd.graders.grader import Grader, Verdict
from megatron_lopd.graders.math_grader import MathGrader
from megatron_lopd.graders.sandbox import Sandbox
from megatron_lopd.registry import GRADERS

__all__ = ["Grader", "Sandbox", "Verdict", "open_grader"]

GRADERS.add(MathGrader, ArithmeticGrader, DialectsGrader)


def open_grader(name: str) -> Grader:
    """The grader of that name. ConfigError when there is none."""
    grader: type[Grader] = GRADERS[name]
    return grader()
