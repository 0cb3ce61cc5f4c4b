"""What an attack is: a valid world, ways of spoiling it, the code that uses it, and what it may then say.

A kind of attack is one file in tests/attacks/kinds with one subclass of Attack; nothing else need know of it.
"""

from __future__ import annotations

import importlib
import io
import os
import pkgutil
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from inspect import isabstract
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

from hypothesis.strategies import SearchStrategy

from megatron_lopd.errors import LopdError

Change = TypeVar("Change")

DOCUMENTED_CODES = {0, 1, 2, 3, 75, 130}


class Attack(ABC, Generic[Change]):
    """One kind. It is made without arguments, and keeps nothing from one attempt to the next.

    An attempt's world is a directory with `run`, a whole run in miniature made of `recipe.yaml`, `teacher`
    and `student`; only the paths in `copies` are there. Beside the world lies `../outside`, with files that
    nothing may touch. `run` alone may be written to.
    """

    name: ClassVar[str]
    copies: ClassVar[Sequence[str]] = ("recipe.yaml", "teacher", "student", "run")
    examples: ClassVar[int] = 25  # in `make test`
    seconds: ClassVar[float] = 30.0  # an attempt that computes, or waits, for longer hangs

    def build(self, world: Path) -> None:
        """Add to the valid world, once, what the run has not."""

    @abstractmethod
    def changes(self) -> SearchStrategy[Change]:
        """The ways of spoiling it. A change's repr is what a finding is told by."""

    @abstractmethod
    def spoil(self, world: Path, change: Change) -> None:
        """Make the change in a world of its own."""

    @abstractmethod
    def use(self, world: Path, change: Change | None) -> str:
        """What the program makes of the world, as text: equal for equal things. None: nothing was changed.

        It runs in a process of its own, in the world. LopdError says that the world was refused, which is
        right whatever the change; any other error is a finding.
        """

    def allows(self, change: Change, before: str, after: str) -> bool:
        """Whether a world that was not refused may give `after`, where the valid one gives `before`."""
        return before == after

    def named(self, change: Change) -> Sequence[str]:
        """Texts of which a refusal must have one: files or keys. None: any line will do."""
        return ()


class RefusedError(LopdError):
    """A command said no, in its one line."""


def lopd(*arguments: str) -> str:
    """`lopd *arguments` in this process: what it printed.

    RefusedError, with the command's line, where it ended otherwise than 0. AssertionError where the exit code
    is not a documented one, or that line is not the last one.
    """
    from megatron_lopd.cli import main

    out, err = io.StringIO(), io.StringIO()
    try:
        with redirect_stdout(out), redirect_stderr(err):
            code = main(list(arguments))
    except SystemExit as ended:  # argparse
        code = int(ended.code or 0)
    finally:
        # For the judge, who looks for tracebacks and control characters in all that was said.
        os.write(1, out.getvalue().encode(errors="backslashreplace"))
        os.write(2, err.getvalue().encode(errors="backslashreplace"))
    assert code in DOCUMENTED_CODES, f"exit code {code}"
    if code:
        last = err.getvalue().rstrip("\n").rpartition("\n")[2]
        assert last.startswith(("lopd", "usage")), f"exit code {code}, and its last line is {last[:300]!a}"
        raise RefusedError(last)
    return out.getvalue()


def kinds() -> dict[str, Attack[Any]]:
    """Every kind by its name, from the files of tests/attacks/kinds."""
    from tests.attacks import kinds as folder

    found: dict[str, Attack[Any]] = {}
    for module in sorted(each.name for each in pkgutil.iter_modules(folder.__path__)):
        imported = importlib.import_module(f"tests.attacks.kinds.{module}")
        for each in vars(imported).values():
            is_kind = isinstance(each, type) and issubclass(each, Attack) and not isabstract(each)
            if is_kind and each.__module__ == imported.__name__:
                found[each.name] = each()
    return found
