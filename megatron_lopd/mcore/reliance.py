"""What this project relies on in Megatron-Core's and torch's inner workings, and how it replaces a part of
them.

Each `Reliance` names the code that it was made for, and `compat.prepare()` refuses a release that does not
have it: what has lost its reason may hide a new behaviour. Names alone are checked in private.py.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from packaging.version import Version

from megatron_lopd.errors import ConfigError

# The releases of Megatron-Core that the tests run on, and between them all that were tried.
OLDEST, NEWEST = "0.16.1", "0.19.2"


@dataclass(frozen=True)
class Reliance:
    """`ours` works only where `place` (module:attribute) is there, and has the text `mention` in its source.

    Releases of Megatron-Core before `since` have no such code, and no need of ours.
    """

    ours: str
    place: str
    mention: str
    reason: str
    since: str = OLDEST

    @property
    def applies(self) -> bool:
        """Whether the installed Megatron-Core is at least `since`."""
        return installed() >= Version(self.since).release

    def check(self) -> None:
        """Raise ConfigError unless that code is still there."""
        try:
            found = _resolve(self.place)
        except (ImportError, AttributeError) as error:
            raise ConfigError(self._lost(f"is gone ({error})")) from error
        if self.mention and self.mention not in inspect.getsource(found):
            raise ConfigError(self._lost(f"no longer uses {self.mention}"))

    def _lost(self, what: str) -> str:
        package = self.place.partition(".")[0].replace("megatron", "megatron-core")
        fitting = (
            f"one from {OLDEST} to {NEWEST}" if package == "megatron-core" else "that of requirements.txt"
        )
        return (
            f"{package} {version(package)} does not fit this machine: {self.place} {what}, "
            f"which {self.ours} was made for ({self.reason}): install {fitting}"
        )


@dataclass(frozen=True)
class Patch:
    """`target` (module:attribute) is replaced because `needed_by` (module:attribute) uses `mention`."""

    target: str
    replacement: Any
    needed_by: str
    mention: str
    reason: str
    since: str = OLDEST

    @property
    def reliance(self) -> Reliance:
        """The code this patch exists for."""
        return Reliance(f"the patch of {self.target}", self.needed_by, self.mention, self.reason, self.since)

    def apply(self) -> None:
        module, _, name = self.target.partition(":")
        *owners, attribute = name.split(".")
        owner = functools.reduce(getattr, owners, importlib.import_module(module))
        setattr(owner, attribute, self.replacement)


def installed() -> tuple[int, ...]:
    """The release of Megatron-Core that is installed, without what an image's builder put behind it."""
    return Version(version("megatron-core")).release


def _resolve(path: str) -> Any:
    module, _, name = path.partition(":")
    return functools.reduce(getattr, name.split("."), importlib.import_module(module))
