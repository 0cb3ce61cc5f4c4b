"""Engines: generate() and score() behind one protocol."""

from __future__ import annotations

import torch

from megatron_lopd.config import EngineConfig
from megatron_lopd.engines.protocol import Engine, Prompted
from megatron_lopd.engines.requests import give_back_memory
from megatron_lopd.errors import EngineError
from megatron_lopd.mcore.gpus import require_usable
from megatron_lopd.ops.products import without_tf32

__all__ = ["Engine", "Prompted", "open_engine"]


def open_engine(config: EngineConfig, model_dir: str) -> Engine:
    """Load a Hugging Face checkpoint into the engine that `config.name` asks for; `close` it when done.

    vLLM runs in a process of its own, under the Python of `config.python`. What this process has kept of GPU
    memory, and no longer uses, is given back first. Raises EngineError when the model does not load, and
    ConfigError where the CPU would do the work of a GPU that torch cannot use.
    """
    give_back_memory()
    if config.name != "vllm":  # which says itself what it lacks
        require_usable()
        return load_engine(config, model_dir)
    from megatron_lopd.engines.process import EngineProcess

    process = EngineProcess("vLLM", config, model_dir, torch.get_num_threads())
    try:
        process.ready()
    except EngineError:
        process.close()
        raise
    return process


def load_engine(config: EngineConfig, model_dir: str) -> Engine:
    """`open_engine`, in this process whatever the engine."""
    without_tf32()
    # Here, for importing any takes seconds.
    if config.name == "vllm":
        from megatron_lopd.engines.vllm import VllmEngine

        return VllmEngine(config, model_dir)
    if config.name == "megatron":
        from megatron_lopd.engines.megatron import MegatronEngine

        return MegatronEngine(config, model_dir)
    from megatron_lopd.engines.hf import TransformersEngine

    return TransformersEngine(config, model_dir)
