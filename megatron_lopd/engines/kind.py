"""What the rest of the project asks of an engine before it is open: what it can do, and its own options.

Commands that only ask import this: a kind imports what is heavy in `open`.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from megatron_lopd.config import EngineConfig, Options, ParallelConfig, check_options
from megatron_lopd.registry import ENGINES

if TYPE_CHECKING:
    from megatron_lopd.engines.protocol import Engine


@dataclass(frozen=True)
class EngineOptions(Options):
    """An engine's own options, and what follows from them that is asked of any engine's."""

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


class EngineKind(ABC):
    """One kind of engine; an object of it is registered.

    `samples`, `scores`: what it can be asked for. `takes_weights`: while it is open, those of a student in
    training. `own_process`: it runs in one, and may die without taking this one along. `fp8`: it can have FP8
    layers. A recipe has its `Options` in the section called `name` beside engine.name.
    """

    name: ClassVar[str]
    caption: ClassVar[str]
    Options: ClassVar[type[EngineOptions]] = EngineOptions
    samples: ClassVar[bool] = True
    scores: ClassVar[bool] = True
    takes_weights: ClassVar[bool] = False
    own_process: ClassVar[bool] = False
    fp8: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        check_options(cls, EngineOptions)

    @abstractmethod
    def open(self, config: EngineConfig, model_dir: str) -> Engine:
        """Load a Hugging Face checkpoint, in this process. EngineError when it does not load."""

    def python(self, config: EngineConfig) -> str:
        """The interpreter of its own process."""
        return sys.executable

    def require(self, config: EngineConfig, section: str) -> None:  # noqa: B027 - some need nothing
        """Raise NotInstalled unless all it needs is here. `section` is the recipe's, for the message."""

    def versions(self, config: EngineConfig) -> dict[str, str]:
        """{library: version}, for manifests; of what `base_versions` does not tell already."""
        return {}

    def here(self) -> str:
        """What `doctor` says of it on this machine."""
        return self.caption

    def score_advice(self, config: EngineConfig) -> list[str]:
        """A line for scores that will be coarser than they look; none otherwise."""
        return []

    def beside_trainer(self, config: EngineConfig) -> EngineConfig:
        """`config`, for a GPU on which a model is trained as well."""
        return config

    @contextmanager
    def leading(self) -> Iterator[None]:
        """In rank 0: the other ranks `serve` what is opened within, and go on when it is left."""
        yield

    def serve(self) -> None:  # noqa: B027 - most have no ranks
        """In every other rank of an engine that is made of ranks: take part in what rank 0 opens."""

    def sizes(self, config: EngineConfig, node: int) -> list[int]:
        """How many of a node's GPUs may hold one copy of the model: what `plan` chooses among."""
        return [count for count in (1, 2, 4, 8) if count <= node]

    def memory_share(self, config: EngineConfig) -> float | None:
        """The share of a GPU's memory that it takes; None where nothing limits it."""
        return None

    def assumption(self) -> str | None:
        """What `plan` takes for granted of it; None for nothing."""
        return (
            f"engine.name={self.name} is planned as vLLM would run, with a paged KV cache over several GPUs: "
            "itself it takes one GPU, and all of batch_size at once"
        )

    def too_large(self, section: str) -> list[str]:
        """What to do where a model does not fit its GPUs, beside what helps any engine."""
        return []


def kind_of(config: EngineConfig) -> EngineKind:
    """The kind that `config` names. ConfigError where there is none."""
    kind: EngineKind = ENGINES[config.name]
    return kind
