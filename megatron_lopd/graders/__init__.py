"""What says whether an answer is right, by name."""

from megatron_lopd.graders.grader import KINDS
from megatron_lopd.registry import GRADERS

GRADERS.add(*KINDS)
