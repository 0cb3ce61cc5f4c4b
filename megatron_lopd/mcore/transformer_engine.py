"""Transformer Engine, loaded before Megatron-Core and before torch loads cuDNN, or put aside for good.

Its wheels look for cuDNN where the system keeps it first, and torch's own, once loaded, gives it unresolved
symbols (OSError). A package of compiled parts can fail in many other ways, and Megatron-Core expects
ImportError alone: with anything else, importing Megatron-Core fails. So `megatron_lopd/__init__.py` calls
`load` when Megatron-Core is first imported, whoever does it.
"""

from __future__ import annotations

import functools
import importlib
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import torch

from megatron_lopd.mcore.gpus import why_unusable

PACKAGE = "transformer_engine"


@dataclass(frozen=True)
class TransformerEngine:
    """`version` where it is loaded, else None. `lacking`: why it is not, "" where it is.

    `broken`: it is installed, there is a GPU for it, and it cannot be loaded.
    """

    version: str | None
    lacking: str = ""
    broken: bool = False


@functools.cache
def load() -> TransformerEngine:
    """Import it where torch has a GPU. Elsewhere, and where that fails, the process goes on without it.

    Then `import transformer_engine` raises ImportError for everybody, so that all of Megatron-Core's modules
    agree that it is absent: with a part of it imported, they would not.
    """
    if not torch.cuda.is_available():
        return _put_aside(TransformerEngine(None, why_unusable() or "there is no NVIDIA GPU here"))
    if find_spec(PACKAGE) is None:
        return _put_aside(TransformerEngine(None, "Transformer Engine is not installed"))
    try:
        importlib.import_module(f"{PACKAGE}.pytorch")
    # Compiled parts raise OSError, RuntimeError, AssertionError; and what gives up may well exit.
    except (Exception, SystemExit) as error:  # noqa: BLE001
        words = f"{type(error).__name__}: {' '.join(str(error).split())}"
        name = f"Transformer Engine {installed_version()}"
        return _put_aside(
            TransformerEngine(None, f"{name} cannot be loaded, because of {words}", broken=True)
        )
    return TransformerEngine(installed_version())


def _put_aside(engine: TransformerEngine) -> TransformerEngine:
    for name in [name for name in sys.modules if name.partition(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.modules[PACKAGE] = None  # type: ignore[assignment] # the import system's own "halted"
    return engine


def installed_version() -> str:
    """By the metadata of whichever of its packages is there."""
    for package in ("transformer-engine", "transformer-engine-torch", "transformer_engine_torch"):
        try:
            return version(package)
        except PackageNotFoundError:
            continue
    return "of unknown version"


def quantization() -> Any:
    """The module of its FP8 recipes, checks and state: `quantization` since 2.9, `fp8` before."""
    try:
        return importlib.import_module(f"{PACKAGE}.pytorch.quantization")
    except ImportError:
        return importlib.import_module(f"{PACKAGE}.pytorch.fp8")


def forget_fp8_state() -> None:
    """Let go of the amax buffers of models that are gone: they would live, and be reduced, with the next."""
    if load().version is not None:
        quantization().FP8GlobalStateManager.reset()
