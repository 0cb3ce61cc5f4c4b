"""How a key of the recipe is declared: its help, its range, and whether a door stands behind it."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from msgspec import Meta

from megatron_lopd.config.hints import LARGEST
from megatron_lopd.errors import ConfigError
from megatron_lopd.registry import Registry

# Ranges, checked by msgspec when a file is read, and told by help, reference and JSON schema.
Count = Annotated[int, Meta(ge=1, le=LARGEST)]
CountOrZero = Annotated[int, Meta(ge=0, le=LARGEST)]
Positive = Annotated[float, Meta(gt=0)]
NotNegative = Annotated[float, Meta(ge=0)]
Share = Annotated[float, Meta(gt=0, le=1)]
Fraction = Annotated[float, Meta(gt=0, lt=1)]
Decay = Annotated[float, Meta(ge=0, lt=1)]
# `~` and `$NAME` in it stand for what they do in a shell.
FilePath = Annotated[str, Meta(extra={"path": True})]


def key(
    help: str,
    default: Any = ...,
    factory: Any = None,
    *,
    operational: bool = False,
    door: Registry[Any] | None = None,
) -> Any:
    """A dataclass field carrying its help text (with the unit) for `--help`.

    An `operational` key says how the work is done, not what comes out but for rounding: it may
    change between an interrupted run and its resumption. The key of a `door` holds the name (a tuple: the
    names) of what that registry knows, or an import path.
    """
    metadata = {"help": help, "operational": operational, "door": door}
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


def options_of(name: str) -> Any:
    """A dataclass field with the Options of what the key called `name` names; left out, the defaults."""
    return field(default=None, metadata={"options_of": name})


def check_options(thing: Any, base: type[Options]) -> None:
    """Raise ConfigError unless the `Options` of a class behind a door are made as all are, from `base`."""
    found = thing.Options
    is_made_so = (
        isinstance(found, type)
        and issubclass(found, base)
        and "__dataclass_fields__" in vars(found)
        and all("help" in item.metadata for item in fields(found))
    )
    require(
        is_made_so,
        f"{thing.__name__}: its Options must be a frozen dataclass and a subclass of "
        f"{base.__module__}.{base.__name__}, each of its fields a megatron_lopd.config.key(...)",
    )


def named_by(config: Any, name: str) -> Any:
    """What the door's key `name` of a config names. ConfigError where that is not known."""
    (item,) = (each for each in fields(config) if each.name == name)
    return item.metadata["door"][getattr(config, name)]


def settle_options(config: Any) -> None:
    """Give a new `config` the default options of the thing it names. ConfigError for another thing's."""
    for item in fields(config):
        if name := item.metadata.get("options_of"):
            kind = (thing := named_by(config, name)).Options
            options = getattr(config, item.name)
            if options is None:  # the one place where a frozen config is written to, before anyone has it
                object.__setattr__(config, item.name, kind())
            require(
                options is None or type(options) is kind,
                f"{type(options).__name__} is not of {name}={thing.name}: leave it out, or give its own",
            )


def require(condition: bool, message: str) -> None:
    """Raise ConfigError with `message` unless `condition` holds."""
    if not condition:
        raise ConfigError(message)
