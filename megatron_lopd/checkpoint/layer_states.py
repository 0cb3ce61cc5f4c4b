"""What a layer keeps beside its weights, looked at before the layer is given it.

Transformer Engine keeps a pickle in a tensor of bytes, and unpickles that by itself: names in it would be
code that is run. So every name in it is looked up here first, and nothing is allowed but tensors and
Transformer Engine's own FP8 recipes.
"""

from __future__ import annotations

import dataclasses
import io
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_lopd.errors import DataError
from megatron_lopd.mcore.private import tensor_rebuilders

_SUFFIX = "_extra_state"
_RECIPES = "transformer_engine.common.recipe"


def require_plain(directory: Path, states: Mapping[str, Any]) -> None:
    """Raise DataError, naming the layer, where a state read from `directory` could run code."""
    for name, state in states.items():
        if not name.endswith(_SUFFIX):
            continue
        try:
            if not isinstance(state, Tensor) or state.dtype != torch.uint8:
                raise TypeError(f"a {type(state).__name__}, not a tensor of bytes")
            if state.numel():
                _NameChecker(io.BytesIO(state.numpy().tobytes())).load()
        except Exception as error:  # noqa: BLE001 - of what a damaged one is built, anything may be raised
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            raise DataError(
                f"{directory}: {name} is damaged, or names code, which is not run ({reason}): remove "
                f"{directory} to go on from the checkpoint before"
            ) from None


class _NameChecker(pickle.Unpickler):
    """Resolves tensors and FP8 recipes, nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch._utils" and name in tensor_rebuilders:
            return tensor_rebuilders[name]
        if (module, name) == ("torch.storage", "_load_from_bytes"):
            return _load_storage
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        value = getattr(torch, name, None) if module == "torch" else None
        if value is torch.Size or isinstance(value, torch.dtype):
            return value
        if module == _RECIPES and module in sys.modules:  # else nothing here unpickles it
            found = getattr(sys.modules[module], name, None)
            is_enum = isinstance(found, type) and issubclass(found, Enum)
            if isinstance(found, type) and (is_enum or _is_record(found)):
                return found
        raise pickle.UnpicklingError(f"it names {module}.{name}")


def _is_record(found: type) -> bool:
    return dataclasses.is_dataclass(found) or (issubclass(found, tuple) and hasattr(found, "_fields"))


def _load_storage(data: bytes) -> Any:
    """What a tensor's pickle calls for its bytes, by the reader that runs no code."""
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
