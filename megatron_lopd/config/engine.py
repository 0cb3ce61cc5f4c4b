"""What runs a model to sample or to score, and how."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_lopd.config.keys import key, require


@dataclass(frozen=True)
class EngineConfig:
    name: Literal["transformers"] = key("what runs the model: transformers", "transformers")
    batch_size: int = key("sequences run together", 64)
    dtype: Literal["fp32", "bf16"] = key("compute precision of the engine", "fp32")
    workers: int = key(
        "processes that share the stage on each machine, its GPUs and cores divided among them (count)",
        1,
        operational=True,
    )
    shard_samples: int = key("samples in a shard: what a killed worker can lose at most", 4096)
    trust_remote_code: bool = key("run code that comes with the model", False)

    def __post_init__(self) -> None:
        require(self.batch_size >= 1, "engine.batch_size must be at least 1")
        require(self.workers >= 1, "engine.workers must be at least 1")
        require(self.shard_samples >= 1, "engine.shard_samples must be at least 1")
