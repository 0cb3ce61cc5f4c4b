"""Engines: generate() and score() behind one protocol; which there are, and how one is opened.

Imports nothing that computes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_lopd.artifacts.digest_cache import require_as_hashed, require_unchanged, stamps_of
from megatron_lopd.artifacts.model_files import model_files
from megatron_lopd.config import EngineConfig
from megatron_lopd.engines.kind import EngineKind, EngineOptions, kind_of
from megatron_lopd.engines.megatron import Megatron
from megatron_lopd.engines.protocol import Engine, Prompted
from megatron_lopd.engines.transformers import Transformers
from megatron_lopd.engines.vllm import Vllm
from megatron_lopd.errors import DataError, EngineError
from megatron_lopd.registry import ENGINES

if TYPE_CHECKING:
    from megatron_lopd.engines.process import EngineProcess

ENGINES.add(Transformers(), Vllm(), Megatron())

__all__ = ["Engine", "EngineKind", "EngineOptions", "Prompted", "kind_of", "load_engine", "open_engine"]


def open_engine(config: EngineConfig, model_dir: str) -> Engine | EngineProcess:
    """Load a Hugging Face checkpoint into the engine that `config.name` asks for; `close` it when done.

    In this process, or in one of its own where its kind is so. What this process has kept of GPU memory, and
    no longer uses, is given back first. Raises EngineError when the model does not load, DataError where its
    files are not those of one model (`model_files`), change meanwhile, or are not as they were when this
    process hashed them, and ConfigError where the CPU would do the work of a GPU that torch cannot use.
    """
    from megatron_lopd.engines.requests import give_back_memory

    give_back_memory()
    files = model_files(model_dir).all
    before = stamps_of(files)
    engine = _opened(config, model_dir)
    try:
        require_unchanged(before, "loaded")
        require_as_hashed(files)
    except DataError:
        engine.close()
        raise
    return engine


def _opened(config: EngineConfig, model_dir: str) -> Engine | EngineProcess:
    import torch

    from megatron_lopd.engines.process import EngineProcess
    from megatron_lopd.mcore.gpus import require_usable

    kind = kind_of(config)
    if not kind.own_process:  # which says itself what it lacks
        require_usable()
        return load_engine(config, model_dir)
    process = EngineProcess(kind.name, config, model_dir, torch.get_num_threads())
    try:
        process.ready()
    except EngineError:
        process.close()
        raise
    return process


def load_engine(config: EngineConfig, model_dir: str) -> Engine:
    """`open_engine`, in this process whatever the engine."""
    from megatron_lopd.ops.products import without_tf32

    without_tf32()
    return kind_of(config).open(config, model_dir)
