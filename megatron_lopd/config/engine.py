"""What runs a model to sample or to score, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_lopd.config.fp8 import Fp8Config
from megatron_lopd.config.keys import key, require
from megatron_lopd.config.layout import ParallelConfig

ALONE = 0.85  # of a GPU's memory, where nothing else is on it


@dataclass(frozen=True)
class EngineConfig:
    name: Literal["transformers", "vllm", "megatron"] = key(
        "what runs the model: transformers; vllm; or to score, megatron, the trainer's own model over ranks",
        "transformers",
    )
    batch_size: int = key("sequences run together (transformers, vllm)", 64, operational=True)
    dtype: Literal["fp32", "bf16"] = key("compute precision of the engine", "fp32")
    workers: int = key(
        "processes that share the stage on each machine, its GPUs and cores divided among them (count)",
        1,
        operational=True,
    )
    shard_samples: int = key("samples in a shard: what a killed worker can lose at most", 4096)
    trust_remote_code: bool = key("run code that comes with the model", False)
    python: str = key("vllm: the Python that has it; empty: this one", "", operational=True)
    tensor: int = key("vllm: GPUs that hold one copy of the model", 1, operational=True)
    memory_fraction: float | None = key(
        "vllm: share of a GPU's memory it takes; empty: 0.85, or as online's teacher half of what is free "
        "beside the trainer",
        None,
        operational=True,
    )
    micro_batch_tokens: int = key("token budget of a packed micro-batch (megatron)", 16384, operational=True)
    parallel: ParallelConfig | None = key(
        "how megatron's model is split over ranks; empty: the recipe's parallel", None, operational=True
    )
    fp8: Fp8Config | None = key("FP8 layers (megatron, dtype=bf16); empty: none", None)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "engine.batch_size must be at least 1")
        require(self.workers >= 1, "engine.workers must be at least 1")
        require(self.shard_samples >= 1, "engine.shard_samples must be at least 1")
        require(self.tensor >= 1, "engine.tensor must be at least 1")
        require(0 < self.memory_share <= 1, "engine.memory_fraction must be above 0 and at most 1")
        for option, plain in (("python", ""), ("tensor", 1)):
            require(
                self.name == "vllm" or getattr(self, option) == plain,
                f"engine.{option} is of engine.name=vllm alone, not of {self.name}: drop it",
            )
        require(self.micro_batch_tokens >= 1, "engine.micro_batch_tokens must be at least 1")
        for option in ("parallel", "fp8"):
            require(
                self.name == "megatron" or getattr(self, option) is None,
                f"engine.{option} is of engine.name=megatron alone, not of {self.name}: drop it",
            )
        require(
            self.fp8 is None or self.dtype == "bf16",
            "engine.fp8 layers stand among bf16 ones: set engine.dtype=bf16, or drop engine.fp8",
        )
        require(
            self.fp8 is None or self.fp8.recipe != "delayed",
            "engine.fp8.recipe=delayed finds its scales in earlier micro-batches, and scores would depend on "
            "their order: set it to tensorwise or blockwise",
        )

    @property
    def memory_share(self) -> float:
        """`memory_fraction`, or its default where the engine has the GPU to itself."""
        return ALONE if self.memory_fraction is None else self.memory_fraction
