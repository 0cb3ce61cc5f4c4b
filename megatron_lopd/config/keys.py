"""How a key of the recipe is declared and checked."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any

from msgspec import Meta

from megatron_lopd.errors import ConfigError

Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]


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


@dataclass(frozen=True)
class Options:
    """Options of one thing behind a door; its keys are declared as any others, by `key`.

    A recipe has them in a section called by the thing's name, beside the key that names the thing.
    """

    def check(self, recipe: Any) -> None:
        """Raise ConfigError where they do not go with the rest of `recipe`, a Recipe."""


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
