"""The doors of the house: what may be added in one file, by the name that a recipe calls it.

A `Registry` knows the things of one kind. The project's own are added in the `__init__.py` of one folder, the
registry's `home`. That is imported at the first question, so whoever asks (the recipe's checks, help, doctor,
plan, report) may stand below it. A user's are named by import path, `my_package.my_module:MyObjective`.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, Protocol, TypeVar
from weakref import WeakKeyDictionary

from megatron_lopd.errors import ConfigError, DataError
from megatron_lopd.files.digests import sha256_file

# None while no recipe is being read: then what has been imported is known, and nothing else is.
_ALLOWED: ContextVar[bool | None] = ContextVar("user code may be imported", default=None)
_DIGESTS: WeakKeyDictionary[ModuleType, str] = WeakKeyDictionary()  # of a user's file, as it was imported


class Kind(Protocol):
    """What every registered thing says of itself; it may be a class or an object."""

    name: Any  # text, as the recipe calls it: letters, digits and _
    caption: Any  # text: what it is, in a line, for help, doctor and report


T = TypeVar("T", bound=Kind)


class Registry(Generic[T]):
    """The things of one kind, by name.

    `what` one of them is, for messages; `home` adds the project's own, and has their `base`, a class.
    """

    def __init__(self, what: str, home: str, base: str) -> None:
        self.what = what
        self._home = home
        self._base = base
        self._things: dict[str, T] = {}
        self._imported: dict[str, T] = {}  # a user's, by import path

    def add(self, *things: T) -> None:
        """Make `things` known under their names. ConfigError for a name that another has."""
        for thing in things:
            if self._things.setdefault(thing.name, thing) is not thing:
                raise ConfigError(f"{self.what} {thing.name!r} is there already: choose another name")

    def __getitem__(self, name: str) -> T:
        """The thing called `name`, or at that import path. ConfigError where there is none."""
        if ":" in name:
            return self._at(name)
        known = self.things()
        path = self.import_path(name)
        if path is not None and _ALLOWED.get() is not None:  # a lineage would not see its code
            raise ConfigError(f"{self.what} {name} is code of yours: name it by its import path, {path}")
        if name not in known:
            close = difflib.get_close_matches(name, known, 1)
            hint = f" (did you mean {close[0]}?)" if close else ""
            raise ConfigError(
                f"unknown {self.what} {name!r}{hint}: use one of {', '.join(known)}, "
                "or module:name of your own"
            )
        return known[name]

    def things(self) -> dict[str, T]:
        """All that this process knows, by name, in the order that they were added."""
        importlib.import_module(self._home)
        return dict(self._things)

    def import_path(self, name: str) -> str | None:
        """Where a user's own is from; None for one of the project's."""
        mine = f"{__name__.partition('.')[0]}."  # whose things have paths too
        return next(
            (p for p, thing in self._imported.items() if thing.name == name and not p.startswith(mine)), None
        )

    def _at(self, path: str) -> T:
        if _ALLOWED.get() is False or (path not in self._imported and not _ALLOWED.get()):
            raise ConfigError(f"{self.what} {path} is code of yours: set allow_user_code=true to have it run")
        if path not in self._imported:
            thing: T = _import(path)
            known = self.things()
            if lacking := self._lacking(thing, known):
                raise ConfigError(f"{path}: no {self.what}: {lacking}")
            self.add(thing)
            self._imported[path] = thing
        return self._imported[path]

    def _lacking(self, thing: Any, known: dict[str, T]) -> str:
        """What `thing` has not of what is asked of all here; an object where classes are, or the reverse."""
        base = getattr(importlib.import_module(self._home), self._base)
        wants_class = any(isinstance(each, type) for each in known.values())
        is_one = (
            isinstance(thing, type) and issubclass(thing, base) if wants_class else isinstance(thing, base)
        )
        if not is_one:
            kind = "a subclass" if wants_class else "an object"
            return f"it must be {kind} of {self._home}.{self._base}"
        if unmade := sorted(getattr(thing, "__abstractmethods__", ())):
            return f"it has no {' and no '.join(unmade)}"
        wordless = [each for each in ("name", "caption") if not isinstance(getattr(thing, each, None), str)]
        return f"it has no text called {' and no '.join(wordless)}" if wordless else ""


@contextmanager
def allowing_user_code(allowed: bool) -> Iterator[None]:
    """Whether the recipe that is read in this block may name code of its own, by import path.

    What has been imported is known after it, but not to another recipe.
    """
    token = _ALLOWED.set(allowed)
    try:
        yield
    finally:
        _ALLOWED.reset(token)


def identity(name: str) -> str:
    """What a lineage says of a thing by its name; of a user's, with the SHA-256 of the file it is in.

    ConfigError when that file cannot be read, or is no longer the one that this process has imported.
    """
    module = name.partition(":")[0]
    if ":" not in name:
        return name
    digest = _digest(module, name)
    if _DIGESTS.setdefault(sys.modules[module], digest) != digest:
        raise ConfigError(
            f"{name}: the file of {module} has changed since this process imported it: undo that, or "
            "start anew"
        )
    return f"{name} sha256:{digest}"


def _digest(module: str, name: str) -> str:
    try:
        return sha256_file(Path(inspect.getfile(sys.modules[module])))
    except (KeyError, OSError, TypeError, DataError) as error:
        raise ConfigError(f"{name}: the source of {module} cannot be read: {error}") from None


def _import(path: str) -> Any:
    module, _, attribute = path.partition(":")
    try:
        thing = getattr(importlib.import_module(module), attribute)
    except ConfigError as error:  # of a class that is not as its door has them
        raise ConfigError(f"{path}: {error}") from None
    except (Exception, SystemExit) as error:  # somebody's module may raise anything
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(
            f"{path}: cannot be imported: {reason}: correct it, or put its folder on PYTHONPATH"
        ) from error
    with suppress(ConfigError):  # which `identity` says, where it matters
        _DIGESTS.setdefault(sys.modules[module], _digest(module, path))
    return thing


OBJECTIVES: Registry[Any] = Registry("objective", "megatron_lopd.objectives", "Objective")
FAMILIES: Registry[Any] = Registry("model family", "megatron_lopd.families", "Family")
ENGINES: Registry[Any] = Registry("engine", "megatron_lopd.engines", "EngineKind")
GRADERS: Registry[Any] = Registry("grader", "megatron_lopd.graders", "Grader")
PROMPT_READERS: Registry[Any] = Registry("prompt format", "megatron_lopd.prompts", "Reader")
TASKS: Registry[Any] = Registry("task", "megatron_lopd.prompts", "Task")
LOGGERS: Registry[Any] = Registry("logger", "megatron_lopd.loggers", "Logger")
LAUNCHERS: Registry[Any] = Registry("launcher", "megatron_lopd.launchers", "Launcher")
DOORS = (OBJECTIVES, FAMILIES, ENGINES, GRADERS, PROMPT_READERS, LOGGERS, LAUNCHERS)
