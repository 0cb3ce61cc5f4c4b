"""The engines by name: what each can do, and its own options. Imports nothing that computes."""

from __future__ import annotations

from dataclasses import dataclass, replace

from megatron_lopd.config import Count, Options, ParallelConfig, Share, key

ALONE = 0.85  # of a GPU's memory, where nothing else is on it


@dataclass(frozen=True)
class EngineOptions(Options):
    """An engine's own options, and what the stages ask of any engine's."""

    @property
    def devices(self) -> int:
        """GPUs that hold one copy of the model."""
        return 1

    @property
    def layout(self) -> ParallelConfig | None:
        """How ranks divide the model; None for an engine that is not made of ranks."""
        return None

    def over(self, layout: ParallelConfig) -> EngineOptions:
        """These, with `layout` for what they leave empty of it."""
        return self


@dataclass(frozen=True)
class VllmOptions(EngineOptions):
    python: str = key("the Python that has it; empty: this one", "", operational=True)
    tensor: Count = key("GPUs that hold one copy of the model", 1, operational=True)
    memory_fraction: Share | None = key(
        "share of a GPU's memory it takes; empty: 0.85, or as online's teacher half of what is free beside "
        "the trainer",
        None,
        operational=True,
    )

    @property
    def devices(self) -> int:
        return self.tensor

    @property
    def memory_share(self) -> float:
        """`memory_fraction`, or its default where the engine has the GPU to itself."""
        return ALONE if self.memory_fraction is None else self.memory_fraction


@dataclass(frozen=True)
class MegatronOptions(EngineOptions):
    micro_batch_tokens: Count = key("token budget of a packed micro-batch", 16384, operational=True)
    parallel: ParallelConfig | None = key(
        "how the model is split over ranks; empty: the recipe's parallel", None, operational=True
    )

    @property
    def layout(self) -> ParallelConfig | None:
        return self.parallel

    def over(self, layout: ParallelConfig) -> EngineOptions:
        return replace(self, parallel=self.parallel or layout)


@dataclass(frozen=True)
class EngineKind:
    """`samples`: it can draw responses, not only score them. `fp8`: it can have FP8 layers."""

    name: str
    caption: str
    Options: type[EngineOptions] = EngineOptions
    samples: bool = True
    fp8: bool = False


TRANSFORMERS = EngineKind("transformers", "Hugging Face's own code, in this process, on one GPU or on CPUs")
VLLM = EngineKind("vllm", "vLLM, in a process of its own, on the GPUs that one copy takes", VllmOptions)
MEGATRON = EngineKind(
    "megatron",
    "the trainer's own model over ranks; scores only",
    MegatronOptions,
    samples=False,
    fp8=True,
)
