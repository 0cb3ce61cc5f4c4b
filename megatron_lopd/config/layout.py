"""How a model is split over ranks."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from megatron_lopd.config.keys import Count, key, require

Recompute = Literal["none", "core_attn", "mlp", "moe_act", "moe", "selective", "full"]


@dataclass(frozen=True)
class ParallelConfig:
    """How a model is split. Ranks are tensor x context x pipeline x data; experts divide them anew."""

    tensor: Count = key("tensor parallel size (ranks)", 1)
    pipeline: Count = key("pipeline parallel size (ranks)", 1)
    virtual_pipeline: Count = key("model chunks on each pipeline rank, interleaved (count)", 1)
    context: Count = key("context parallel size: ranks that share a sequence", 1)
    expert: Count = key("expert parallel size: ranks that share the experts of a layer", 1)
    expert_tensor: Count | None = key("tensor parallel size within experts (ranks); empty: as tensor", None)
    sequence: bool = key("sequence parallelism, when tensor > 1", True)
    recompute: Recompute = key(
        "activations made again in the backward pass, by Megatron-Core's name of a layer's part: none; "
        "core_attn (pays without Transformer Engine); mlp of dense models; moe_act, experts' SwiGLU; moe, "
        "experts whole; selective: mlp, or moe_act where it can be, else moe; full: whole layers",
        "none",
    )
    processes: Count = key("processes `lopd run` starts for sft and train on this machine (ranks)", 1)

    def __post_init__(self) -> None:
        require(
            self.virtual_pipeline == 1 or self.pipeline > 1,
            f"parallel.virtual_pipeline={self.virtual_pipeline} interleaves pipeline stages, and "
            "parallel.pipeline is 1: set parallel.virtual_pipeline=1 or parallel.pipeline to at least 2",
        )
        require(
            self.processes % self.ranks_multiple == 0,
            f"parallel.processes={self.processes} must be a multiple of {self.ranks_multiple} "
            f"({self.product}): set parallel.processes="
            f"{self.ranks_multiple * max(1, self.processes // self.ranks_multiple)}",
        )

    @property
    def expert_tensor_size(self) -> int:
        """Tensor parallel size within experts."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def ranks_multiple(self) -> int:
        """The number of ranks must be a multiple of this: both the dense and the expert axes divide it."""
        dense = self.tensor * self.context * self.pipeline
        return math.lcm(dense, self.expert_tensor_size * self.expert * self.pipeline)

    @property
    def product(self) -> str:
        """The sizes behind `ranks_multiple`, for messages: the axes that are not 1, or tensor x pipeline."""
        dense = f"tensor x context x pipeline = {self.tensor} x {self.context} x {self.pipeline}"
        if self.expert == 1 and self.expert_tensor is None:
            return dense
        return (
            f"{dense}, and expert_tensor x expert x pipeline = "
            f"{self.expert_tensor_size} x {self.expert} x {self.pipeline}"
        )
