"""The `megatron` engine's kind."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from megatron_lopd.config import Count, EngineConfig, ParallelConfig, key
from megatron_lopd.engines.kind import EngineKind, EngineOptions

if TYPE_CHECKING:
    from megatron_lopd.engines.protocol import Engine


@dataclass(frozen=True)
class MegatronOptions(EngineOptions):
    micro_batch_tokens: Count = key("token budget of a packed micro-batch", 16384, operational=True)
    parallel: ParallelConfig | None = key(
        "how the model is split over ranks; empty: the recipe's parallel", None, operational=True
    )

    @property
    def layout(self) -> ParallelConfig | None:
        return self.parallel

    def over(self, layout: ParallelConfig) -> MegatronOptions:
        return replace(self, parallel=self.parallel or layout)


class Megatron(EngineKind):
    """Rank 0 has the engine, and the other ranks serve it."""

    name = "megatron"
    caption = "the trainer's own model over ranks; scores only"
    Options = MegatronOptions
    samples = False
    fp8 = True

    def open(self, config: EngineConfig, model_dir: str) -> Engine:
        from megatron_lopd.engines.megatron_engine import MegatronEngine

        return MegatronEngine(config, model_dir)

    @contextmanager
    def leading(self) -> Iterator[None]:
        from megatron_lopd.engines.megatron_engine import leading

        with leading():
            yield

    def serve(self) -> None:
        from megatron_lopd.engines.megatron_engine import serve

        serve()
