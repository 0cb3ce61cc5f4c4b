"""Where Megatron-Core's SwiGLU functions are replaced by our kernels (ops/swiglu.py)."""

from __future__ import annotations

from megatron_lopd.mcore.reliance import Patch
from megatron_lopd.ops.swiglu import swiglu, swiglu_back, weighted_swiglu, weighted_swiglu_back

_FUSION = "megatron.core.fusions.fused_bias_swiglu"
PATCHES = (
    Patch(
        f"{_FUSION}:swiglu",
        swiglu,
        f"{_FUSION}:SwiGLUFunction",
        "return swiglu(input)",
        "runs the feed-forward's activation",
    ),
    Patch(
        f"{_FUSION}:swiglu_back",
        swiglu_back,
        f"{_FUSION}:SwiGLUFunction",
        "tmp = swiglu_back(grad_output, input)",
        "runs its gradient",
    ),
    Patch(
        f"{_FUSION}:weighted_swiglu",
        weighted_swiglu,
        f"{_FUSION}:WeightedSwiGLUFunction",
        "return weighted_swiglu(input, weights)",
        "runs the experts' activation",
    ),
    Patch(
        f"{_FUSION}:weighted_swiglu_back",
        weighted_swiglu_back,
        f"{_FUSION}:WeightedSwiGLUFunction",
        "tmp, wgrad = weighted_swiglu_back(grad_output, input, weights)",
        "runs its gradients",
    ),
)
