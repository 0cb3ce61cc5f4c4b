"""RMSNorm that goes with sequence parallelism, which Megatron-Core's torch norm refuses."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from megatron.core.transformer import TransformerConfig

from megatron_lopd.mcore import compat


class RMSNorm(torch.nn.Module):
    """`weight * x / sqrt(mean(x^2) + eps)` over the last dimension (Zhang & Sennrich 2019, equation 4).

    Under layernorm_zero_centered_gamma `1 + weight` stands for the weight, and begins as zeros.
    The normalisation is in fp32 and its product with the weight in the input's dtype, as in
    transformers. Under sequence parallelism each rank sees part of the tokens, so the weight is marked
    for `megatron.core.distributed.finalize_model_grads`, which then sums its gradient over TP.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        ones = torch.ones(hidden_size, dtype=config.params_dtype, device=compat.device())
        self.weight = torch.nn.Parameter(ones - 1 if self.zero_centered else ones)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` [..., hidden_size]."""
        normed = F.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        if self.zero_centered:  # in fp32 throughout: 1 + weight in bf16 would lose the weight's own digits
            return (normed * (1 + self.weight.float())).to(x.dtype)
        return normed.to(x.dtype) * self.weight
