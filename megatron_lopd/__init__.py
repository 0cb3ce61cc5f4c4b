"""Offline on-policy distillation (Lightning OPD, arXiv 2604.13010) on Megatron-Core.

Megatron-Core warns at import about each optional package it lacks (Apex, Transformer Engine). `lopd
doctor` reports those; on every other command's console they are noise. They are filtered here, since
every module of the package is imported after this one, and so Megatron-Core is too; which is also why what
must be there before it is put there here: Transformer Engine, and `jit` for its own.
"""

from __future__ import annotations

import importlib
import logging
import sys
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType
from typing import TYPE_CHECKING, Any

from megatron_lopd import errors
from megatron_lopd.mcore import jit

if TYPE_CHECKING:
    from megatron_lopd.api import Run, read_metrics, read_rollouts, read_scores

__all__ = ["Run", "errors", "read_metrics", "read_rollouts", "read_scores"]
__version__ = "0.1.0"

jit.install()

warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
# What torch says of Megatron-Core's code. The filter above does not see these: without CUDA they come
# from mcore.compat, which stands between the two, or they are no UserWarning.
for _message in (
    r"The \.grad attribute of a Tensor that is not a leaf",  # the optimizer's fp32 shards are views
    r"`torch\.distributed\.\w+` is deprecated",
    r"`load_state_dict` is deprecated",
    r"Please use DTensor instead",
    r"The argument order of load has been changed",  # this and the next: Megatron-Core 0.19's loader
    r"torch\.distributed is disabled, unavailable or uninitialized",
):
    warnings.filterwarnings("ignore", message=_message)


def _other_than(message: str) -> Callable[[logging.LogRecord], bool]:
    return lambda record: not record.getMessage().startswith(message)


# What Megatron-Core 0.19 advises at every start and load: its other model class, another way to build
# it, another checkpoint. Older releases know none of them.
for _logger, _message in (
    ("models.gpt.gpt_model", "GPTModel IS DEPRECATED"),
    ("transformer.transformer_layer", "Rewrapping ModuleSpec"),
    ("distributed.distributed_data_parallel", "DistributedDataParallel: full_param_layout not provided"),
    ("dist_checkpointing.strategies.common", "load_common is deprecated"),
):
    logging.getLogger(f"megatron.core.{_logger}").addFilter(_other_than(_message))


class _TransformerEngineFirst(MetaPathFinder):
    """Finds no module, but loads Transformer Engine when Megatron-Core is about to be imported."""

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None) -> None:
        if fullname == "megatron.core":
            from megatron_lopd.mcore.transformer_engine import load  # imports torch, which --help need not

            load()


sys.meta_path.insert(0, _TransformerEngineFirst())


def __getattr__(name: str) -> Any:
    """The Python interface, imported when it is asked for: every module of the package imports this one."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("megatron_lopd.api"), name)
