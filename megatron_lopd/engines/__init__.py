"""Engines: generate() and score() behind one protocol."""

from __future__ import annotations

from megatron_lopd.config import EngineConfig
from megatron_lopd.engines.protocol import Completion, Engine, GenerateRequest, ScoreRequest

__all__ = ["Completion", "Engine", "GenerateRequest", "ScoreRequest", "open_engine"]


def open_engine(config: EngineConfig, model_dir: str) -> Engine:
    """Load a Hugging Face checkpoint into the engine that `config.name` asks for; `close` it when done.

    Raises EngineError when the model does not load.
    """
    # Here, for importing either takes seconds.
    if config.name == "megatron":
        from megatron_lopd.engines.megatron import MegatronEngine

        return MegatronEngine(config, model_dir)
    from megatron_lopd.engines.hf import TransformersEngine

    return TransformersEngine(config, model_dir)
