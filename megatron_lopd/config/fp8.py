"""FP8 layers: how their scales are found."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_lopd.config.keys import key, require


@dataclass(frozen=True)
class Fp8Config:
    """Transformer Engine's FP8 in the linear layers; log-probs and master weights stay fp32."""

    recipe: Literal["delayed", "tensorwise", "blockwise", "mxfp8"] = key(
        "how scales are found: from earlier steps, by tensor, by block, or in blocks of 32 (Blackwell)"
    )
    format: Literal["e4m3", "hybrid"] | None = key(
        "hybrid: e4m3 forward, e5m2 backward; empty: hybrid for delayed and tensorwise, e4m3 for the others",
        None,
    )
    bf16_first_last_layers: int = key("layers kept in bf16 at each end (count; not with delayed)", 0)

    def __post_init__(self) -> None:
        require(self.bf16_first_last_layers >= 0, "fp8.bf16_first_last_layers must be at least 0")
        require(
            self.recipe != "delayed" or self.bf16_first_last_layers == 0,
            f"fp8.bf16_first_last_layers={self.bf16_first_last_layers} does not go with fp8.recipe=delayed: "
            "set it to 0, or fp8.recipe to tensorwise or blockwise",
        )

    @property
    def number_format(self) -> Literal["e4m3", "hybrid"]:
        """`format`, or Transformer Engine's default for the recipe: small blocks need no wider exponent."""
        return self.format or ("hybrid" if self.recipe in ("delayed", "tensorwise") else "e4m3")
