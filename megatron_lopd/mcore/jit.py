"""Stands in for `megatron.core.jit`: functions are compiled when first called, not as they are defined.

torch.compile loads all of torch's compiler, which takes longer than the rest of Megatron-Core, and every
process of a job would wait for it; of the thirty functions that Megatron-Core decorates so, our models call
hardly one (ops/swiglu.py has the activation). `install` must come before Megatron-Core is imported. 0.19.2
names torch.compile itself in one place, a router for inference, and loads the compiler all the same.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any


def install() -> None:
    """Have Megatron-Core import this module for its own; nothing where it has been imported already."""
    sys.modules.setdefault("megatron.core.jit", sys.modules[__name__])


def jit_fuser(function: Callable[..., Any]) -> Callable[..., Any]:
    """A decorator: `torch.compile(function)`, at the first call."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        import torch  # not before: commands that never train import this

        return torch.compile(function)

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call
