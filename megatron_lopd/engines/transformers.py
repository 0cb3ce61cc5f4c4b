"""The `transformers` engine's kind."""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lopd.config import EngineConfig
from megatron_lopd.engines.kind import EngineKind

if TYPE_CHECKING:
    from megatron_lopd.engines.protocol import Engine


class Transformers(EngineKind):
    """Runs anywhere, and is the reference that the others are compared with."""

    name = "transformers"
    caption = "Hugging Face's own code, in this process, on one GPU or on the CPU"
    takes_weights = True

    def open(self, config: EngineConfig, model_dir: str) -> Engine:
        from megatron_lopd.engines.transformers_engine import TransformersEngine

        return TransformersEngine(config, model_dir)
