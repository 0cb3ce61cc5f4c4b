"""How a key of the recipe is declared and checked."""

from __future__ import annotations

from dataclasses import field
from typing import Any

from megatron_lopd.errors import ConfigError


def key(help: str, default: Any = ..., factory: Any = None, *, operational: bool = False) -> Any:
    """A dataclass field carrying its help text (with the unit) for `--help`.

    An `operational` key says how the work is done, not what comes out but for rounding: it may
    change between an interrupted run and its resumption.
    """
    metadata = {"help": help, "operational": operational}
    if factory is not None:
        return field(default_factory=factory, metadata=metadata)
    if default is ...:
        return field(metadata=metadata)
    return field(default=default, metadata=metadata)


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
