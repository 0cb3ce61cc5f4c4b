"""What stops a run whose numbers cannot be trusted."""

from __future__ import annotations

from megatron_lopd.errors import NumericsError


def check_skipped(skipped_steps: int, max_skipped_steps: int, step: int, grad_norm: float) -> None:
    """Raise NumericsError when more steps were skipped for non-finite gradients than are allowed."""
    if skipped_steps > max_skipped_steps:
        raise NumericsError(
            f"step {step}: the gradient norm is {grad_norm}, and {skipped_steps} steps were skipped so, "
            f"above max_skipped_steps={max_skipped_steps}: lower optimizer.lr, raise optimizer.warmup_steps "
            "or train in fp32; if it was so from the first step on, check the starting model's weights"
        )
